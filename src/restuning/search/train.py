"""`restuning.train`: one call from a data set to a trained, tested and saved task."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, overload

import torch

from restuning import methods
from restuning._errors import DataError, TrainingError
from restuning._files import hold_folder, write_json
from restuning.backbones import Backbone, load_backbone, refuse_for_loaded, with_text_tower
from restuning.data import Data, with_validation
from restuning.features import StoreOptions
from restuning.features.stored import BY_ITSELF, VIEWS_OF
from restuning.runtime.processes import count_processes, is_main_process
from restuning.search.auto import AUTO, choose_method
from restuning.search.budget import Budget, format_minutes
from restuning.search.candidates import CANDIDATES
from restuning.search.comparison import FILE, PICTURE, Comparison
from restuning.training.beforehand import OF_A_RUN, check_beforehand
from restuning.training.defaults import settings_for
from restuning.training.device import on_device
from restuning.training.own_size import note_smaller_size
from restuning.training.run import (
    Inputs,
    Log,
    Recipe,
    Run,
    Source,
    default_folder,
    folder_name,
    refuse_other_run,
    run_task,
    silent,
    with_pool,
)
from restuning.training.settings import FitSettings
from restuning.training.together import alone, from_main
from restuning.training.zero_shot import ZeroShot

if TYPE_CHECKING:
    from typing_extensions import Unpack

CHOICE = "choice.json"
"""In the folder of a run whose method was chosen, and in its task folder."""


class TrainOptions(TypedDict, total=False):
    """Everything else that `train` can be told; what is left out keeps its default.

    Attributes:
        settings: Settings of training, in place of the method's own defaults.
        epochs, batch_size, lr, lambda_rate, weight_decay, warmup_epochs, label_smoothing,
            precision, accumulate, clip, drop_path, ema, seed, workers, checkpoint_every, track:
            Single settings, over those; see `FitSettings`.
        rank, scale, zero, layers, pool: Options of the method; see `methods.build`.
        augment: Augmentation of training images: "none", "flip", "timm", "timm:POLICY".
        final: Train on train and val together.
        skip_bad: Leave corrupt images out, and count them.
        text, label: Columns of a csv.
        max_tokens: Tokens of a text that are read.
        store: Where feature stores lie (a folder), or `StoreOptions`; False runs the backbone in
            every epoch.
        random: Random weights of the backbone, from the seed.
        zero_shot: Prompts such as "a photo of a {}." that make the first head of the class names.
        class_names: File of class names for it, a line each.
        memory: Limit for "auto", of everything together, such as "2GiB".
        minutes: Limit for "auto", of the choice and the final run together.
        progress: Bars on a terminal.
    """

    settings: FitSettings
    epochs: int | None
    batch_size: int | None
    lr: float | None
    lambda_rate: float | None
    weight_decay: float | None
    warmup_epochs: float | None
    label_smoothing: float | None
    precision: str | None
    accumulate: int | None
    clip: float | None
    drop_path: float | None
    ema: float | None
    seed: int | None
    workers: int | None
    checkpoint_every: int | None
    track: Sequence[str] | None
    rank: int | None
    scale: str | None
    zero: bool | None
    layers: Any
    pool: str | None
    augment: str
    final: bool
    skip_bad: bool
    text: str
    label: str
    max_tokens: int
    store: str | Path | StoreOptions | bool | None
    random: bool
    zero_shot: str | Sequence[str] | None
    class_names: str | Path | None
    memory: str | None
    minutes: float | None
    progress: bool


SETTINGS = tuple(each.name for each in fields(FitSettings))
OF_METHOD = ("rank", "scale", "zero", "layers", "pool", "drop_path")
OF_SOURCE = ("augment", "final", "skip_bad", "text", "label", "max_tokens")
NO_FOLDER = frozenset(("", "off", "on", "no", "yes", "none", "false", "true", "auto"))
"""Words that somebody writes who means a switch: as folders they would be made without a word."""
OF_BUDGET = ("memory", "minutes")
OF_STEPS = ("epochs", "lr", "warmup_epochs", "clip", "ema")
"""Settings of steps that nobody gives without a reason: the command line hands on the others always."""
CHOSEN_BY_AUTO = ("lr", "rank", "scale", "zero", "layers", "zero_shot", "ema")
"""Settings that a choice finds by itself, or cannot use."""


@overload
def train(
    data: str | Path | Data,
    *,
    backbone: str | Backbone = ...,
    weights: str | Path | None = ...,
    method: str = ...,
    out: str | Path | None = ...,
    device: str | torch.device | None = ...,
    resume: bool = ...,
    log: Log = ...,
    **options: Unpack[TrainOptions],
) -> Run: ...


@overload
def train(
    data: str | Path | Data,
    *,
    backbone: str | Backbone = ...,
    weights: str | Path | None = ...,
    method: Sequence[str],
    out: str | Path | None = ...,
    device: str | torch.device | None = ...,
    resume: bool = ...,
    log: Log = ...,
    **options: Unpack[TrainOptions],
) -> Comparison: ...


def train(
    data: str | Path | Data,
    *,
    backbone: str | Backbone = "restuning-tiny",
    weights: str | Path | None = None,
    method: str | Sequence[str] = AUTO,
    out: str | Path | None = None,
    device: str | torch.device | None = None,
    resume: bool = True,
    log: Log = silent,
    **options: Unpack[TrainOptions],
) -> Run | Comparison:
    """Train a task on a frozen backbone, test it and save it: all that `restuning train` does.

    Features of the backbone are stored once and trained from wherever that is exact. Killed and
    called again with the same arguments and the same `out`, it goes on and ends the same.

    Args:
        data: As `load_data` takes it (a folder, a csv, "digits", "hf:NAME" ...), or a `Data`.
        backbone: By name (see `load_backbone`), or one that is loaded.
        weights: File of its weights, without a hub.
        method: A name of `methods.names()`; a list of names to compare; or "auto", the default,
            which chooses a method and its settings on the validation split within `memory` and
            `minutes`. (The command line without `--method` compares `training.defaults.COMPARED`:
            it has somebody to show a table to.)
        out: Folder of the run; None for `runs/DATA-METHOD-TIME`.
        device: "cpu", "cuda", "cuda:1"; None for CUDA if it is there.
        resume: False starts over.
        log: Receives a line for each thing that is decided. Nothing is printed.
        **options: See `TrainOptions`.

    Returns:
        The run (`.metrics`, `.task`, `.folder`), or a `Comparison` (`.runs`) of several methods.

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
    if method != AUTO:
        methods.refuse_unused(names, _options(explicit))
    recipes = [_recipe(name, explicit) for name in names]
    source = _source(data, explicit, recipes[0].settings, log)
    if budget is not None:
        # The choice reads the splits apart; the run that follows reads both anyway.
        source = replace(source, final=False)
    if budget is not None and count_processes() > 1:
        raise TrainingError(
            "a method is chosen in one process: clocks of several would choose several",
            where=f"--method {AUTO}",
            found=f"{count_processes()} processes of a launcher",
            fix="choose without the launcher, then train the method that was chosen with it",
        )
    log = log if is_main_process() else silent
    for line in _unused_steps([n for n in names if n != AUTO], explicit):
        log(line)
    with alone(), on_device(device) as place:
        # With `random=True` the backbone's weights are drawn here.
        torch.manual_seed(recipes[0].settings.seed)
        loaded = _load(backbone, weights, explicit)
        trainer = _Trainer(source, loaded, place, resume, bool(explicit.get("progress")), log)
        trainer.how["call"] = _call(source, loaded, weights, explicit)
        folder = None if out is None else Path(out)
        if budget is not None:
            return trainer.train_chosen(recipes[0], budget, folder)
        if explicit.get("zero_shot"):
            recipes = [trainer.with_head(each, _prompts(explicit)) for each in recipes]
        if isinstance(method, str):
            return trainer.train_one(recipes[0], folder)
        return trainer.compare(recipes, folder)


def _unused_steps(names: Sequence[str], explicit: Mapping[str, Any]) -> list[str]:
    """A line for each method that takes no steps, where the user said something about them."""
    given = [f"--{name.replace('_', '-')}" for name in OF_STEPS if name in explicit]
    solved = [name for name in names if methods.is_solved(name)]
    return [
        f"note      unused by {name}, which is solved in closed form: {', '.join(given)}"
        for name in solved
        if given
    ]


class _Trainer:
    """A source of data before a backbone, and how its runs are made."""

    def __init__(
        self,
        source: Source,
        backbone: Backbone,
        device: torch.device,
        resume: bool,
        progress: bool,
        log: Log,
    ) -> None:
        self.source, self.backbone, self.log = source, backbone, log
        self.how: dict[str, Any] = {"resume": resume, "progress": progress, "log": log}
        self.resume = resume
        self.data = source.load(backbone)
        self.host = backbone.host()
        self.host.to(device)

    def with_head(self, recipe: Recipe, prompts: ZeroShot) -> Recipe:
        """The recipe with a first head made of the names of the classes."""
        return replace(recipe, head=prompts.head(self.backbone, self.data.labels))

    def train_one(self, recipe: Recipe, out: Path | None) -> Run:
        inputs = self._inputs(recipe)
        self._describe(inputs, [recipe.method])
        out = out or default_folder(self.data, folder_name(recipe.method))
        return run_task(inputs, recipe, out, **self.how)

    def compare(self, recipes: Sequence[Recipe], out: Path | None) -> Comparison:
        """Every method in a folder of its own, then all of them in one table and picture."""
        inputs = self._inputs(recipes[0])
        self._describe(inputs, [each.method for each in recipes])
        out = out or default_folder(self.data, "comparison")
        check_beforehand(self.data, out, (FILE, PICTURE))
        with hold_folder(out):
            self._store_once(inputs, recipes, out)
            runs = [
                run_task(inputs, each, out / folder_name(each.method), **self.how)
                for each in recipes
            ]
            comparison = Comparison(tuple(runs), out)
            from_main(lambda: comparison.save(f"{self.data.name} on {self.backbone.name}"))
        return comparison

    def train_chosen(self, recipe: Recipe, budget: Budget, out: Path | None) -> Run:
        """A method chosen on validation, then trained on both splits and tested once."""
        plain = with_validation(self.source.load(self.backbone, plain=True))
        inputs = self._inputs(recipe, with_validation(self.data))
        inputs = replace(inputs, load_plain=lambda: plain)
        self._describe(inputs, [each.method for each in CANDIDATES])
        val = len(inputs.data.val)
        if self.data.val is None:
            self.log(
                f"  no validation split: {val} of {len(self.data.train)} training examples are "
                "held out for the choice"
            )
        self.log(f"{AUTO}  on {val} validation examples")
        out = out or default_folder(self.data, AUTO)
        check_beforehand(self.data, out, (*OF_A_RUN, CHOICE))
        with hold_folder(out):
            choice = choose_method(
                inputs,
                recipe.settings,
                out / "choice",
                budget=budget,
                resume=self.resume,
                log=lambda line: self.log(f"  {line}"),
            )
            warm = " more from its trial's weights" if choice.start is not None else ""
            how = f"lr {choice.lr:g}, {choice.epochs} epochs{warm}"
            how = "solved in closed form" if methods.is_solved(choice.method) else how
            self.log(
                f"take  {choice.method}, {how}; the choice took {format_minutes(choice.seconds)}"
            )
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
            )
            facts = {"choice": choice.to_dict()}
            # What begins the choice and not what it found: the run goes on from a trial, so that the method
            # alone would be another run. Without a limit of time the same begins the same.
            began = {**recipe.settings.to_dict(), **dict.fromkeys(CHOSEN_BY_AUTO)}
            call = {**self.how["call"], **began, "method": AUTO, "options": dict(recipe.options)}
            run = run_task(inputs, chosen, out, facts=facts, **{**self.how, "call": call})
            for folder in (run.folder, run.task_folder):
                write_json(folder / CHOICE, choice.to_dict())
            return replace(run, choice=choice)

    def _store_once(self, inputs: Inputs, recipes: Sequence[Recipe], out: Path) -> None:
        """One pass over the data for all methods; first the folders of their runs are looked at."""
        if self.resume:
            for each in recipes:
                task = each.build_form(inputs)
                task.labels = inputs.data.labels
                folder = out / folder_name(each.method)
                from_main(partial(refuse_other_run, inputs, task, each.settings, folder))
        inputs.store_once(partial(each.build_form, inputs) for each in recipes)

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


def _budget(method: str | Sequence[str], explicit: Mapping[str, Any]) -> Budget | None:
    """The budget of "auto"; None of methods that are named."""
    limits = [f"--{name}" for name in OF_BUDGET if name in explicit]
    if method != AUTO:
        if limits:
            raise TrainingError(
                "a budget is for --method auto",
                where=" ".join(limits),
                found=f"--method {method if isinstance(method, str) else ' '.join(method)}",
                fix="give --method auto; `restuning plan` forecasts what one method takes",
            )
        return None
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
    return Source(
        str(data) if isinstance(data, Path) else data,
        cache=store is not False,
        store=options,
        **{name: explicit[name] for name in OF_SOURCE if name in explicit},
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
    if isinstance(backbone, Backbone):
        refuse_for_loaded(backbone, weights=weights, random=explicit.get("random"))
        return backbone
    # Class names become a head by the text tower; `hf:NAME` alone would load the image tower only.
    name = with_text_tower(backbone) if explicit.get("zero_shot") else backbone
    file = None if weights is None else Path(weights)
    return load_backbone(name, weights=file, random=bool(explicit.get("random")))


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
