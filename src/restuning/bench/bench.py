"""One process's share of a grid: a backbone, the task at hand, and one run after the other."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from restuning import methods
from restuning._errors import DataError
from restuning._files import read_json, write_json
from restuning.backbones import Backbone, load_backbone
from restuning.bench import rivals
from restuning.bench.chosen import choose_entry, describe_choice, find_setting
from restuning.bench.entries import is_detached
from restuning.bench.facts import (
    count_memory,
    count_parameters,
    count_saved_bytes,
    describe_data,
    describe_store,
)
from restuning.bench.folder import WORK, describe_run, pack_hits, refuse_other_source, task_folder
from restuning.bench.grid import Entry, GridProtocol, GridRun, Setting, layer_numbers
from restuning.bench.measure import (
    INFERRED,
    describe_hardware,
    measure_inference,
    predict_split,
    read_step_seconds,
    read_versions,
)
from restuning.bench.suites import SuiteTask
from restuning.data import Data, load_data
from restuning.data.decoded import decode_once
from restuning.features import Stored, StoreOptions
from restuning.features.stored import reason_not_storable
from restuning.host import Host, weights_digest
from restuning.runtime.hub import named_in
from restuning.search import AUTO, CANDIDATES, Choice
from restuning.task import Task, Tuned
from restuning.training import FitSettings
from restuning.training.run import Inputs, Setup

LARGEST_STORE = 16 * 2**30
"""Bytes of one task's features up to which a grid stores them: it reads them for every seed."""


@dataclass
class LoadedTask:
    """The data and stores that all runs on one task share."""

    task: SuiteTask
    apart: Data
    together: Data
    stores: dict[Any, Stored | None] = field(default_factory=dict)


@dataclass(frozen=True)
class ResolvedRun:
    """What a run trains, and how, once validation and the backbone have been asked.

    Attributes:
        entry: Its method; of `auto` the one that was chosen.
        setting: What was chosen on validation, as results tell it.
        options: Of the method.
        settings: Of training on inputs.
        chosen: Among what, and how that scored; None where there was nothing to choose.
        choice: Of `auto`, else None.
    """

    entry: Entry
    setting: Setting
    options: dict[str, Any]
    settings: FitSettings
    chosen: dict[str, Any] | None
    choice: Choice | None


class Bench:
    """Loads a backbone once and carries out runs of a protocol.

    Args:
        protocol: Of the grid.
        folder: Of the grid: results below `runs`, all else below `work`.
        stores: Where feature stores lie; None for the grid's own folder.
        keep: Keep every final run's task folder below `work/tasks`.
        entries: Columns of the grid: one pass over a task's data stores what all of them read.
        track: Trackers, by name, that are told of every training.

    Raises:
        BackboneError: It cannot be loaded.
    """

    def __init__(
        self,
        protocol: GridProtocol,
        folder: Path,
        stores: Path | None = None,
        keep: bool = False,
        entries: Sequence[Entry] = (),
        track: Sequence[str] = (),
    ) -> None:
        self.protocol, self.folder, self.keep, self.track = protocol, folder, keep, track
        self.entries = tuple(entries)
        self.work = folder / WORK
        self.stores = stores or self.work / "features"
        # Weights that a backbone draws afresh must be the same in every process of a grid.
        torch.manual_seed(0)
        weights = Path(protocol.weights) if protocol.weights else None
        with named_in(protocol.named_in):
            self.backbone: Backbone = load_backbone(protocol.backbone, weights=weights)
        self.host = Host(self.backbone.model, *self.backbone.example, **self.backbone.kwargs)
        if torch.cuda.is_available():
            self.host.cuda()
        self.device = next(self.host.model.parameters()).device
        self.known: dict[str, Any] = {}
        self.loaded: LoadedTask | None = None
        self.digest = weights_digest(self.host.model)
        backbone = f"{type(self.host.model).__name__} {self.digest}"
        refuse_other_source(folder, "the backbone", backbone)

    def run(self, run: GridRun) -> dict[str, Any]:
        """Train, test and measure; returns the result that is written.

        Raises:
            RestuningError: The run cannot be made (it is the caller who records that).
        """
        started = time.perf_counter()
        data, final = self.data(run.task), run.stage == "final"
        resolved = self._resolve(run, data)
        setup, settings = self._set_up(run, resolved, data)
        folder = self.work / "fits" / run.name
        # A run that goes on from a checkpoint has no whole time of training to tell.
        resumed = (folder / "checkpoints").exists()
        cpu = time.process_time()
        about = {
            "run": run.name,
            "task": run.task.name,
            "method": run.entry.label,
            "backbone": self.protocol.backbone,
            "stage": run.stage,
        }
        # Of no setting that a result is known by.
        told = replace(settings, track=self.track)
        fitted = setup.fit(told, folder, val=False, progress=False, about=about)
        # A machine shared with others slows the clock on the wall, not this one.
        cpu = time.process_time() - cpu
        split = setup.data.test if final else setup.data.val
        if split is None:
            raise DataError(
                f"there is no {'test' if final else 'validation'} split",
                where=run.task.source,
                fix="give the task one",
            )
        test_started = time.perf_counter()
        answers, labels = predict_split(
            setup.tuned, split, setup.data.collate, settings.batch_size, settings.precision
        )
        test_seconds = time.perf_counter() - test_started
        # Kept image by image: reports resample the same images for all methods.
        hits = answers == labels
        result = {
            **describe_run(run, self.protocol),
            "status": "done",
            "split": "test" if final else "validation",
            "accuracy": float(hits.mean()),
            "count": len(hits),
            "hits": pack_hits(hits),
            "train_loss": fitted.train_loss,
            "setting": dict(resolved.setting),
            "options": resolved.options,
            "chosen": resolved.chosen,
            "settings": settings.to_dict(),
            "parameters": count_parameters(setup.task, self.backbone.model),
            "steps": fitted.steps,
            "data": describe_data(data.apart),
            "backbone": {
                "name": self.backbone.name,
                "weights": Path(self.backbone.weights).name,
                "digest": self.digest,
            },
            "features": describe_store(setup.stored),
        }
        seconds: dict[str, float] = {}
        result["memory"] = {}
        if final:
            # What a user runs reads images, whatever it was trained from.
            live = setup.tuned if setup.stored is None else self._attach(setup.task)
            result["file_bytes"] = count_saved_bytes(
                setup.task,
                self.host,
                self.backbone,
                task_folder(self.folder, run),
                result["accuracy"],
                self.keep,
            )
            result["memory"] = {
                **self._count_memory(resolved, live, settings, data, setup.stored is not None),
                "process_peak_bytes": fitted.peak_memory_bytes,
                "process_measure": fitted.memory_measure,
            }
            seconds = self._measure_inference(run.task, resolved, live, data)
        choice = resolved.choice
        result["seconds"] = {
            "train": fitted.seconds + (choice.seconds if choice else 0),
            # The time of `auto` counts as training: who names a method has chosen it before.
            "train_cpu": None if resumed else cpu + (choice.cpu_seconds if choice else 0),
            "choice_cpu": choice and choice.cpu_seconds,
            "step": read_step_seconds(folder / "log.jsonl")
            or fitted.seconds / max(1, fitted.steps),
            **self._extraction_seconds(setup.stored),
            "test": test_seconds,
            "inference": seconds.get("tuned"),
            "bare_inference": seconds.get("bare"),
            "whole": time.perf_counter() - started,
        }
        result["versions"], result["hardware"] = read_versions(), describe_hardware(self.device)
        result["measured_on"] = time.strftime("%Y-%m-%d")
        # Checkpoints are for runs that break off; this one has its result.
        shutil.rmtree(folder, ignore_errors=True)
        return result

    def _resolve(self, run: GridRun, data: LoadedTask) -> ResolvedRun:
        """Method, options and settings of a run: as they stand in the grid, or as chosen before."""
        entry, choice = run.entry, None
        setting, chosen = find_setting(self.protocol, self.folder, run)
        if entry.method == AUTO:
            entry, choice = choose_entry(
                run, self.protocol, self._inputs(data), self.work / "choices" / run.name
            )
        options = self._options(entry, setting)
        settings = self.protocol.settings_for(setting, run.seed)
        if choice is not None:
            settings = choice.settings(settings)
            words, chosen = describe_choice(choice)
            setting = tuple(words.items())
        return ResolvedRun(entry, setting, options, settings, chosen, choice)

    def _options(self, entry: Entry, setting: Setting) -> dict[str, Any]:
        """The options of a method; `first-1/3` and the like mean numbers now that the backbone is known."""
        layers = self.host.sites.layers
        return {
            name: layer_numbers(value, layers) if name in ("layers", "taps") else value
            for name, value in self.protocol.options_for(entry, setting).items()
        }

    def _set_up(
        self, run: GridRun, resolved: ResolvedRun, data: LoadedTask
    ) -> tuple[Setup, FitSettings]:
        """Build the run's task with the data it is fed, and the training settings for those."""
        # Right before the task is built: start weights depend on the seed and on nothing before.
        torch.manual_seed(run.seed)
        tuned = self.build(resolved.entry, data.apart.num_classes, resolved.options)
        task: Any = tuned.task
        if resolved.choice is not None:
            resolved.choice.begin(task)
        inputs = self._inputs(data, final=run.stage == "final")
        stored = self._open_store(task, data)
        if stored is None:
            return Setup(tuned, inputs.data), resolved.settings
        # Products of a side network are small: casting them costs more than it saves.
        return Setup.on(inputs, task, stored), replace(resolved.settings, precision="no")

    def build(self, entry: Entry, classes: int, options: dict[str, Any]) -> nn.Module:
        """Build a method or a rival on this backbone, with a new head."""
        if entry.method in rivals.RIVALS:
            return rivals.build(entry.method, self.host, self.backbone, classes, **options)
        task = methods.build(entry.method, self.host, num_classes=classes, **options)
        return self._attach(task.to(self.device))

    def _attach(self, task: Task) -> nn.Module:
        return Tuned(self.host, task)

    def data(self, task: SuiteTask) -> LoadedTask:
        """Load a task's images; they stay in memory until those of another task are asked for."""
        if self.loaded is None or self.loaded.task != task:
            # Let go before the next are decoded: two tasks' images need not fit in memory together.
            self.loaded = None
            images = self.work / "images"
            data = load_data(task.source, self.backbone, task.options)
            apart = decode_once(data, self.backbone, images)
            refuse_other_source(self.folder, f"the data of {task.name}", apart.identity, task.name)
            if apart.test is None:
                raise DataError("there is no test split", where=task.source, fix="add one")
            # The protocol of VTAB: the final training is on train and val, with what val has
            # chosen.
            together = apart.train if apart.val is None else apart.train.concatenate(apart.val)
            whole = Data(
                apart.name,
                together,
                None,
                apart.test,
                apart.labels,
                apart.kind,
                apart.collate,
                apart.left_out,
                notes=apart.notes,
            )
            self.loaded = LoadedTask(task, apart, whole)
        return self.loaded

    def _open_store(self, task: Any, data: LoadedTask) -> Stored | None:
        """Features of a task that needs no gradient in the backbone; one store for all such runs."""
        inputs = self._inputs(data)
        if (
            inputs.store is None
            or not isinstance(task, Task)
            or reason_not_storable(task, inputs.augment)
        ):
            return None
        needs = task.needs(self.host.readout_rule)
        # Methods that read the same share a store, so it is built once for all their runs.
        if needs not in data.stores:
            wall, cpu = time.perf_counter(), time.process_time()
            there = inputs.open_store(task, build=False)
            if there is None:
                inputs.store_once([lambda: task, *self._forms(data)])
            data.stores[needs] = stored = inputs.open_store(task)
            if stored is not None and there is None:
                # Beside the store: whichever process built it, every run that reads it is charged
                # for it.
                took = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
                write_json(self._seconds_file(stored), took, sealed=True)
        return data.stores[needs]

    def _forms(self, data: LoadedTask) -> Iterator[Callable[[], Task]]:
        """What makes a task of each column and setting that is trained beside the backbone."""
        for entry in filter(is_detached, self.entries):
            if entry.method == AUTO:
                entries = [Entry(entry.label, each.method) for each in CANDIDATES]
                tried = [(one, ()) for one in entries if is_detached(one)]
            else:
                tried = [(entry, setting) for setting in self.protocol.candidates(entry)]
            for one, setting in tried:
                yield partial(self._build_form, one, setting, data.apart.num_classes)

    def _build_form(self, entry: Entry, setting: Setting, classes: int) -> Any:
        return self.build(entry, classes, self._options(entry, setting)).task

    def _inputs(self, data: LoadedTask, final: bool = False) -> Inputs:
        """A task's data before the backbone; for a final run train and val are one split."""
        # Stored features are those of live training.
        precision = "bf16" if self.protocol.settings.precision == "bf16" else "fp32"
        store = StoreOptions(self.stores, self.protocol.dtype, precision, limit=LARGEST_STORE)
        return Inputs(
            self.host,
            self.backbone,
            data.together if final else data.apart,
            lambda: data.apart,
            store if self.protocol.cache else None,
            final=final,
        )

    def _extraction_seconds(self, stored: Stored | None) -> dict[str, float | None]:
        """What building a store took, whoever built it: on the wall, and of the processor."""
        if stored is None:
            return {"features": 0.0, "features_cpu": 0.0}
        file = self._seconds_file(stored)
        took = read_json(file) if file.exists() else {}
        return {"features": took.get("seconds", 0.0), "features_cpu": took.get("cpu")}

    def _seconds_file(self, stored: Stored) -> Path:
        return self.stores / f"{stored.store.path.name}.seconds.json"

    def _measure_inference(
        self, task: SuiteTask, resolved: ResolvedRun, live: nn.Module, data: LoadedTask
    ) -> dict[str, float]:
        """Measure inference once for each method, options and task: weights do not change it."""
        # By task as well: the batch that is timed is of its images.
        key = f"inference {task.name} {resolved.entry.method} {resolved.options}"
        if key not in self.known:
            images = data.apart.test.gather(range(min(INFERRED, len(data.apart.test))), [])[0]
            precision = self.protocol.settings.precision
            self.known[key] = measure_inference(live, self.host, images, precision)
        return self.known[key]

    def _count_memory(
        self,
        resolved: ResolvedRun,
        live: nn.Module,
        settings: FitSettings,
        data: LoadedTask,
        cached: bool,
    ) -> dict[str, Any]:
        """Count the memory of a step, once for each method with its options."""
        key = f"{resolved.entry.method} {resolved.options} {data.apart.num_classes} {settings.batch_size}"
        if key not in self.known:
            example = self.backbone.example[0].to(self.device)
            precision = self.protocol.settings.precision
            self.known[key] = count_memory(self.host, example, live, settings, precision, cached)
        return dict(self.known[key])
