"""Views of the training images: what augmentation becomes when features are computed once."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from restuning._errors import StoreError
from restuning.data.identity import list_files
from restuning.runtime.randomness import preserve_randomness, seed_all

FLIP = 1
"""Number of the view of mirror images."""

VIEWS = 16
"""The most views: beyond, live augmentation costs less disk for the same variety."""


def view_names(count: int) -> tuple[str, ...]:
    """1: the image; 2: and its mirror image; more: and random crops, each drawn once.

    Raises:
        StoreError: Not between 1 and 16.
    """
    if not 1 <= count <= VIEWS:
        raise StoreError("views out of range", found=str(count), fix=f"give 1 to {VIEWS}")
    return ("plain", "flip", *(f"crop.{k}" for k in range(2, count)))[:count]


class _Flipped(Dataset):
    """Mirror images of a data set of `(tensor, label)`."""

    def __init__(self, dataset: Any) -> None:
        self.dataset, self.files = dataset, list_files(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        return image.flip(-1), label


class _Drawn(Dataset):
    """One fixed draw of a randomly augmented data set."""

    def __init__(self, dataset: Any, view: str) -> None:
        self.dataset, self.view, self.files = dataset, view, list_files(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        # Seeded by the view and the index alone, so that every process draws the same image.
        raw = hashlib.blake2b(f"{self.view}.{index}".encode(), digest_size=8).digest()
        seed = int.from_bytes(raw, "little") >> 1
        # timm's transforms draw from all three generators; the run's own must not notice.
        with preserve_randomness(devices=False):
            seed_all(seed, devices=False)
            return self.dataset[index]


def view_of(view: str, plain: Any, augmented: Any) -> Any:
    """The data set that gives a view.

    Args:
        view: A name of `view_names`.
        plain: The training data without augmentation.
        augmented: The training data with random augmentation, for crops.
    """
    if view == "plain":
        return plain
    return _Flipped(plain) if view == "flip" else _Drawn(augmented, view)


def draw_view(count: int) -> int:
    """The view of one example in one epoch, from torch's generator.

    With two views the draw is the very one that live flipping makes, so that cached and live
    training see the same images.
    """
    if count == 2:
        return int(torch.rand(()) < 0.5)
    return int(torch.randint(count, ()))
