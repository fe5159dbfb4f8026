"""A table of figures: as text, as GitHub markdown, or as plain data for JSON."""

import dataclasses
from typing import Any

import rich.table
from rich import box
from rich.console import Group, RenderableType
from rich.text import Text

MISSING = "–"


@dataclasses.dataclass(frozen=True)
class Column:
    """One figure of every row: its key there, its heading, and how many decimals are shown."""

    key: str
    title: str
    decimals: int | None = None  # of numbers; None for words

    def show(self, row: dict[str, Any]) -> str:
        """The cell as text; a figure that could not be had is a dash."""
        value = row.get(self.key)
        if value is None:
            return MISSING
        return str(value) if self.decimals is None else f"{value:,.{self.decimals}f}"


@dataclasses.dataclass
class Table:
    """Rows of figures, and notes on them such as why one is missing."""

    title: str
    columns: list[Column]
    rows: list[dict[str, Any]]
    notes: list[str] = dataclasses.field(default_factory=list)

    def as_data(self) -> dict[str, Any]:
        """What JSON holds: the rows in full precision, with the headings of their keys."""
        headings = {column.key: column.title for column in self.columns}
        return {"title": self.title, "columns": headings, "rows": self.rows, "notes": self.notes}

    def as_markdown(self) -> str:
        """A heading, the table and its notes.

        >>> table = Table("t", [Column("a", "A"), Column("b", "B", 1)], [{"a": "x", "b": 2}])
        >>> print(table.as_markdown())
        **t**
        <BLANKLINE>
        | A | B |
        | --- | ---: |
        | x | 2.0 |
        """
        lines = [f"**{self.title}**", ""]
        if self.rows:
            lines += [
                _line(column.title for column in self.columns),
                _line("---" if column.decimals is None else "---:" for column in self.columns),
                *(_line(column.show(row) for column in self.columns) for row in self.rows),
            ]
        lines += [line for note in self.notes for line in ("", note)]
        return "\n".join(lines)

    def as_rich(self) -> Group:
        """For a console."""
        parts: list[RenderableType] = [Text(self.title, style="bold")]
        if self.rows:
            table = rich.table.Table(box=box.SIMPLE_HEAD)
            for column in self.columns:
                table.add_column(
                    column.title, justify="left" if column.decimals is None else "right"
                )
            for row in self.rows:
                table.add_row(*(column.show(row) for column in self.columns))
            parts.append(table)
        return Group(*parts, *map(Text, self.notes), Text())


def _line(cells) -> str:
    return f"| {' | '.join(cells)} |"
