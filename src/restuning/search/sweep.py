"""A sweep: a grid of settings over seeds, chosen on validation, tested once."""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from restuning import methods
from restuning._errors import FormatError, TrainingError
from restuning._files import Claim, hold_folder, write_json
from restuning.backbones import Backbone, take_backbone
from restuning.data import Data
from restuning.features import Cached, Stored
from restuning.features.stored import VIEWS_OF, reason_not_storable
from restuning.problems import from_spec as problem_from_spec
from restuning.search.accuracy_axis import scale_accuracy
from restuning.search.as_written import write_figure
from restuning.search.folder import SearchFolder
from restuning.task import Task, average, check_savable, load, reason_not_averaged, save
from restuning.training import FitSettings
from restuning.training.beforehand import check_beforehand
from restuning.training.calibrate import Calibration, has_calibration, judge
from restuning.training.defaults import settings_for
from restuning.training.device import on_device
from restuning.training.evaluate import collect_logits
from restuning.training.identity import describe_classes, describe_data, describe_host
from restuning.training.own_size import note_smaller_size
from restuning.training.parallel_runs import evaluate_stored, stack_signature, train_in_parallel
from restuning.training.run import METRIC, Inputs, Recipe, Source, default_folder, saved_with
from restuning.training.together import alone

RATES = {
    "lr": "lr",
    "lambda": "lambda_rate",
    "wd": "weight_decay",
    "clip": "clip",
    "smoothing": "label_smoothing",
    "batch": "batch_size",
    "epochs": "epochs",
}
"""Keys of a grid that are settings of training; all others are options of the method."""

TOGETHER = 16
"""Runs made in parallel: on CPU more gain nothing, and a killed sweep loses no more than these."""

CLAIMS = "claims"
"""Folder of what workers that share a sweep have in hand; there while they work."""

POLL = 0.5
"""Seconds between two looks at what other workers have done."""

TRIED = "arms"
REPORT, PICTURE = "sweep", "sweep.png"
"""Folder of the results by setting; its name, and `died_at` in them, are those of the first sweeps."""

OnProgress = Callable[[int, int, str], None]
"""Called with runs that are done, runs in all, and the best so far in words."""


@dataclass(frozen=True)
class SweepRequest:
    """What is swept.

    Attributes:
        source: Where the data come from and how their features are stored.
        method: A method whose task trains from stored features.
        grid: Values by setting, as `parse_grid` gives them.
        seeds: Of the runs.
        settings: What the grid does not name; None for the method's own defaults.
        backbone: By name (see `load_backbone`), or one that is loaded.
        weights: File of its weights, without a hub.
        random: Random weights of the backbone, from seed 0.
    """

    source: Source
    method: str
    grid: Mapping[str, Sequence[Any]]
    seeds: Sequence[int] = (0, 1, 2)
    settings: FitSettings | None = None
    backbone: str | Backbone = "restuning-tiny"
    weights: Path | None = None
    random: bool = False


@dataclass(frozen=True)
class Sweep:
    """A finished sweep.

    Attributes:
        report: As `sweep.json`.
        folder: What it left: `sweep.json`, `sweep.png`, a file for each run, the final tasks.
    """

    report: dict[str, Any]
    folder: Path

    def draw(self, file: Path, title: str) -> None:
        """Draw validation accuracy by setting: the mean, and from the worst to the best seed."""
        # A figure by hand: pyplot would keep state and choose a backend for the caller.
        from matplotlib.figure import Figure

        rows = [row for row in self.report["settings"] if row["mean"] is not None]
        metric = self.report.get("metric", "accuracy")
        key = f"val_{metric}"
        rows.sort(key=lambda row: row["mean"])
        figure = Figure(figsize=(7, 1.4 + 0.32 * len(rows)), layout="constrained")
        axes = figure.subplots()
        shown = scale_accuracy(axes, [100 * value for row in rows for value in row[key]], "x")
        for place, row in enumerate(rows):
            chosen = row["setting"] == self.report["best"]["setting"]
            colour = "#d9822b" if chosen else "#2a6fbb"
            values, mean = [100 * value for value in row[key]], 100 * row["mean"]
            axes.axhline(place, color="#cccccc", linewidth=0.8, zorder=0)
            # What the seeds gave, and no deviation on both sides: that may end beyond 100 %.
            axes.plot([min(values), max(values)], [place, place], color=colour, linewidth=2)
            axes.plot(values, [place] * len(values), "o", markersize=4, color=colour, alpha=0.6)
            axes.plot(mean, place, "o", markersize=9, color=colour)
            axes.annotate(
                f"{mean:.2f}{' chosen' if chosen else ''}",
                (1, place),
                (4, 0),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=colour,
            )
        labels = [setting_in_words(row["setting"]) for row in rows]
        axes.set_yticks(range(len(rows)), labels, fontsize=8)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        words = metric.replace("_", " ")
        axes.set_xlabel(f"validation {words} (%), {shown}: each seed, and their mean")
        axes.set_title(title, loc="left")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        write_figure(figure, file, dpi=150)


def setting_in_words(setting: Mapping[str, Any]) -> str:
    """A setting as `lr 0.001, rank 5`."""
    return ", ".join(f"{name} {value}" for name, value in setting.items())


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep: a setting and a seed."""

    setting: tuple[tuple[str, Any], ...]
    seed: int

    @property
    def name(self) -> str:
        """The name of its result file."""
        return ".".join([*(f"{k}={v}" for k, v in self.setting), f"seed={self.seed}"])


def parse_grid(text: str) -> dict[str, list[Any]]:
    """`lr=1e-3,3e-3,rank=4,8` as `{"lr": [0.001, 0.003], "rank": [4, 8]}`.

    Raises:
        TrainingError: The text is no such grid.
    """
    grid: dict[str, list[Any]] = {}
    key = ""
    for part in filter(None, (p.strip() for p in text.replace(" ", ",").split(","))):
        if "=" in part:
            key, _, part = part.partition("=")
            key = key.strip()
            if key in grid:
                raise TrainingError(
                    "a grid names a setting twice",
                    where=text,
                    found=key,
                    fix="give all its values after one name",
                )
            grid[key] = []
        if not key or not part:
            raise TrainingError(
                "not a grid",
                where=text,
                found=part or "a name without a value",
                fix="write lr=1e-3,3e-3,rank=5,10",
            )
        grid[key].append(_value(part))
    if not grid or not all(grid.values()):
        raise TrainingError("not a grid", where=text, fix="write lr=1e-3,3e-3,rank=5,10")
    return grid


def _value(text: str) -> Any:
    # As a word it would be true, whichever of the two it says.
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    # Whole numbers first: a rank of 4.0 is none.
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def run_sweep(
    request: SweepRequest,
    *,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    on_progress: OnProgress = lambda done, total, best: None,
    started: float | None = None,
) -> Sweep:
    """Load data and backbone, sweep, and draw the result: all that `restuning sweep` does.

    Killed and called again with the same request and the same `out`, it goes on and ends the same.

    Args:
        request: What is swept.
        out: Folder of the sweep; None for `runs/DATA-sweep-TIME`.
        device: "cpu", "cuda", "cuda:1"; None for CUDA if it is there.
        on_progress: As for `sweep`.
        started: When by `time.perf_counter` it began, where workers have made its runs; None for now.

    Raises:
        TrainingError: As `sweep`, or training images are augmented in a way that no store repeats.
        RestuningError: Names, data or weights are not what they should be.
    """
    method = request.method
    with _opened(request, device) as inputs:
        folder = default_folder(inputs.data, "sweep") if out is None else Path(out)
        with hold_folder(folder):
            report = sweep(
                inputs,
                method,
                request.grid,
                seeds=request.seeds,
                settings=request.settings or settings_for(method, {}),
                out=folder,
                on_progress=on_progress,
                started=started,
            )
            result = Sweep(report, folder)
            result.draw(folder / PICTURE, f"{method} on {inputs.data.name}")
    return result


def share_sweep(request: SweepRequest, out: Path, device: str | torch.device | None = None) -> None:
    """Make runs of a sweep that no other worker has in hand, until there are all of them: `run_sweep` then ends it.

    Any number of workers share a folder, by claims that a dying one gives back; none of them holds the folder.

    Args:
        request: The same for all of them.
        out: Folder of the sweep.
        device: As for `run_sweep`.

    Raises:
        RestuningError: As `run_sweep`.
    """
    with _opened(request, device) as inputs:
        grid, seeds = request.grid, request.seeds
        settings = request.settings or settings_for(request.method, {})
        _begin(inputs, request.method, grid, seeds, settings, out, {}, shared=True).choose()


def refuse_augment(augment: str) -> None:
    """Refuse training images that are augmented in a way that no store repeats.

    Raises:
        TrainingError: They are.
    """
    if augment not in VIEWS_OF:
        raise TrainingError(
            "a sweep trains from stored features",
            where=f"--augment {augment}",
            fix="give none or flip",
        )


@contextmanager
def _opened(request: SweepRequest, device: str | torch.device | None) -> Iterator[Inputs]:
    source = request.source
    # Before anything is loaded: a backbone may take minutes.
    refuse_augment(source.augment)
    torch.manual_seed(0)
    backbone = take_backbone(request.backbone, weights=request.weights, random=request.random)
    host = backbone.host()
    with alone(), on_device(device) as place:
        host.to(place)
        inputs = source.open(host, backbone)
        source.store.log(f"data  {inputs.data.describe()}")
        detached = not methods.runs_inside(request.method)
        if note := note_smaller_size(backbone, detached=detached):
            source.store.log(f"note  {note}")
        yield inputs


@alone()
def sweep(
    inputs: Inputs,
    method: str,
    grid: Mapping[str, Sequence[Any]],
    *,
    seeds: Sequence[int],
    settings: FitSettings,
    out: str | Path,
    options: Mapping[str, Any] | None = None,
    on_progress: OnProgress = lambda done, total, best: None,
    started: float | None = None,
) -> dict[str, Any]:
    """Train every setting of a grid with every seed, choose on validation, test the choice.

    Features are stored first. Runs of one form, seed and length then train together as one bank.
    Each result is one file in `out/arms`; a sweep that is started again goes on with those that
    have none. The tasks of the final runs are left in `out/final/seed-N.task`, and their mean, which is one task
    (`task.average`), in `out/final/average.task`.

    Args:
        inputs: Data in front of a backbone, with a validation split.
        method: A method whose task trains from stored features.
        grid: Values by setting: `lr`, `lambda` (its rate over the others'), `wd`, `clip`,
            `smoothing`, `batch`, `epochs`, or any option of the method (`rank`, `scale`, ...).
        seeds: Every setting is trained with each of them.
        settings: Values of all settings that the grid does not name.
        out: Folder of the sweep.
        options: Options of the method that the grid does not name.
        on_progress: Called after each epoch: runs that are done, runs in all, the best so far in
            words.
        started: As for `run_sweep`.

    Returns:
        As `sweep.json`: `settings` (with `val_accuracy`, or another problem's figure, by seed, mean and std), `best`, `final`
        (the same of the test split), and `average` (of the mean of the seeds, or why there is none).

    Raises:
        TrainingError: There is no validation data, features cannot be stored, the folder holds
            another sweep, or every setting lost a run to NaN.
    """
    begun = time.perf_counter() if started is None else started
    run = _begin(inputs, method, grid, seeds, settings, Path(out), options or {}, on_progress)
    rows, best, finals = run.choose()
    plain, folder, metric = inputs.plain, run.folder, run.metric
    tested = [read_result(folder, "final", one, metric) for one in finals]
    accuracy = [r[f"test_{metric}"] for r in tested if r[f"test_{metric}"] is not None]
    alive = [one for one, each in zip(finals, tested, strict=True) if each["died_at"] is None]
    report = {
        **run.identity,
        **({} if metric == METRIC else {"metric": metric}),
        "data": plain.identity,
        "backbone": inputs.host.fingerprint(),
        "settings": rows,
        "best": best,
        "final": {
            f"test_{metric}": accuracy,
            "mean": statistics.mean(accuracy) if accuracy else None,
            "std": statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0,
        },
        "average": run.average(alive),
        "arms": len(list_sweep_runs(grid, seeds)),
        "seconds": time.perf_counter() - begun,
    }
    # For people: it is not read again, so it is what is returned and nothing else.
    write_json(folder.path(REPORT), report)
    return report


def list_sweep_runs(grid: Mapping[str, Sequence[Any]], seeds: Sequence[int]) -> list[SweepRun]:
    """The runs that are chosen between, seed by seed: those of one seed meet the same batches and can be stacked."""
    return [SweepRun(setting, seed) for seed in seeds for setting in _combine(grid)]


def _combine(grid: Mapping[str, Sequence[Any]]) -> list[tuple[tuple[str, Any], ...]]:
    return [tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def _begin(
    inputs: Inputs,
    method: str,
    grid: Mapping[str, Sequence[Any]],
    seeds: Sequence[int],
    settings: FitSettings,
    out: Path,
    options: Mapping[str, Any],
    on_progress: OnProgress = lambda done, total, best: None,
    shared: bool = False,
) -> _Sweep:
    """Refuse what cannot be swept, and begin the folder or go on with it."""
    # Where every word or place is answered, the readout is that of the problem.
    asked = {"pool": pool} if (pool := inputs.data.problem.pool) else {}
    options = {**asked, **inputs.options, **options}
    for name, values in grid.items():
        if name not in RATES:
            methods.refuse_unused([method], {name: values})
            for value in values:
                methods.check(method, options={name: value})
    plain = inputs.plain
    if plain.val is None:
        raise TrainingError(
            "a sweep chooses on validation data", found="none", fix="give data with a val split"
        )
    check_beforehand(plain, out, (f"{REPORT}.json", PICTURE))
    form = Recipe(method, settings, options).build(inputs)
    for seed in seeds:
        check_savable(form, inputs.host, _final_folder(out, seed), **saved_with(inputs))
    identity = {
        "method": method,
        "grid": {k: list(v) for k, v in grid.items()},
        "seeds": list(seeds),
        "base": settings.identity(),
        "options": options,
        **describe_data(inputs.data.train, inputs.data.val, inputs.data.collate),
        "the backbone": describe_host(inputs.host),
        # Last, for it may be long.
        "the class names": describe_classes(plain.labels),
    }
    folder = SearchFolder(out, identity, file="grid.json", what="this folder holds another sweep")
    # One pass for all settings, also where some read more than others.
    forms = dict.fromkeys(
        tuple((name, value) for name, value in each if name not in RATES) for each in _combine(grid)
    )
    recipes = [Recipe(method, settings, {**options, **dict(form)}) for form in forms]
    stored = _open_store(inputs, recipes)
    return _Sweep(
        *(inputs, method, grid, seeds, settings, options),
        *(folder, identity, stored, on_progress, shared),
    )


def read_result(
    folder: SearchFolder, kind: str, run: SweepRun, metric: str = METRIC
) -> dict[str, Any]:
    """The result of one run of a sweep, checked field by field.

    Args:
        folder: Of the sweep.
        kind: `TRIED` or "final".
        run: Whose it is.
        metric: Of the data's problem.

    Raises:
        FormatError: There is none, or it is not what this run leaves.
    """
    result = folder.read(kind, run.name)
    # Through JSON, as the result has been.
    setting = json.loads(json.dumps(dict(run.setting), default=str))
    died, scores = result.get("died_at", ""), (f"val_{metric}", f"test_{metric}")
    # Others than shares may be below zero.
    fits = _is_share if metric == METRIC else _is_score
    wrong = [name for name in scores if not fits(result.get(name, ""))]
    if result.get("setting") != setting or result.get("seed") != run.seed:
        wrong.append("the setting or seed of another run")
    if died is not None and not _is_count(died):
        wrong.append("died_at")
    # On training and validation data together there is none to be accurate on.
    elif kind == TRIED and (result.get(f"val_{metric}") is None) != (died is not None):
        wrong.append(f"val_{metric}")
    if not has_calibration(result):
        wrong.append("its temperature")
    if not _is_count(result.get("trainable_parameters")):
        wrong.append("trainable_parameters")
    if wrong:
        raise FormatError(
            "a result of a sweep is incomplete or malformed",
            where=str(folder.path(kind, run.name)),
            found=", ".join(wrong),
            fix="restore it, or delete it and run the same command again",
        )
    return result


def _is_share(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or (number and 0 <= value <= 1)


def _is_score(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _open_store(inputs: Inputs, recipes: Sequence[Recipe]) -> Stored:
    """The store that all runs of a sweep train from."""
    task, *others = (recipe.build_form(inputs) for recipe in recipes)
    reason = reason_not_storable(task, inputs.augment)
    stored = None if reason else inputs.open_store(task, *others)
    if stored is None:
        raise TrainingError(
            "a sweep trains from stored features",
            where=recipes[0].method,
            found=reason
            or "features that cannot be stored: texts of different lengths, all "
            "tokens, or more bytes than the limit",
            fix="sweep a bypass method or linear, with --augment none or flip; for texts give a "
            "readout of one token",
        )
    return stored


class _Sweep:
    """Trains and tests runs that share inputs, method and folder."""

    def __init__(
        self,
        inputs: Inputs,
        method: str,
        grid: Mapping[str, Sequence[Any]],
        seeds: Sequence[int],
        settings: FitSettings,
        options: dict[str, Any],
        folder: SearchFolder,
        identity: dict[str, Any],
        stored: Stored,
        on_progress: OnProgress,
        shared: bool,
    ) -> None:
        self.inputs, self.host, self.method = inputs, inputs.host, method
        self.grid, self.seeds, self.settings, self.options = grid, seeds, settings, options
        self.folder, self.identity, self.on_progress = folder, identity, on_progress
        self.shared, self.metric = shared, inputs.plain.problem.metric
        self.apart = stored.data(inputs.plain, final=False)
        self.together = stored.data(inputs.plain, final=True)

    def choose(self) -> tuple[list[dict[str, Any]], dict[str, Any], list[SweepRun]]:
        """Make all runs: a row a setting, the best of them, and its final runs.

        Raises:
            TrainingError: Every setting lost a run to NaN.
        """
        runs = list_sweep_runs(self.grid, self.seeds)
        self.train(runs, self.apart, TRIED)
        rows, key = [], f"val_{self.metric}"
        for setting in _combine(self.grid):
            each = [SweepRun(setting, seed) for seed in self.seeds]
            results = [read_result(self.folder, TRIED, run, self.metric) for run in each]
            values = [r[key] for r in results if r["died_at"] is None]
            rows.append(
                {
                    "setting": dict(setting),
                    key: values,
                    "mean": statistics.mean(values) if values else None,
                    "std": statistics.stdev(values) if len(values) > 1 else 0.0,
                    "died": len(results) - len(values),
                    "trainable_parameters": results[0]["trainable_parameters"],
                }
            )
        # A mean without the seeds that were lost would flatter a setting that is unsafe.
        complete = [row for row in rows if not row["died"]]
        if not complete:
            raise TrainingError(
                "every setting lost a run to NaN",
                where=str(self.folder.folder),
                found=f"{len(runs)} runs",
                fix="lower the learning rates",
            )
        best = max(complete, key=lambda row: row["mean"])
        chosen = tuple(best["setting"].items())
        # Anew, on train and val together; only these read the test split.
        finals = [SweepRun(chosen, seed) for seed in self.seeds]
        self.train(finals, self.together, "final")
        return rows, best, finals

    def train(self, runs: Sequence[SweepRun], data: Data, kind: str) -> None:
        """Train what has no result yet, in banks; `final` runs are tested and saved as well."""
        groups: dict[Any, list[tuple[SweepRun, Task, FitSettings]]] = {}
        for run in runs:
            # Made before this sweep was killed. Workers that share one make the same banks, whenever they begin.
            if not self.shared and self.folder.has(kind, run.name):
                continue
            task, settings = self._build(run)
            # What stacked runs must share: shapes, order of examples, number of steps.
            key = (stack_signature(task), run.seed, settings.epochs, settings.batch_size)
            groups.setdefault(key, []).append((run, task, settings))
        parts = [
            members[start : start + TOGETHER]
            for members in groups.values()
            for start in range(0, len(members), TOGETHER)
        ]
        while parts:
            made = [self._make(part, data, kind, runs) for part in parts]
            parts = [part for part in parts if self._missing(part, kind)]
            # All that is left is in other hands; should they die, it is free at the next look.
            if parts and not any(made):
                time.sleep(POLL)

    def _missing(
        self, part: Sequence[tuple[SweepRun, Task, FitSettings]], kind: str
    ) -> list[tuple[SweepRun, Task, FitSettings]]:
        return [each for each in part if not self.folder.has(kind, each[0].name)]

    def _make(
        self,
        part: Sequence[tuple[SweepRun, Task, FitSettings]],
        data: Data,
        kind: str,
        runs: Sequence[SweepRun],
    ) -> bool:
        """Train a bank, unless another worker has made it or has it in hand; whether it was made here."""
        with self._claim(part[0][0], kind) as ours:
            left = self._missing(part, kind) if ours else []
            if left:
                done = sum(self.folder.has(kind, run.name) for run in runs)
                self._train(left, data, kind, (done, len(runs)))
        return bool(left)

    @contextmanager
    def _claim(self, first: SweepRun, kind: str) -> Iterator[bool]:
        if not self.shared:
            yield True
            return
        name = hashlib.sha256(f"{kind}/{first.name}".encode()).hexdigest()[:24]
        claim = Claim.take(self.folder.folder / CLAIMS / f"{name}.lock", wait=False)
        try:
            yield claim is not None
        finally:
            if claim is not None:
                claim.give_back()

    def _build(self, run: SweepRun) -> tuple[Task, FitSettings]:
        setting = dict(run.setting)
        overrides = {RATES[k]: v for k, v in setting.items() if k in RATES}
        more = {k: v for k, v in setting.items() if k not in RATES}
        settings = replace(self.settings, seed=run.seed, **overrides)
        return Recipe(self.method, settings, {**self.options, **more}).build(self.inputs), settings

    def _train(
        self,
        part: Sequence[tuple[SweepRun, Task, FitSettings]],
        data: Data,
        kind: str,
        progress: tuple[int, int],
    ) -> None:
        done, total = progress

        problem = part[0][1].problem

        def each_epoch(epoch: int, scores: Sequence[float | None]) -> None:
            words = ""
            if known := [(score, k) for k, score in enumerate(scores) if score is not None]:
                score, k = max(known, key=lambda each: each[0])
                words = f"{problem.show(score)} {part[k][0].name} (epoch {epoch})"
            self.on_progress(done, total, words)

        started = time.perf_counter()
        results = train_in_parallel(
            self.host,
            [task for _, task, _ in part],
            [settings for _, _, settings in part],
            data.train,
            data.val,
            each_epoch=each_epoch,
        )
        # They ran at once: each is charged an equal share.
        seconds = (time.perf_counter() - started) / len(part)
        for (run, task, settings), result in zip(part, results, strict=True):
            alive = result.diverged_at is None
            tested, calibration, told = None, Calibration(), {}
            if kind == "final":
                calibration = self._save(task, run)
                if data.test is not None and alive:
                    tested = evaluate_stored(self.host, task, data.test)
            elif alive:
                cached = Cached(self.host, task, data.val.store)
                answers = collect_logits(cached, data.val, settings.batch_size, data.collate)
                calibration = judge(task, *answers)
                if not problem.one_hot:
                    told = {"problem": problem.with_errors(*answers).spec()}
            self.folder.write(
                {
                    "setting": dict(run.setting),
                    "seed": run.seed,
                    "settings": settings.to_dict(),
                    f"val_{problem.metric}": result.val_accuracy[-1]
                    if result.val_accuracy and alive
                    else None,
                    "val_by_epoch": result.val_accuracy,
                    f"test_{problem.metric}": tested,
                    **calibration.to_dict(),
                    **told,
                    "train_loss": result.train_loss if alive else None,
                    "died_at": result.diverged_at,
                    "trainable_parameters": task.trainable_parameters(),
                    "seconds": seconds,
                    "arms_together": len(part),
                },
                kind,
                run.name,
            )
        self.on_progress(done + len(part), total, "")

    def average(self, runs: Sequence[SweepRun]) -> dict[str, Any]:
        """Leave the mean of final tasks as one task, and test it."""
        data = self.together
        folders = [_final_folder(self.folder.folder, run.seed) for run in runs]
        tasks = [load(folder, self.host) for folder in folders]
        reason = reason_not_averaged(tasks) if tasks else "every seed was lost to NaN"
        if reason:
            return {"not_made": reason}
        task = average(tasks)
        save(task, self.host, folders[0].with_name("average.task"), **saved_with(self.inputs))
        tested = None if data.test is None else evaluate_stored(self.host, task, data.test)
        return {f"test_{task.problem.metric}": tested}

    def _save(self, task: Task, run: SweepRun) -> Calibration:
        """Leave a final task, with the temperature that its setting and seed had on validation."""
        tried = read_result(self.folder, TRIED, run, task.problem.metric)
        calibration = Calibration.from_dict(tried).of_another_run()
        if "problem" in tried:
            # The error bars that its setting and seed had on validation.
            task.problem = task.problem.with_errors_of(problem_from_spec(tried["problem"]))
        task.labels, task.temperature = self.inputs.data.labels, calibration.temperature
        save(
            task,
            self.host,
            _final_folder(self.folder.folder, run.seed),
            **saved_with(self.inputs),
        )
        return calibration


def _final_folder(out: Path, seed: int) -> Path:
    return out / "final" / f"seed-{seed}.task"
