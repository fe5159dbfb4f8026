"""One look for all progress bars; they go to standard error."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)


def progress_bars(*, shown: bool = True) -> Progress:
    return _bars(MofNCompleteColumn(), shown=shown)


def byte_bars() -> Progress:
    """Bars that count bytes."""
    return _bars(DownloadColumn(), TransferSpeedColumn(), shown=True)


def _bars(*counts: ProgressColumn, shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *counts,
        TimeElapsedColumn(),
        console=Console(stderr=True),
        disable=not shown,
    )
