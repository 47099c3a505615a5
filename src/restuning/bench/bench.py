"""One process's share of a grid: a backbone, the task at hand, and one run after the other."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field, replace
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
from restuning.bench.facts import (
    count_memory,
    count_parameters,
    count_saved_bytes,
    data_facts,
    store_facts,
)
from restuning.bench.folder import WORK, describe_run, pack_hits, task_folder
from restuning.bench.grid import Entry, GridProtocol, GridRun, layer_numbers
from restuning.bench.measure import (
    INFERRED,
    hardware,
    measure_inference,
    predict_split,
    step_seconds,
    versions,
)
from restuning.bench.suites import SuiteTask
from restuning.data import Data, load_data
from restuning.data.decoded import decode_once
from restuning.features import Stored, StoreOptions
from restuning.features.stored import reason_not_storable
from restuning.host import Host, weights_digest
from restuning.search import AUTO
from restuning.task import Task, Tuned
from restuning.training import FitSettings
from restuning.training.run import Inputs, Setup

LARGEST_STORE = 16 * 2**30
"""Bytes of one task's features up to which a grid stores them: it reads them for every seed."""


@dataclass
class LoadedTask:
    """What runs on one task share."""

    task: SuiteTask
    apart: Data
    together: Data
    stores: dict[Any, Stored | None] = field(default_factory=dict)


class Bench:
    """Loads a backbone once and carries out runs of a protocol.

    Args:
        protocol: Of the grid.
        folder: Of the grid: results below `runs`, all else below `work`.
        stores: Where feature stores lie; None for the grid's own folder.
        keep: Keep every final run's task folder below `work/tasks`.

    Raises:
        BackboneError: It cannot be loaded.
    """

    def __init__(
        self, protocol: GridProtocol, folder: Path, stores: Path | None = None, keep: bool = False
    ) -> None:
        self.protocol, self.folder, self.keep = protocol, folder, keep
        self.work = folder / WORK
        self.stores = stores or self.work / "features"
        torch.manual_seed(0)
        weights = Path(protocol.weights) if protocol.weights else None
        self.backbone: Backbone = load_backbone(protocol.backbone, weights=weights)
        self.host = Host(self.backbone.model, *self.backbone.example, **self.backbone.kwargs)
        if torch.cuda.is_available():
            self.host.cuda()
        self.device = next(self.host.model.parameters()).device
        self.known: dict[str, Any] = {}
        self.loaded: LoadedTask | None = None
        self.digest = weights_digest(self.host.model)

    def run(self, run: GridRun) -> dict[str, Any]:
        """Train, test and measure; returns the result that is written.

        Raises:
            RestuningError: The run cannot be made (it is the caller who records that).
        """
        started = time.perf_counter()
        data = self.data(run.task)
        choice, entry, final = None, run.entry, run.stage == "final"
        setting, chosen = find_setting(self.protocol, self.folder, run)
        if entry.method == AUTO:
            entry, choice = choose_entry(
                run, self.protocol, self._inputs(data), self.work / "choices" / run.name
            )
        layers = self.host.sites.layers
        options = {
            k: layer_numbers(v, layers) if k in ("layers", "taps") else v
            for k, v in self.protocol.options_of(entry, setting).items()
        }
        settings = self.protocol.settings_of(setting, run.seed)
        if choice is not None:
            settings, (told_of, chosen) = choice.settings(settings), describe_choice(choice)
            setting = tuple(told_of.items())
        torch.manual_seed(run.seed)
        tuned = self.build(entry, data.apart.num_classes, options)
        task: Any = tuned.task
        if choice is not None:
            choice.begin(task)
        inputs = self._inputs(data, final=final)
        kept = self._stored(task, data)
        setup = Setup(tuned, inputs.data) if kept is None else Setup.on(inputs, task, kept)
        if kept is not None:
            # Products of a side network are small: casting them costs more than it saves.
            settings = replace(settings, precision="no")
        tuned, fed = setup.tuned, setup.data
        folder = self.work / "fits" / run.name
        resumed = (folder / "checkpoints").exists()
        used = time.process_time()
        fitted = setup.fit(settings, folder, val=False, progress=False)
        # A machine shared with others slows the clock on the wall, not this one.
        used = time.process_time() - used
        tested = fed.test if final else fed.val
        if tested is None:
            raise DataError(
                f"there is no {'test' if final else 'validation'} split",
                where=run.task.source,
                fix="give the task one",
            )
        begun = time.perf_counter()
        found, right = predict_split(
            tuned, tested, fed.collate, settings.batch_size, settings.precision
        )
        test_seconds = time.perf_counter() - begun
        hits = found == right
        result = {
            **describe_run(run),
            "status": "done",
            "split": "test" if final else "validation",
            "accuracy": float(hits.mean()),
            "count": len(hits),
            "hits": pack_hits(hits),
            "train_loss": fitted.train_loss,
            "setting": dict(setting),
            "options": options,
            "chosen": chosen,
            "settings": settings.to_dict(),
            "parameters": count_parameters(task, self.backbone.model),
            "steps": fitted.steps,
            "data": data_facts(data.apart),
            "backbone": {
                "name": self.backbone.name,
                "weights": Path(self.backbone.weights).name,
                "digest": self.digest,
            },
            "features": store_facts(kept),
        }
        if final:
            live = tuned if kept is None else self._live(task)
            folder_of_task = task_folder(self.folder, run)
            result["file_bytes"] = count_saved_bytes(
                task, self.host, self.backbone, folder_of_task, result["accuracy"], self.keep
            )
            result["memory"] = {
                **self._memory(entry, options, live, settings, data, kept is not None),
                "process_peak_bytes": fitted.peak_memory_bytes,
                "process_measure": fitted.memory_measure,
            }
            seconds = self._inference(run.task, entry, options, live, data)
        else:
            result["memory"], seconds = {}, {}
        result["seconds"] = {
            "train": fitted.seconds + (choice.seconds if choice else 0),
            "train_cpu": None if resumed else used + (choice.cpu_seconds if choice else 0),
            "choice_cpu": choice and choice.cpu_seconds,
            "step": step_seconds(folder / "log.jsonl") or fitted.seconds / max(1, fitted.steps),
            **self._extraction(kept),
            "test": test_seconds,
            "inference": seconds.get("tuned"),
            "bare_inference": seconds.get("bare"),
            "whole": time.perf_counter() - started,
        }
        result["versions"], result["hardware"] = versions(), hardware(self.device)
        result["measured_on"] = time.strftime("%Y-%m-%d")
        shutil.rmtree(folder, ignore_errors=True)
        return result

    def build(self, entry: Entry, classes: int, options: dict[str, Any]) -> nn.Module:
        """A method or rival on this backbone, with a new head."""
        if entry.method in rivals.RIVALS:
            return rivals.build(entry.method, self.host, self.backbone, classes, **options)
        task = methods.build(entry.method, self.host, num_classes=classes, **options)
        return self._live(task.to(self.device))

    def _live(self, task: Task) -> nn.Module:
        return Tuned(self.host, task)

    def data(self, task: SuiteTask) -> LoadedTask:
        """The task's images, held until another task's are asked for."""
        if self.loaded is None or self.loaded.task != task:
            self.loaded = None
            images = self.work / "images"
            data = load_data(task.source, self.backbone)
            apart = decode_once(data, self.backbone, images)
            if apart.test is None:
                raise DataError("there is no test split", where=task.source, fix="add one")
            together = apart.train if apart.val is None else apart.train.and_also(apart.val)
            whole = Data(
                apart.name,
                together,
                None,
                apart.test,
                apart.labels,
                apart.kind,
                apart.collate,
                apart.skipped,
                apart.identity,
                apart.notes,
            )
            self.loaded = LoadedTask(task, apart, whole)
        return self.loaded

    def _stored(self, task: Any, data: LoadedTask) -> Stored | None:
        """Features of a task that needs no gradient in the backbone; one store for all such runs."""
        inputs = self._inputs(data)
        if (
            inputs.store is None
            or not isinstance(task, Task)
            or reason_not_storable(task, inputs.augment)
        ):
            return None
        needs = task.needs(self.host.readout_rule)
        if needs not in data.stores:
            used = time.process_time()
            data.stores[needs] = kept = inputs.stored(task)
            if kept is not None and kept.seconds:
                took = {"seconds": kept.seconds, "cpu": time.process_time() - used}
                write_json(self._built(kept), took)
        return data.stores[needs]

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

    def _extraction(self, kept: Stored | None) -> dict[str, float | None]:
        """What building a store took, whoever built it: on the wall, and of the processor."""
        if kept is None:
            return {"features": 0.0, "features_cpu": 0.0}
        file = self._built(kept)
        found = read_json(file) if file.exists() else {}
        return {"features": found.get("seconds", 0.0), "features_cpu": found.get("cpu")}

    def _built(self, kept: Stored) -> Path:
        return self.stores / f"{kept.store.path.name}.seconds.json"

    def _inference(
        self,
        task: SuiteTask,
        entry: Entry,
        options: dict[str, Any],
        live: nn.Module,
        data: LoadedTask,
    ) -> dict[str, float]:
        """Measured once for each form of a method on each task: weights do not change it."""
        key = f"inference {task.name} {entry.method} {options}"
        if key not in self.known:
            images = data.apart.test.gather(range(min(INFERRED, len(data.apart.test))), [])[0]
            precision = self.protocol.settings.precision
            self.known[key] = measure_inference(live, self.host, images, precision)
        return self.known[key]

    def _memory(
        self,
        entry: Entry,
        options: dict[str, Any],
        live: nn.Module,
        settings: FitSettings,
        data: LoadedTask,
        cached: bool,
    ) -> dict[str, Any]:
        """Counted once for each form of a method."""
        key = f"{entry.method} {options} {data.apart.num_classes} {settings.batch_size}"
        if key not in self.known:
            example = self.backbone.example[0].to(self.device)
            precision = self.protocol.settings.precision
            self.known[key] = count_memory(self.host, example, live, settings, precision, cached)
        return dict(self.known[key])
