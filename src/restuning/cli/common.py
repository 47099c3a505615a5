"""What all commands share: options and their panels, the console, tables, examples that can be copied.

Nothing here imports torch, and no command's file does at its top, so that help comes at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text as Styled
from typer.core import TyperCommand

from restuning._durations import tell_time
from restuning.cli.config import chosen_by_file
from restuning.cli.speech import speaking
from restuning.cli.visible import make_visible
from restuning.runtime.processes import is_main_process


class AsWritten(Console):
    """A console that prints as it is what is written, and steers a terminal by nothing that is."""

    def render_str(self, text: str, **how: Any) -> Styled:
        """A string as rich makes lines and cells of it."""
        return super().render_str(make_visible(text, lines=True), **how)


def open_console(**where: Any) -> Console:
    """A console that prints as it is what is written: a label `[red]`, a folder `:cat:`."""
    return AsWritten(markup=False, emoji=False, highlight=False, **where)


console = open_console()


def parse_place(on: str | None) -> str | None:
    """The address in `ray:ADDRESS` of `--on`; None of plain `ray`, and where none is given."""
    kind, _, address = (on or "ray").partition(":")
    if kind != "ray":
        raise typer.BadParameter("--on takes ray or ray:ADDRESS", param_hint=repr(on))
    return address or None


def messages(as_json: bool) -> Console:
    """Where words for a person go: aside, where the output is JSON for a program."""
    if not as_json:
        return console
    return open_console(stderr=True, quiet=not is_main_process())


def add_heading(heading: str, text: str) -> Styled:
    """A line that begins with a word in bold."""
    return Styled.assemble((heading, "bold"), "  ", make_visible(text))


class Command(TyperCommand):
    """A command whose help ends with examples, one a line and never wrapped, to be copied whole.

    They are given as `epilog`, a line each. typer's own epilog reads brackets as markup and breaks
    lines at the width of the terminal: what is copied from it is another command.
    """

    def __init__(self, *args: Any, epilog: str | None = None, **more: Any) -> None:
        super().__init__(*args, **more)
        self.examples = (epilog or "").splitlines()
        # A server has one of its own, which is about requests.
        self.speaks = not any(each.name == "quiet" for each in self.params)
        if self.speaks:
            self.params += make_switches()

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; one value given twice is refused, where the last would win without a word."""
        if not ctx.resilient_parsing:
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for given in order:
                # Members by name, as in `chosen_by_file`. A switch says the same however often.
                takes_one = not (given.multiple or getattr(given, "is_flag", False))
                if takes_one and given.nargs == 1 and order.count(given) > 1:
                    ctx.fail(
                        f"{given.opts[0]} takes one value and is given {order.count(given)} times."
                    )
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, then the examples."""
        super().format_help(ctx, formatter)
        show_examples(self.examples)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a backbone that a file of options names is opened as a file's choice."""
        said = {name: bool(ctx.meta.get(f"restuning.{name}")) for name in ("quiet", "verbose")}
        if all(said.values()):
            ctx.fail("--quiet and --verbose are each other's contrary.")
        with chosen_by_file(ctx), speaking(**said) if self.speaks else nullcontext():
            return super().invoke(ctx)


QUIET = "Say the result alone, and warnings"
VERBOSE = "Say what the library logs, too"


@cache
def make_switches() -> list[Any]:
    """`--quiet` and `--verbose` of every command, whose own function is not told of them."""

    def say(
        quiet: Annotated[bool, switch(QUIET, "quiet")] = False,
        verbose: Annotated[bool, switch(VERBOSE, "verbose")] = False,
    ) -> None:
        pass

    # typer alone knows how its options are made of such lines.
    said = typer.Typer(add_completion=False)
    said.command()(say)
    made = typer.main.get_command(said).params
    return [each for each in made if each.name in ("quiet", "verbose")]


def switch(help: str, name: str) -> Any:  # noqa: A002 (typer's word)
    """A switch that is kept beside a command's options."""

    def keep(ctx: typer.Context, value: bool) -> bool:
        ctx.meta[f"restuning.{name}"] = value
        return value

    return option(OUTPUT, help, f"--{name}", callback=keep, expose_value=False)


def show_examples(examples: list[str]) -> None:
    """Print command lines under a heading, each on one line however long it is."""
    if examples:
        console.print(" Examples" if len(examples) > 1 else " Example", style="bold")
        for example in examples:
            console.print(f" {example}", soft_wrap=True)
        console.print()


def command(app: typer.Typer, *examples: str, name: str | None = None) -> Callable[..., Any]:
    """Make a function a command of `app`.

    Args:
        app: The application, or a group in it.
        examples: Command lines for the end of its help.
        name: Where it is not the function's own.
    """
    return app.command(name, cls=Command, epilog="\n".join(examples))


def group(help: str) -> typer.Typer:  # noqa: A002 (typer's word)
    """An application for one command, or for a group of them."""
    # Shell completion is installed by the top of the command line, once for all commands.
    return typer.Typer(
        no_args_is_help=True, rich_markup_mode="rich", add_completion=False, help=help
    )


METHODS = (
    "auto",
    "linear",
    "full",
    "bitfit",
    "res-tuning",
    "res-tuning-single",
    "res-tuning-tri",
    "res-tuning-bypass",
    "bypass-horizontal",
    "bypass-vertical",
    "mixing-bypass",
    "ensemble",
    "ridge",
    "knn",
    "lora",
    "prefix",
    "vpt-deep",
    "vpt-shallow",
    "adapter",
    "houlsby",
    "adaptformer",
)
"""For completion only, which must not import what knows all of them."""

BACKBONES = (
    "restuning-tiny",
    "timm:vit_tiny_patch16_224",
    "timm:vit_small_patch16_224",
    "timm:vit_base_patch16_224",
    "timm:vit_small_patch14_dinov2",
    "timm:convnext_tiny",
    "timm:resnet50",
    "timm:swin_tiny_patch4_window7_224",
    "hf:google-bert/bert-base-uncased",
    "hf:sentence-transformers/all-MiniLM-L6-v2",
    "hf:openai/clip-vit-base-patch32",
    "torchvision:vit_b_16",
    "clip:openai/clip-vit-base-patch32",
    "openclip:ViT-B-32/laion2b_s34b_b79k",
    "onnx:",
    "openvino:",
    "pt2:",
)
"""For completion only: one or two of each kind."""


def complete_method(incomplete: str) -> list[str]:
    """Names of methods that begin so."""
    return [name for name in METHODS if name.startswith(incomplete)]


def complete_backbone(incomplete: str) -> list[str]:
    """Names of backbones that begin so."""
    return [name for name in BACKBONES if name.startswith(incomplete)]


DATA, BACKBONE, METHOD = "Data", "Backbone", "Method"
OPTIMISER, FEATURES, OUTPUT = "Optimiser", "Features", "Output"


def option(panel: str, help: str, *names: str, **more: Any) -> Any:  # noqa: A002 (typer's word)
    """An option in a panel of the help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


DataName = Annotated[
    str,
    typer.Argument(
        help="digits, a folder of images or sounds, a csv, a conll, torchvision:NAME or hf:NAME"
    ),
]
Augment = Annotated[
    str, option(DATA, "Of training images: none, flip, timm (crops too), timm:POLICY")
]
Text = Annotated[str, option(DATA, "Text column of a csv")]
Label = Annotated[
    str,
    option(
        DATA,
        "Label column of a csv or table; several, with commas, are a task each; of tars cls, txt or a "
        "field of json",
    ),
]
ImageColumn = Annotated[
    str | None, option(DATA, "Column of a table that holds images or their paths", "--image")
]
AudioColumn = Annotated[
    str | None, option(DATA, "Column of a table that holds sounds or their paths", "--audio")
]
Seconds = Annotated[
    float | None,
    option(
        DATA, "Of a sound, what is read from its beginning; default: what the backbone takes, or 10"
    ),
]
ProblemName = Annotated[
    str | None,
    option(
        DATA,
        "What a column holds: single-label, multi-label, regression, segmentation or depth, or COLUMN=KIND with commas; "
        "default: found from its cells. Of classes also embedding: the answer is a vector",
        "--problem",
    ),
]
ClassesFile = Annotated[
    str | None,
    option(
        DATA,
        "Of masks: file of the names of classes, a line each; default: classes.txt beside the data",
    ),
]
InTiles = Annotated[
    bool,
    option(
        DATA,
        "Read images that are larger than those of training as overlapping windows of their size; of tasks on pixels",
        "--tiles",
    ),
]
WindowSide = Annotated[
    int | None,
    option(
        DATA,
        "Of --tiles: side of a window in pixels of an image; default: as training images",
        min=1,
    ),
]
Whole = Annotated[
    bool,
    option(DATA, "Resize images whole, cropping nothing, as masks and depths ask for", "--whole"),
]
ScaledJpeg = Annotated[
    bool,
    option(
        DATA,
        "Decode JPEG files much larger than the backbone's size to 1/2, 1/4 or 1/8 of their sides: sooner, "
        "features differ slightly",
        "--scaled-jpeg",
    ),
]
Dimensions = Annotated[
    int | None,
    option(
        DATA, "Of --problem embedding; default: as many as there are classes, 512 at most", min=1
    ),
]
MaxTokens = Annotated[int, option(DATA, "Tokens of a text that are read", min=1)]
SkipBad = Annotated[bool, option(DATA, "Leave corrupt files out, and count them", "--skip-bad")]
Workers = Annotated[int, option(DATA, "Processes that load data; 0: none beside this one", min=0)]

BackboneName = Annotated[
    str,
    option(
        BACKBONE,
        "restuning-tiny, or a name of timm:, hf:, torchvision:, clip:, openclip:, onnx:",
        autocompletion=complete_backbone,
    ),
]
TaskBackbone = Annotated[
    str | None,
    option(BACKBONE, "Default: the one in task.json", autocompletion=complete_backbone),
]
Weights = Annotated[Path | None, option(BACKBONE, "Weights file (safetensors), without a hub")]
Random = Annotated[bool, option(BACKBONE, "Random weights from the seed", "--random")]
Quantize = Annotated[
    str | None,
    option(BACKBONE, "int8 or nf4 (4 bit): the backbone's weights; as NAME+int8"),
]
Device = Annotated[
    str | None, option(BACKBONE, "cpu, cuda, cuda:1, mps; default: cuda where there is one")
]
Revision = Annotated[
    str | None, option(BACKBONE, "Of a task on the hub: branch, tag or commit; default: the newest")
]
AnyBackbone = Annotated[
    bool,
    option(BACKBONE, "Also other weights, or another engine, of this backbone", "--any-backbone"),
]

Rank = Annotated[
    int | None, option(METHOD, "Bottleneck or length of the tuners; most methods: 10", min=1)
]

ForwardBatch = Annotated[int, option(BACKBONE, "Inputs of one forward", "--batch-size", min=1)]
BatchSize = Annotated[int, option(OPTIMISER, "Examples of one step; train: 64, of masks 8", min=1)]
Epochs = Annotated[
    int | None, option(OPTIMISER, "Passes over the training data; default: the method's", min=1)
]
WeightDecay = Annotated[float, option(OPTIMISER, "Not on biases, scales and lambda")]
LabelSmoothing = Annotated[float, option(OPTIMISER, "Share of the target given to other classes")]
ClassWeights = Annotated[
    str | None,
    option(
        OPTIMISER,
        "balanced: weigh the loss inversely by how often a class is there; default: all alike",
        "--class-weights",
    ),
]
BalancedSampling = Annotated[
    bool,
    option(OPTIMISER, "Take as many examples of each class in an epoch", "--balanced-sampling"),
]
Clip = Annotated[float | None, option(OPTIMISER, "Largest gradient norm; default: none")]
Precision = Annotated[str, option(OPTIMISER, "Autocast: no, bf16, fp16")]
Accumulate = Annotated[int, option(OPTIMISER, "Pieces a batch is run in", min=1)]
Ema = Annotated[
    float | None, option(OPTIMISER, "Decay of a running mean of weights; default: none")
]

StoreFolder = Annotated[
    str | None,
    option(
        FEATURES,
        "Where feature stores lie: a folder, or a URL such as s3://bucket/stores",
        metavar="PATH",
    ),
]
CacheDtype = Annotated[str, option(FEATURES, "How they are kept: fp32, bf16, fp16, int8")]
CachePrecision = Annotated[str, option(FEATURES, "What they are computed in: fp32 or bf16")]

Out = Annotated[Path | None, option(OUTPUT, "Folder of the run; the same folder goes on with it")]
ON_RAY = "ray, or ray:ADDRESS: the work as tasks of a cluster whose nodes all see"
CheckpointEvery = Annotated[int, option(OUTPUT, "Steps between checkpoints", min=1)]
NoResume = Annotated[bool, option(OUTPUT, "Start over", "--no-resume")]
Track = Annotated[
    list[str] | None,
    option(
        OUTPUT,
        "Tell a tracker of the run: tensorboard, wandb, mlflow, comet_ml, aim, clearml, dvclive, swanlab or trackio; "
        "may be given again",
    ),
]
NoReport = Annotated[bool, option(OUTPUT, "Leave no report.html", "--no-report")]
Json = Annotated[bool, option(OUTPUT, "Print JSON for a program to read", "--json")]


def plain(value: Any) -> str:
    """A value in one cell: a number as it is read best, and nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return make_visible(value) if isinstance(value, str) else json.dumps(value, default=str)


def count(number: int, noun: str) -> str:
    """A number of things: `1 task`, `2 tasks`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def size_in_words(value: int | None) -> str:
    """Bytes as MB or GB."""
    if value is None:
        return ""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def time_in_words(seconds: float | None) -> str:
    """Seconds as ms, s, min or h; nothing of None."""
    return "" if seconds is None else tell_time(seconds)


def show_json(value: Any) -> None:
    """Print JSON for a program."""
    typer.echo(json.dumps(value, indent=1))


def show_rows(rows: list[dict[str, Any]], title: str) -> None:
    """Rows as a table, without the columns that are empty in all of them."""
    table = Table(title=make_visible(title), title_justify="left")
    columns = [c for c in (rows[0] if rows else ()) if any(row[c] is not None for row in rows)]
    for column in columns:
        # rich would else cut a long cell and put an ellipsis; the name of a column stays whole.
        longest = max(map(len, column.split()), default=None)
        table.add_column(column, overflow="fold", min_width=longest)
    for row in rows:
        table.add_row(*[plain(row[column]) for column in columns])
    console.print(table)


def show_facts(facts: Mapping[str, Any], title: str) -> None:
    """Facts as a table, one a row."""
    show_rows([{"what": name, "": value} for name, value in facts.items()], title)


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
        # No rich table: that knows its widths, and prints, only when all rows are there.
        shown = [(make_visible(str(cells.get(name, ""))), w) for name, w in self.widths.items()]
        padded = [f"{cell:<{width}}" for cell, width in shown]
        console.print("  ".join(padded).rstrip(), style=style, soft_wrap=True)


def read_tiles(tiles: bool, window: int | None) -> bool | int:
    """`--tiles` and `--window` as a predictor takes them."""
    if window is not None and not tiles:
        raise typer.BadParameter("give --tiles as well", param_hint="--window")
    return window or tiles
