"""A sweep: a grid of settings over seeds, chosen on validation, tested once."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from restuning import methods
from restuning._errors import RestuningError, TrainingError
from restuning.data import Data
from restuning.features import StoredFeatures
from restuning.host import Extractor
from restuning.task import Task, save
from restuning.training import FitSettings
from restuning.training.arms import evaluate_arm, form, train_arms

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
"""Arms of one bank: on CPU more gain nothing, and a killed sweep loses no more than these."""


@dataclass(frozen=True)
class Arm:
    """One run of a sweep: a setting and a seed."""

    setting: tuple[tuple[str, Any], ...]
    seed: int

    @property
    def name(self) -> str:
        """Of its result file."""
        return ".".join([*(f"{k}={v}" for k, v in self.setting), f"seed={self.seed}"])


def parse_grid(text: str) -> dict[str, list[Any]]:
    """`lr=1e-3,3e-3,rank=4,8` as `{"lr": [0.001, 0.003], "rank": [4, 8]}`.

    Raises:
        TrainingError: It does not read so.
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
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def sweep(
    host: Extractor,
    method: str,
    search: Data,
    final: Data,
    grid: Mapping[str, Sequence[Any]],
    *,
    seeds: Sequence[int],
    base: FitSettings,
    out: Path,
    options: Mapping[str, Any] | None = None,
    card: Mapping[str, Any] | None = None,
    say: Callable[[int, int, str], None] = lambda done, total, best: None,
) -> dict[str, Any]:
    """Train every setting of a grid with every seed, choose on validation, test the choice.

    Arms of one form, seed and length train together as one bank. Each result is one file in
    `out/arms`; a sweep that is started again goes on with the arms that have none.

    Args:
        host: The frozen backbone.
        method: A method whose task trains from stored features.
        search: Stored features, with validation data.
        final: The same with train and val as one, for the final runs.
        grid: Values by setting: `lr`, `lambda` (its rate over the others'), `wd`, `clip`, `smoothing`, `batch`, `epochs`, or any option
            of the method (`rank`, `scale`, ...).
        seeds: Of the runs.
        base: Settings that the grid does not name.
        out: Folder of the sweep.
        options: Options of the method that the grid does not name.
        card: For the task folders of the final runs: `backbone`, `preprocessing`, `labels`.
        say: Told after each epoch: arms done, arms in all, the best so far in words.

    The tasks of the final runs are left in `out/final/seed-N.task`.

    Returns:
        As `sweep.json`: `settings` (with `val_accuracy` by seed, mean and std), `best`, and `final`
        (test accuracy by seed, mean and std).

    Raises:
        TrainingError: There is no validation data, the folder holds another sweep, or every arm
            died.
    """
    if search.val is None:
        raise TrainingError(
            "a sweep chooses on validation data", found="none", fix="give data with a val split"
        )
    run = _Sweep(host, method, base, dict(options or {}), out, dict(card or {}), say)
    identity = {
        "method": method,
        "grid": {k: list(v) for k, v in grid.items()},
        "seeds": list(seeds),
        "base": base.identity(),
        "options": dict(options or {}),
        "data": search.identity,
        "backbone": host.fingerprint(),
    }
    run.open(json.loads(json.dumps(identity, default=str)))
    started = time.perf_counter()
    settings = [
        tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
    ]
    arms = [Arm(setting, seed) for seed in seeds for setting in settings]
    run.train(arms, search.train, search.val, search.num_classes, "arms")
    rows = []
    for setting in settings:
        found = [run.result("arms", Arm(setting, seed)) for seed in seeds]
        values = [r["val_accuracy"] for r in found if r["died_at"] is None]
        rows.append(
            {
                "setting": dict(setting),
                "val_accuracy": values,
                "mean": statistics.mean(values) if values else None,
                "std": statistics.stdev(values) if len(values) > 1 else 0.0,
                "died": len(found) - len(values),
                "trainable_parameters": found[0]["trainable_parameters"],
            }
        )
    whole = [row for row in rows if not row["died"]]
    if not whole:
        raise TrainingError(
            "every setting lost an arm to NaN",
            where=str(out),
            found=f"{len(arms)} arms",
            fix="lower the learning rates",
        )
    best = max(whole, key=lambda row: row["mean"])
    chosen = tuple(best["setting"].items())
    finals = [Arm(chosen, seed) for seed in seeds]
    run.train(finals, final.train, None, final.num_classes, "final", test=final.test)
    tested = [run.result("final", arm) for arm in finals]
    accuracy = [r["test_accuracy"] for r in tested if r["test_accuracy"] is not None]
    report = {
        **identity,
        "settings": rows,
        "best": best,
        "final": {
            "test_accuracy": accuracy,
            "mean": statistics.mean(accuracy) if accuracy else None,
            "std": statistics.stdev(accuracy) if len(accuracy) > 1 else 0.0,
        },
        "arms": len(arms),
        "seconds": time.perf_counter() - started,
    }
    _write(out / "sweep.json", report)
    return report


class _Sweep:
    """What all groups of arms share."""

    def __init__(
        self,
        host: Extractor,
        method: str,
        base: FitSettings,
        options: dict[str, Any],
        out: Path,
        card: dict[str, Any],
        say: Callable[[int, int, str], None],
    ) -> None:
        self.host, self.method, self.base, self.options = host, method, base, options
        self.out, self.card, self.say = out, card, say

    def open(self, identity: dict[str, Any]) -> None:
        file = self.out / "grid.json"
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            differs = [k for k in identity if before.get(k) != identity[k]]
            if differs:
                raise TrainingError(
                    "this folder holds another sweep",
                    where=str(self.out),
                    found=f"other {', '.join(differs)}",
                    fix="choose another --out",
                )
        else:
            self.out.mkdir(parents=True, exist_ok=True)
            _write(file, identity)

    def file(self, kind: str, arm: Arm) -> Path:
        return self.out / kind / f"{arm.name}.json"

    def result(self, kind: str, arm: Arm) -> dict[str, Any]:
        return json.loads(self.file(kind, arm).read_text(encoding="utf-8"))

    def train(
        self,
        arms: Sequence[Arm],
        train: StoredFeatures,
        val: StoredFeatures | None,
        classes: int,
        kind: str,
        test: StoredFeatures | None = None,
    ) -> None:
        groups: dict[Any, list[tuple[Arm, Task, FitSettings]]] = {}
        for arm in arms:
            if self.file(kind, arm).exists():
                continue
            task, settings = self._made(arm, classes)
            key = (form(task), arm.seed, settings.epochs, settings.batch_size)
            groups.setdefault(key, []).append((arm, task, settings))
        done = sum(self.file(kind, arm).exists() for arm in arms)
        for members in groups.values():
            for start in range(0, len(members), TOGETHER):
                part = members[start : start + TOGETHER]
                self._train(part, train, val, kind, test, done, len(arms))
                done += len(part)

    def _made(self, arm: Arm, classes: int) -> tuple[Task, FitSettings]:
        setting = dict(arm.setting)
        own = {RATES[k]: v for k, v in setting.items() if k in RATES}
        more = {k: v for k, v in setting.items() if k not in RATES}
        torch.manual_seed(arm.seed)
        task = methods.build(self.method, self.host, classes, **{**self.options, **more})
        if task.side is None and (task.inline_tuners or len(task.weights)):
            raise TrainingError(
                "a sweep trains from stored features",
                where=self.method,
                found="tuners inside the backbone",
                fix="sweep a bypass method or linear",
            )
        return task, replace(self.base, seed=arm.seed, **own)

    def _train(
        self,
        part: Sequence[tuple[Arm, Task, FitSettings]],
        train: StoredFeatures,
        val: StoredFeatures | None,
        kind: str,
        test: StoredFeatures | None,
        done: int,
        total: int,
    ) -> None:
        def each_epoch(epoch: int, accuracy: list[float]) -> None:
            words = ""
            if accuracy:
                k = max(range(len(accuracy)), key=lambda i: accuracy[i])
                words = f"{accuracy[k]:.2%} {part[k][0].name} (epoch {epoch})"
            self.say(done, total, words)

        started = time.perf_counter()
        results = train_arms(
            self.host,
            [t for _, t, _ in part],
            [s for _, _, s in part],
            train,
            val,
            each_epoch=each_epoch,
        )
        seconds = (time.perf_counter() - started) / len(part)
        for (arm, task, settings), result in zip(part, results, strict=True):
            alive = result.died_at is None
            if test is not None:
                task.labels = self.card.get("labels")
                save(
                    task,
                    self.host,
                    self.out / kind / f"seed-{arm.seed}.task",
                    backbone=str(self.card.get("backbone", "")),
                    preprocessing=self.card.get("preprocessing"),
                )
            _write(
                self.file(kind, arm),
                {
                    "setting": dict(arm.setting),
                    "seed": arm.seed,
                    "settings": settings.to_dict(),
                    "val_accuracy": result.val_accuracy[-1]
                    if result.val_accuracy and alive
                    else None,
                    "val_by_epoch": result.val_accuracy,
                    "test_accuracy": evaluate_arm(self.host, task, test)
                    if test and alive
                    else None,
                    "train_loss": result.train_loss if alive else None,
                    "died_at": result.died_at,
                    "trainable_parameters": task.trainable_parameters(),
                    "seconds": seconds,
                    "arms_together": len(part),
                },
            )
        self.say(done + len(part), total, "")


def _write(file: Path, content: dict[str, Any]) -> None:
    partial = file.with_suffix(".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise RestuningError(
            "a result cannot be written",
            where=str(file),
            found=error.strerror or str(error),
            fix="free space and run the same command again: finished arms are kept",
        ) from None
