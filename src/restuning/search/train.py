"""`restuning.train`: one call from a data set to a trained, tested and saved task."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, overload

import torch

from restuning import methods
from restuning._durations import tell_time
from restuning._errors import DataError, NoSitesError, TrainingError
from restuning._files import hold_folder, write_json
from restuning.backbones import Backbone, take_backbone, with_text_tower
from restuning.data import Data, with_validation
from restuning.features import StoreOptions
from restuning.features.stored import BY_ITSELF, VIEWS_OF
from restuning.forecast import parse_bytes
from restuning.host import Extractor
from restuning.runtime.processes import count_processes, is_main_process
from restuning.search.auto import AUTO, Choice, choose_method
from restuning.search.budget import Budget
from restuning.search.candidates import CANDIDATES
from restuning.search.columns import RUNS, Columns, name_folders
from restuning.search.comparison import FILE, PICTURE, Comparison
from restuning.training.beforehand import OF_A_RUN, check_beforehand
from restuning.training.callbacks import Callback
from restuning.training.defaults import settings_for
from restuning.training.device import on_device
from restuning.training.fit import refuse_in_several
from restuning.training.own_size import note_smaller_size
from restuning.training.run import (
    Inputs,
    Log,
    Recipe,
    Run,
    Source,
    default_folder,
    folder_name,
    log_line,
    refuse_other_run,
    run_task,
    silent,
    with_pool,
)
from restuning.training.settings import FitSettings
from restuning.training.together import alone, from_main
from restuning.training.trackers import check_track
from restuning.training.zero_shot import ZeroShot

if TYPE_CHECKING:
    from typing_extensions import Unpack

CHOICE = "choice.json"
"""In the folder of a run whose method was chosen, and in its task folder."""


class _Options(TypedDict, total=False):
    """All of `TrainOptions` but the column of answers, which says what is returned."""

    settings: FitSettings
    epochs: int | None
    batch_size: int | None
    lr: float | None
    lambda_rate: float | None
    weight_decay: float | None
    warmup_epochs: float | None
    label_smoothing: float | None
    class_weights: str | None
    balanced_sampling: bool | None
    precision: str | None
    accumulate: int | None
    clip: float | None
    drop_path: float | None
    ema: float | None
    seed: int | None
    workers: int | None
    checkpoint_every: int | None
    track: Any
    early_stopping: int | None
    keep_best: bool | None
    monitor: str | None
    callbacks: Sequence[Callback]
    rank: int | None
    scale: str | None
    zero: bool | None
    layers: Any
    pool: str | None
    targets: str | Sequence[str] | None
    alpha: float | None
    augment: str
    final: bool
    skip_bad: bool
    text: str
    image: str | None
    problem: str | None
    classes: str | Path | Sequence[str] | None
    whole: bool
    scaled_jpeg: bool
    dimensions: int | None
    max_tokens: int
    audio: str | None
    seconds: float | None
    store: str | Path | StoreOptions | bool | None
    random: bool
    zero_shot: str | Sequence[str] | None
    class_names: str | Path | None
    memory: str | int | None
    minutes: float | None
    progress: bool
    report: bool


class TrainOptions(_Options, total=False):
    """Everything else that `train` can be told; what is left out keeps its default.

    Attributes:
        settings: Settings of training, in place of the method's own defaults.
        epochs, batch_size, lr, lambda_rate, weight_decay, warmup_epochs, label_smoothing: Single settings, over those; see
            `FitSettings`.
        class_weights, balanced_sampling: Likewise, of classes that are rare.
        precision, accumulate, clip, drop_path, ema, seed, workers, checkpoint_every, track: Likewise.
        early_stopping, keep_best, monitor: Likewise.
        callbacks: Told what the training does, in this order (`restuning.Callback`); of one method.
        rank, scale, zero, layers, pool, targets, alpha: Options of the method; see `methods.build`.
        augment: Augmentation of training images: "none", "flip", "timm", "timm:POLICY".
        final: Train on train and val together.
        skip_bad: Leave corrupt images out, and count them.
        text, image, audio, label: Columns of a csv or a table; several of `label`, in a list or with commas, are a
            task each.
        problem: What a column holds: "single-label", "multi-label", "regression", "segmentation" or "depth", or `COLUMN=KIND`
            with commas; found from its cells where it is not given. "embedding" of any data of classes: the answer is a vector.
        classes: Of masks: names of classes, or a file of them, a line each; `classes.txt` beside the data where it is not given.
        whole: Resize images whole to the backbone's size and crop nothing; columns of a table beside one of pixels are so always.
        scaled_jpeg: Decode JPEG files that are much larger than the backbone's size to a half, a fourth or an eighth of their sides.
        dimensions: Of an embedding; as many as there are classes, 512 at most, where none are given.
        max_tokens: Tokens of a text that are read.
        seconds: Of a sound, what is read from its beginning; what the backbone takes, or 10, where none are given.
        store: Where feature stores lie (a folder), or `StoreOptions`; False runs the backbone in
            every epoch.
        random: Random weights of the backbone, from the seed.
        zero_shot: Prompts such as "a photo of a {}." that make the first head of the class names.
        class_names: File of class names for it, a line each.
        memory: Such as "2GiB". Of a method that is named: what rows of stored features may take in memory, beyond which epochs
            go through the store in portions; what is free where it is not given. Of "auto": limit of everything together.
        minutes: Limit for "auto", of the choice and the final run together.
        progress: Bars on a terminal.
        report: Leave a page about each run, `report.html`: True unless it is given.
    """

    label: str | Sequence[str]


SETTINGS = tuple(each.name for each in fields(FitSettings))
OF_METHOD = ("rank", "scale", "zero", "layers", "pool", "drop_path", "targets", "alpha")
OF_SOURCE = (
    *("augment", "final", "skip_bad", "text", "label", "image", "problem", "classes", "whole"),
    *("scaled_jpeg", "dimensions", "max_tokens", "audio", "seconds"),
)
NO_FOLDER = frozenset(("", "off", "on", "no", "yes", "none", "false", "true", "auto"))
"""Words that somebody writes who means a switch: as folders they would be made without a word."""
ENSEMBLE, ON_MAPS = "ensemble", "ridge"
"""What columns are trained with unasked, and what those of pixels are where a backbone of maps has no ensemble of places."""
OF_STEPS = ("epochs", "lr", "warmup_epochs", "clip", "ema")
"""Settings of steps that nobody gives without a reason: the command line hands on the others always."""
OF_IMBALANCE = ("class_weights", "balanced_sampling")
CHOSEN_BY_AUTO = ("lr", "rank", "scale", "zero", "layers", "targets", "alpha", "zero_shot", "ema")
"""Settings that a choice finds by itself, or cannot use."""


class _Call(TypedDict, total=False):
    """What `train` takes beside its options, whatever it returns."""

    backbone: str | Backbone
    weights: str | Path | None
    out: str | Path | None
    device: str | torch.device | None
    resume: bool
    log: Log


class _OfOne(_Call, _Options, total=False):
    method: str


class _OfSeveral(_Call, TrainOptions, total=False):
    pass


@overload
def train(data: Any, *, label: str = ..., **options: Unpack[_OfOne]) -> Run: ...


@overload
def train(
    data: Any, *, label: list[str] | tuple[str, ...], **options: Unpack[_OfOne]
) -> Columns: ...


@overload
def train(data: Any, *, method: Sequence[str], **options: Unpack[_OfSeveral]) -> Comparison: ...


def train(
    data: Any,
    *,
    backbone: str | Backbone = "restuning-tiny",
    weights: str | Path | None = None,
    method: str | Sequence[str] = AUTO,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    resume: bool = True,
    log: Log = log_line,
    **options: Unpack[TrainOptions],
) -> Run | Columns | Comparison:
    """Train a task on a frozen backbone, test it and save it: all that `restuning train` does.

    Features of the backbone are stored once and trained from wherever that is exact. Killed and
    called again with the same arguments and the same `out`, it goes on and ends the same.

    Args:
        data: As `load_data` takes it (a folder, a csv, "digits", "hf:NAME", a table ...), or a `Data`.
        backbone: By name (see `load_backbone`), or one that is loaded.
        weights: File of its weights, without a hub.
        method: A name of `methods.names()`; a list of names to compare; or "auto", the default,
            which chooses a method and its settings on the validation split within `memory` and
            `minutes`. (The command line without `--method` compares `training.defaults.COMPARED`:
            it has somebody to show a table to.)
        out: Folder of the run; None for `runs/DATA-METHOD-TIME`.
        device: "cpu", "cuda", "cuda:1"; None for CUDA if it is there.
        resume: False starts over.
        log: Receives a line for each thing that is decided; by itself Python's logger `restuning` does, at INFO. Nothing
            is printed.
        **options: See `TrainOptions`.

    Returns:
        The run (`.metrics`, `.task`, `.folder`), or a `Comparison` (`.runs`) of several methods. Of a table whose columns
        of answers are given in a list (of one as well), or several of them with commas, `Columns` (`.runs` by column,
        `.metrics`), trained from one pass over the inputs where the method trains from a store.

    Raises:
        RestuningError: Names, data, weights or settings are not what they should be, the folder
            holds another run, the disk is full, or training diverged.
    """
    # None says nothing, so that a command line can hand on every option it has.
    explicit = {name: value for name, value in options.items() if value is not None}
    if not explicit.get("zero_shot"):
        # An option that may be repeated is an empty list where it is not given.
        explicit.pop("zero_shot", None)
    _check_names(explicit)
    _check_class_names(explicit)
    names = [method] if isinstance(method, str) else list(method)
    if AUTO in names and not isinstance(method, str):
        raise TrainingError(
            f"{AUTO} tries several methods itself and is not compared with others",
            where=f"--method {' --method '.join(names)}",
            fix=f"give --method {AUTO} alone; in a grid (`restuning bench run`) it is an entry like any other",
        )
    if len(set(names)) < len(names):
        raise TrainingError(
            "a method is compared with itself",
            where="method",
            found=", ".join(names),
            fix="name each once; several seeds are `restuning sweep` or `restuning bench run`",
        )
    for name in names:
        methods.check(name, (AUTO,) if isinstance(method, str) else ())
    if not names:
        raise TrainingError("there is nothing to train", where="method", found="an empty list")
    budget = _budget(method, explicit)
    _check_followers(method, explicit)
    if method != AUTO:
        methods.refuse_unused(names, _options(explicit))
    recipes = [_recipe(name, explicit) for name in names]
    source = _source(data, explicit, recipes[0].settings, log)
    if budget is not None:
        # The choice reads the splits apart; the run that follows reads both anyway.
        source = replace(source, final=False)
    elif "memory" in explicit:
        # A budget is of everything; here rows of stored features are meant.
        size = parse_bytes(str(explicit["memory"]))
        source = replace(source, store=replace(source.store, memory=size))
    if budget is not None and count_processes() > 1:
        raise TrainingError(
            "a method is chosen in one process: clocks of several would choose several",
            where=f"--method {AUTO}",
            found=f"{count_processes()} processes of a launcher",
            fix="choose without the launcher, then train the method that was chosen with it",
        )
    batch_said = "batch_size" in explicit or "settings" in explicit
    log = log if is_main_process() else silent
    for line in _unused([n for n in names if n != AUTO], explicit):
        log(line)
    with alone(), on_device(device) as place:
        # With `random=True` the backbone's weights are drawn here.
        torch.manual_seed(recipes[0].settings.seed)
        loaded = _load(backbone, weights, explicit)
        folder = None if out is None else Path(out)

        @cache
        def open_host() -> Extractor:
            # Once for all columns: the hooks of each host run in every forward of the backbone.
            host = loaded.host()
            host.to(place)
            return host

        if sources := source.columns(loaded, log):
            if explicit.get("callbacks"):
                raise TrainingError(
                    "callbacks follow one run",
                    where="callbacks",
                    found=f"{len(sources)} columns of answers, a run each",
                    fix="name one column; settings such as early_stopping serve several",
                )
            if not isinstance(method, str) or explicit.get("zero_shot"):
                raise TrainingError(
                    "several columns of answers are trained by one method, with new heads",
                    where="label",
                    found=f"{len(sources)} columns, "
                    f"{'--zero-shot' if isinstance(method, str) else f'a list of methods: {names}'}",
                    fix="name one method and no --zero-shot, or one column",
                )

            def trainer_of(one: Source) -> _Trainer:
                made = _Trainer(one, loaded, open_host, resume, explicit, log)
                made.how["call"] = _call(one, loaded, weights, explicit)
                made.batch_said = batch_said
                return made

            def recipe_of(one: _Trainer) -> Recipe:
                return one.choose_answering(recipes[0], partial(_recipe, explicit=explicit))

            return _train_columns(sources, trainer_of, recipe_of, budget, folder)
        trainer = _Trainer(source, loaded, open_host, resume, explicit, log)
        trainer.how["call"] = _call(source, loaded, weights, explicit)
        trainer.batch_said = batch_said
        if budget is not None:
            return trainer.train_chosen(recipes[0], budget, folder)
        if explicit.get("zero_shot"):
            recipes = [trainer.with_head(each, _prompts(explicit)) for each in recipes]
        if isinstance(method, str):
            return trainer.train_one(recipes[0], folder)
        return trainer.compare(recipes, folder)


def _unused(names: Sequence[str], explicit: Mapping[str, Any]) -> list[str]:
    """A line for each method that takes no steps, or stores nothing, where the user said something about that."""
    live = explicit.get("store") is False
    inside = [name for name in names if live or methods.runs_inside(name)]
    given = [f"--{name.replace('_', '-')}" for name in OF_STEPS if name in explicit]
    solved = [name for name in names if methods.is_solved(name)]
    return [
        f"note      unused by {name}, which is solved in closed form: {', '.join(given)}"
        for name in solved
        if given
    ] + [
        f"note      unused by {name}, which stores no features: --memory"
        for name in inside
        if "memory" in explicit
    ]


def _train_columns(
    sources: Mapping[str, Source],
    trainer_of: Callable[[Source], _Trainer],
    recipe_of: Callable[[_Trainer], Recipe],
    budget: Budget | None,
    out: Path | None,
) -> Columns:
    """A run for each column; one pass over the inputs serves all of them."""
    folders = name_folders(list(sources))
    trainers = {column: trainer_of(source) for column, source in sources.items()}
    first = next(iter(trainers.values()))
    out = out or default_folder(first.data, "columns")
    from_main(lambda: out.mkdir(parents=True, exist_ok=True))
    if budget is not None:
        budget = budget.share(len(sources))
    runs: dict[str, Run] = {}
    recipes = {column: recipe_of(trainer) for column, trainer in trainers.items()}
    places = {column: out / RUNS / folders[column] for column in sources}
    with hold_folder(out):
        # Where all are answered at the same places the first of them stores what all read.
        if budget is None and len({each.data.problem.pool for each in trainers.values()}) > 1:
            _store_together(
                [trainers[c].plan(recipes[c], places[c]) for c in sources], first.resume
            )
        if budget is None:
            for column, trainer in trainers.items():
                runs[column] = trainer.train_one(recipes[column], places[column], out)
        else:
            inputs = {c: trainer.open_choice(recipes[c]) for c, trainer in trainers.items()}
            chosen = {
                c: trainer.choose(recipes[c], inputs[c], budget, places[c], list(inputs.values()))
                for c, trainer in trainers.items()
            }
            # What test rows are read for is known when all is chosen.
            first_inputs = next(iter(chosen.values())).inputs
            first_inputs.store_once(
                partial(each.recipe.build_form, each.inputs) for each in chosen.values()
            )
            for column, trainer in trainers.items():
                runs[column] = trainer.finish(chosen[column], out)
        found = Columns.of(runs, out)
        from_main(found.save)
    return found


def _store_together(runs: Sequence[tuple[Inputs, Recipe, Path]], resume: bool) -> None:
    """One pass over the data for all runs; first it is seen whether each of them can be made, and in its folder."""
    for inputs, recipe, folder in runs:
        task = recipe.build_form(inputs)
        refuse_in_several(task)
        if resume:
            task.labels = inputs.data.labels
            from_main(partial(refuse_other_run, inputs, task, recipe.settings, folder))
    runs[0][0].store_once(partial(recipe.build_form, inputs) for inputs, recipe, _ in runs)


@dataclass(frozen=True)
class _Chosen:
    """A method that was chosen, and its final run, which is to be made."""

    choice: Choice
    inputs: Inputs
    recipe: Recipe
    out: Path
    call: Mapping[str, Any]


class _Trainer:
    """A source of data before a backbone, and how its runs are made."""

    def __init__(
        self,
        source: Source,
        backbone: Backbone,
        open_host: Callable[[], Extractor],
        resume: bool,
        explicit: Mapping[str, Any],
        log: Log,
    ) -> None:
        self.source, self.backbone, self.log = source, backbone, log
        self.how: dict[str, Any] = {
            "resume": resume,
            "progress": bool(explicit.get("progress")),
            "report": bool(explicit.get("report", True)),
            "callbacks": tuple(explicit.get("callbacks", ())),
            "log": log,
        }
        self.resume = resume
        # Set where the user says how many examples a step has.
        self.batch_said = False
        self.data = source.load(backbone)
        self.host = open_host()

    def with_head(self, recipe: Recipe, prompts: ZeroShot) -> Recipe:
        """The recipe with a first head made of the names of the classes."""
        return replace(recipe, head=prompts.head(self.backbone, self.data.labels))

    def _suit(self, recipe: Recipe) -> Recipe:
        """The recipe with steps of the size that the problem asks for, where nobody said one."""
        size = self.data.problem.batch_size
        if size is None or self.batch_said:
            return recipe
        return replace(recipe, settings=replace(recipe.settings, batch_size=size))

    def choose_answering(self, recipe: Recipe, make: Callable[[str], Recipe]) -> Recipe:
        """The recipe; of an ensemble that has no answer for every place of this backbone, where one is asked for, that of `ridge`."""
        if recipe.method != ENSEMBLE or self.data.problem.pool != "grid":
            return recipe
        try:
            recipe.build_form(self._inputs(recipe))
        except NoSitesError as error:
            self.log(f"method    {self.source.label}: {ON_MAPS}, for {ENSEMBLE} has {error.found}")
            return make(ON_MAPS)
        return recipe

    def plan(self, recipe: Recipe, out: Path) -> tuple[Inputs, Recipe, Path]:
        """What `train_one` would train, and where."""
        recipe = self._suit(recipe)
        return self._inputs(recipe), recipe, out

    def train_one(self, recipe: Recipe, out: Path | None, tasks: Path | None = None) -> Run:
        recipe = self._suit(recipe)
        inputs = self._inputs(recipe)
        self._describe(inputs, [recipe.method])
        out = out or default_folder(self.data, folder_name(recipe.method))
        return run_task(inputs, recipe, out, tasks=tasks, **self.how)

    def compare(self, recipes: Sequence[Recipe], out: Path | None) -> Comparison:
        """Every method in a folder of its own, then all of them in one table and picture."""
        recipes = [self._suit(each) for each in recipes]
        inputs = self._inputs(recipes[0])
        self._describe(inputs, [each.method for each in recipes])
        out = out or default_folder(self.data, "comparison")
        check_beforehand(self.data, out, (FILE, PICTURE))
        with hold_folder(out):
            planned = [(inputs, each, out / folder_name(each.method)) for each in recipes]
            _store_together(planned, self.resume)
            runs = [
                run_task(inputs, each, out / folder_name(each.method), **self.how)
                for each in recipes
            ]
            comparison = Comparison(tuple(runs), out)
            from_main(lambda: comparison.save(f"{self.data.name} on {self.backbone.name}"))
        return comparison

    def train_chosen(self, recipe: Recipe, budget: Budget, out: Path | None) -> Run:
        """A method chosen on validation, then trained on both splits and tested once."""
        out = out or default_folder(self.data, AUTO)
        inputs = self.open_choice(recipe)
        with hold_folder(out):
            return self.finish(self.choose(recipe, inputs, budget, out))

    def open_choice(self, recipe: Recipe) -> Inputs:
        """What a method is chosen on: the data with a validation split."""
        plain = with_validation(self.source.load(self.backbone, plain=True))
        inputs = self._inputs(self._suit(recipe), with_validation(self.data))
        return replace(inputs, load_plain=lambda: plain)

    def choose(
        self,
        recipe: Recipe,
        inputs: Inputs,
        budget: Budget,
        out: Path,
        beside: Sequence[Inputs] = (),
    ) -> _Chosen:
        """Choose a method on validation.

        Args:
            recipe: Settings of all that are tried.
            inputs: From `open_choice`.
            budget: Of the choice and its final run.
            out: Folder of the run.
            beside: As of `choose_method`.
        """
        recipe = self._suit(recipe)
        plain = inputs.plain
        self._describe(inputs, [each.method for each in CANDIDATES])
        val = len(inputs.data.val)
        if self.data.val is None:
            self.log(
                f"  no validation split: {val} of {len(self.data.train)} training examples are "
                "held out for the choice"
            )
        self.log(f"{AUTO}  on {val} validation examples")
        check_beforehand(self.data, out, (*OF_A_RUN, CHOICE))
        with hold_folder(out):
            choice = choose_method(
                inputs,
                recipe.settings,
                out / "choice",
                budget=budget,
                resume=self.resume,
                log=lambda line: self.log(f"  {line}"),
                beside=beside,
            )
            warm = " more from its trial's weights" if choice.start is not None else ""
            how = f"lr {choice.lr:g}, {choice.epochs} epochs{warm}"
            how = "solved in closed form" if methods.is_solved(choice.method) else how
            self.log(f"take  {choice.method}, {how}; the choice took {tell_time(choice.seconds)}")
            final = replace(self.source, final=True)
            # From the splits of the choice, whose features are stored already.
            inputs = replace(
                final.open(self.host, self.backbone),
                options=inputs.options,
                load_plain=lambda: plain,
            )
            # `begin` gives it the trial's weights, where the choice says that it goes on from them.
            chosen = Recipe(
                choice.method,
                choice.settings(recipe.settings),
                begin=choice.begin,
                calibration=choice.calibration,
                told=choice.problem,
            )
            # What begins the choice and not what it found: the run goes on from a trial, so that the method
            # alone would be another run. Without a limit of time the same begins the same.
            began = {**recipe.settings.to_dict(), **dict.fromkeys(CHOSEN_BY_AUTO)}
            call = {**self.how["call"], **began, "method": AUTO, "options": dict(recipe.options)}
            return _Chosen(choice, inputs, chosen, out, call)

    def finish(self, chosen: _Chosen, tasks: Path | None = None) -> Run:
        """The final run of a choice."""
        how = {**self.how, "call": chosen.call, "tasks": tasks}
        facts = {"choice": chosen.choice.to_dict()}
        with hold_folder(chosen.out):
            run = run_task(chosen.inputs, chosen.recipe, chosen.out, facts=facts, **how)
            for folder in (run.folder, run.task_folder):
                write_json(folder / CHOICE, chosen.choice.to_dict())
        return replace(run, choice=chosen.choice)

    def _inputs(self, recipe: Recipe, data: Data | None = None) -> Inputs:
        inputs = self.source.open(self.host, self.backbone, self.data if data is None else data)
        return with_pool(inputs, recipe.options)

    def _describe(self, inputs: Inputs, names: Sequence[str]) -> None:
        """What is trained on, and what that costs any of the methods."""
        for line in inputs.describe():
            self.log(line)
        detached = not all(map(methods.runs_inside, names))
        if note := note_smaller_size(self.backbone, detached=detached):
            self.log(f"note      {note}")


def _check_names(explicit: Mapping[str, Any]) -> None:
    known = list(TrainOptions.__annotations__)
    for name in explicit:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise TrainingError(
                "train knows no such option",
                where=name,
                found=f"did you mean {' or '.join(near)}?" if near else "",
                fix=f"one of: {', '.join(known)}",
            )


def _check_class_names(explicit: Mapping[str, Any]) -> None:
    if "class_names" in explicit and "zero_shot" not in explicit:
        raise TrainingError(
            "names of classes are for a head that is made of them",
            where="--class-names",
            found="no --zero-shot",
            fix="give --zero-shot 'a photo of a {}.' as well; labels of a task are the data's own",
        )


def _check_followers(method: str | Sequence[str], explicit: Mapping[str, Any]) -> None:
    """Refuse what follows a run, where there are several, and stopping early, where a choice decides that."""
    whole = explicit.get("settings")
    objects = [
        each
        for each in check_track(explicit.get("track", getattr(whole, "track", ())))
        if not isinstance(each, str)
    ]
    several = method == AUTO or not isinstance(method, str)
    followed = ["callbacks"] * bool(explicit.get("callbacks")) + ["track"] * bool(objects)
    if several and followed:
        raise TrainingError(
            "callbacks and trackers that are objects follow one run",
            where=", ".join(followed),
            found=f"--method {method}"
            if isinstance(method, str)
            else f"methods {', '.join(method)}",
            fix="name one method; settings such as early_stopping and trackers by name serve several",
        )
    early = [
        f"--{n.replace('_', '-')}"
        for n in ("early_stopping", "keep_best")
        if explicit.get(n, getattr(whole, n, None))
    ]
    if method == AUTO and early:
        raise TrainingError(
            "--method auto trains its choice on train and val together, which leaves nothing to follow",
            where=" ".join(early),
            fix="leave it out, or name a method",
        )


def _budget(method: str | Sequence[str], explicit: Mapping[str, Any]) -> Budget | None:
    """The budget of "auto"; None of methods that are named."""
    if method != AUTO:
        # Memory has another meaning there; see `_source`.
        if "minutes" in explicit:
            raise TrainingError(
                "a budget is for --method auto",
                where="--minutes",
                found=f"--method {method if isinstance(method, str) else ' '.join(method)}",
                fix="give --method auto; `restuning plan` forecasts what one method takes",
            )
        return None
    whole = explicit.get("settings")
    uneven = [
        f"--{n.replace('_', '-')}" for n in OF_IMBALANCE if explicit.get(n, getattr(whole, n, None))
    ]
    if uneven:
        raise TrainingError(
            "--method auto compares on classes as they are",
            where=" ".join(uneven),
            fix="name a method: `restuning train DATA --method linear --class-weights balanced`",
        )
    fixed = [f"--{name.replace('_', '-')}" for name in CHOSEN_BY_AUTO if name in explicit]
    if fixed:
        raise TrainingError(
            "--method auto chooses this itself",
            where=" ".join(fixed),
            fix="leave it out, or name a method",
        )
    augment = explicit.get("augment", "none")
    if explicit.get("store") is False or augment not in VIEWS_OF:
        raise TrainingError(
            "--method auto trains from stored features first",
            where="--no-cache" if augment in VIEWS_OF else f"--augment {augment}",
            fix=f"leave --no-cache out, and give --augment {' or '.join(VIEWS_OF)}",
        )
    return Budget.of(explicit.get("memory"), explicit.get("minutes"))


def _options(explicit: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the methods that are named."""
    options = {name: explicit[name] for name in OF_METHOD if name in explicit}
    # The command line always hands it on; it is a setting as well and recorded there.
    if options.get("drop_path") == 0:
        del options["drop_path"]
    return options


def _recipe(method: str, explicit: Mapping[str, Any]) -> Recipe:
    overrides = {name: explicit[name] for name in SETTINGS if name in explicit}
    options = _options(explicit)
    # `auto` names its methods later, which are given none of them but the readout.
    options = options if method == AUTO else methods.keep_used(method, options)
    return Recipe(method, settings_for(method, overrides, explicit.get("settings")), options)


def _source(data: Any, explicit: Mapping[str, Any], settings: FitSettings, log: Log) -> Source:
    if isinstance(data, Data):
        _refuse_for_loaded(data, explicit)
    store = explicit.get("store")
    options = store if isinstance(store, StoreOptions) else StoreOptions(limit=BY_ITSELF)
    if isinstance(store, str) and store.strip().lower() in NO_FOLDER:
        raise TrainingError(
            "the store of features is a folder, and this word is hardly meant as its name",
            where="store",
            found=repr(store),
            fix="give False to run the backbone in every epoch, None for the default place, or "
            f"Path({store!r}) for a folder that is called so",
        )
    if isinstance(store, str | Path):
        options = replace(options, root=store)
    options = replace(
        options,
        workers=options.workers or settings.workers,
        progress=bool(explicit.get("progress")),
        log=lambda line: log(f"  from stored features: {line}"),
    )
    told = {name: explicit[name] for name in OF_SOURCE if name in explicit}
    if isinstance(told.get("classes"), Path):
        # As a file of settings can hold it.
        told["classes"] = str(told["classes"])
    return Source(
        str(data) if isinstance(data, Path) else data,
        cache=store is not False,
        store=options,
        **told,
    )


def _refuse_for_loaded(data: Data, explicit: Mapping[str, Any]) -> None:
    usual = {each.name: each.default for each in fields(Source)}
    # `final` is a way to train on them; images that are augmented are refused where they are opened.
    reading = [name for name in OF_SOURCE if name not in ("augment", "final")]
    given = [name for name in reading if explicit.get(name, usual[name]) != usual[name]]
    if given:
        raise DataError(
            "data that are loaded already are taken as they are",
            where=", ".join(given),
            found=data.name,
            fix="give the name or path of the data, or load_data(..., "
            f"{', '.join(f'{name}=...' for name in given)})",
        )


def _load(
    backbone: str | Backbone, weights: str | Path | None, explicit: Mapping[str, Any]
) -> Backbone:
    # Class names become a head by the text tower; `hf:NAME` alone would load the image tower only.
    if isinstance(backbone, str) and explicit.get("zero_shot"):
        backbone = with_text_tower(backbone)
    return take_backbone(backbone, weights=weights, random=explicit.get("random"))


def _call(
    source: Source, backbone: Backbone, weights: str | Path | None, explicit: Mapping[str, Any]
) -> dict[str, Any]:
    """The options of the command line for the same run, beside method and settings.

    Names of the options of `restuning train`; data that were given as an object have none.
    """
    named: dict[str, Any] = {"data": source.name} if isinstance(source.name, str) else {}
    store = source.store
    return {
        **named,
        "backbone": backbone.name,
        "weights": None if weights is None else str(weights),
        # Defaults as well: a call and the command line leave the same file.
        "random": bool(explicit.get("random")),
        **{name: getattr(source, name) for name in OF_SOURCE},
        "zero_shot": [explicit["zero_shot"]]
        if isinstance(explicit.get("zero_shot"), str)
        else explicit.get("zero_shot"),
        "class_names": None
        if explicit.get("class_names") is None
        else str(explicit["class_names"]),
        "memory": explicit.get("memory"),
        "minutes": explicit.get("minutes"),
        "no_cache": not source.cache,
        "store": None if store.root is None else str(store.root),
        "cache_dtype": store.dtype,
        "cache_precision": store.precision,
    }


def _prompts(explicit: Mapping[str, Any]) -> ZeroShot:
    prompts = explicit["zero_shot"]
    templates = (prompts,) if isinstance(prompts, str) else tuple(prompts)
    return ZeroShot(templates, explicit.get("class_names"))
