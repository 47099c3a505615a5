"""One run from data to a task file: build, store or live, prepare, fit, test, write down.

The parts are `Source` (where data come from), `Inputs` (a data set in front of a backbone),
`Recipe` (a method with its settings), `Setup` (a task with what it is fed) and `run_task`, which
makes a whole run of them. A benchmark or a search takes the parts and adds what is its own.
"""

from __future__ import annotations

import itertools
import logging
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from restuning import methods
from restuning._errors import DataError, RestuningError, TrainingError, warn
from restuning._files import expand_home, hold_folder, write_json
from restuning._version import __version__
from restuning.backbones import Backbone
from restuning.bypass import Ridge
from restuning.data import LONGEST_TEXT, Data, DataOptions, load_columns, load_data
from restuning.data.digests import Tell, quiet
from restuning.data.hub_sets import name_on_hub
from restuning.data.identity import Samples, concatenate, find_samples
from restuning.data.labelled import find_labels
from restuning.data.load import is_by_name
from restuning.data.media import media_of
from restuning.data.tables import find_table
from restuning.features import Cached, Stored, StoreOptions, open_or_build, store_once
from restuning.features.cached import contents_of_splits
from restuning.features.stored import (
    BY_ITSELF,
    VIEWS_OF,
    choose_pool,
    reason_not_storable,
    taps_to_store,
)
from restuning.forecast import FinishedRun, forecast_run
from restuning.host import Extractor
from restuning.problems import OfPixels, Problem, Segmentation, find_problem
from restuning.problems import from_spec as problem_from_spec
from restuning.problems import kinds as problem_kinds
from restuning.problems.judged import Judged
from restuning.problems.meters import read_meters
from restuning.sites import Needs
from restuning.task import Task, Tuned, check_savable, save
from restuning.training.balance import (
    find_groups,
    find_weights,
    finds_by_targets,
    takes_weights,
    warn_of_imbalance,
)
from restuning.training.beforehand import OF_A_RUN, check_beforehand, read_once
from restuning.training.calibrate import LEFT_OUT_ROWS, Calibration, calibrate, scales_itself
from restuning.training.callbacks import Callback
from restuning.training.checkpoint import is_finished, read_newest
from restuning.training.evaluate import collect_logits, evaluate
from restuning.training.fit import fit, fit_until, refuse_in_several
from restuning.training.identity import (
    describe_classes,
    describe_contents,
    describe_data,
    describe_form,
    describe_host,
    describe_settings,
)
from restuning.training.loop import CHECKPOINTS, check_same_run
from restuning.training.prepare import solve_tuned
from restuning.training.run_report import REPORT, describe_run, write_report
from restuning.training.settings import FitSettings
from restuning.training.sums_file import (
    KeptSums,
    describe_sums,
    find_updated,
    reason_not_kept,
    remove_other_sums,
    sums_of,
    write_sums,
)
from restuning.training.supervised import FitResult
from restuning.training.together import alone, from_main
from restuning.training.trackers import check_installed

Log = Callable[[str], None]


def silent(line: str) -> None:
    """A log that nobody reads."""


def log_line(line: str) -> None:
    """The log where a caller gives none: Python's logger `restuning`, at INFO."""
    logging.getLogger("restuning").info("%s", line)


@dataclass(frozen=True)
class Source:
    """Where training data come from, and whether features of them may be stored.

    Attributes:
        name: As `load_data` takes it, a name or a Hugging Face table; or a data set that is loaded already.
        augment: Of training images: "none", "flip", "timm", "timm:POLICY".
        final: Train on train and val together.
        skip_bad: Leave corrupt images out.
        text, image, audio, label: Columns of a csv or of a table.
        problem: Kind of answer in a column; None to find it.
        classes: Of masks: names of classes, or a file of them; None for that beside the data.
        whole: Resize images whole and crop nothing.
        scaled_jpeg: Decode large JPEG files scaled.
        dimensions: Of an embedding.
        max_tokens: Tokens of a text that are read.
        seconds: Of a sound, what is read.
        cache: Train from stored features where that is exact.
        store: Where stores lie and how values are kept.
    """

    # A Hugging Face table has no type of its own where that library is not installed.
    name: str | Data | Any
    augment: str = "none"
    final: bool = False
    skip_bad: bool = False
    text: str = "text"
    label: str | Sequence[str] = "label"
    image: str | None = None
    problem: str | None = None
    classes: str | Sequence[str] | None = None
    whole: bool = False
    scaled_jpeg: bool = False
    dimensions: int | None = None
    max_tokens: int = LONGEST_TEXT
    audio: str | None = None
    seconds: float | None = None
    cache: bool = True
    store: StoreOptions = field(default_factory=lambda: StoreOptions(limit=BY_ITSELF))

    def load(self, backbone: Backbone, *, plain: bool = False) -> Data:
        """The data set; `plain` without augmentation and with its splits apart.

        Raises:
            DataError: Missing or malformed data, or augmentation is asked of a data set that is
                loaded already.
        """
        if isinstance(self.name, Data):
            return self._use_loaded(self.name, plain)
        return load_data(self.name, backbone, self._options(plain))

    def columns(self, backbone: Backbone, log: Log = silent) -> dict[str, Source]:
        """A source for each column of answers; empty of data that are no table, and of one column outside a list.

        Each names its problem, so that a run of it begins the same by itself; the log is told what was assumed.
        """
        options = self._options(plain=True)
        if isinstance(self.name, Data) or not find_table(self.name, backbone, options):
            return {}
        found = load_columns(self.name, backbone, options)
        if len(found) < 2 and isinstance(self.label, str):
            return {}
        for data in found.values():
            if data.assumed:
                log(f"problem   {data.assumed}")
        # By itself a column of classes would not know that images are whole for another one's sake.
        of_pixels = any(isinstance(data.problem, OfPixels) for data in found.values())
        inputs = _name_inputs(next(iter(found.values())), backbone)
        return {
            column: replace(
                self,
                label=column,
                problem=data.problem.kind,
                classes=self.classes if isinstance(data.problem, Segmentation) else None,
                whole=self.whole or of_pixels,
                **inputs,
            )
            for column, data in found.items()
        }

    def _options(self, plain: bool) -> DataOptions:
        return DataOptions(
            augment="none" if plain else self.augment,
            skip_bad=self.skip_bad,
            final=False if plain else self.final,
            text=self.text,
            label=self.label,
            image=self.image,
            problem=self.problem,
            classes=self.classes,
            whole=self.whole,
            scaled_jpeg=self.scaled_jpeg,
            dimensions=self.dimensions,
            max_tokens=self.max_tokens,
            audio=self.audio,
            seconds=self.seconds,
        )

    def _use_loaded(self, data: Data, plain: bool) -> Data:
        if self.augment != "none":
            raise DataError(
                "images that are loaded already are not augmented",
                where=data.name,
                found=f"augment={self.augment!r}",
                fix="give the name or path of the data, or load_data(..., augment=...)",
            )
        usual = {each.name: each.default for each in fields(self)}
        named = (
            *("label", "image", "audio", "problem", "classes", "whole", "scaled_jpeg"),
            *("dimensions", "seconds"),
        )
        asked = [c for c in named if getattr(self, c) != usual[c]]
        if asked:
            raise DataError(
                "data that are loaded already are taken as they are",
                where=", ".join(asked),
                found=data.name,
                fix="give the name or path of the data, or load_data(..., "
                f"{', '.join(f'{c}=...' for c in asked)})",
            )
        if plain or not self.final or data.val is None:
            return data
        both = torch.utils.data.ConcatDataset([data.train, data.val])
        return data.with_splits(train=both, val=None)

    def open(self, host: Extractor, backbone: Backbone, data: Data | None = None) -> Inputs:
        """Load the data and put them in front of a backbone.

        Args:
            host: The frozen backbone, on its device.
            backbone: The backbone that `host` was made of.
            data: The same data, where they were loaded before.
        """
        # Stores hold plain images, split by split: else the data are listed once more for them.
        same = self.augment == "none" and not self.final
        data = self.load(backbone) if data is None else data
        return Inputs(
            host,
            backbone,
            data,
            # Loaded only where features are stored: it lists, and with skip_bad decodes, all files.
            (lambda: data) if same else (lambda: self.load(backbone, plain=True)),
            replace(self.store, views=VIEWS_OF.get(self.augment, 1)) if self.cache else None,
            self.augment,
            self.final,
        )


def _name_inputs(data: Data, backbone: Backbone) -> dict[str, Any]:
    """The column of images or sounds of a table, where it has no usual name: alone a column would not know which others are answers."""
    media = None if backbone.preprocessing is None else media_of(backbone.preprocessing)
    return {} if media is None or data.source in media.columns else {media.kind: data.source}


@dataclass(frozen=True)
class Inputs:
    """A data set in front of a frozen backbone: as it is, or as features that are stored once.

    Attributes:
        host: The frozen backbone, on its device.
        backbone: The backbone that `host` was made of.
        data: As live training reads it, maybe augmented.
        load_plain: Gives the same without augmentation and with its splits apart.
        store: How features are stored; None trains live.
        augment: Augmentation of `data`.
        final: Whether training reads train and val together.
        options: Options of every method that is built for it, such as `pool`.
    """

    host: Extractor
    backbone: Backbone
    data: Data
    load_plain: Callable[[], Data]
    store: StoreOptions | None = None
    augment: str = "none"
    final: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def plain(self) -> Data:
        """Without augmentation, splits apart."""
        return self.load_plain()

    def open_store(self, task: Task, *others: Task, build: bool = True) -> Stored | None:
        """The store that a task trains from.

        Args:
            task: Whose taps and tokens are stored.
            others: That train from the same rows: other settings of its method.
            build: Whether one is built that is not there yet.

        Returns:
            None where training from a store would not be exact, or none can be built.

        Raises:
            StoreError: It cannot be written, or one that is there is damaged.
        """
        if self.store is None or reason_not_storable(task, self.augment):
            return None
        needs = task.needs(self.host.readout_rule)
        if others:
            more = [other.needs(self.host.readout_rule) for other in others]
            alike = [each for each in more if (each.tokens == "pool") == (needs.tokens == "pool")]
            needs = taps_to_store(self.host, needs, *alike)
        # A limit of nothing opens what is there and builds nothing.
        options = self.store if build else replace(self.store, limit=0, log=silent)
        return open_or_build(self.host, self.backbone, self.plain, needs, options)

    def store_once(self, build: Iterable[Callable[[], Task]]) -> None:
        """Make one pass over the data for all tasks of a command; `open_store` finds what it left.

        Args:
            build: Make the tasks. One that cannot be made, or does not train from a store, asks for nothing.

        Raises:
            StoreError: It cannot be written, or one that is there is damaged.
        """
        if self.store is None:
            return
        needs: list[Needs] = []
        for make in build:
            # Whoever trains it is told why.
            with suppress(RestuningError):
                task = make()
                if not reason_not_storable(task, self.augment):
                    needs.append(task.needs(self.host.readout_rule))
        store_once(self.host, self.backbone, self.plain, needs, self.store)

    @property
    def preprocessing(self) -> dict[str, Any] | None:
        """How an input becomes what the backbone takes, as a task file tells it."""
        own = self.backbone.preprocessing
        return self.data.notes.get("preprocessing") or (own.to_dict() if own else None)

    def describe(self) -> list[str]:
        """Backbone, sites, readout and data, a line each."""
        host, rule, pool = self.host, self.host.readout_rule, self.options.get("pool")
        model = type(self.backbone.model).__name__
        proof = "given" if pool else rule.proof
        readout = f"{pool or rule.pool} after {rule.norm or 'no norm'}"
        weights = self.backbone.weights
        return [
            f"backbone  {self.backbone.name}: {model}, {host.sites.layers} layers, weights {weights}",
            f"sites     {host.sites.summarise()}",
            f"readout   {readout}, width {rule.dim} ({proof})",
            f"data      {self.data.describe()}",
            *([f"problem   {self.data.assumed}"] if self.data.assumed else []),
        ]


def open_inputs(
    host: Extractor,
    backbone: Backbone,
    data: Data,
    store: StoreOptions | None = None,
    options: Mapping[str, Any] | None = None,
) -> Inputs:
    """A data set that is loaded, without augmentation, in front of a backbone.

    Args:
        host: The frozen backbone, on its device.
        backbone: The backbone that `host` was made of.
        data: The data set, with its splits apart.
        store: How features are stored; None for the usual place, up to `BY_ITSELF` bytes.
        options: Options of every method, such as `pool`.
    """
    store = StoreOptions(limit=BY_ITSELF) if store is None else store
    return Inputs(host, backbone, data, lambda: data, store, options=dict(options or {}))


def with_pool(inputs: Inputs, options: Mapping[str, Any]) -> Inputs:
    """The inputs with options of every method, and among them the readout that the data ask for."""
    backbone, data = inputs.backbone, inputs.data
    pool = options.get("pool") or choose_pool(backbone, data)
    return replace(inputs, options={**options, "pool": pool} if pool else dict(options))


@dataclass(frozen=True)
class Recipe:
    """A method and how it is trained.

    Attributes:
        method: A name of `methods`.
        settings: How it is trained.
        options: Options of this method; they win over those of all methods.
        head: A head to start from; None for a new one.
        begin: Gives the new task other first weights.
        calibration: That of another run, for one that leaves no held-out answers to fit it to.
        told: Likewise a problem, for its error bars.
    """

    method: str
    settings: FitSettings
    options: Mapping[str, Any] = field(default_factory=dict)
    head: nn.Linear | None = None
    begin: Callable[[Task], None] | None = None
    calibration: Calibration | None = None
    told: Problem | None = None

    def build(self, inputs: Inputs) -> Task:
        """A new task on the backbone's device, with the first weights of the seed.

        Raises:
            UnknownNameError: No such method or option.
            NoSitesError: The backbone has no site of an operation the method tunes.
        """
        # First weights follow from the seed, whatever was drawn before.
        torch.manual_seed(self.settings.seed)
        task = methods.build(
            self.method,
            inputs.host,
            num_classes=inputs.data.num_classes,
            head=self.head,
            **{**inputs.options, **self.options},
        )
        task.problem = inputs.data.problem
        task = task.to(inputs.host.device)
        if self.begin is not None:
            self.begin(task)
        return task

    def build_form(self, inputs: Inputs) -> Task:
        """A task of this form, for what it reads: without the weights that it would be given."""
        return replace(self, head=None, begin=None).build(inputs)


@dataclass
class Setup:
    """A task in place, and what it is fed: inputs through the backbone, or stored features.

    Attributes:
        tuned: `Cached` or `Tuned`, or another module with `.task`.
        data: Splits as `tuned` takes them.
        stored: The store they come from; None where they are inputs.
    """

    tuned: nn.Module
    data: Data
    stored: Stored | None = None

    @classmethod
    def open(cls, inputs: Inputs, task: Task) -> Setup:
        """Put a task in place: on a feature store wherever training from one is exact, else live."""
        return cls.on(inputs, task, inputs.open_store(task))

    @classmethod
    def on(cls, inputs: Inputs, task: Task, stored: Stored | None) -> Setup:
        """Put a task on a store that is open already; None runs the backbone."""
        if stored is None:
            data, tuned = inputs.data, Tuned(inputs.host, task)
        else:
            data = stored.data(inputs.plain, final=inputs.final)
            tuned = Cached(inputs.host, task, stored.store)
            # A store does not say of which inputs its rows are, one by one; the plain data do.
            splits = [inputs.plain.train, inputs.plain.val]
            data.train.sample_digests = partial(_digest_samples, splits[: 1 + inputs.final])
        return cls(tuned, data, stored)

    @property
    def task(self) -> Any:
        """The task that is trained."""
        return self.tuned.task

    def fit(self, settings: FitSettings, out: Path, *, val: bool = True, **how: Any) -> FitResult:
        """Train; `val=False` evaluates after no epoch. Else as `restuning.fit`."""
        data = self.data
        return fit(
            self.tuned,
            data.train,
            data.val if val else None,
            settings=settings,
            out=out,
            collate=data.collate,
            **how,
        )

    def fit_until(
        self, stop: Callable[[list[dict[str, Any]]], bool], settings: FitSettings, out: Path
    ) -> FitResult:
        """Train until `stop` has seen enough of the history, as `training.fit_until`."""
        data = self.data
        return fit_until(
            stop,
            self.tuned,
            data.train,
            data.val,
            settings=settings,
            out=out,
            collate=data.collate,
        )

    def solve(self) -> None:
        """Solve a task that is solved in closed form once more, for the sums of it; see `solve_tuned`."""
        solve_tuned(self.tuned, self.data.train, self.data.collate)

    def accuracy(self, split: Any, batch_size: int) -> float | None:
        """Accuracy on a split of `data`, or the metric of its problem; None where there is no such split."""
        if split is None:
            return None
        scores = evaluate(self.tuned, split, batch_size, self.data.collate)
        return scores[find_problem(self.task).metric]

    def judge(self, split: Any, batch_size: int) -> Judged | None:
        """What answers to a split of `data` are worth; None without a split."""
        if split is None:
            return None
        problem = find_problem(self.task)
        judge = problem.judge(self.data.labels, getattr(self.task, "temperature", 1.0))
        scores = evaluate(self.tuned, split, batch_size, self.data.collate, watch=judge.update)
        judged = judge.conclude()
        # As it was counted while training: in double precision, and in every process.
        return replace(judged, figures={**judged.figures, problem.metric: scores[problem.metric]})

    def calibrate(self, batch_size: int, other: Calibration | None = None) -> Calibration:
        """Fit the temperature of the trained task on the validation split.

        Args:
            batch_size: Inputs of one forward.
            other: What is taken where that split was trained on, or is not there.
        """
        if self.data.val is None:
            return other or Calibration(on=LEFT_OUT_ROWS if scales_itself(self.task) else None)
        return calibrate(self.tuned, self.data.val, batch_size, self.data.collate)

    def told_problem(self, result: FitResult, other: Problem | None = None) -> Problem:
        """The task's problem, with error bars of what the run left out while it trained, where it did.

        Else with those of the validation split (`calibrate`), or of another run.
        """
        told, own = result.left.get("left_out"), find_problem(self.task)
        if told is not None:
            return problem_from_spec(told)
        return own if other is None or self.data.val is not None else own.with_errors_of(other)


def _digest_samples(splits: Sequence[Any], tell: Tell = quiet) -> Samples | None:
    """Digests of the inputs of splits, one after the other; None where they are not known one by one."""
    parts = [find_samples(split, tell) for split in splits if split is not None]
    known = [part for part in parts if part is not None]
    return concatenate(known) if len(known) == len(parts) else None


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        method: That was trained.
        task: With its trained weights, in eval mode.
        folder: What it left: `metrics.json`, `settings.json`, `log.jsonl`, `curves.png`,
            `checkpoints/` and the task's own folder.
        metrics: As `metrics.json`: figures, sizes, memory, time, settings, versions.
        choice: How `auto` chose the method; None of a method that was named.
        left_in: The folder of the task, where it is not in that of the run.
    """

    method: str
    task: Task = field(repr=False)
    folder: Path
    metrics: dict[str, Any] = field(repr=False)
    choice: Any = field(default=None, repr=False)
    left_in: Path | None = field(default=None, repr=False)

    @property
    def task_folder(self) -> Path:
        """The task as `restuning.load` and `restuning predict` take it."""
        return self.left_in or task_folder(self.folder, self.metrics["data"]["name"])

    @property
    def test_accuracy(self) -> float | None:
        """On the test split; None where there is none, or where another figure is measured."""
        return self.metrics.get("test_accuracy")

    @property
    def metric(self) -> str:
        """The figure that methods are compared by, in torchmetrics' words."""
        return metric_of(self.metrics)

    @property
    def test_score(self) -> float | None:
        """The `metric` on the test split; None where there is none."""
        return self.metrics[f"test_{self.metric}"]

    @property
    def val_score(self) -> float | None:
        """The `metric` on the validation split; None where there is none."""
        return self.metrics[f"val_{self.metric}"]

    def row(self) -> dict[str, Any]:
        """The figures that a comparison shows."""
        # Metrics of before the validation accuracy was shown have none.
        metric = self.metric
        row = {name: self.metrics.get(name) for name in ROW}
        if metric == METRIC:
            return row
        own = {f"{split}_{METRIC}": f"{split}_{metric}" for split in SHORT.values()}
        return {
            "metric": metric,
            **{own.get(name, name): self.metrics.get(own.get(name, name)) for name in ROW},
        }


ROW = (
    "method",
    "test_accuracy",
    "val_accuracy",
    "trainable_parameters",
    "tuner_parameters",
    "peak_memory_bytes",
    "seconds",
    "seed",
)


SHORT = {"test": "test", "validation": "val"}
"""Splits by the words that a reader meets, and as figures are named."""


DATA_FROM_RUN = "data_from_run"
"""Of `metrics.json`: from the path of the data, as the command had it, to that as seen from the folder of the run."""

METRIC = "accuracy"
"""The figure of results that name no other."""


def metric_of(figures: Mapping[str, Any]) -> str:
    """The figure that results are compared by: `test_METRIC` and `val_METRIC` are its values."""
    return figures.get("metric", METRIC)


def measured_on(figures: Mapping[str, Any]) -> str:
    """The split whose accuracy is shown: "test", or "validation" where there is no test split."""
    test, val = (figures.get(f"{split}_{metric_of(figures)}") for split in ("test", "val"))
    return "validation" if test is None and val is not None else "test"


def tell_score(figures: Mapping[str, Any], split: str) -> str:
    """The score of a row on a split ("test" or "validation"), as people read it; "-" of none."""
    metric = metric_of(figures)
    return show_figure(metric, figures.get(f"{SHORT[split]}_{metric}"))


def show_figure(metric: str, value: float | None) -> str:
    """A value of a metric as people read it; "-" of none."""
    # Those that are no share are no percent.
    percent = next((p.percent for p in problem_kinds().values() if p.metric == metric), True)
    return "-" if value is None else f"{value:.2%}" if percent else f"{value:.3f}"


@alone()
def run_task(
    inputs: Inputs,
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = True,
    progress: bool = True,
    facts: Mapping[str, Any] | None = None,
    call: Mapping[str, Any] | None = None,
    log: Log = log_line,
    tasks: Path | None = None,
    report: bool = False,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Train, test and write down one method; the whole of a run.

    Killed and called again with the same arguments it goes on, and ends with the same weights.

    Args:
        inputs: Data in front of a backbone.
        recipe: Method and settings.
        out: Folder of the run.
        resume: False starts over.
        progress: A bar on a terminal.
        facts: Go into `metrics.json` as well.
        call: Goes into `settings.json` as well, over what was trained: data and backbone by name, and
            how they are read (of a method that was chosen what the choice began with), so that
            `restuning train --config settings.json` makes the same run.
        log: Receives a line for each thing that is decided; by itself Python's logger `restuning` does.
        tasks: Where the task is left, under the name of its column of answers; None for the run's folder, under
            that of its data.
        report: Leave `report.html` as well.
        callbacks: Told what the training does.

    Raises:
        RestuningError: As `Recipe.build`, `open_or_build` and `fit`.
    """
    out, settings = Path(out), recipe.settings
    task = recipe.build(inputs)
    task.labels = inputs.data.labels
    refuse_in_several(task)
    log(f"{recipe.method}  {describe_size(task, settings)}")
    # All that the end needs, before anything takes time.
    check_beforehand(inputs.data, out, (*OF_A_RUN, *([REPORT] if report else [])))
    check_installed(settings.track)
    # Told now whether rare classes can be made to count, and where nobody asked that they should.
    find_weights(task, inputs.data.train, settings)
    find_groups(task, inputs.data.train, settings)
    warn_of_imbalance(
        task.problem,
        inputs.data.train,
        task.labels,
        settings,
        by_steps=not finds_by_targets(task),
        weighs=takes_weights(task),
    )
    folder = task_folder(out, inputs.data.name)
    if tasks is not None:
        folder = task_folder(tasks, out.name)
    from_main(lambda: check_savable(task, inputs.host, folder, **saved_with(inputs)))
    if resume:
        from_main(lambda: refuse_other_run(inputs, task, settings, out))
    setup = Setup.open(inputs, task)
    data, batch = setup.data, settings.batch_size
    with hold_folder(out):
        if resume:
            from_main(lambda: _refuse_updated(folder))
        # A run that ended here has nothing to lose.
        if not (resume and is_finished(out / CHECKPOINTS)):
            from_main(lambda: read_once(data.val, data.test))
        # Only a head that was made of class names knows anything before training.
        start = None if recipe.head is None else from_main(lambda: setup.accuracy(data.val, batch))
        if start is not None:
            log(f"  zero-shot: {start:.1%} on validation, before any training")
        about = {
            "method": recipe.method,
            "data": inputs.data.name,
            "backbone": inputs.backbone.name,
            **inputs.options,
            **recipe.options,
        }
        result = setup.fit(
            settings, out, resume=resume, progress=progress, callbacks=callbacks, about=about
        )
        if ending := result.describe_end():
            log(f"  {ending}")
        if task.solved and task.side is not None and (found := task.side.describe_found()):
            log(f"  {found}")
        if from_main(lambda: _lacks_sums(setup, folder)):
            setup.solve()
        calibration = from_main(lambda: setup.calibrate(batch, recipe.calibration))
        task.temperature = calibration.temperature
        task.problem = from_main(lambda: setup.told_problem(result, recipe.told))
        if calibration.temperature != 1:
            log(f"  {calibration.describe()}")

        def conclude() -> dict[str, Any]:
            plain = judge_feature(inputs, batch)
            if plain is not None:
                told = task.problem.tell(plain[task.problem.metric])
                log(f"  the backbone's feature as it is: {told} on the test split")
            # The one look at the test split, when nothing is left to be decided.
            judged = setup.judge(data.test, batch)
            figures = {} if judged is None else dict(judged.figures)
            metric = result.metric
            tested = figures.get(metric)
            other = {} if metric == METRIC else {"metric": metric}
            shares = {f"test_{metric}": tested, f"val_{metric}": result.val_score, **other}
            metrics = {
                "method": recipe.method,
                f"test_{metric}": tested,
                "problem": task.problem.kind,
                **other,
                "test": figures,
                **({} if plain is None else {"test_of_feature": plain}),
                "zero_shot_val_accuracy": start,
                **measurements(setup, result, settings),
                **({"ended": result.ended} if result.ended else {}),
                **({} if result.kept is None else {"kept_epoch": result.kept}),
                **calibration.to_dict(),
                "accuracy_on": measured_on(shares),
                **origin(inputs, setup),
                **find_data(out, call),
                "settings": settings.to_dict(),
                "options": {**inputs.options, **recipe.options},
                **(facts or {}),
                **surroundings(inputs.host),
            }
            # Before the task, which at every moment has the sums that it was solved from.
            _keep_sums(setup, inputs, folder, log)
            # That of a run before in this folder is about another task, and none may follow.
            (out / REPORT).unlink(missing_ok=True)
            write_run(Run(recipe.method, task, out, metrics, left_in=folder), inputs, call)
            remove_other_sums(folder, task)
            if report:
                page = describe_run(
                    metrics,
                    task.problem,
                    inputs.data,
                    judged=judged or setup.judge(data.val, batch),
                    history=result.history,
                    task=folder,
                    call=call,
                )
                write_report(page, out / REPORT)
            return metrics

        # One process tests, forecasts and writes; all return the same run.
        return Run(recipe.method, task, out, from_main(conclude), left_in=folder)


def judge_feature(inputs: Inputs, batch_size: int) -> dict[str, float | None] | None:
    """Figures of the backbone's own feature on the test split, where it is an answer of the problem's kind; else None.

    Cost: where no store has it, a forward of that split.
    """
    problem = inputs.data.problem
    if not problem.judges_feature or inputs.data.test is None:
        return None
    task = Task(pool=inputs.options.get("pool") or inputs.host.readout_rule.pool, problem=problem)
    setup = Setup.on(inputs, task, inputs.open_store(task, build=False))
    test = setup.data.test
    logits, labels = collect_logits(setup.tuned, test, batch_size, setup.data.collate)
    meters = problem.metrics(logits.shape[-1])
    meters.update(logits, labels)
    return read_meters(meters)


def _find_inputs(setup: Setup) -> Samples | None:
    """Digests of the training inputs, one by one."""
    samples = find_samples(setup.data.train)
    return samples if samples is None or all(len(d) == 32 for d in samples.inputs) else None


def _lacks_sums(setup: Setup, folder: Path) -> bool:
    """Whether a task that is solved has neither its sums in this process nor beside its folder."""
    task = setup.task
    if not isinstance(task, Task) or not isinstance(task.side, Ridge) or task.side.sums is not None:
        return False
    samples = _find_inputs(setup)
    reason = reason_not_kept(task, len(setup.data.train), samples and len(samples.inputs))
    return not reason and not sums_of(folder, task).exists()


def _keep_sums(setup: Setup, inputs: Inputs, folder: Path, log: Log) -> None:
    """Leave the sums of a solved task beside its folder, for `restuning update`; without room for them a warning."""
    task = setup.task
    if not isinstance(task, Task) or not isinstance(task.side, Ridge) or task.side.sums is None:
        return
    sums, samples = task.side.sums, _find_inputs(setup)
    reason = reason_not_kept(task, sums.count, samples and len(samples.inputs))
    if reason or samples is None:
        log(f"  not kept for `restuning update`: {reason}")
        return
    key = None if setup.stored is None else setup.stored.store.key
    about = {
        **describe_sums(task, inputs.host.digest(), inputs.preprocessing or {}),
        "accuracy": task.side.left_out_accuracy,
        "updates": 0,
        # Rows of a coarse store are a little other than those that an update computes.
        "stored": [key.dtype, key.precision] if key is not None else None,
    }
    labels = find_labels(setup.data.train)
    try:
        path = write_sums(folder, task, KeptSums(sums, samples.inputs, labels, about))
    except TrainingError as error:
        # The task is there all the same.
        warn("the sums of a task are not kept", where=error.where, found=error.found, fix=error.fix)
        return
    log(f"  kept for `restuning update`: {path.name}, {path.stat().st_size / 2**20:.1f} MiB")


def _refuse_updated(folder: Path) -> None:
    """Refuse to write a run's own task over one that was updated since."""
    if (path := find_updated(folder)) is not None:
        raise TrainingError(
            "the task of this run was updated since it was trained",
            where=str(folder),
            found=f"{path.name}, left by `restuning update`",
            fix="give another --out, or --no-resume to start over without the updates",
        )


def describe_size(task: Task, settings: FitSettings) -> str:
    """How much of a task is learned, and how, in words."""
    learned = task.trainable_parameters()
    if task.solved:
        assert task.side is not None
        # Of what keeps rows there are none before it has seen them.
        numbers = f"{learned:,} numbers " if learned else ""
        return f"{numbers}{task.side.solving}; no epochs, no learning rate"
    return (
        f"{learned:,} trainable parameters, {task.tuner_parameters():,} without the head; "
        f"{settings.epochs} epochs, lr {settings.lr}"
    )


def refuse_other_run(inputs: Inputs, task: Task, settings: FitSettings, out: Path) -> None:
    """Refuse a folder that holds another run, before features are stored for this one.

    Training compares once more, and with all that it then knows. A run through the backbone does so first of
    all, and is not looked at here.

    Args:
        inputs: Data in front of a backbone.
        task: New, with the names of its classes.
        settings: How it is trained.
        out: Folder of the run.

    Raises:
        TrainingError: It was begun with other settings, data, class names, or another backbone or form.
    """
    if inputs.store is None or reason_not_storable(task, inputs.augment):
        return
    begun = read_newest(out / CHECKPOINTS, warn=False)
    if begun is None:
        return
    before, plain, data = begun.state["run"], inputs.plain, inputs.data
    known, joined = plain.contents(), inputs.final and plain.val is not None
    now = describe_contents(
        contents_of_splits(known, ["train", "val"] if joined else ["train"]),
        None if inputs.final or plain.val is None else contents_of_splits(known, ["val"]),
    )
    if any(before.get(name) != value for name, value in now.items()):
        # One whose features were too many to store was trained on the inputs.
        live = describe_data(data.train, data.val, data.collate)
        now = {name: value for name, value in now.items() if before.get(name) != live[name]}
    now |= {
        **describe_settings(settings, task),
        "the backbone": describe_host(inputs.host),
        "the method's form": describe_form(task),
        "the class names": describe_classes(task.labels),
    }
    # What it does not say of itself is for training to judge.
    now = {name: value for name, value in now.items() if name in before}
    check_same_run({name: before[name] for name in now}, now, out)


def measurements(setup: Setup, result: FitResult, settings: FitSettings) -> dict[str, Any]:
    """Sizes, memory and time of a run, and beside them what shapes alone foretold."""
    task, data = setup.task, setup.data
    foretold = {"not_made": "solved in closed form: there are no steps"}
    if not getattr(task, "solved", False):
        foretold = forecast_run(
            FinishedRun(
                setup.tuned,
                data.train,
                data.val,
                data.collate,
                settings.batch_size,
                settings.accumulate,
                settings.epochs,
                settings.precision,
                settings.ema is not None,
            )
        )
    return {
        "trainable_parameters": task.trainable_parameters(),
        "tuner_parameters": task.tuner_parameters(),
        "peak_memory_bytes": result.peak_memory_bytes,
        "seconds": result.seconds,
        "seed": settings.seed,
        f"val_{result.metric}": result.val_score,
        "train_loss": result.train_loss,
        "steps": result.steps,
        "memory_measure": result.memory_measure,
        "forecast": foretold,
    }


def origin(inputs: Inputs, setup: Setup) -> dict[str, Any]:
    """The backbone, data and stored features that a run was made of."""
    data, stored, features = inputs.data, setup.stored, None
    if stored is not None:
        key = stored.store.key
        features = {
            "store": str(stored.store.path),
            "digest": key.digest,
            # What was read: a store may hold more, for other methods.
            "tokens": stored.store.form.partition("/")[0],
            "dtype": key.dtype,
            "precision": key.precision,
            "views": stored.views,
            "bytes": stored.store.bytes,
            "built_seconds": stored.seconds,
            # Only where memory decided the order of the examples.
            **({} if stored.at_once is None else {"rows_at_once": stored.at_once}),
        }
    return {
        "backbone": inputs.backbone.name,
        "weights": inputs.backbone.weights,
        "fingerprint": inputs.host.fingerprint(),
        "data": {
            "name": data.name,
            "identity": data.identity,
            "skipped": data.skipped,
            **describe_data(setup.data.train, setup.data.val, setup.data.collate),
        },
        "features": features,
    }


def surroundings(host: Extractor) -> dict[str, Any]:
    """Versions and machine that a run was made with."""
    return {
        "versions": {"restuning": __version__, "torch": torch.__version__},
        "hardware": {
            "device": str(host.device),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
        },
    }


def write_run(run: Run, inputs: Inputs, call: Mapping[str, Any] | None = None) -> None:
    """Leave the task, its metrics and its settings in the run's folder, each whole or not at all."""
    metrics = run.metrics
    split, metric = measured_on(metrics), metric_of(metrics)
    # The task first: whoever finds metrics.json finds what it measures.
    save(
        run.task,
        inputs.host,
        run.task_folder,
        **saved_with(inputs),
        results={
            f"{split} {metric.replace('_', ' ')}": metrics[f"{SHORT[split]}_{metric}"],
            "seed": metrics["seed"],
        },
        data=_named_data(inputs, call),
    )
    write_json(run.folder / "metrics.json", metrics)
    trained = {"method": run.method, "options": metrics["options"], **metrics["settings"]}
    write_json(run.folder / "settings.json", {**trained, **(call or {})})


def _named_data(inputs: Inputs, call: Mapping[str, Any] | None) -> str:
    """What a card says of the data: the name on a hub, or a word; paths of this machine are nobody's business."""
    given = str((call or {}).get("data", ""))
    return name_on_hub(given) or inputs.data.name


def find_data(out: Path, call: Mapping[str, Any] | None) -> dict[str, dict[str, str]]:
    """Where the data of a run lie as seen from its folder, of a path that hangs on the folder of the command.

    What a report is made of again, wherever it is asked for.
    """
    data = (call or {}).get("data")
    if not isinstance(data, str) or is_by_name(data) or expand_home(data).is_absolute():
        return {}
    try:
        return {DATA_FROM_RUN: {data: Path(os.path.relpath(data, out)).as_posix()}}
    except ValueError:
        # On another drive.
        return {}


def saved_with(inputs: Inputs) -> dict[str, Any]:
    """What a task file says beside the task: how its backbone is loaded and its inputs are made."""
    return {
        "backbone": inputs.backbone.name,
        "weights": inputs.backbone.weights_file,
        "preprocessing": inputs.preprocessing,
    }


def task_folder(out: Path, data: str) -> Path:
    """Where a run leaves its task, by the name of its data."""
    return out / f"{data}.task"


def default_folder(data: Data, kind: str) -> Path:
    """Where a run goes that was given no folder: `runs/DATA-KIND-TIME`, which is not there yet."""

    def find_free() -> Path:
        first = Path("runs") / f"{data.name}-{kind}-{time.strftime('%Y%m%d-%H%M%S')}"
        # Two runs may begin in one second, and the second must not be taken for the first, gone on with.
        others = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
        return next(folder for folder in itertools.chain([first], others) if not folder.exists())

    # Processes that a launcher started do not read the clock at the same second.
    return from_main(find_free)


def folder_name(method: str) -> str:
    """A method as part of a path."""
    return method.replace("[", "-").replace("]", "").replace(",", "-").replace("=", "-")
