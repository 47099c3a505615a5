"""A task's images decoded once for all runs: bytes in one file, mapped into every process."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from restuning._errors import DataError
from restuning._files import Claim, replacing
from restuning.backbones import Backbone, Preprocessing
from restuning.data.data import Data, ImageDataset, collate_batch
from restuning.data.digests import Tell, digest_value, quiet
from restuning.data.identity import (
    Samples,
    Watch,
    concatenate,
    describe_reading,
    label_digests,
)
from restuning.problems import SingleLabel


class DecodedImages(Dataset):
    """Images of one size as bytes, normalised a batch at a time; a loader gets whole batches.

    Args:
        pixels: `n 3 h w`, bytes.
        labels: One each.
        normalise: Bytes to what the backbone takes.
        samples: Digests of what they were decoded from; None to know them by their pixels.
    """

    whole_batches, views = True, 1

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        normalise: Callable[[Tensor], Tensor],
        samples: Samples | None = None,
    ) -> None:
        self.pixels, self.labels, self.normalise = pixels, labels, normalise
        self.samples = samples

    def sample_digests(self, tell: Tell = quiet) -> Samples:
        """Of images and labels, in order."""
        if self.samples is not None:
            return self.samples
        inputs = [digest_value(pixels) for pixels in self.pixels]
        reading = describe_reading(self.normalise)
        return Samples(inputs, label_digests(self.labels.tolist()), reading)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image `3 h w` and its label."""
        return self.normalise(self.pixels[index]), int(self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A whole batch."""
        return self.gather(indices, [0] * len(indices))

    def view(self) -> int:
        """Images are decoded without augmentation: there is one view."""
        return 0

    def gather(self, indices: Sequence[int], views: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`b 3 h w` and labels of a batch."""
        at = torch.as_tensor(list(indices))
        return self.normalise(self.pixels[at]), self.labels[at]

    def concatenate(self, other: DecodedImages) -> DecodedImages:
        """These images, then another's."""
        return DecodedImages(
            torch.cat([self.pixels, other.pixels]),
            torch.cat([self.labels, other.labels]),
            self.normalise,
            concatenate([self.sample_digests(), other.sample_digests()]),
        )


def decode_once(data: Data, backbone: Backbone, root: Path) -> Data:
    """The same data set with its images decoded, resized and cropped.

    Args:
        data: Image files or arrays, without augmentation.
        backbone: Whose preprocessing is used.
        root: Folder of the files of bytes, shared by all processes; each file is written once.

    Raises:
        DataError: No images, or there is no room for them.
    """
    preprocessing = backbone.preprocessing
    if not isinstance(data.problem, SingleLabel):
        raise DataError(
            "a grid compares methods on one class an image",
            where=data.name,
            found=data.problem.kind,
            fix="use `restuning train`",
        )
    if not isinstance(preprocessing, Preprocessing) or data.kind != "image":
        raise DataError(
            "a grid trains on images",
            where=data.name,
            found="sounds" if data.kind == "audio" else f"{data.kind}s",
            fix="use `restuning train` for these",
        )

    def split(name: str) -> DecodedImages | None:
        dataset = getattr(data, name)
        return None if dataset is None else _decode_split(dataset, name, data, preprocessing, root)

    return Data(
        data.name,
        split("train"),
        split("val"),
        split("test"),
        data.labels,
        data.kind,
        collate_batch,
        data.left_out,
        notes=data.notes,
    )


def _decode_split(
    dataset: ImageDataset, name: str, data: Data, preprocessing: Preprocessing, root: Path
) -> DecodedImages:
    # Another backbone's preprocessing, or a changed image, is another file.
    watch, samples = Watch(dataset), dataset.sample_digests()
    described = f"{samples.contents().key()} {preprocessing.to_dict()}"
    digest = hashlib.sha256(described.encode()).hexdigest()[:12]
    file = root / f"{data.name}-{name}-{digest}.npy"
    labels = torch.tensor([dataset.label(i) for i in range(len(dataset))])
    if not file.exists():
        root.mkdir(parents=True, exist_ok=True)
        # Others wait for the one who decodes.
        claim = Claim.take(file.with_suffix(".lock"), wait=True)
        try:
            if not file.exists():
                _decode(dataset, preprocessing, file, watch)
        finally:
            if claim is not None:
                claim.give_back()
    # Private pages: torch wants memory it may write to, and nobody writes.
    return DecodedImages(
        torch.from_numpy(np.load(file, mmap_mode="c")), labels, preprocessing.normalise, samples
    )


def _decode(dataset: ImageDataset, preprocessing: Preprocessing, file: Path, watch: Watch) -> None:
    """Write all images, whole or not at all."""
    # The caller's data set keeps its own transform.
    pixels = copy.copy(dataset)
    pixels.transform, pixels.in_memory = preprocessing.resize_and_crop, None
    shape = (len(pixels), 3, *preprocessing.size)
    try:
        with replacing(file) as partial:
            # Written through a map: a data set need not fit in memory.
            whole = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
            for index in range(len(pixels)):
                whole[index] = pixels[index][0].numpy()
            whole.flush()
            # Windows renames no file that is mapped.
            del whole
            watch.check()
    except OSError as error:
        raise DataError(
            "decoded images cannot be written",
            where=str(file),
            found=str(error),
            fix="free space, or give another --out",
        ) from None
