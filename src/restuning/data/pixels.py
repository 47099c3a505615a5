"""Images with a target for every pixel: a folder `images/` and one of masks or depth maps beside it, or columns of a table."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from restuning._errors import DataError
from restuning._files import FileState, file_state
from restuning.backbones.images import Least, Measured, measure
from restuning.data.data import (
    CACHED_PIXELS,
    SPLIT_SEED,
    Data,
    DataOptions,
    ImageDataset,
    ImageFiles,
    drop_unreadable,
    name_of,
    split_by_class,
)
from restuning.data.digests import Tell, digest_value, quiet
from restuning.data.identity import (
    Samples,
    describe_reading,
    file_inputs,
    label_digests,
    list_files,
)
from restuning.data.listing import (
    CORRUPT,
    NO_IMAGE,
    LeftOut,
    find_images,
    is_folder,
    list_entries,
    merge_left_out,
)
from restuning.data.splits import find_splits
from restuning.problems import OfPixels

if TYPE_CHECKING:
    from restuning.backbones import Preprocessing

IMAGES = "images"
"""Folder of the images."""

SHARES = (0.7, 0.1)
"""Of the images for training and validation, where a folder has no splits."""

THREADS = 4
"""Targets that are read at once when a folder is opened."""


class PixelTargets(ABC):
    """One kind of targets of pixels: how they are called, read, checked and made as large as a backbone sees its images.

    Attributes:
        kind: Of its problem.
        folder: Beside `images/`.
        suffixes: Of its files, in small letters.
        noun: What one is called.
        asks: What a folder of them asks for.
        unpaired: Why one without an image is left out.
    """

    kind: ClassVar[str]
    folder: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    noun: ClassVar[str]
    asks: ClassVar[str]
    unpaired: ClassVar[str]

    @abstractmethod
    def read(self, source: Any, name: str = "") -> Image.Image:
        """One, upright, in its own size.

        Raises:
            DataError: It cannot be read, or is of another form.
        """

    def check(self, numbers: np.ndarray, name: str) -> None:  # noqa: B027
        """Refuse numbers that mean nothing.

        Raises:
            DataError: One is there.
        """

    @abstractmethod
    def fit(self, target: Image.Image, preprocessing: Preprocessing) -> Tensor:
        """One, `h w`, resized and cropped as its image is."""

    @abstractmethod
    def summarise(self, numbers: np.ndarray) -> Any:
        """What the problem and its checks must know of one."""

    @abstractmethod
    def make_problem(
        self, summaries: Sequence[Any], window: tuple[int, int], where: str
    ) -> OfPixels:
        """The problem of the training split.

        Args:
            summaries: Of its targets.
            window: Median height and width of its images.
            where: Of what, for errors.

        Raises:
            DataError: They teach nothing.
        """

    def look_at_splits(self, summaries: Mapping[str, Sequence[Any]], where: str) -> None:  # noqa: B027
        """Tell of what a split lacks that is trained on.

        Args:
            summaries: Of the targets of each split.
            where: Of what.
        """

    @property
    @abstractmethod
    def labels(self) -> list[str]:
        """Names of what is answered."""

    def key(self) -> Any:
        """What its checks hang on, beside the files."""
        return self.kind


class ImagesWithTargets(ImageDataset):
    """Images with a target for every pixel, resized and cropped alike.

    Args:
        images: Of the same preprocessing, without augmentation.
        targets: One each: a path, or what is in memory.
        names: What errors call them.
        kind: Of the targets.
        preprocessing: Of both.
        flip: Give the mirror images of both with probability 0.5.
    """

    def __init__(
        self,
        images: ImageDataset,
        targets: Sequence[Any],
        names: Sequence[str],
        kind: PixelTargets,
        preprocessing: Preprocessing,
        flip: bool = False,
    ) -> None:
        super().__init__(preprocessing.image, keep=True)
        self.images, self.targets, self.names = images, list(targets), list(names)
        self.kind, self.preprocessing, self.flip = kind, preprocessing, flip
        self._known: dict[int, Tensor] = {}
        # Of the file and of what is made of it.
        self._digests: dict[int, tuple[bytes, bytes]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For a worker process, which keeps what it decodes itself."""
        return {**super().__getstate__(), "_known": {}}

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    @property
    def files(self) -> list[Path]:
        """One an image, where all are files."""
        return list_files(self.images) or []

    def image(self, index: int, least: Least | None = None) -> Image.Image:
        """As its data set gives it, always whole: it is as large as its target."""
        return self.images.image(index)

    def target(self, index: int) -> Image.Image:
        """The target in its own size, that of its image.

        Raises:
            DataError: It cannot be read, is of another size than its image, or has numbers that mean nothing.
        """
        name = self.names[index]
        read = self.kind.read(self.targets[index], name)
        check_target(self.kind, self.images.measure(index), read, name)
        return read

    def label(self, index: int) -> Any:
        """The target as large as the backbone sees the image, `h w`.

        Raises:
            DataError: As `target`.
        """
        if index not in self._known:
            made = self.kind.fit(self.target(index), self.preprocessing)
            if (len(self._known) + 1) * made.numel() > CACHED_PIXELS:
                return made
            self._known[index] = made
        return self._known[index]

    def __getitem__(self, index: int) -> Any:
        """One image and its target; of both the mirror image, as the draw falls."""
        found: Any = super().__getitem__(index)
        image, target = found
        if self.flip and torch.rand(()) < 0.5:
            return image.flip(-1), target.flip(-1)
        return found

    def sample_digests(self, tell: Tell = quiet) -> Samples:
        """Those of the images as their data set knows them, and of the targets as they are trained on."""
        inputs = self.images.sample_digests(tell).inputs
        self.forget_changed(inputs)
        # What a target is trained as hangs on its contents, and takes longer to make than these to compare.
        for index, digest in enumerate(self._digest_targets(tell)):
            if self._digests.get(index, (b"", b""))[0] != digest:
                self._known.pop(index, None)
                (made,) = label_digests([self.label(index)])
                self._digests[index] = digest, made
        labels = [self._digests[index][1] for index in range(len(self))]
        return Samples(inputs, labels, describe_reading(self.transform, self.flip))

    def _digest_targets(self, tell: Tell) -> list[bytes]:
        if all(isinstance(each, Path) for each in self.targets):
            return file_inputs(self.targets, tell)
        return [digest_value(each) for each in self.targets]


class Checked(NamedTuple):
    """What was found of an image and its target.

    Attributes:
        states: Of their files, as far as they are files.
        key: Of the kind of target.
        summary: As the kind of target makes it.
        size: Width and height.
        turned: Whether notes turn the image and the sizes do not tell if the target was drawn before that or after.
    """

    states: tuple[FileState | None, ...]
    key: Any
    summary: Any
    size: tuple[int, int]
    turned: bool


_checked: dict[tuple[Path, Path], Checked] = {}
"""Pairs of files that were checked in this process."""


def check_targets(
    kind: PixelTargets, images: Sequence[Any], targets: Sequence[Any], names: Sequence[str]
) -> list[Checked]:
    """Check targets against their images; what was found, in their order.

    Args:
        kind: Of the targets.
        images: Paths, or what `read_image` takes.
        targets: Likewise what the kind reads.
        names: What errors call the targets.

    Raises:
        DataError: The first that is wrong.

    Cost: every target is read once, and headers of images; files that did not change are not read again.
    """

    def check(number: int) -> Checked:
        image, target, name = images[number], targets[number], names[number]
        pair = (image, target) if isinstance(image, Path) and isinstance(target, Path) else None
        states = () if pair is None else tuple(map(file_state, pair))
        known = None if pair is None else _checked.get(pair)
        if known is not None and None not in states and known[:2] == (states, kind.key()):
            return known
        read = kind.read(target, name)
        size = measure(image)
        turned = check_target(kind, size, read, name)
        summary = kind.summarise(np.asarray(read))
        found = Checked(states, kind.key(), summary, size.size, turned)
        if pair is not None:
            _checked[pair] = found
        return found

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(check, range(len(images))))


def check_target(kind: PixelTargets, image: Measured, target: Image.Image, name: str) -> bool:
    """Refuse a target that is not of this image; whether the image is turned and had this size before as well.

    Raises:
        DataError: It is of another size, or has numbers that mean nothing.
    """
    (wanted, before), size = image, target.size
    if size != wanted:
        turned = ", as the image is before it is put upright" if size == before else ""
        raise DataError(
            f"a {kind.noun} is of another size than its image",
            where=name,
            found=f"{size[0]} x {size[1]}{turned}; the image is {wanted[0]} x {wanted[1]}",
            fix=f"make the {kind.noun} of this image, a pixel for each of its own",
        )
    kind.check(np.asarray(target), name)
    return before == size


def make_problem(kind: PixelTargets, checked: Sequence[Checked], where: str) -> OfPixels:
    """The problem of a training split, of what was found of it."""
    widths, heights = zip(*(each.size for each in checked), strict=True)
    # Of an even number the larger of the two in the middle: a side is a whole number.
    window = tuple(sorted(sides)[len(sides) // 2] for sides in (heights, widths))
    return kind.make_problem([each.summary for each in checked], window, where)


def say_turned(kind: PixelTargets, turned: Sequence[str]) -> str:
    """What is taken for granted where notes turn images and sizes do not tell; "" where they do."""
    if not turned:
        return ""
    count = "1 image" if len(turned) == 1 else f"{len(turned)} images"
    return f"; EXIF turns {count}, such as {turned[0]}, and {kind.noun}s are taken to lie on them as they are then"


def refuse_other_reading(options: DataOptions, where: str) -> None:
    """Refuse augmentation that would leave targets where they were, and images of another size than theirs.

    Raises:
        DataError: The augmentation is neither none nor flip, or images are to be decoded scaled.
    """
    if options.scaled_jpeg:
        raise DataError(
            "images beside masks or depths are decoded whole: both have one size",
            where=where,
            found="scaled_jpeg",
            fix="leave --scaled-jpeg (scaled_jpeg=True) out",
        )
    if options.augment not in ("none", "flip"):
        raise DataError(
            "this augmentation moves pixels and not the mask",
            where=f"--augment {options.augment}",
            found=where,
            fix="give none or flip",
        )


# Folders.


def has_targets(path: Path, folder: str) -> bool:
    """Whether a folder, or the folder of its training split, holds `images/` and another one."""
    if not path.is_dir():
        return False
    names = _list_folders(path)
    if {IMAGES, folder} <= set(names):
        return True
    train = find_splits(names, str(path)).get("train")
    return train is not None and all((path / train / each).is_dir() for each in (IMAGES, folder))


def _list_folders(path: Path) -> list[str]:
    return [name for name, entry in list_entries(path).items() if is_folder(entry)]


Pairs = list[tuple[Path, Path]]
"""Images and their targets."""


def from_pixels(
    path: Path,
    form: type[PixelTargets],
    make: Callable[[], PixelTargets],
    preprocessing: Preprocessing,
    options: DataOptions,
) -> Data:
    """A folder of images and targets of their pixels; see `load_data`.

    Every image is resized whole, whatever its shape, so that every pixel of it is trained on and answered.

    Args:
        path: The folder.
        form: Of the targets.
        make: Gives the targets of this form, once the folder is known to be one of them.
        preprocessing: Of the backbone.
        options: How it is read.

    Raises:
        DataError: The layout is another; an image has no target, or one of another size or form; an augmentation is asked
            for that would leave the target where it was.

    Cost: every target is read once, and headers of images.
    """
    refuse_other_reading(options, str(path))
    left_out: LeftOut = {}
    splits = _find_pairs(path, form, left_out)
    kind = make()
    if options.skip_bad:
        splits = {name: _drop_corrupt(pairs, kind, left_out) for name, pairs in splits.items()}
    checked = {name: _check_pairs(kind, pairs) for name, pairs in splits.items()}
    for name, pairs in splits.items():
        if not pairs:
            raise DataError(
                "a split without images",
                where=f"{path}, {name}",
                found=f"{sum(map(len, splits.values()))} images in all",
                fix=f"put images into {IMAGES}/ and their {kind.noun}s, called alike, into {kind.folder}/",
            )
    joined = ("train", "val") if options.final and "val" in splits else ("train",)
    # Of what is trained on with the validation split as well: numbers are scaled by all of it.
    of_train = [each for name in joined for each in checked[name]]
    problem = make_problem(kind, of_train, str(path))
    summaries = {name: [each.summary for each in own] for name, own in checked.items()}
    kind.look_at_splits(summaries, str(path))
    whole = preprocessing.whole()

    def part(names: Sequence[str], flip: bool = False) -> ImagesWithTargets:
        pairs = [pair for name in names for pair in splits[name]]
        images = ImageFiles([(image, 0) for image, _ in pairs], whole.image)
        targets = [target for _, target in pairs]
        return ImagesWithTargets(images, targets, list(map(str, targets)), kind, whole, flip)

    data = Data(
        name_of(path),
        part(joined, options.augment == "flip"),
        None if options.final or "val" not in splits else part(["val"]),
        part(["test"]) if "test" in splits else None,
        kind.labels,
        left_out={
            why: [os.path.relpath(p, path) for p in paths] for why, paths in left_out.items()
        },
        notes={"preprocessing": whole.to_dict()},
        problem=problem,
    )
    height, width = whole.size
    data.assumed = f"{kind.kind}, of {IMAGES}/ and {kind.folder}/; images are resized whole to {width} x {height}"
    pairs = ((s, c) for name in splits for s, c in zip(splits[name], checked[name], strict=True))
    data.assumed += say_turned(kind, [image.name for (image, _), found in pairs if found.turned])
    return data


def _check_pairs(kind: PixelTargets, pairs: Pairs) -> list[Checked]:
    targets = [target for _, target in pairs]
    return check_targets(kind, [image for image, _ in pairs], targets, list(map(str, targets)))


def _find_pairs(path: Path, kind: type[PixelTargets], left_out: LeftOut) -> dict[str, Pairs]:
    """Pairs of every split; of a folder without splits drawn once, the same for everybody."""
    names = _list_folders(path) if path.is_dir() else []
    if {IMAGES, kind.folder} <= set(names):
        pairs = _list_pairs(path, kind, left_out)
        parts = split_by_class([0] * len(pairs), SHARES, SPLIT_SEED)
        drawn = zip(("train", "val", "test"), parts, strict=True)
        return {name: [pairs[i] for i in at] for name, at in drawn}
    splits = find_splits(names, str(path))
    if "train" not in splits:
        raise DataError(
            f"a folder without images and {kind.noun}s",
            where=str(path),
            found=", ".join(names[:5]) or "no folders",
            fix=f"lay it out as {IMAGES}/x.jpg and {kind.folder}/x.png, the two folders optionally below train/, val/ and "
            "test/",
        )
    return {name: _list_pairs(path / folder, kind, left_out) for name, folder in splits.items()}


def _list_pairs(folder: Path, kind: type[PixelTargets], left_out: LeftOut) -> Pairs:
    images, beside = folder / IMAGES, folder / kind.folder
    for each in (images, beside):
        if not each.is_dir():
            raise DataError(
                f"images and {kind.noun}s are two folders",
                where=str(folder),
                found=f"no {each.name}/",
                fix=f"make {IMAGES}/ and {kind.folder}/",
            )
    files, others = find_images(images)
    merge_left_out(left_out, others)
    pairs: Pairs = []
    wanted: dict[Path, Path] = {}
    for image in files:
        target = _find_target(beside / image.relative_to(images), image, kind)
        if target in wanted:
            raise DataError(
                f"two images of one {kind.noun}",
                where=str(target),
                found=f"{wanted[target].name} and {image.name}",
                fix=f"rename one, and give it a {kind.noun}",
            )
        wanted[target] = image
        pairs.append((image, target))
    found, more = find_images(beside)
    # Of arrays as well, which are no images.
    there = [*found, *(f for f in more.get(NO_IMAGE, ()) if f.suffix.lower() in kind.suffixes)]
    if alone := [each for each in there if each not in wanted]:
        left_out.setdefault(kind.unpaired, []).extend(sorted(alone))
    return pairs


def _find_target(stem: Path, image: Path, kind: type[PixelTargets]) -> Path:
    ways = [stem.with_suffix(suffix) for suffix in kind.suffixes]
    there = [each for each in ways if each.is_file()]
    if not there:
        raise DataError(
            f"an image has no {kind.noun}",
            where=str(image),
            found=f"no {' or '.join(map(str, ways))}",
            fix="make it, with the value for none where nothing is known, or take the image out",
        )
    if len(there) > 1:
        raise DataError(
            f"an image has two {kind.noun}s",
            where=str(image),
            found=" and ".join(map(str, there)),
            fix="take one of them out",
        )
    return there[0]


def _drop_corrupt(pairs: Pairs, kind: PixelTargets, left_out: LeftOut) -> Pairs:
    # Images first, then the targets of those that are left.
    good, bad = drop_unreadable([(image, n) for n, (image, _) in enumerate(pairs)])
    left_out.setdefault(CORRUPT, []).extend(bad)
    kept = []
    for _, number in good:
        try:
            kind.read(pairs[number][1])
        except DataError:
            left_out[CORRUPT].append(pairs[number][1])
        else:
            kept.append(pairs[number])
    return kept
