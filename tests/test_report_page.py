import base64
import re
import struct
from html.parser import HTMLParser

import numpy as np
import pytest

from jax_eplb import Placement, Recording
from jax_eplb.report import build_report
from jax_eplb.report_page import report_page
from jax_eplb.simulate import NONE, STATIC, Advice, Outcome, Recommendation, every
from tests.browser import find_browser, show
from tests.command_line import LAYERS, skewed_recording

pytestmark = pytest.mark.light_compile

VOID = {"meta", "img", "br", "hr", "link", "input"}
RANKS = 4


class Page(HTMLParser):
    """Elements, tables and text of a page; fails where a tag is left open or closed twice."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if "style" not in self.open:
            self.text.append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def outcome(policy, imbalance: float, windows: int = 3) -> Outcome:
    """A step takes 1 + imbalance, and without balancing 2."""
    values = np.full((windows, len(LAYERS)), imbalance)
    return Outcome(
        policy=policy,
        num_slots=16,
        num_ranks=RANKS,
        replica_choice="even",
        imbalance=values,
        moves=np.zeros(values.shape),
        step_seconds=1 + values.mean(axis=1),
        move_seconds=np.zeros(windows),
        unbalanced_imbalance=np.ones(values.shape),
        unbalanced_seconds=np.full(windows, 2.0),
        steps_per_window=1,
    )


def planned() -> Placement:
    rows = [[(slot * 5 + layer) % 12 for slot in range(16)] for layer in LAYERS]
    return Placement.from_slots(rows, num_experts=12, num_ranks=RANKS, layer_ids=LAYERS)


@pytest.fixture(scope="module")
def advised() -> tuple[Advice, list[Outcome]]:
    outcomes = [outcome(NONE, 1.0), outcome(STATIC, 0.5), outcome(every(2), 0.25)]
    made = Recommendation(
        balance=True,
        num_slots=16,
        replan_every=2,
        replica_choice="even",
        expected_gain=0.6,
        reason="4 redundant experts & a plan <every 2 iterations>.",
        gain_error=None,
        move_share=0.0,
        decay=1.0,
        max_moves=None,
        expected_gain_even=0.6,
        imbalance_before=1.0,
        imbalance_after=0.25,
        least_tokens=7.0,
    )
    return Advice(made, outcomes[2], outcomes, skewed_recording(), history=1), outcomes


@pytest.fixture(scope="module")
def text(advised) -> str:
    advice, compared = advised
    return report_page(
        skewed_recording(source="runs/<a> & b.npz"),
        placement=planned(),
        advice=advice,
        compared=compared,
    )


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


@pytest.mark.slow
def test_the_page_needs_no_script_and_nothing_from_elsewhere(text, page):
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed"}
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "srcset"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not re.search(r"https?://|@import|url\(", re.sub(r"base64,[^\"]*", "", text))
    assert len(page.attributes("title")) == len(page.attributes("h1")) == 1
    assert page.attributes("html")[0]["lang"] == "en"
    assert {"charset": "utf-8"} in page.attributes("meta")
    assert any(a.get("name") == "viewport" for a in page.attributes("meta"))


@pytest.mark.slow
def test_every_picture_is_a_png_of_words(page):
    pictures = page.attributes("img")
    # Of the recording, of the plan and of the simulation.
    assert len(pictures) == 6 + 1 + 3
    assert len({picture["src"] for picture in pictures}) == len(pictures)
    for picture in pictures:
        assert picture["alt"]
        png = base64.b64decode(picture["src"].removeprefix("data:image/png;base64,"))
        assert png.startswith(b"\x89PNG")
        assert min(struct.unpack(">II", png[16:24])) > 300


@pytest.mark.slow
def test_the_numbers_are_the_reports(page):
    before = build_report(skewed_recording(), num_ranks=RANKS)
    after = build_report(skewed_recording(), placement=planned())
    table = next(t for t in page.tables if "imbalance planned" in t[0])
    assert table[0] == [
        "layer",
        "mean",
        "std before",
        "imbalance before",
        "std planned",
        "imbalance planned",
    ]
    rows = [
        [str(layer), *figures]
        for layer, *figures in zip(
            LAYERS,
            *(
                [f"{x:.{digits}f}" for x in values]
                for values, digits in (
                    (before.summary.mean, 1),
                    (before.summary.std, 1),
                    (before.summary.imbalance, 6),
                    (after.summary.std, 1),
                    (after.summary.imbalance, 6),
                )
            ),
            strict=True,
        )
    ]
    old, new = before.summary.average, after.summary.average
    rows.append(
        [
            "average",
            f"{old.mean:.1f}",
            f"{old.std:.1f}",
            f"{old.imbalance:.6f}",
            f"{new.std:.1f}",
            f"{new.imbalance:.6f}",
        ]
    )
    assert table[1:] == rows
    words = "".join(page.text)
    assert f"Chance alone would leave {before.chance:.4f}" in words
    assert f"{after.balancedness_mean_of_ratios:.4f} (mean of ratios)" in words


@pytest.mark.slow
def test_the_plan_is_there_slot_for_slot(page):
    table = next(t for t in page.tables if t[0][1] == "rank 0")
    slots = [[int(e) for cell in row[1:] for e in cell.split()] for row in table[1:]]
    np.testing.assert_array_equal(slots, planned().slot_to_expert)
    replicas = next(t for t in page.tables if t[0][1] == "experts with several replicas")
    for row, (layer, named) in zip(slots, replicas[1:], strict=True):
        several = {e: row.count(e) for e in row if row.count(e) > 1}
        assert {int(e): int(n) for e, n in re.findall(r"(\d+) \(×(\d+)\)", named)} == several
        assert layer in map(str, LAYERS)


@pytest.mark.slow
def test_the_recommendation_and_the_policies_are_the_simulators(page, advised):
    advice, compared = advised
    words = "".join(page.text)
    assert "Should it be balanced? Yes." in words
    assert advice.recommendation.reason in words
    table = next(t for t in page.tables if t[0][0] == "policy")
    assert [row[0] for row in table[1:]] == ["none", "static", "every 2 windows (recommended)"]
    assert [row[2] for row in table[1:]] == ["+0.0%", "+33.3%", "+60.0%"]
    assert [float(row[1]) for row in table[1:]] == [o.mean_imbalance for o in compared]


@pytest.mark.slow
def test_names_from_files_are_escaped(text):
    assert "<a>" not in text
    assert "&lt;a&gt; &amp; b.npz" in text
    assert "runs/" not in text


@pytest.mark.slow
def test_without_a_plan_and_advice_the_page_says_why():
    counts = np.random.default_rng(0).integers(1, 99, (2, 1, 8))
    slots = Recording(counts, num_experts=6, experts_per_token=2, unit="slots")
    reason = "Which expert sits in a slot is <not> known."
    page = Page(report_page(slots, num_ranks=RANKS, advice=reason))
    assert reason in "".join(page.text)
    assert len(page.attributes("img")) == 5
    (table,) = page.tables
    assert table[0] == ["layer", "mean", "std", "imbalance"]
    report = build_report(slots, num_ranks=RANKS)
    assert table[1][3] == f"{report.summary.imbalance[0]:.6f}"


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="no browser is installed")
def test_a_browser_shows_the_page_on_a_phone_and_prints_it(tmp_path, text):
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    shown = show(tmp_path / "page.html", tmp_path / "profile", width=390)
    assert shown.pictures == [True] * len(Page(text).attributes("img"))
    assert shown.rows == [len(table) for table in Page(text).tables]
    assert shown.page_width <= 390  # wide tables scroll by themselves
    assert shown.requested == {(tmp_path / "page.html").as_uri(), "data:"}
    assert shown.complaints == []
    assert shown.printed.startswith(b"%PDF")
