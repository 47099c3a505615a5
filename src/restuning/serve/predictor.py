"""Saved tasks, opened with the backbone they name, that answer whatever a user has at hand."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from restuning._errors import (
    AnswerError,
    BackboneError,
    DataError,
    FormatError,
    UnknownNameError,
    WrongBackboneError,
    WrongTaskError,
)
from restuning._files import expand_home, read_json
from restuning.backbones import (
    AudioPreprocessing,
    Backbone,
    choose_device,
    load_backbone,
    preprocessing_from_dict,
    refuse_for_loaded,
    refuse_other_engine,
)
from restuning.data import CORRUPT, TagBatch, make_text_batch
from restuning.host import Extractor
from restuning.problems import (
    Choice,
    DepthAnswer,
    MaskAnswer,
    NumbersAnswer,
    Prediction,
    Share,
    TagsAnswer,
    VectorAnswer,
)
from restuning.problems.problem import Box
from restuning.runtime.hub import named_in
from restuning.serve.inputs import (
    AudioInputs,
    FileInputs,
    ImageInputs,
    Inputs,
    Place,
    TextInputs,
    WordInputs,
)
from restuning.serve.tiles import Tiles
from restuning.task import (
    HubTask,
    Identified,
    MultiTask,
    Task,
    WeightsFile,
    describe,
    find_origin,
    find_task,
    load,
)

BATCH = 64
"""Inputs of one backbone forward, as for `restuning predict`."""


@dataclass(frozen=True)
class Answer:
    """What all tasks say of one input: `answer["pets"].label`, or `answer.label` of a single task.

    What a task says is a `Prediction` of one class, a `TagsAnswer` of several labels, a `NumbersAnswer`, a `MaskAnswer`, a
    `DepthAnswer` or a `VectorAnswer`, as its problem is (`restuning.problems`). All of them have a `label`, `words` for a table and `to_json`.

    Attributes:
        input: As it was given; a folder is given as its files, a sentence as its words.
        predictions: By task, in the order the tasks were given; empty where each word is answered.
        words: Of a task on tagged words an answer for every word, whose `input` is the word. Words
            beyond the tokens that are read have none. Empty for other tasks.
    """

    input: Any
    predictions: Mapping[str, Prediction | NumbersAnswer | MaskAnswer | DepthAnswer | VectorAnswer]
    words: tuple[Answer, ...] = ()

    def __repr__(self) -> str:
        """What was answered; of an image or an array its kind alone, for its pixels would fill pages."""
        named = isinstance(self.input, str | Path | list)
        given = repr(self.input) if named else f"<{type(self.input).__name__}>"
        said = f"words={self.words!r}" if self.words else f"predictions={dict(self.predictions)!r}"
        return f"Answer({given}, {said})"

    def __getitem__(self, task: str) -> Any:
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
        """Of a single task: the most probable class, all labels, or the numbers in words."""
        return self._single().label

    @property
    def probability(self) -> float:
        """Of a single task: the probability of `label`.

        Raises:
            WrongTaskError: It answers with numbers.
        """
        return self._choosing().probability

    def top(self, count: int = 5) -> list[Choice]:
        """Of a single task: the most probable classes first."""
        return self._choosing().top(count)

    @property
    def tags(self) -> tuple[Choice, ...]:
        """Of a single task on several labels: those that are there, the most probable first."""
        return self._of_kind(TagsAnswer, "answers with several labels").tags

    @property
    def value(self) -> float:
        """Of a single task on numbers: the first of them, in its units."""
        return self._of_kind(NumbersAnswer, "answers with numbers").value

    @property
    def error(self) -> float | None:
        """Of a single task on numbers: how far off such values were on rows left out; None where nothing was."""
        return self._of_kind(NumbersAnswer, "answers with numbers").error

    @property
    def vector(self) -> Tensor:
        """Of a single task on embeddings: the vector, at unit length."""
        return self._of_kind(VectorAnswer, "answers with vectors").vector

    @property
    def mask(self) -> Tensor:
        """Of a single task on pixels: the class of each, `H W` in the image's own size."""
        return self._of_kind(MaskAnswer, "answers with masks").mask

    @property
    def depth(self) -> Tensor:
        """Of a single task on depths: the number of each pixel in units, `H W` in the image's own size."""
        return self._of_kind(DepthAnswer, "answers with depths").depth

    @property
    def shares(self) -> tuple[Share, ...]:
        """Of a single task on pixels: the share of each class that is there, the largest first."""
        return self._of_kind(MaskAnswer, "answers with masks").shares

    def _choosing(self) -> Prediction:
        return self._of_kind(Prediction, "answers with labels")

    def _of_kind(self, kind: Any, what: str) -> Any:
        said = self._single()
        if not isinstance(said, kind):
            raise WrongTaskError(
                f"no task here {what}",
                found=f"{type(said).__name__}: {said.label}",
                fix="ask for .label, or for .value, .tags, .mask, .depth or .probability as the task's problem is",
            )
        return said

    def _single(self) -> Any:
        if len(self.predictions) == 1:
            return next(iter(self.predictions.values()))
        names = ", ".join(self.predictions)
        raise UnknownNameError(
            "which task's answer?" if names else "each word has an answer of its own",
            found=f"the tasks {names}" if names else f"{len(self.words)} words",
            fix="name it: answer[NAME].label" if names else "for word in answer.words: word.label",
        )


class Predictor:
    """Tasks on one backbone, ready for images, sounds or texts: `predictor(["a.jpg", image]) -> answers`.

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
        skip_bad: Leave files out that cannot be read, and keep their names in `skipped`.
        batch_size: Inputs of one backbone forward.
        tiles: Read images that are larger than those of training as overlapping windows, for tasks that answer pixels
            (`serve.tiles`): True of the size of the training images, a number of so many pixels a side.

    Attributes:
        backbone, host: The backbone, and with its hooks.
        tasks: By name.
        labels: Names of what is answered, by task: of classes, labels or numbers; numbers where a task has none.
        multi: The tasks as one module, from a batch to logits.
        inputs: How what is given becomes an input; `inputs.kind` is "image", "audio", "text" or "words".
        preprocessing: The same as task files store it.
        forwards: Backbone forwards of one batch.

    Raises:
        DataError: Nothing says how inputs are prepared.
        FormatError: There is no task, or the tasks cannot share a backbone.
        EngineError: The backbone is an engine, and a task has tuners inside it or reads what its file does not give.
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
        tiles: bool | int = False,
    ) -> None:
        if batch_size < 1:
            raise DataError(
                "a batch holds an input", found=f"batch_size={batch_size}", fix="give 1 or more"
            )
        self.backbone, self.host = backbone, host or backbone.host()
        self.host.to(choose_device(device))
        self.tasks = {name: task.to(self.host.device).eval() for name, task in tasks.items()}
        self.multi = _share_forward(self.host, self.tasks)
        self.batch_size = batch_size
        self.labels = {name: _class_names(name, task) for name, task in self.tasks.items()}
        self.inputs = _make_inputs(backbone, preprocessing or {}, skip_bad)
        own = backbone.preprocessing.to_dict() if backbone.preprocessing else {}
        self.preprocessing = dict(preprocessing or own)
        self._tiles = tiles
        self.tiles = self._find_tiles()

    @classmethod
    def load(
        cls,
        where: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        backbone: str | Backbone | None = None,
        weights: str | Path | None = None,
        device: str | torch.device | None = None,
        any_backbone: bool = False,
        skip_bad: bool = False,
        batch_size: int = BATCH,
        tiles: bool | int = False,
    ) -> Predictor:
        """Open tasks and the one backbone that all of them name.

        Args:
            where: A task folder, a run folder (for the task in it, or the tasks of all columns of a table) or a name on the Hugging Face hub
                (`user/pets`, `user/zoo/pets` of one that holds several, `user/pets@v1`); a list of them; or by the
                names that answers shall bear. Else a task has the name of its folder or repository.
            revision: Of hub names: branch, tag or commit; None for the newest.
            token: For repositories that are private; None for that of the login (`hf auth login`, HF_TOKEN).
            local_files_only: Of hub names take what was fetched before, and ask no hub.
            backbone: A name for `load_backbone`, or a backbone that is loaded; None for the one
                that the tasks name.
            weights: The weights file of a backbone that is named; None for the file that the tasks name, which must
                be there and the same to the byte, or for weights that come with the name.
            device: Where it runs; None for a GPU if there is one.
            any_backbone: Accept other weights of the same shape, or another engine of the backbone.
            skip_bad: Leave files out that cannot be read, and keep their names in `skipped`.
            batch_size: Inputs of one backbone forward.
            tiles: As of the class.

        Raises:
            FormatError: No task there, or a damaged one.
            HubError: The hub refuses, or fails.
            DataError: The tasks are of several backbones, or prepare their inputs in several ways.
            BackboneError: The backbone or its weights file cannot be loaded, another file lies
                where that was, or `weights` is given for a backbone that is loaded.
            WrongBackboneError: A task was trained on another backbone.

        Cost: loads the backbone, and reads its weights file once more for the digest.
        """
        folders = find_folders(where, revision, token=token, local_files_only=local_files_only)
        stored = {name: describe(folder) for name, folder in folders.items()}
        opened = _open_backbone(stored, folders, backbone, weights, any_backbone)
        host = opened.host()
        # Nobody writes to it meanwhile: its weights are read once for all tasks.
        known = Identified(host)
        return cls(
            opened,
            {name: load(f, known, any_backbone=any_backbone) for name, f in folders.items()},
            host=host,
            preprocessing=_common_preprocessing(stored),
            device=device,
            skip_bad=skip_bad,
            batch_size=batch_size,
            tiles=tiles,
        )

    @property
    def forwards(self) -> int:
        """Backbone forwards of one batch."""
        return self.multi.forwards

    @property
    def skipped(self) -> list[str]:
        """Files that were left out so far, where `skip_bad` allows it."""
        return [str(file) for file in self.left_out.get(CORRUPT, [])]

    @property
    def ignored(self) -> list[str]:
        """What else was left out of folders so far: files of other kinds, folders of runs."""
        others = (files for why, files in self.left_out.items() if why != CORRUPT)
        return [str(file) for files in others for file in files]

    @property
    def left_out(self) -> Mapping[str, Sequence[Path]]:
        """Files that have no answer, so far, by reason."""
        return self.inputs.left_out if isinstance(self.inputs, FileInputs) else {}

    @property
    def cut(self) -> list[str]:
        """Files of sounds that were longer so far than what is read of any."""
        return list(self.inputs.cut) if isinstance(self.inputs, AudioInputs) else []

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
                For sounds: a path, a folder, the bytes of a file, samples with their rate (`Sound`, or a pair
                `(array, rate)`), or any iterable of these.
                For texts: a string, a `Path` of a file (csv with a column `text`, else a text a
                line), or an iterable of these; of tagged words also lists of words.

        Raises:
            DataError: An input cannot be read, or is of another kind.
            AnswerError: A task answers one of them with what is no number.
        """
        return list(self.stream(inputs))

    def stream(self, inputs: Any) -> Iterator[Answer]:
        """The same one after the other, each as soon as its batch is done.

        Args:
            inputs: As for a call; an iterator is read a batch at a time.
        """
        single = self.inputs.expand([inputs] if self.inputs.single(inputs) else inputs)
        yield from self._answer_all(single) if self.tiles is None else self._answer_windows(single)

    def _answer_all(self, single: Iterator[Any]) -> Iterator[Answer]:
        # A batch at a time: an iterator without an end is answered as well.
        while chunk := list(islice(single, self.batch_size)):
            yield from self._answer(chunk)

    def _answer_windows(self, single: Iterator[Any]) -> Iterator[Answer]:
        """Answers to images that are cut into parts, of which a batch at a time is held."""
        assert self.tiles is not None and isinstance(self.inputs, ImageInputs)
        images, tiles = self.inputs, self.tiles
        waiting: deque[tuple[Any, tuple[int, int], list[Box]]] = deque()

        def cut() -> Iterator[Any]:
            for each in single:
                if (image := images.open(each)) is None:
                    continue
                size = (image.height, image.width)
                boxes = tiles.place(size)
                waiting.append((each, size, boxes))
                yield from map(image.crop, boxes)

        parts: list[Mapping[str, Any]] = []
        for answer in self._answer_all(cut()):
            parts.append(answer.predictions)
            given, size, boxes = waiting[0]
            if len(parts) == len(boxes):
                waiting.popleft()
                yield Answer(given, tiles.join(parts, boxes, size))
                parts = []

    def _find_tiles(self) -> Tiles | None:
        if self._tiles is False:
            return None
        problems = {name: task.problem for name, task in self.tasks.items()}
        if not isinstance(self.inputs, ImageInputs):
            raise DataError(
                "only images are read in windows",
                where="tiles",
                found=f"tasks that answer {self.inputs.kind}",
                fix="leave tiles out",
            )
        return Tiles.of(problems, self._tiles, self.inputs.preprocessing)

    def _answer(self, chunk: list[Any]) -> Iterator[Answer]:
        batch = self.inputs.batch(chunk)
        if not batch.inputs:
            return
        device = self.host.device
        with torch.inference_mode():
            logits = self.multi(
                *(x.to(device) for x in batch.args),
                **{name: value.to(device) for name, value in batch.kwargs.items()},
            )
        chances = self.chances(logits)
        # `batch.inputs` and not `chunk`: files that were skipped have no answer.
        for row, given in enumerate(batch.inputs):
            words = None if batch.words is None else batch.words[row]
            place = None if batch.places is None else batch.places[row]
            yield self.answer(given, chances, row, words, place)

    def chances(self, logits: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """By task what is told of a batch (probabilities, or numbers) and its logits, on the CPU."""
        # Of the logits: two of them may round to one probability.
        return {name: (self.tasks[name].values(z).cpu(), z.cpu()) for name, z in logits.items()}

    def answer(
        self,
        given: Any,
        chances: Mapping[str, tuple[Tensor, Tensor]],
        row: int,
        words: Mapping[int, int] | None = None,
        place: Place | None = None,
    ) -> Answer:
        """What tasks say of one input of a batch.

        Args:
            given: The input.
            chances: Of the batch, by task.
            row: Its place there.
            words: The token that answers for each word; None where the input has one answer.
            place: Of an image its size, and what is seen of it.

        Raises:
            AnswerError: One of them says what is no number.
        """
        if words is None:
            return Answer(given, self._predictions(given, chances, row, place))
        return Answer(
            given,
            {},
            tuple(
                Answer(given[word], self._predictions(given, chances, (row, token)))
                for word, token in words.items()
            ),
        )

    def _predictions(
        self,
        given: Any,
        chances: Mapping[str, tuple[Tensor, Tensor]],
        row: Any,
        place: Place | None = None,
    ) -> dict[str, Any]:
        # `b ...` by input, or `b n c` by input and token.
        found = {}
        for name, (values, z) in chances.items():
            # A sum is the quickest look at all of them; finite numbers may have one that is not.
            if not math.isfinite(values[row].sum()) and not values[row].isfinite().all():
                raise _no_number(name, values[row], given if self.inputs.kind == "image" else "")
            problem = self.tasks[name].problem
            said = problem.answer(values[row], z[row], self.labels[name])
            found[name] = said if place is None else problem.on_image(said, *place)
        return found

    def exchange(self, tasks: Mapping[str, Task], *, afresh: bool = False) -> Predictor:
        """A predictor on the same backbone with other tasks; this one answers on as it is.

        Args:
            tasks: By name, on the host's device. Those that are here are not built again (`MultiTask`).
            afresh: Build all of them again, into one bank.

        Raises:
            FormatError: There is no task.
            EngineError: As the constructor.
        """
        made = copy(self)
        made.tasks = dict(tasks)
        made.multi = _share_forward(self.host, made.tasks, None if afresh else self.multi)
        made.labels = {
            name: self.labels[name]
            if self.tasks.get(name) is task
            else _class_names(name, task.eval())
            for name, task in tasks.items()
        }
        made.tiles = made._find_tiles()
        return made


def open_task(
    where: str | Path,
    *,
    revision: str | None = None,
    backbone: str | Backbone | None = None,
    weights: str | Path | None = None,
    any_backbone: bool = False,
) -> tuple[Task, Backbone, Extractor]:
    """One task, also without a head, with the backbone that it names and a host on that.

    Args:
        where: As for `Predictor.load`, like all that follows.
        revision: Of a hub name.
        backbone: A name, or a backbone that is loaded; None for the one that the task names.
        weights: The weights file of a backbone that is named.
        any_backbone: Accept other weights of the same shape.

    Raises:
        FormatError, BackboneError, WrongBackboneError: As `Predictor.load`; of several tasks as well.
    """
    folders = find_folders(where, revision)
    if len(folders) > 1:
        raise FormatError(
            "a folder of several tasks, and one is wanted",
            where=str(where),
            found=", ".join(folders),
            fix=f"give one of them, such as {next(iter(folders.values()))}",
        )
    stored = {name: describe(folder) for name, folder in folders.items()}
    opened = _open_backbone(stored, folders, backbone, weights, any_backbone)
    host = opened.host()
    (folder,) = folders.values()
    return load(folder, host, any_backbone=any_backbone), opened, host


def find_folders(
    where: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> dict[str, Path]:
    """Task folders by name; hub names are fetched, as `find_task` says."""

    def find(each: str | Path) -> Path:
        return find_task(each, revision, token=token, local_files_only=local_files_only)

    if isinstance(where, Mapping):
        return {name: find(each) for name, each in where.items()}
    places = [where] if isinstance(where, str | Path) else list(where)
    if len(places) == 1 and (columns := find_columns(places[0])):
        return columns
    folders = [find(each) for each in places]
    names = [_name_of(each, folder) for each, folder in zip(places, folders, strict=True)]
    if len(set(names)) < len(names):
        raise DataError(
            "two tasks have one name",
            found=", ".join(names),
            fix="rename a task folder, or in Python give {name: folder}",
        )
    return dict(zip(names, folders, strict=True))


def _name_of(given: str | Path, folder: Path) -> str:
    # What is fetched from a hub lies in a folder named by its commit.
    if origin := HubTask.read(find_origin(folder)):
        return origin.name
    return (folder if folder.suffix == ".task" else Path(given)).name.removesuffix(".task")


def find_columns(where: str | Path) -> dict[str, Path]:
    """The task folders of a folder that a table of several columns of answers left, by column; empty of others.

    Raises:
        FormatError: Its `metrics.json` is damaged.
    """
    folder = expand_home(where)
    file = folder / "metrics.json"
    if (folder / "task.json").exists() or not file.is_file():
        return {}
    content = read_json(file)
    columns = content.get("columns") if isinstance(content, dict) else None
    if not isinstance(columns, dict):
        return {}
    found = {}
    for column, told in columns.items():
        name = told.get("task") if isinstance(told, dict) else None
        # A name and no path: what a file says leads nowhere else.
        ours = isinstance(name, str) and Path(name).name == name and name.endswith(".task")
        if not isinstance(name, str) or not ours or not (folder / name).is_dir():
            raise FormatError(
                "the tasks of a table are not all there",
                where=str(file),
                found=f"{column}: {name!r}"[:200],
                fix="restore the folder, or give the task folders with commas (--tasks)",
            )
        found[column] = folder / name
    return found


def _open_backbone(
    stored: Mapping[str, Mapping[str, Any]],
    folders: Mapping[str, Path],
    name: str | Backbone | None,
    weights: str | Path | None,
    any_backbone: bool,
) -> Backbone:
    """The backbone that all tasks name, or the one that the user names or has loaded instead."""
    if isinstance(name, Backbone):
        refuse_for_loaded(name, weights=weights)
        return name
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
        its_own = {n: d for n, d in stored.items() if d["backbone"]["name"] == chosen}
        weights = _find_weights(its_own, folders, any_backbone)
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
    preprocessing = preprocessing_from_dict(said) if said else backbone.preprocessing
    if preprocessing is None:
        raise DataError(
            "nothing says how inputs are prepared",
            where=backbone.name,
            fix="train the task again with `restuning train`",
        )
    if isinstance(preprocessing, AudioPreprocessing):
        return AudioInputs(preprocessing, skip_bad)
    return ImageInputs(preprocessing, skip_bad)


def _share_forward(
    host: Extractor, tasks: Mapping[str, Task], earlier: MultiTask | None = None
) -> MultiTask:
    multi = MultiTask(host, tasks, earlier=earlier)
    if multi.keep is not None:
        # Now and not when somebody asks: an engine's file gives some tokens and no others.
        host.resolve_needs(multi.keep)
    return multi


def _no_number(task: str, values: Tensor, given: Any) -> AnswerError:
    count = int((~values.isfinite()).sum())
    named = f", of {given}"[:200] if isinstance(given, str | Path) and str(given) else ""
    return AnswerError(
        "a task answers with what is no number",
        where=task,
        found=f"{count:,} of {values.numel():,} numbers of its answer are NaN or infinite{named}",
        fix="leave this task out, or train it again: its weights or what the backbone computes overflow",
    )


def _class_names(name: str, task: Task) -> list[str]:
    if task.head is None:
        raise DataError(
            "a task without a head names no classes",
            where=name,
            fix="use it in Python: restuning.Tuned(host, task)(inputs)",
        )
    return task.labels or [str(i) for i in range(task.head.out_features)]
