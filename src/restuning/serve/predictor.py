"""Saved tasks, opened with the backbone they name, that answer whatever a user has at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from restuning._errors import BackboneError, DataError, UnknownNameError, WrongBackboneError
from restuning.backbones import (
    Backbone,
    Preprocessing,
    choose_device,
    load_backbone,
    refuse_for_loaded,
    refuse_other_engine,
)
from restuning.data import CORRUPT, TagBatch, make_text_batch
from restuning.host import Extractor
from restuning.runtime.hub import named_in
from restuning.serve.inputs import ImageInputs, Inputs, TextInputs, WordInputs
from restuning.task import MultiTask, Task, WeightsFile, describe, find_task, load

BATCH = 64
"""Inputs of one backbone forward, as for `restuning predict`."""


class Choice(NamedTuple):
    """A class and its probability."""

    label: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What one task says of one input.

    Attributes:
        label: The most probable class; its number where the task has no names.
        probability: Of that class, at the task's temperature (`Task.probabilities`).
        probabilities: Of all classes, in the order of `labels`, `c` on the CPU.
        labels: Names of all classes.
    """

    label: str
    probability: float
    probabilities: Tensor = field(repr=False, compare=False)
    labels: Sequence[str] = field(repr=False, compare=False)

    def top(self, count: int = 5) -> list[Choice]:
        """The most probable classes first; all of them where there are fewer."""
        best = self.probabilities.topk(min(count, len(self.labels)))
        return [
            Choice(self.labels[int(index)], probability)
            for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


@dataclass(frozen=True)
class Answer:
    """What all tasks say of one input: `answer["pets"].label`, or `answer.label` of a single task.

    Attributes:
        input: As it was given; a folder is given as its files, a sentence as its words.
        predictions: By task, in the order the tasks were given; empty where each word is answered.
        words: Of a task on tagged words an answer for every word, whose `input` is the word. Words
            beyond the tokens that are read have none. Empty for other tasks.
    """

    input: Any
    predictions: Mapping[str, Prediction]
    words: tuple[Answer, ...] = ()

    def __repr__(self) -> str:
        """What was answered; of an image or an array its kind alone, for its pixels would fill pages."""
        named = isinstance(self.input, str | Path | list)
        given = repr(self.input) if named else f"<{type(self.input).__name__}>"
        said = f"words={self.words!r}" if self.words else f"predictions={dict(self.predictions)!r}"
        return f"Answer({given}, {said})"

    def __getitem__(self, task: str) -> Prediction:
        """What one task says.

        Raises:
            UnknownNameError: There is no such task, or it answers each of the `words`.
        """
        if task in self.predictions:
            return self.predictions[task]
        raise UnknownNameError(
            "no such task answered",
            where=task,
            found=", ".join(self.predictions) or "an answer for every word: answer.words",
            fix="give one of these names",
        )

    @property
    def label(self) -> str:
        """Of a single task: the most probable class."""
        return self._single().label

    @property
    def probability(self) -> float:
        """Of a single task: the probability of `label`."""
        return self._single().probability

    def top(self, count: int = 5) -> list[Choice]:
        """Of a single task: the most probable classes first."""
        return self._single().top(count)

    def _single(self) -> Prediction:
        if len(self.predictions) == 1:
            return next(iter(self.predictions.values()))
        names = ", ".join(self.predictions)
        raise UnknownNameError(
            "which task's answer?" if names else "each word has an answer of its own",
            found=f"the tasks {names}" if names else f"{len(self.words)} words",
            fix="name it: answer[NAME].label" if names else "for word in answer.words: word.label",
        )


class Predictor:
    """Tasks on one backbone, ready for images or texts: `predictor(["a.jpg", image]) -> answers`.

    All bypass tasks and heads alone share one backbone forward a batch; every task with tuners inside
    the backbone takes one more. It may be called from several threads at once.

    Most users want `Predictor.load`, which opens all of this from a folder.

    Args:
        backbone: What the tasks were trained on.
        tasks: By name.
        host: Of the backbone, where one is made already.
        preprocessing: How inputs become the backbone's, as task files store it; None for the
            backbone's own.
        device: Where it runs; None for a GPU if there is one.
        skip_bad: Leave image files out that cannot be read, and keep their names in `skipped`.
        batch_size: Inputs of one backbone forward.

    Attributes:
        backbone, host: The backbone, and with its hooks.
        tasks: By name.
        labels: Class names by task; numbers where a task has none.
        inputs: How what is given becomes an input; `inputs.kind` is "image", "text" or "words".
        forwards: Backbone forwards of one batch.

    Raises:
        DataError: Nothing says how inputs are prepared.
        FormatError: There is no task, or the tasks cannot share a backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        tasks: Mapping[str, Task],
        *,
        host: Extractor | None = None,
        preprocessing: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        skip_bad: bool = False,
        batch_size: int = BATCH,
    ) -> None:
        if batch_size < 1:
            raise DataError(
                "a batch holds an input", found=f"batch_size={batch_size}", fix="give 1 or more"
            )
        self.backbone, self.host = backbone, host or backbone.host()
        self.host.to(choose_device(device))
        self.tasks = {name: task.to(self.host.device).eval() for name, task in tasks.items()}
        self._answers = MultiTask(self.host, self.tasks)
        self.batch_size = batch_size
        self.labels = {name: _class_names(name, task) for name, task in self.tasks.items()}
        self.inputs = _make_inputs(backbone, preprocessing or {}, skip_bad)

    @classmethod
    def load(
        cls,
        where: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
        *,
        revision: str | None = None,
        backbone: str | Backbone | None = None,
        weights: str | Path | None = None,
        device: str | torch.device | None = None,
        any_backbone: bool = False,
        skip_bad: bool = False,
        batch_size: int = BATCH,
    ) -> Predictor:
        """Open tasks and the one backbone that all of them name.

        Args:
            where: A task folder, a run folder (for the task in it) or a name on the Hugging Face hub
                (`user/name`); a list of them; or by the names that answers shall bear. Else a task
                has the name of its folder.
            revision: Of hub names: branch, tag or commit.
            backbone: A name for `load_backbone`, or a backbone that is loaded; None for the one
                that the tasks name.
            weights: The weights file of a backbone that is named; None for the file that the tasks name, which must
                be there and the same to the byte, or for weights that come with the name.
            device: Where it runs; None for a GPU if there is one.
            any_backbone: Accept other weights of the same shape, or another engine of the backbone.
            skip_bad: Leave image files out that cannot be read, and keep their names in `skipped`.
            batch_size: Inputs of one backbone forward.

        Raises:
            FormatError: No task there, or a damaged one.
            DataError: The tasks are of several backbones, or prepare their inputs in several ways.
            BackboneError: The backbone or its weights file cannot be loaded, another file lies
                where that was, or `weights` is given for a backbone that is loaded.
            WrongBackboneError: A task was trained on another backbone.

        Cost: loads the backbone, and reads its weights file once more for the digest.
        """
        folders = _find_folders(where, revision)
        stored = {name: describe(folder) for name, folder in folders.items()}
        if isinstance(backbone, Backbone):
            refuse_for_loaded(backbone, weights=weights)
        else:
            backbone = _open_backbone(stored, folders, backbone, weights, any_backbone)
        host = backbone.host()
        return cls(
            backbone,
            {name: load(f, host, any_backbone=any_backbone) for name, f in folders.items()},
            host=host,
            preprocessing=_common_preprocessing(stored),
            device=device,
            skip_bad=skip_bad,
            batch_size=batch_size,
        )

    @property
    def forwards(self) -> int:
        """Backbone forwards of one batch."""
        return self._answers.forwards

    @property
    def skipped(self) -> list[str]:
        """Image files that were left out so far, where `skip_bad` allows it."""
        return [str(file) for file in self.left_out.get(CORRUPT, [])]

    @property
    def ignored(self) -> list[str]:
        """What else was left out of folders so far: files that are no images, folders of runs."""
        others = (files for why, files in self.left_out.items() if why != CORRUPT)
        return [str(file) for files in others for file in files]

    @property
    def left_out(self) -> Mapping[str, Sequence[Path]]:
        """Files that have no answer, so far, by reason."""
        return self.inputs.left_out if isinstance(self.inputs, ImageInputs) else {}

    def __repr__(self) -> str:
        """The tasks and the backbone."""
        return f"Predictor({', '.join(self.tasks)} on {self.backbone.name})"

    def __call__(self, inputs: Any) -> list[Answer]:
        """Answers to one input or many, in their order; always a list.

        Args:
            inputs: For images: a path, a folder (all images in it, at any depth; `left_out` names
                its other files), a PIL image, the bytes of a file, an array as
                `restuning.data.read_image` takes it, a tensor `c h w` of uint8, a prepared tensor
                of floats in the backbone's own size; or any iterable of these, or `b ...` of the
                arrays.
                For texts: a string, a `Path` of a file (csv with a column `text`, else a text a
                line), or an iterable of these; of tagged words also lists of words.

        Raises:
            DataError: An input cannot be read, or is of another kind.
        """
        return list(self.stream(inputs))

    def stream(self, inputs: Any) -> Iterator[Answer]:
        """The same one after the other, each as soon as its batch is done.

        Args:
            inputs: As for a call; an iterator is read a batch at a time.
        """
        single = self.inputs.expand([inputs] if self.inputs.single(inputs) else inputs)
        # A batch at a time: an iterator without an end is answered as well.
        while chunk := list(islice(single, self.batch_size)):
            yield from self._answer(chunk)

    def _answer(self, chunk: list[Any]) -> Iterator[Answer]:
        batch = self.inputs.batch(chunk)
        if not batch.inputs:
            return
        device = self.host.device
        with torch.inference_mode():
            logits = self._answers(
                *(x.to(device) for x in batch.args),
                **{name: value.to(device) for name, value in batch.kwargs.items()},
            )
        chances = {name: self.tasks[name].probabilities(z).cpu() for name, z in logits.items()}
        # Of the logits: two of them may round to one probability.
        best = {name: z.argmax(-1).cpu() for name, z in logits.items()}
        # `batch.inputs` and not `chunk`: files that were skipped have no answer.
        for row, given in enumerate(batch.inputs):
            if batch.words is None:
                yield Answer(given, self._predictions(chances, best, row))
                continue
            words = (
                Answer(given[word], self._predictions(chances, best, (row, token)))
                for word, token in batch.words[row].items()
            )
            yield Answer(given, {}, tuple(words))

    def _predictions(
        self, chances: Mapping[str, Tensor], best: Mapping[str, Tensor], place: Any
    ) -> dict[str, Prediction]:
        predictions = {}
        for task, values in chances.items():
            # `b c` by input, or `b n c` by input and token.
            own, labels, top = values[place], self.labels[task], int(best[task][place])
            predictions[task] = Prediction(labels[top], float(own[top]), own, labels)
        return predictions


def _find_folders(
    where: str | Path | Sequence[str | Path] | Mapping[str, str | Path], revision: str | None
) -> dict[str, Path]:
    """Task folders by name; hub names are fetched."""
    if isinstance(where, Mapping):
        return {name: find_task(each, revision) for name, each in where.items()}
    places = [where] if isinstance(where, str | Path) else list(where)
    folders = [find_task(each, revision) for each in places]
    # What is fetched from a hub lies in a folder named by its commit.
    names = [
        (folder if folder.suffix == ".task" else Path(each)).name.removesuffix(".task")
        for each, folder in zip(places, folders, strict=True)
    ]
    if len(set(names)) < len(names):
        raise DataError(
            "two tasks have one name",
            found=", ".join(names),
            fix="rename a task folder, or in Python give {name: folder}",
        )
    return dict(zip(names, folders, strict=True))


def _open_backbone(
    stored: Mapping[str, Mapping[str, Any]],
    folders: Mapping[str, Path],
    name: str | None,
    weights: str | Path | None,
    any_backbone: bool,
) -> Backbone:
    """The backbone that all tasks name, or the one that the user names instead."""
    names = {d["backbone"]["name"] for d in stored.values()}
    if name is None and len(names) > 1:
        raise DataError(
            "tasks of several backbones cannot share a forward",
            found=", ".join(sorted(names)),
            fix="predict with the tasks of one backbone at a time",
        )
    where = str(next(iter(folders.values()), ""))
    chosen = name or next(iter(names), "")
    if not chosen:
        raise BackboneError(
            "the task does not name its backbone",
            where=where,
            fix="name it: backbone=NAME (--backbone NAME)",
        )
    # Another backbone, which the user names, has weights of its own.
    if weights is None and chosen in names:
        weights = _find_weights(stored, folders, any_backbone)
    with named_in(Path(where) / "task.json" if name is None else None):
        if not any_backbone:
            trained_on = {n: d["backbone"]["fingerprint"] for n, d in stored.items()}
            refuse_other_engine(chosen, trained_on)
        return load_backbone(chosen, weights=weights)


def _find_weights(
    stored: Mapping[str, Mapping[str, Any]], folders: Mapping[str, Path], any_backbone: bool
) -> Path | None:
    """The one weights file that the tasks name, found and compared to the byte."""
    files = {name: WeightsFile.from_description(d) for name, d in stored.items()}
    # By contents: copies of one file may lie in several places.
    if len({file and file.sha256 for file in files.values()}) > 1:
        raise DataError(
            "the tasks were trained on several weights files",
            found=", ".join(f"{n}: {f.path if f else 'the own ones'}" for n, f in files.items()),
            fix="predict with the tasks of one backbone at a time",
        )
    name, wanted = next(iter(files.items()))
    if wanted is None:
        return None
    found = wanted.find(folders[name])
    if found is None:
        raise BackboneError(
            "the weights of a task's backbone are not there",
            where=str(folders[name]),
            found=f"no file {wanted.path}, and no {wanted.name} beside the task",
            fix="give weights=FILE (--weights FILE), the file that `sha256sum` answers "
            f"{wanted.sha256[:12]}... for",
        )
    if not any_backbone and not wanted.matches(found):
        raise WrongBackboneError(
            "another file lies where the weights of a task's backbone were",
            where=str(found),
            found=f"its sha256 is not {wanted.sha256[:12]}...",
            fix="restore the file, or give weights=FILE (--weights FILE); any_backbone=True "
            "(--any-backbone) accepts other weights of the same shape",
        )
    return found


def _common_preprocessing(stored: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any] | None:
    said = [d["preprocessing"] for d in stored.values() if d["preprocessing"]]
    if any(other != said[0] for other in said):
        raise DataError(
            "the tasks prepare their inputs in different ways",
            found=str(said[:2])[:200],
            fix="predict with them one at a time",
        )
    return said[0] if said else None


def _make_inputs(backbone: Backbone, said: Mapping[str, Any], skip_bad: bool) -> Inputs:
    if backbone.tokenizer is not None:
        batch = make_text_batch(backbone.tokenizer, said)
        return WordInputs(batch) if isinstance(batch, TagBatch) else TextInputs(batch)
    preprocessing = Preprocessing.from_dict(said) if said else backbone.preprocessing
    if preprocessing is None:
        raise DataError(
            "nothing says how inputs are prepared",
            where=backbone.name,
            fix="train the task again with `restuning train`",
        )
    return ImageInputs(preprocessing, skip_bad)


def _class_names(name: str, task: Task) -> list[str]:
    if task.head is None:
        raise DataError(
            "a task without a head names no classes",
            where=name,
            fix="use it in Python: restuning.Tuned(host, task)(inputs)",
        )
    return task.labels or [str(i) for i in range(task.head.out_features)]
