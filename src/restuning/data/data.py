"""What every data set becomes: splits of samples, labels, and how to collate them."""

from __future__ import annotations

import copy
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from restuning._errors import DataError
from restuning._files import expand_home
from restuning.backbones.images import Least, Measured, measure, read_image
from restuning.backbones.preprocessing import least_for
from restuning.data.digests import Tell, digest_value, quiet
from restuning.data.identity import (
    Samples,
    combine,
    describe_reading,
    digest_names,
    file_samples,
    identify,
    label_digests,
)
from restuning.data.listing import CORRUPT, say_left_out
from restuning.problems import Problem, SingleLabel

CACHED_PIXELS = 300_000_000
"""Values kept decoded in memory (1.2 GB in fp32); beyond, images and sounds are decoded each time."""

LONGEST_TEXT = 256
"""Tokens of a text that are read, where the backbone takes as many."""

SPLIT_SEED = 0
"""Splits that a data set does not bring are drawn once, with this seed, never the run's."""


@dataclass(frozen=True)
class DataOptions:
    """How a data set is read; every field is a keyword of `load_data`.

    Attributes:
        augment: Training images: "none", "flip", "timm", "timm:POLICY".
        skip_bad: Leave corrupt images out and count them.
        final: Train on train and val together (after settings were chosen on val).
        text, label: Columns of a csv; of a table several columns of answers, in a list or with commas.
        image, audio: Column of a table that holds images or sounds, or their paths.
        problem: Kind of answer that a column holds ("single-label", "multi-label", "regression", "segmentation", "depth"), or
            `COLUMN=KIND` with commas; None to find it from the cells.
        classes: Names of the classes of masks, or a file of them, a line each; None for `classes.txt` beside the data.
        whole: Resize every image whole to the backbone's size, whatever its shape, and crop nothing, as masks and depths ask for.
        scaled_jpeg: Decode JPEG files that are much larger than the backbone's size to a half, a fourth or an eighth of their sides.
        dimensions: Of `problem="embedding"`, which classes of any data set may be asked for; None for `Embedding.of`'s.
        max_tokens: Tokens of a text that are read; 256, or what the backbone takes if less.
        seconds: Of a sound, what is read from its beginning; None for what the backbone takes, or 10.
        root: Where torchvision data sets lie.
    """

    augment: str = "none"
    skip_bad: bool = False
    final: bool = False
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
    root: str | Path = "data"


@dataclass(init=False)
class Data:
    """Splits of one data set.

    Attributes:
        name: What it is called in tables and folders.
        train, val, test: Map-style data sets of `(x, label)`; None where absent.
        labels: Names of what is answered: of classes in the order of their numbers, of labels or numbers in that of
            the targets' columns.
        kind: "image", "audio", "text", or "tags" (a label for every word).
        collate: Samples to a batch; None for torch's default.
        left_out: Names of what was passed over, by reason: corrupt files (`skip_bad`), files that are no
            images, folders of earlier runs.
        notes: What a task file stores beside: "preprocessing" of texts and sounds.
        problem: What kind of answer is asked, and so what a label is (`restuning.problems`); one class of several
            by default.
        beside: Whether labels are kept beside stored features and not in them, so that one store serves several
            columns of a table.
    """

    name: str
    train: Any
    val: Any
    test: Any
    labels: list[str]
    kind: str = "image"
    collate: Callable[[Sequence[Any]], Any] | None = None
    left_out: dict[str, list[str]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    problem: Problem = field(default_factory=SingleLabel)
    beside: bool = False

    # By hand: `identity` is no field, so that `dataclasses.replace` neither reads all data for it
    # nor hands on that of other splits.
    def __init__(
        self,
        name: str,
        train: Any,
        val: Any,
        test: Any,
        labels: list[str],
        kind: str = "image",
        collate: Callable[[Sequence[Any]], Any] | None = None,
        left_out: dict[str, list[str]] | None = None,
        identity: str = "",
        notes: dict[str, Any] | None = None,
        problem: Problem | None = None,
        beside: bool | None = None,
    ) -> None:
        self.problem = SingleLabel() if problem is None else problem
        self.beside = self.problem.beside if beside is None else beside
        self.name, self.labels, self.kind = name, labels, kind
        self.train, self.val, self.test = train, val, test
        self.collate, self.left_out = collate, {} if left_out is None else left_out
        self.notes = {} if notes is None else notes
        self._given = identity
        # What was found of a column of a table unasked, in words.
        self.assumed = ""
        # The column of inputs, of a table.
        self.source = ""

    @property
    def identity(self) -> str:
        """Digest of the contents of all splits and of the names of the classes; or what was given.

        Made each time it is asked for. A text that was given as `identity` stands beside the contents.

        Cost: a pass over the bytes of the data; files that did not change are read once.
        """
        return self._given or combine([json.dumps(self.contents(), sort_keys=True)])[:16]

    @property
    def num_classes(self) -> int:
        """Numbers that a head answers with: of classes how many there are."""
        return self.problem.outputs(self.labels)

    @property
    def skipped(self) -> int:
        """Corrupt files that were left out (`skip_bad`)."""
        return len(self.left_out.get(CORRUPT, []))

    def contents(self, tell: Tell = quiet) -> dict[str, Any]:
        """What features of it are kept under: digests of every split and of the names of classes.

        Args:
            tell: Receives a line where much has to be read.
        """
        splits = {"train": self.train, "val": self.val, "test": self.test}
        known = {n: identify(s, tell).key() for n, s in splits.items() if s is not None}
        named = {"given": self._given} if self._given else {}
        return {**known, "classes": digest_names(self.labels), **named}

    def with_splits(self, **splits: Any) -> Data:
        """The same data set with other splits (`train`, `val`, `test`), which are not read for it."""
        other = copy.copy(self)
        for name, split in splits.items():
            setattr(other, name, split)
        return other

    def describe(self) -> str:
        """One line: splits and classes, and what was left out."""
        sizes = " + ".join(
            f"{len(split)} {word}"
            for word, split in (("train", self.train), ("val", self.val), ("test", self.test))
            if split is not None
        )
        said = say_left_out(self.left_out)
        left_out = f"; left out: {said}" if said else ""
        return f"{self.name}: {sizes}, {self.problem.describe(self.labels)}{left_out}"


class MediaDataset(Dataset, ABC):
    """Images or sounds with labels, transformed when asked for, and kept in memory if they are few.

    Args:
        transform: What `read` gives to a tensor.
        keep: Keep transformed tensors in memory (only where the transform has no randomness).

    Attributes:
        in_memory: Tensors that were asked for, by index; None where they are not kept.
    """

    def __init__(self, transform: Callable[[Any], Tensor], keep: bool) -> None:
        self.transform = transform
        self.in_memory: dict[int, Tensor] | None = {} if keep else None
        self._made_of: Sequence[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For a worker process, which keeps what it decodes itself.

        A tensor is sent as a file descriptor, and of those a process has a thousand.
        """
        return {**vars(self), "in_memory": None if self.in_memory is None else {}}

    @abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abstractmethod
    def read(self, index: int) -> Any:
        """One input, decoded, before the transform."""

    @abstractmethod
    def label(self, index: int) -> int:
        """Its label, without decoding the input."""

    @abstractmethod
    def sample_digests(self, tell: Tell = quiet) -> Samples:
        """Digests of inputs and labels, in order; `tell` hears of much reading."""

    def forget_changed(self, inputs: Sequence[bytes]) -> None:
        """Forget tensors in memory that were made of other bytes, or of bytes that nobody has seen."""
        before, kept = self._made_of, self.in_memory or {}
        for index in list(kept):
            if before is None or inputs[index] != before[index]:
                del kept[index]
        self._made_of = inputs

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One input and its label."""
        if self.in_memory is not None and index in self.in_memory:
            return self.in_memory[index], self.label(index)
        tensor = self.transform(self.read(index))
        self.hold(index, tensor)
        return tensor, self.label(index)

    def hold(self, index: int, tensor: Tensor) -> None:
        """Keep a tensor in memory, where tensors are kept and there is room.

        Not in a loader's process: it ends with the epoch, and nobody asks it twice.
        """
        if get_worker_info() is not None:
            return
        # The first inputs fill what is allowed; the rest is decoded in every epoch.
        if (
            self.in_memory is not None
            and (len(self.in_memory) + 1) * tensor.numel() <= CACHED_PIXELS
        ):
            self.in_memory[index] = tensor


class ImageDataset(MediaDataset):
    """Images with labels."""

    @abstractmethod
    def image(self, index: int, least: Least | None = None) -> Image.Image:
        """One image, before any transform; of a JPEG no more pixels than `read_image` keeps for `least`."""

    def read(self, index: int) -> Image.Image:
        """As much of it as the transform takes."""
        least = least_for(self.transform)
        return self.image(index) if least is None else self.image(index, least)

    def measure(self, index: int) -> Measured:
        """Its size, by its header where there is one."""
        return Measured(self.image(index).size, None)


class ImageFiles(ImageDataset):
    """Images on disk, known by the bytes of their files.

    Args:
        samples: Path and label of each.
        transform: Image to tensor.
        keep: Keep transformed tensors in memory (only where the transform has no randomness).
    """

    def __init__(
        self,
        samples: Sequence[tuple[Path, int]],
        transform: Callable[[Image.Image], Tensor],
        keep: bool = False,
    ) -> None:
        super().__init__(transform, keep)
        self.samples = list(samples)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.samples)

    @property
    def files(self) -> list[Path]:
        """One an image."""
        return [path for path, _ in self.samples]

    def image(self, index: int, least: Least | None = None) -> Image.Image:
        """Decoded.

        Raises:
            DataError: It cannot be read.
        """
        return read_image(self.samples[index][0], least=least)

    def measure(self, index: int) -> Measured:
        """By its header."""
        return measure(self.samples[index][0])

    def label(self, index: int) -> int:
        """As listed."""
        return self.samples[index][1]

    def sample_digests(self, tell: Tell = quiet) -> Samples:
        """Those of the files' bytes, as they are now."""
        now = file_samples(self.samples, describe_reading(self.transform), tell)
        self.forget_changed(now.inputs)
        return now


class Arrays(ImageDataset):
    """Images in memory.

    Args:
        images: Whatever `read_image` takes: PIL images, bytes of files, paths, arrays.
        labels: One each.
        transform: Image to tensor.
        keep: Transform once and keep the tensors.
    """

    def __init__(
        self,
        images: Sequence[Any],
        labels: Sequence[int],
        transform: Callable[[Image.Image], Tensor],
        keep: bool = False,
    ) -> None:
        super().__init__(transform, keep)
        self.images, self.labels = images, list(labels)
        self._known: list[bytes] | None = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def image(self, index: int, least: Least | None = None) -> Image.Image:
        """Read as an image from any other source.

        Raises:
            DataError: It cannot be read.
        """
        return read_image(self.images[index], f"image {index}", least)

    def measure(self, index: int) -> Measured:
        """By its header, where it has one."""
        return measure(self.images[index], f"image {index}")

    def label(self, index: int) -> int:
        """As it was given."""
        return self.labels[index]

    def sample_digests(self, tell: Tell = quiet) -> Samples:
        """Those of the pixels, made once."""
        known = self._known = self._known or [digest_value(image) for image in self.images]
        return Samples(known, label_digests(self.labels), describe_reading(self.transform))


def drop_unreadable(
    samples: list[tuple[Path, int]],
) -> tuple[list[tuple[Path, int]], list[Path]]:
    """The samples whose files decode, and the files that do not."""
    good, bad = [], []
    for path, label in samples:
        try:
            read_image(path)
        except DataError:
            bad.append(path)
            continue
        good.append((path, label))
    return good, bad


def name_of(path: Path) -> str:
    """What a data set at a path is called: its folder's own name, also of `.`, `..` and `x/`."""
    # Not by where links lead: a link has a name of its own.
    whole = Path(os.path.abspath(expand_home(path)))
    return (whole.name if whole.is_dir() else whole.stem) or "data"


def split_by_class(labels: Sequence[int], shares: Sequence[float], seed: int) -> list[list[int]]:
    """Indices split by shares within every class, in a fixed order.

    Args:
        labels: One each.
        shares: Shares of all but the last split; the last takes the rest.
        seed: Of the shuffle.
    """
    rng = np.random.default_rng(seed)
    splits: list[list[int]] = [[] for _ in range(len(shares) + 1)]
    array = np.asarray(labels)
    for label in np.unique(array):
        order = rng.permutation(np.flatnonzero(array == label))
        # A class of two images still gets one into the first split; the last may go without.
        at = 0
        for split, share in zip(splits, [*shares, 1.0], strict=True):
            to = len(order) if split is splits[-1] else at + max(1, round(share * len(order)))
            split += order[at:to].tolist()
            at = to
    return [sorted(split) for split in splits]


def collate_batch(batch: Any) -> Any:
    """The collate function of a data set that gives whole batches."""
    return batch
