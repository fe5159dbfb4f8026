"""A Chromium without a window, driven by its DevTools protocol."""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

from tornado.websocket import WebSocketClientConnection, websocket_connect

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_SECONDS = 60
_LOOK = """({
    pictures: [...document.images].map(image => image.complete && image.naturalWidth > 0),
    rows: [...document.querySelectorAll("table")].map(table => table.rows.length),
    page_width: document.documentElement.scrollWidth,
})"""


class Shown(NamedTuple):
    """What a browser made of a page."""

    pictures: list[bool]  # whether each is shown
    rows: list[int]  # of each table
    page_width: int
    requested: set[str]  # addresses; of data, the scheme alone
    complaints: list[dict[str, Any]]
    printed: bytes


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, _NAMES)), None)


def show(page: Path, profile: Path, *, width: int) -> Shown:
    """Open a page at so many pixels' width, look at it, and print it."""
    browser = find_browser()
    assert browser is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command = [browser, *options, f"--user-data-dir={profile}", "--remote-debugging-port=0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = profile / "DevToolsActivePort"
        end = time.monotonic() + _SECONDS
        while not (port.exists() and port.read_text().count("\n")):
            assert time.monotonic() < end, "the browser did not start"
            time.sleep(0.05)
        number, path = port.read_text().split()
        look = _look(f"ws://127.0.0.1:{number}{path}", page.as_uri(), width)
        return asyncio.run(asyncio.wait_for(look, _SECONDS))
    finally:
        process.kill()
        process.wait()


async def _look(socket: str, address: str, width: int) -> Shown:
    connection = await websocket_connect(socket)
    try:
        return await _drive(connection, address, width)
    finally:
        connection.close()
        while await connection.read_message() is not None:
            pass


async def _drive(connection: WebSocketClientConnection, address: str, width: int) -> Shown:
    numbers, events = itertools.count(), []

    async def call(method: str, session: str | None = None, **parameters) -> dict[str, Any]:
        number = next(numbers)
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        await connection.write_message(json.dumps(message))
        while (answer := json.loads(await connection.read_message())).get("id") != number:
            events.append(answer)
        return answer["result"]

    target = await call("Target.createTarget", url="about:blank")
    session = (await call("Target.attachToTarget", flatten=True, **target))["sessionId"]
    for domain in ("Page", "Network", "Log", "Runtime"):
        await call(f"{domain}.enable", session)
    screen = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    await call("Emulation.setDeviceMetricsOverride", session, **screen)
    await call("Page.navigate", session, url=address)
    while not any(event.get("method") == "Page.loadEventFired" for event in events):
        events.append(json.loads(await connection.read_message()))
    look = await call("Runtime.evaluate", session, expression=_LOOK, returnByValue=True)
    printed = await call("Page.printToPDF", session)

    def of(*names: str) -> list[dict[str, Any]]:
        return [event["params"] for event in events if event.get("method") in names]

    urls = [each["request"]["url"] for each in of("Network.requestWillBeSent")]
    return Shown(
        **look["result"]["value"],
        requested={"data:" if url.startswith("data:") else url for url in urls},
        complaints=of("Log.entryAdded", "Runtime.exceptionThrown"),
        printed=base64.b64decode(printed["data"]),
    )
