"""The report of a run: gathers what a run left and what its answers are worth, and writes one HTML file."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from restuning._durations import tell_time
from restuning._errors import DataError, FormatError, TrainingError
from restuning._files import write_text
from restuning._version import __version__
from restuning.data import Data
from restuning.data.shown import find_shown, list_names
from restuning.problems import Problem
from restuning.problems.judged import Judged
from restuning.report import Curve, Page, Shown, find_word, render
from restuning.task import describe
from restuning.training.evaluate_task import JudgedTask
from restuning.training.supervised import tell_end

REPORT = "report.html"
MIB = 2**20
OF_SOLVED = ("batch_size", "precision", "seed", "workers")
"""Settings that mean something where nothing is trained by steps."""


def write_report(page: Page, file: Path) -> None:
    """Write a report, whole or not at all.

    Raises:
        TrainingError: It cannot be written.
    """
    text = render(page)
    try:
        write_text(file, text)
    except OSError as error:
        raise TrainingError(
            "a report cannot be written",
            where=str(file),
            found=error.strerror or str(error),
            fix="free space or make the folder writable; the task and its figures are there",
        ) from None


def describe_run(
    metrics: Mapping[str, Any],
    problem: Problem,
    data: Data,
    *,
    judged: Judged | None,
    history: Sequence[Mapping[str, Any]],
    task: Path,
    call: Mapping[str, Any] | None = None,
) -> Page:
    """What the report of a run says.

    Args:
        metrics: As `metrics.json`.
        problem: Of the task.
        data: That it was trained and tested on, as inputs and not as stored features.
        judged: What answers to the test split are worth, or without one to the validation split; None where
            there was neither.
        history: One entry an epoch, as `FitResult.history`.
        task: Folder of the task.
        call: Options that the run was called with, as `settings.json`: `data` and how it is read, for the lines to
            copy; None where there were none.
    """
    call = call or {}
    method, backbone = str(metrics["method"]), str(metrics["backbone"])
    settings, solved = metrics.get("settings") or {}, metrics.get("steps") == 0
    split, on = judged_split(data)
    took = tell_time(metrics["seconds"])
    steps = f"{metrics.get('steps') or 0:,} steps"
    peak = metrics.get("peak_memory_bytes")
    sizes = {each: getattr(data, each) for each in ("train", "val", "test")}
    facts = {
        "method": method,
        "backbone": backbone,
        "answers": problem.describe(data.labels),
        "examples": " + ".join(f"{len(s):,} {n}" for n, s in sizes.items() if s is not None),
        "learned": f"{metrics['trainable_parameters']:,} numbers",
        "training": f"{took}, {'in closed form' if solved else steps}",
        **({"memory above weights": f"{peak / MIB:,.0f} MiB"} if peak is not None else {}),
    }
    return Page(
        title=_name_data(data, call),
        lead=f"{method} on a frozen {backbone}, and what it answers to examples that it was not trained on.",
        metric=problem.metric,
        noun=problem.noun,
        split=on,
        judged=judged,
        facts=facts,
        curves=[] if solved else draw_history(history, problem),
        worst=[] if judged is None else show_worst(judged, split),
        use=describe_use(task, call, data.kind, problem),
        settings={
            **(metrics.get("options") or {}),
            # Of what takes no step they say nothing.
            **{n: v for n, v in settings.items() if not solved or n in OF_SOLVED},
        },
        about=_describe_surroundings(metrics),
        notes=_describe_notes(metrics, judged, settings, history),
    )


def describe_evaluation(found: JudgedTask, task: Path, call: Mapping[str, Any]) -> Page:
    """What the report of a test of a saved task says.

    Args:
        found: By `judge_task`.
        task: Folder of the task.
        call: `data` and how it was read.
    """
    own, data, judged = found.task, found.data, found.judged
    problem = own.problem
    backbone = str(describe(task).get("backbone", {}).get("name"))
    return Page(
        title=_name_data(data, call),
        lead=f"{own.method} on a frozen {backbone}, tested on {data.name}.",
        metric=problem.metric,
        noun=problem.noun,
        split=found.on,
        judged=judged,
        facts={
            "method": own.method,
            "backbone": backbone,
            "answers": problem.describe(data.labels),
            "task": task.name,
            "tested on": f"{len(found.split):,} examples",
            **({"in windows of": found.result["window"]} if "window" in found.result else {}),
        },
        curves=[],
        worst=show_worst(judged, found.split),
        use=describe_use(task, call, data.kind, problem),
        settings={},
        about={"restuning version": __version__, "data, known by contents": data.identity},
        notes=_describe_notes({"temperature": own.temperature}, judged, {}),
    )


def judged_split(data: Data) -> tuple[Any, str]:
    """The split that a report is about and its name: the test split, or without one the validation split."""
    return (data.val, "validation") if data.test is None else (data.test, "test")


def draw_history(history: Sequence[Mapping[str, Any]], problem: Problem) -> list[Curve]:
    """Loss and metric over epochs, where there are several."""
    curves = []
    metric = problem.metric
    for key, title, percent in (
        ("loss", problem.loss_name, False),
        (metric, metric.replace("_", " "), problem.percent),
    ):
        lines = {
            name: [(h["epoch"], h[own]) for h in history if h.get(own) is not None]
            for name, own in (("training", key), ("validation", f"val_{key}"))
        }
        lines = {name: line for name, line in lines.items() if line}
        if lines and len(history) > 1:
            curves.append(Curve(title, lines, percent))
    return curves


def show_worst(judged: Judged, split: Any) -> list[Shown]:
    """The inputs of the worst mistakes; without a picture where it cannot be read any more."""
    names, found = list_names(split, len(judged.rows)), []
    for mistake in judged.worst:
        name, shown = names[mistake.row], None
        # Of a word there is none of its own.
        if len(judged.rows) == len(split):
            try:
                shown = find_shown(split, mistake.row)
            except (DataError, OSError):
                shown = None
        # The folder and the file: a whole path is long, and says where somebody works.
        found.append(
            Shown(shown, name if isinstance(shown, str) else "/".join(Path(name).parts[-2:]))
        )
    return found


def describe_use(
    task: Path, call: Mapping[str, Any], kind: str = "image", problem: Problem | None = None
) -> dict[str, str]:
    """Lines to copy: to answer, to test, to serve, and in Python."""
    # An answer at every place is a picture, of which a folder is written.
    out = "answers/" if problem is not None and problem.pool == "grid" else "answers.csv"
    place, data = shlex.quote(str(task)), call.get("data")
    reading = [
        f" --{name} {shlex.quote(str(call[name]))}"
        for name, usual in (
            ("image", None),
            ("audio", None),
            ("text", "text"),
            ("label", "label"),
        )
        if isinstance(call.get(name), str) and call[name] != usual
    ]
    tiles = " --tiles" if call.get("tiles") else ""
    if tiles and isinstance(call.get("window"), int):
        tiles += f" --window {call['window']}"
    new, one = {
        "image": ("new/", '"photo.jpg"'),
        "audio": ("new/", '"sound.wav"'),
        "text": ("new.csv", '"a text"'),
        "tags": ("new.txt", '"a sentence of words"'),
    }.get(kind, ("new/", '"photo.jpg"'))
    lines = [
        f"restuning predict {new} --task {place}{tiles} --out {out}",
        *(
            [f"restuning eval {place} {shlex.quote(data)}{''.join(reading)}{tiles} --out judged/"]
            if isinstance(data, str)
            else []
        ),
        f"restuning serve {place}",
    ]
    in_python = f", tiles={call.get('window') or True}" if tiles else ""
    python = (
        "import restuning\n\n"
        f"predictor = restuning.Predictor.load({str(task)!r}{in_python})\n"
        f"answer = predictor([{one}])[0]\n"
        "print(answer)"
    )
    return {"On the command line": "\n".join(lines), "In Python": python}


def read_history(folder: Path, problem: Problem) -> list[dict[str, Any]]:
    """The entries of a run's log that are about whole epochs; of none an empty list.

    Raises:
        FormatError: A line is no JSON, or a figure of it no number.
    """
    file = folder / "log.jsonl"
    if not file.exists():
        return []
    found = []
    shown = [f"{of}{name}" for of in ("", "val_") for name in ("loss", problem.metric)]
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            entry = json.loads(line)
            if (
                not isinstance(entry, dict)
                or not {"epoch", f"val_{problem.metric}"} <= entry.keys()
            ):
                continue
            figures = [entry["epoch"], *(entry[n] for n in shown if entry.get(n) is not None)]
            if not all(isinstance(each, int | float) for each in figures):
                raise ValueError
        except ValueError:
            raise FormatError(
                "a log cannot be read",
                where=f"{file}: line {number}",
                fix="remove it: the report then has no curves",
            ) from None
        found.append(entry)
    return found


def _describe_notes(
    metrics: Mapping[str, Any],
    judged: Judged | None,
    settings: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
) -> list[str]:
    notes = []
    feature = [
        f"{find_word(name).name} {value:.1%}"
        for name, value in (metrics.get("test_of_feature") or {}).items()
        if isinstance(value, float)
    ]
    if feature:
        notes.append(f"The backbone's own feature, untrained, has {', '.join(feature)}.")
    if judged is not None:
        before, after = judged.figures.get("ece_uncalibrated"), judged.figures.get("ece")
        temperature = metrics.get("temperature") or 1
        if before is not None and after is not None and temperature != 1:
            notes.append(
                f"Logits are divided by a temperature of {temperature:.3g} where probabilities are made of "
                f"them: the calibration error is {before:.1%} without it and {after:.1%} with it."
            )
    last = history[-1]["epoch"] if history else None
    if ending := tell_end(last, metrics.get("ended"), metrics.get("kept_epoch")):
        notes.append(f"{ending[:1].upper()}{ending[1:]}.")
    if settings.get("class_weights"):
        notes.append("Classes were weighed, so that rare ones count as much as frequent ones.")
    if settings.get("balanced_sampling"):
        notes.append("As many examples of each class were drawn in every epoch.")
    return notes


def _name_data(data: Data, call: Mapping[str, Any]) -> str:
    """What a page is called: the data, and of a table the column that is answered."""
    label = call.get("label")
    # "label" is what a column is called by default, and what folders are called with.
    named = data.beside and isinstance(label, str) and label != "label"
    return f"{label} of {data.name}" if named else data.name


def _describe_surroundings(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "weights": metrics.get("weights"),
        **{f"{name} version": version for name, version in (metrics.get("versions") or {}).items()},
        **(metrics.get("hardware") or {}),
        "data, known by contents": metrics["data"].get("identity"),
    }
