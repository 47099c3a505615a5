"""The commands in the order of use, each imported only when it is called.

A new command is one file in this folder and one line of `COMMANDS`.
"""

from __future__ import annotations

import importlib
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from restuning._errors import TrainingError
from restuning._version import __version__
from restuning.cli.common import show_examples
from restuning.runtime.processes import count_processes

COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("restuning.cli.train", "Train a task on a frozen backbone"),
    "predict": ("restuning.cli.predict", "Label images or texts with one task or many"),
    "eval": ("restuning.cli.evaluate", "Test a task on a data set"),
    "report": ("restuning.cli.report", "Write the page about a run"),
    "update": ("restuning.cli.update", "Add examples to a solved task, or take some out"),
    "embed": ("restuning.cli.embed", "Write one vector an input"),
    "search": ("restuning.cli.embed", "Find the images nearest to an image or to words"),
    "serve": ("restuning.cli.serve", "Answer over HTTP with one task or a hundred"),
    "plan": ("restuning.cli.plan", "Forecast memory, time and batch size of training"),
    "cache": ("restuning.cli.cache", "Compute a data set's features once"),
    "sweep": ("restuning.cli.sweep", "Train a grid of settings from features computed once"),
    "bench": ("restuning.cli.bench", "Compare methods on a suite of tasks under one protocol"),
    "train-image-generation": (
        "restuning.cli.image_generation",
        "Tune a text-to-image pipeline on captioned images",
    ),
    "import-peft": ("restuning.cli.peft", "Read a LoRA checkpoint of PEFT as a task"),
    "export-peft": ("restuning.cli.peft", "Write a task of lora as a checkpoint of PEFT"),
    "export": ("restuning.cli.export", "Write tasks and backbone as one ONNX file"),
    "engine": ("restuning.cli.engine", "Write a backbone as a file for other runtimes"),
    "sites": ("restuning.cli.inspect", "Show where a backbone can be tuned, and the proof"),
    "info": ("restuning.cli.inspect", "Show what a task folder or a backbone is"),
    "push": ("restuning.cli.hub", "Upload a task to a hub"),
    "ls-hub": ("restuning.cli.hub", "List the tasks on a hub"),
    "methods": ("restuning.cli.inspect", "List the named methods"),
}
"""Name -> the module whose `app` has the command, and its line in the help."""

TOGETHER = ("train", "cache", "train-image-generation")
"""What the processes of a launcher (`accelerate launch -m restuning train ...`) do together."""

EXAMPLES = [
    "restuning train digits",
    "restuning predict photo.jpg --task runs/x/photos.task",
    "restuning train --help",
]


def load_command(name: str) -> Any:
    """Import a command: the one of this name in its module's `app`, or the whole `app`."""
    module = importlib.import_module(COMMANDS[name][0])
    made = typer.main.get_command(module.app)
    made = getattr(made, "commands", {}).get(name, made)
    made.name = name
    return made


class Commands(TyperGroup):
    """The top of the command line: it shows all commands and imports the one that is called."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        # Placeholders with a line of help each: the list is shown without importing torch.
        for name, (_, summary) in COMMANDS.items():
            self.commands[name] = TyperCommand(name, help=summary)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is called; an unknown name is refused before anything is imported."""
        name, found, rest = super().resolve_command(ctx, args)
        if name in COMMANDS and name not in TOGETHER and count_processes() > 1:
            raise TrainingError(
                "this command runs in one process",
                where=f"restuning {name}",
                found=f"{count_processes()} processes of a launcher",
                fix=f"call it without the launcher; {', '.join(TOGETHER)} run in several",
            )
        return name, load_command(name) if name in COMMANDS else found, rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command; Ctrl-C ends with a sentence and exit code 130."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            # Here and not in `main`: typer makes it an "Aborted." of its own on the way up.
            typer.echo("stopped; the same command with the same --out goes on from there", err=True)
            sys.exit(130)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the commands, then where to start."""
        super().format_help(ctx, formatter)
        show_examples(EXAMPLES)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    # `main` makes sentences of errors of the user; all others keep their plain traceback.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    help="Res-Tuning: small tuners beside a frozen backbone, and a bypass that detaches them.",
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"restuning {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version"),
    ] = False,
) -> None:
    pass
