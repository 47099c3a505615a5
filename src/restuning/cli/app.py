"""The commands and their help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from restuning import methods
from restuning._version import __version__
from restuning.backbones import joined
from restuning.cli import choosing, predicting
from restuning.cli import inspect as looks
from restuning.cli import run as runs
from restuning.cli.frame import (
    AnyBackbone,
    BackboneName,
    Json,
    Label,
    MaxTokens,
    Quantize,
    Random,
    RowStream,
    SkipBad,
    Text,
    Weights,
    app,
    console,
    plain,
    show_rows,
)
from restuning.cli.report import log_to, show
from restuning.data import LONGEST_TEXT
from restuning.features import StoreOptions
from restuning.features.stored import BY_ITSELF
from restuning.search import Comparison
from restuning.search.train import train as train_tasks
from restuning.training.defaults import COMPARED


def _version(show: bool) -> None:
    if show:
        typer.echo(f"restuning {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    pass


@app.command(
    epilog="[bold]Examples[/bold]\n\nrestuning train digits\n\n"
    "restuning train photos/ --method res-tuning --backbone timm:vit_base_patch16_224\n\n"
    "restuning train reviews.csv --backbone hf:sentence-transformers/all-MiniLM-L6-v2 "
    "--text review --label verdict\n\n"
    "restuning train pets/ --backbone hf:openai/clip-vit-base-patch32 --zero-shot 'a photo of a {}, a pet.'\n\n"
    "restuning train photos/ --method auto --memory 2GiB --minutes 10\n\n"
    "restuning train digits --method 'res-tuning[[mha=prompt,ffn=adapter]' --epochs 30"
)
def train(
    data: Annotated[
        str, typer.Argument(help="digits, a folder, a csv, a conll, torchvision:N or hf:N")
    ],
    method: Annotated[
        str | None,
        typer.Option(help="One method, or auto; without it linear, res-tuning and bypass"),
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Of auto: for everything, e.g. 2GiB")] = None,
    minutes: Annotated[float | None, typer.Option(help="Of auto: for the whole run")] = None,
    backbone: BackboneName = "restuning-tiny",
    weights: Weights = None,
    random: Random = False,
    quantize: Quantize = None,
    out: Annotated[Path | None, typer.Option(help="Folder; the same folder resumes a run")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training data")] = None,
    batch_size: Annotated[int, typer.Option(help="Images of one step")] = 64,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate")] = None,
    lambda_rate: Annotated[float, typer.Option(help="Of the bypass's lambda, times lr")] = 1.0,
    weight_decay: Annotated[float, typer.Option(help="Not on biases, scales and lambda")] = 1e-4,
    warmup_epochs: Annotated[float | None, typer.Option(help="Default: a tenth of epochs")] = None,
    label_smoothing: float = 0.0,
    rank: Annotated[
        int | None, typer.Option(help=f"Bottleneck or length; most methods: {methods.RANK}")
    ] = None,
    scale: Annotated[str | None, typer.Option(help="none, scalar, channel, gate, exact")] = None,
    drop_path: Annotated[float, typer.Option(help="Chance to leave a tuner out")] = 0.0,
    augment: Annotated[str, typer.Option(help="none, flip, timm, timm:POLICY")] = "none",
    precision: Annotated[str, typer.Option(help="no, bf16, fp16")] = "no",
    accumulate: Annotated[int, typer.Option(help="Pieces a batch is run in")] = 1,
    clip: Annotated[float | None, typer.Option(help="Largest gradient norm")] = None,
    ema: Annotated[float | None, typer.Option(help="Decay of a running mean of weights")] = None,
    seed: int = 0,
    workers: Annotated[int, typer.Option(help="Processes that load data")] = 0,
    final: Annotated[bool, typer.Option("--final", help="Train on train and val")] = False,
    skip_bad: SkipBad = False,
    text: Text = "text",
    label: Label = "label",
    max_tokens: MaxTokens = LONGEST_TEXT,
    pool: Annotated[
        str | None, typer.Option(help="cls, mean, last, own; default: as the backbone does")
    ] = None,
    zero_shot: Annotated[
        list[str] | None,
        typer.Option(
            help="Start the head from class names in this prompt, e.g. 'a photo of a {}.'; "
            "more than one are averaged; or a .txt file of prompts"
        ),
    ] = None,
    class_names: Annotated[
        Path | None, typer.Option(help="Class names for --zero-shot, a line each")
    ] = None,
    track: Annotated[list[str] | None, typer.Option(help="tensorboard, wandb")] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Run the backbone in every epoch")
    ] = False,
    store: Annotated[Path | None, typer.Option(help="Where feature stores lie")] = None,
    cache_dtype: Annotated[str, typer.Option(help="fp32, bf16, fp16, int8")] = "fp32",
    cache_precision: Annotated[
        str, typer.Option(help="Features computed in fp32 or bf16")
    ] = "fp32",
    no_resume: Annotated[bool, typer.Option("--no-resume", help="Start over")] = False,
    as_json: Json = False,
) -> None:
    """Train a task on a frozen backbone; without --method compare three methods."""
    shown = Console(stderr=True) if as_json else console
    result = train_tasks(
        data,
        backbone=joined(backbone, quantize),
        weights=weights,
        method=list(COMPARED) if method is None else method,
        out=out,
        resume=not no_resume,
        log=log_to(shown),
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        lambda_rate=lambda_rate,
        weight_decay=weight_decay,
        warmup_epochs=warmup_epochs,
        label_smoothing=label_smoothing,
        precision=precision,
        accumulate=accumulate,
        clip=clip,
        drop_path=drop_path,
        ema=ema,
        seed=seed,
        workers=workers,
        track=tuple(track or ()),
        rank=rank,
        scale=scale,
        pool=pool,
        augment=augment,
        final=final,
        skip_bad=skip_bad,
        text=text,
        label=label,
        max_tokens=max_tokens,
        store=False
        if no_cache
        else StoreOptions(store, cache_dtype, cache_precision, limit=BY_ITSELF),
        random=random,
        zero_shot=zero_shot,
        class_names=class_names,
        memory=memory,
        minutes=minutes,
        progress=True,
    )
    rows: list[dict[str, Any]]
    if isinstance(result, Comparison):
        rows = result.rows()
    else:
        rows = [result.row()]
        if result.choice is not None:
            choosing.show_choice(result.choice, shown)
            rows[0]["choice"] = result.choice.to_dict()
    show(rows, shown)
    shown.print(f"left in [bold]{result.folder}[/bold]")
    if as_json:
        typer.echo(json.dumps(rows if method is None else rows[0], indent=1))


@app.command(epilog="[bold]Example[/bold]\n\nrestuning eval runs/x/digits.task digits")
def eval(  # noqa: A001
    task: Annotated[Path, typer.Argument(help="Task folder")],
    data: Annotated[str, typer.Argument(help="As for train; its test split is used")],
    backbone: Annotated[str | None, typer.Option(help="Default: the one in task.json")] = None,
    weights: Weights = None,
    random: Random = False,
    any_backbone: AnyBackbone = False,
    batch_size: int = 64,
    skip_bad: SkipBad = False,
    text: Text = "text",
    label: Label = "label",
    as_json: Json = False,
) -> None:
    """Accuracy of a saved task on the test split of a data set."""
    result = runs.evaluate_task(
        task,
        data,
        backbone=backbone,
        weights=weights,
        random=random,
        batch_size=batch_size,
        skip_bad=skip_bad,
        text=text,
        label=label,
        any_backbone=any_backbone,
    )
    if as_json:
        typer.echo(json.dumps(result, indent=1))
    else:
        show_rows([result], f"{task} on {data}")


@app.command(
    epilog="[bold]Examples[/bold]\n\nrestuning predict photo.jpg --task pets.task --top 3\n\n"
    "restuning predict photos/ --tasks pets.task,scenes.task,quality.task --json\n\n"
    "restuning predict 'a film to remember' --task reviews.task\n\n"
    "restuning predict new.csv --task reviews.task --text review --json"
)
def predict(
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Images or folders; for a text task texts, .csv, .txt (a text a line), or -"
        ),
    ],
    task: Annotated[Path | None, typer.Option(help="Task folder")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Task folders, with commas; bypass tasks share one backbone forward"),
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Default: the one in task.json")] = None,
    weights: Weights = None,
    random: Random = False,
    any_backbone: AnyBackbone = False,
    top: Annotated[int, typer.Option(min=1, help="Classes to show")] = 1,
    batch_size: int = 64,
    skip_bad: SkipBad = False,
    text: Text = "text",
    as_json: Json = False,
) -> None:
    """Label images or texts with one task or many; a table, or one JSON line each as it is done."""
    folders = [*([task] if task else []), *(Path(t) for t in (tasks or "").split(",") if t)]
    if not folders:
        raise typer.BadParameter("give --task FOLDER or --tasks FOLDER,FOLDER,...")
    predictor = predicting.Predictor.load(
        folders,
        backbone=backbone,
        weights=weights,
        random=random,
        skip_bad=skip_bad,
        text=text,
        any_backbone=any_backbone,
    )
    kind, named = predictor.inputs.kind, predictor.inputs.named(inputs)
    table = None if as_json else RowStream(predictor.widths(named, top, several=bool(tasks)))
    for name, answers in predictor.answers(named, batch_size, top):
        single = next(iter(answers.values()))
        if table is None:
            found = {"tasks": answers} if tasks else {"predictions": single}
            typer.echo(json.dumps({kind: name, **found}))
        elif kind == "words":
            # A sentence is many answers: a line a word, and an empty line as the file had it.
            for place, word in enumerate(name):
                best_of = {t: _percent(best[place][0]) for t, best in answers.items()}
                table.row({kind: word, **best_of})
            table.row(dict.fromkeys([kind, *answers], ""))
        elif tasks:
            table.row({kind: name, **{t: _percent(best[0]) for t, best in answers.items()}})
        else:
            best = {f"{place + 1}": _percent(each) for place, each in enumerate(single)}
            table.row({kind: name, **best})
    if table is not None:
        typer.echo(
            f"{len(folders)} task{'s' * (len(folders) > 1)}, "
            f"{predictor.together.forwards} backbone forward(s) a batch"
        )
    if predictor.inputs.skipped:
        typer.echo(f"{len(predictor.inputs.skipped)} corrupt files skipped", err=True)


@app.command(
    epilog="[bold]Example[/bold]\n\nrestuning sites timm:swin_tiny_patch4_window7_224 --random"
)
def sites(
    name: Annotated[str, typer.Argument(help="Backbone")],
    weights: Weights = None,
    random: Random = False,
    as_json: Json = False,
) -> None:
    """Where a backbone can be tuned, and how each place was proved."""
    rows = looks.site_rows(name, weights, random)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        show_rows(rows, f"sites of {name}")


@app.command(
    epilog="[bold]Examples[/bold]\n\nrestuning info pets.task\n\nrestuning info restuning-tiny"
)
def info(
    name: Annotated[str, typer.Argument(help="Task folder or backbone")],
    weights: Weights = None,
    random: Random = False,
    as_json: Json = False,
) -> None:
    """What a task folder or a backbone is."""
    facts = looks.facts(name, weights, random)
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
    else:
        show_rows([{"what": k, "": plain(v)} for k, v in facts.items()], name)


@app.command("methods")
def list_methods(
    backbone: Annotated[str | None, typer.Option(help="Count parameters on this one")] = None,
    weights: Weights = None,
    random: Random = False,
    classes: Annotated[int, typer.Option(help="Classes of the head that is counted")] = 100,
    as_json: Json = False,
) -> None:
    """The named methods and where their defaults come from."""
    rows = looks.method_rows(backbone, weights, random, classes)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    else:
        show_rows(rows, "methods")


def _percent(prediction: dict[str, Any]) -> str:
    return f"{prediction['label']} ({prediction['probability']:.1%})"
