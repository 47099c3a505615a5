"""What all commands share: the application, options, and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Res-Tuning: small tuners beside a frozen backbone, and a bypass that detaches them.",
    epilog="[bold]Start here:[/bold]  restuning train digits",
)
console = Console()

BackboneName = Annotated[
    str,
    typer.Option(
        help="restuning-tiny, or a name of timm:, hf:, torchvision:, clip:, openclip:, onnx:"
    ),
]
Weights = Annotated[Path | None, typer.Option(help="Weights file (safetensors), without a hub")]
Quantize = Annotated[
    str | None, typer.Option(help="int8 or nf4 (4 bit): the backbone's weights; as NAME+int8")
]
AnyBackbone = Annotated[
    bool,
    typer.Option("--any-backbone", help="Also other weights, or another engine, of this backbone"),
]
Random = Annotated[bool, typer.Option("--random", help="Random weights from the seed")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read")]
Text = Annotated[str, typer.Option(help="Text column of a csv")]
Label = Annotated[str, typer.Option(help="Label column of a csv")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens of a text that are read")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave corrupt images out, and count")]


def plain(value: Any) -> str:
    """A value in one cell."""
    return value if isinstance(value, str) else json.dumps(value)


def size_in_words(value: int | None) -> str:
    """Bytes as MB or GB."""
    if value is None:
        return ""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def time_in_words(seconds: float | None) -> str:
    """Seconds as ms, s, min or h."""
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    hours, rest = divmod(seconds, 3600)
    return f"{hours:.0f} h {rest / 60:02.0f} min" if hours else f"{rest / 60:.1f} min"


def show_rows(rows: list[dict[str, Any]], title: str) -> None:
    """Rows as a table."""
    table = Table(title=title, title_justify="left")
    for column in rows[0] if rows else ():
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*[f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()])
    console.print(table)


class RowStream:
    """A table that is printed row by row, as results come: widths are fixed beforehand.

    Args:
        widths: By column; a longer cell pushes its row to the right, and nothing is cut.
    """

    def __init__(self, widths: dict[str, int]) -> None:
        self.widths = {name: max(width, len(name)) for name, width in widths.items()}
        self.begun = False

    def row(self, cells: dict[str, Any]) -> None:
        """Print one row, the names of the columns before the first: an error comes without them."""
        if not self.begun:
            self.begun = True
            self._print({name: name for name in self.widths}, "bold")
        self._print(cells)

    def _print(self, cells: dict[str, Any], style: str = "") -> None:
        padded = [f"{cells.get(name, '')!s:<{width}}" for name, width in self.widths.items()]
        console.print(
            "  ".join(padded).rstrip(), style=style, markup=False, highlight=False, soft_wrap=True
        )
