"""What every data set becomes: splits of samples, labels, and how to collate them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from restuning._errors import DataError

CACHED_PIXELS = 300_000_000
"""Values kept decoded in memory (1.2 GB in fp32); beyond, images are decoded each time."""

SPLIT_SEED = 0
"""Splits that a data set does not bring are drawn once, with this seed, never the run's."""


@dataclass
class Data:
    """Splits of one data set.

    Attributes:
        name: What it is called in tables and folders.
        train, val, test: Map-style data sets of `(x, label)`; None where absent.
        labels: Class names, in the order of the labels.
        kind: "image", "text", or "tags" (a label for every word).
        collate: Samples to a batch; None for torch's default.
        skipped: Corrupt files left out (`skip_bad`).
        identity: sha256 over sample names and labels.
        notes: What a task file stores beside: "preprocessing" of texts.
    """

    name: str
    train: Any
    val: Any
    test: Any
    labels: list[str]
    kind: str = "image"
    collate: Callable[[Sequence[Any]], Any] | None = None
    skipped: int = 0
    identity: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.labels)

    def describe(self) -> str:
        """One line: splits and classes."""
        sizes = " + ".join(
            f"{len(split)} {word}"
            for word, split in (("train", self.train), ("val", self.val), ("test", self.test))
            if split is not None
        )
        skipped = f", {self.skipped} corrupt files skipped" if self.skipped else ""
        return f"{self.name}: {sizes}, {self.num_classes} classes{skipped}"


def decode(path: Path) -> Image.Image:
    """Read an image file.

    Raises:
        DataError: Missing, truncated or no image.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I;16"):
                # Pillow would clip 16 bits to white.
                high = np.asarray(image).astype(np.int64) // 257
                return Image.fromarray(high.astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(
            "an image is missing", where=str(path), fix="restore it, or correct the list"
        ) from None
    except (
        UnidentifiedImageError,
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as error:
        raise DataError(
            "an image cannot be read",
            where=str(path),
            found=str(error)[:200],
            fix="restore the file, or leave such files out with --skip-bad",
        ) from None


class ImageFiles(Dataset):
    """Images on disk with labels, decoded when asked for and kept if they are few.

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
        self.samples, self.transform = list(samples), transform
        self.kept: dict[int, Tensor] | None = {} if keep else None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image and its label."""
        path, label = self.samples[index]
        if self.kept is not None and index in self.kept:
            return self.kept[index], label
        tensor = self.transform(decode(path))
        if self.kept is not None and (len(self.kept) + 1) * tensor.numel() <= CACHED_PIXELS:
            self.kept[index] = tensor
        return tensor, label


class Arrays(Dataset):
    """Images in memory with labels.

    Args:
        images: PIL images.
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
        self.images, self.labels, self.transform = images, list(labels), transform
        self.kept: dict[int, Tensor] | None = {} if keep else None

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image and its label."""
        if self.kept is not None and index in self.kept:
            return self.kept[index], self.labels[index]
        tensor = self.transform(self.images[index])
        if self.kept is not None and (len(self.kept) + 1) * tensor.numel() <= CACHED_PIXELS:
            self.kept[index] = tensor
        return tensor, self.labels[index]


def readable(samples: list[tuple[Path, int]]) -> tuple[list[tuple[Path, int]], int]:
    """The samples whose files decode, and how many do not."""
    good = []
    for path, label in samples:
        try:
            decode(path)
        except DataError:
            continue
        good.append((path, label))
    return good, len(samples) - len(good)


def identity(samples: Sequence[tuple[Any, int]]) -> str:
    """sha256 over names and labels, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, label in samples:
        digest.update(f"{name}\t{label}\n".encode())
    return digest.hexdigest()[:16]


def stratified(labels: Sequence[int], shares: Sequence[float], seed: int) -> list[list[int]]:
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
        at = 0
        for split, share in zip(splits, [*shares, 1.0], strict=True):
            to = len(order) if split is splits[-1] else at + max(1, round(share * len(order)))
            split += order[at:to].tolist()
            at = to
    return [sorted(split) for split in splits]


def collate_batch(batch: Any) -> Any:
    """The collate function of a data set that gives whole batches."""
    return batch
