"""The report of a run that is over, made again: its task is tested once more on the data that it names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from restuning._errors import FormatError, RestuningError, TrainingError, warn
from restuning._files import expand_home, fits, hints_of, read_json, write_json, writing_rows
from restuning.data import Data, DataOptions
from restuning.data.identity import identify
from restuning.data.load import is_by_name, is_gone
from restuning.data.shown import list_names
from restuning.report import Page
from restuning.serve import Predictor
from restuning.task import find_task
from restuning.training.beforehand import try_files
from restuning.training.evaluate_task import JudgedTask, judge_task
from restuning.training.identity import describe_contents
from restuning.training.run import DATA_FROM_RUN
from restuning.training.run_report import (
    REPORT,
    describe_evaluation,
    describe_run,
    read_history,
    write_report,
)

METRICS, SETTINGS = "metrics.json", "settings.json"
SHOWN: dict[str, Any] = {
    "method": str,
    "backbone": str,
    "data": dict,
    "seconds": float,
    "trainable_parameters": int,
    "steps": int | None,
    "peak_memory_bytes": int | None,
    "settings": dict | None,
    "options": dict | None,
    "versions": dict | None,
    "hardware": dict | None,
    "test_of_feature": dict | None,
    "temperature": float | None,
    "ended": str | None,
    "kept_epoch": int | None,
}
"""Entries of `metrics.json` that a page shows."""
CHANGED = (
    "Other data than those of the run were judged here: they changed since, or others were given. Counts of examples are "
    "theirs, and some of what was judged may have been trained on."
)
TRAINED_ON = "the training data"
"""Entry of what `metrics.json` tells of data: a digest of the contents of the training split."""
EVALUATION = "eval.json"
OUTPUTS = "outputs.csv"
READ = (
    *("text", "label", "image", "audio", "problem", "classes", "whole", "dimensions"),
    *("scaled_jpeg", "max_tokens", "seconds", "final", "skip_bad"),
)
"""Settings of a run that say how its data are read."""


@dataclass(frozen=True)
class FinishedRun:
    """What a run left.

    Attributes:
        folder: Of the run.
        metrics: As `metrics.json`.
        task: Folder of its task.
        call: What it was called with; `data` is the name or path of its data.
        options: How these are read.
    """

    folder: Path
    metrics: Mapping[str, Any] = field(repr=False)
    task: Path
    call: Mapping[str, Any] = field(repr=False)
    options: DataOptions


def find_runs(where: str | Path) -> list[Path]:
    """The folders of the runs that a folder is of: itself, or one for each column of answers, or for each method.

    Raises:
        FormatError: None is there.
    """
    folder = expand_home(where)
    if _is_run(folder):
        return [folder]
    found = [
        each
        for above in (folder, folder / "runs")
        if above.is_dir()
        for each in sorted(above.iterdir())
        if _is_run(each)
    ]
    if not found:
        raise FormatError(
            "no run is in this folder",
            where=str(folder),
            found=f"no {METRICS} of a run" if folder.is_dir() else "no such folder",
            fix="give the folder that `restuning train` printed after `left in`; of a task alone "
            "`restuning eval TASK DATA --out FOLDER` writes a page",
        )
    return found


def _is_run(folder: Path) -> bool:
    file = folder / METRICS
    return file.is_file() and "method" in read_json(file)


def open_run(folder: Path, data: str | None = None, skip_bad: bool = False) -> FinishedRun:
    """Read what a run left.

    Args:
        folder: Of the run.
        data: In place of the data that it names.
        skip_bad: Leave corrupt images out, also where the run did not.

    Raises:
        FormatError: A file is malformed, there is no task, or the run names no data, some that are gone, or some of a hub.
    """
    metrics = read_json(folder / METRICS)
    said = read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    if data is None:
        data = said.get("data")
        # A file does not choose what is fetched.
        if not isinstance(data, str) or data.startswith("hf:") or "://" in data:
            raise FormatError(
                "a run does not say where its data are"
                if data is None
                else "data of a hub are named by who asks",
                where=str(folder / SETTINGS),
                found=str(data)[:200] if data is not None else "data that were given as an object",
                fix=f"name them: restuning report {folder} DATA",
            )
        data = _find_from_run(data, folder, metrics)
        if is_gone(data):
            raise FormatError(
                "the data of a run are not where they were",
                where=str(folder / SETTINGS),
                found=data if expand_home(data).is_absolute() else f"{data}, in {Path.cwd()}",
                fix=f"put them back, or give them, or others: restuning report {folder} DATA",
            )
    known = {name: said[name] for name in READ if said.get(name) is not None}
    _check(folder / METRICS, metrics, SHOWN)
    _check(folder / SETTINGS, known, {n: h for n, h in hints_of(DataOptions).items() if n in known})
    # What was chosen on the validation split was then trained on it: there is nothing to be judged on there.
    if "choice" in metrics:
        known["final"] = True
    options = DataOptions(**{**known, "skip_bad": skip_bad or bool(known.get("skip_bad"))})
    beside = folder.parent.parent / f"{folder.name}.task"
    task = beside if folder.parent.name == "runs" and beside.is_dir() else find_task(folder)
    return FinishedRun(folder, metrics, task, {**said, "data": data}, options)


def _find_from_run(data: str, folder: Path, metrics: Mapping[str, Any]) -> str:
    """A path that hung on the folder of the command, wherever this one is called; first as seen from the run."""
    known = metrics.get(DATA_FROM_RUN)
    path = known.get(data) if isinstance(known, Mapping) else None
    if not isinstance(path, str) or is_by_name(data):
        return data
    found = os.path.normpath(folder / path)
    return found if os.path.exists(found) else data


def _check(file: Path, content: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Refuse entries of another type: somebody changed the file, or it is of something else."""
    wrong = [name for name, hint in hints.items() if not fits(content.get(name), hint)]
    if wrong:
        raise FormatError(
            "what a run left is malformed",
            where=str(file),
            found=f"{wrong[0]}: {content.get(wrong[0])!r}"[:200],
            fix="restore the file, or train again",
        )


def report_run(run: FinishedRun, predictor: Predictor, batch_size: int = 64) -> Page:
    """What its report says, by one pass over the test split.

    Data that are not those of the run by their contents are warned of, and the page says so.

    Args:
        run: That is over.
        predictor: Of its task.
        batch_size: Inputs of one forward.

    Raises:
        DataError: The data are not those of the task, or there is nothing to judge it on.
    """
    found = judge_task(predictor, run.call["data"], run.options, batch_size, or_validation=True)
    problem = found.task.problem
    page = describe_run(
        run.metrics,
        problem,
        found.data,
        judged=found.judged,
        history=read_history(run.folder, problem),
        task=run.task,
        call=run.call,
    )
    own, now = run.metrics["data"].get("identity"), found.data.identity
    if own is None or own == now:
        return page
    warn(
        "a report is about other data than the run",
        where=str(run.folder),
        found=f"{found.data.name}: contents {now}, those of the run {own}",
        fix="restore the data, or read its figures as those of a test on new data: some of it may have been trained on",
    )
    return replace(
        page,
        notes=[CHANGED, *page.notes],
        about={**page.about, "data that were judged, known by contents": now},
    )


def warn_of_change(task: Path, loaded: Data) -> None:
    """Warn where the training split of data is not the one that a task of these data was trained on: files that name no splits
    are split anew when they change, and rows that it was trained on may then be among those that it is tested on.

    Nothing is known of a task that has no run beside it, of other data, and of a run on train and val together.

    Args:
        task: Folder of the task.
        loaded: What it is tested on.

    Cost: where there is such a run, images that were never read before are read once, to know their contents.
    """
    # Of a column of a table the run lies one deeper.
    for run in (task.parent, task.parent / "runs" / task.stem):
        try:
            metrics, settings = read_json(run / METRICS), read_json(run / SETTINGS)
            name, known = metrics["data"]["name"], metrics["data"][TRAINED_ON]
        except (RestuningError, OSError, KeyError, TypeError):
            continue
        if known is None or name != loaded.name or settings.get("final") or "choice" in metrics:
            return
        now = describe_contents(identify(loaded.train), None)[TRAINED_ON]
        if now != known:
            warn(
                "the data have changed since the task was trained on them",
                where=loaded.name,
                found=f"training data {now}, then {known}",
                fix="where their files name no splits, rows that it was trained on may be among those of test: test it on "
                "data that it has not seen, or train it again",
            )
        return


def check_place(out: Path, rows: str = "csv") -> None:
    """Look whether `write_evaluation` could write, before anything takes time.

    Raises:
        TrainingError: It could not.
    """
    file, *_ = _name_rows(rows)
    try_files(out, (file, OUTPUTS, EVALUATION, REPORT))


def refuse_other_evaluation(out: Path, named: Mapping[str, Any]) -> None:
    """Refuse a folder in which files that `write_evaluation` would replace are of something else.

    Args:
        out: The folder; it need not be there.
        named: `task` and `data`, as the evaluation will tell them.

    Raises:
        TrainingError: There is an evaluation of another task or of other data, or such a file that none left: the page of a run.
    """
    there = [
        name for name in (*_name_rows("csv"), OUTPUTS, EVALUATION, REPORT) if (out / name).is_file()
    ]
    if not there:
        return
    fix = f"give another --out, or remove {', '.join(there)} there"
    if EVALUATION not in there:
        raise TrainingError(
            "files that would be replaced are of no evaluation",
            where=str(out),
            found=f"{', '.join(there)}, and no {EVALUATION}",
            fix=fix,
        )
    other = read_json(out / EVALUATION)
    wrong = [name for name, said in named.items() if other.get(name) != said]
    if wrong:
        raise TrainingError(
            "an evaluation of another task, or of other data, would be replaced",
            where=str(out / EVALUATION),
            found=", ".join(f"{n} {other.get(n)!r}, and not {named[n]!r}"[:200] for n in wrong),
            fix=fix,
        )


def _name_rows(rows: str) -> list[str]:
    """The file of predictions that is asked for, then those of other forms."""
    return [
        f"predictions.{form}" for form in sorted(("csv", "jsonl"), key=lambda form: form != rows)
    ]


def write_evaluation(
    found: JudgedTask,
    result: Mapping[str, Any],
    out: Path,
    task: Path,
    call: Mapping[str, Any],
    rows: str = "csv",
) -> None:
    """Leave what an evaluation found in a folder: `eval.json`, `predictions.csv` (or `.jsonl`), `report.html` and, where outputs
    are judged one by one, `outputs.csv`.

    What an evaluation before left there under these names is replaced (`refuse_other_evaluation` knows whether it may be), and its
    predictions in the other form removed.

    Args:
        found: By `judge_task`.
        result: What is written as JSON.
        out: The folder.
        task: Folder of the task.
        call: `data` and how it was read.
        rows: "csv" or "jsonl".

    Raises:
        FormatError: A file cannot be written.
        TrainingError: Likewise the page.
    """
    # First: a call that is killed while it writes leaves no files that nobody knows whose they are.
    write_json(out / EVALUATION, result)
    told = found.judged.rows
    what = "input" if len(told) == len(found.split) else "word"
    file, *others = (out / name for name in _name_rows(rows))
    with writing_rows(file) as write:
        for name, row in zip(list_names(found.split, len(told)), told, strict=True):
            write({what: name, **row})
    each = found.judged.breakdown
    if each is not None:
        with writing_rows(out / OUTPUTS) as write:
            for row in each.rows():
                write(row)
    # Those of an evaluation before are not of these figures.
    for other in others if each is not None else [*others, out / OUTPUTS]:
        if other.is_file():
            other.unlink()
    write_report(describe_evaluation(found, task, call), out / REPORT)
