"""What differs between data of images and of sounds; all else about folders and tables is the same for both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from restuning._errors import DataError
from restuning.backbones.audio import AUDIO_SUFFIXES, USUAL_AUDIO
from restuning.backbones.audio_preprocessing import AudioPreprocessing
from restuning.backbones.images import image_suffixes
from restuning.backbones.preprocessing import Preprocessing
from restuning.data.data import Arrays, Data, DataOptions, ImageFiles, drop_unreadable
from restuning.data.listing import (
    LOOSE,
    LOOSE_SOUND,
    NO_IMAGE,
    NO_SOUND,
    LeftOut,
    find_images,
    find_sounds,
)
from restuning.data.sounds import AudioBatch, Sounds, drop_unreadable_sounds, warn_of_cut

if TYPE_CHECKING:
    from restuning.backbones import Backbone
    from restuning.backbones.inputs import AnyPreprocessing

USUAL_IMAGES = ".jpg, .png, .webp, .tif and what else Pillow reads"
"""Suffixes of images, in words."""

Sample = tuple[Path, int]


@dataclass(frozen=True)
class Media:
    """One kind of input that lies in files.

    Attributes:
        kind: "image" or "audio".
        noun: For messages, with its article.
        nouns: Several.
        usual: Suffixes of its files in words.
        suffixes: Of its files, in small letters.
        find: The files of it in a folder, and what is left out.
        other: Why a file is left out that is of another kind.
        loose: Why one is that lies in no class folder.
        columns: Names of a column of a table that is taken unasked.
        option: That names another one.
        example: Of a file.
    """

    kind: str
    noun: str
    nouns: str
    usual: str
    suffixes: Callable[[], Collection[str]]
    find: Callable[[Path], tuple[list[Path], LeftOut]]
    other: str
    loose: str
    columns: Sequence[str]
    option: str
    example: str


FILES = ("path", "file", "filename", "file_name")

IMAGES = Media(
    "image",
    "an image",
    "images",
    USUAL_IMAGES,
    image_suffixes,
    find_images,
    NO_IMAGE,
    LOOSE,
    ("image", *FILES, "image_path", "img"),
    "--image",
    "image.jpg",
)
SOUNDS = Media(
    "audio",
    "a sound",
    "sounds",
    USUAL_AUDIO,
    lambda: AUDIO_SUFFIXES,
    find_sounds,
    NO_SOUND,
    LOOSE_SOUND,
    ("audio", "sound", *FILES, "audio_path", "wav"),
    "--audio",
    "sound.wav",
)


def media_of(preprocessing: AnyPreprocessing) -> Media:
    """The kind that a backbone takes."""
    return SOUNDS if isinstance(preprocessing, AudioPreprocessing) else IMAGES


def refuse_mixed(media: Media, left_out: LeftOut, where: str) -> None:
    """Refuse class folders in which files of the other kind lie beside: nobody knows which are meant.

    Raises:
        DataError: There is one; it is named.
    """
    other = IMAGES if media is SOUNDS else SOUNDS
    mixed = [p for p in left_out.get(media.other, ()) if p.suffix.lower() in other.suffixes()]
    if mixed:
        raise DataError(
            "a folder holds images and sounds",
            where=where,
            found=f"{mixed[0]}" + (f" and {len(mixed) - 1:,} more" if len(mixed) > 1 else ""),
            fix=f"take the {other.nouns} out: this backbone takes {media.nouns}",
        )


def drop_corrupt(
    samples: list[Sample], preprocessing: AnyPreprocessing
) -> tuple[list[Sample], list[Path]]:
    """The samples whose files decode, and the files that do not."""
    if isinstance(preprocessing, AudioPreprocessing):
        return drop_unreadable_sounds(samples, preprocessing)
    return drop_unreadable(samples)


def _with_limit(preprocessing: AnyPreprocessing, options: DataOptions) -> AnyPreprocessing:
    if isinstance(preprocessing, AudioPreprocessing):
        return preprocessing.with_seconds(options.seconds)
    if options.seconds is not None:
        raise _no_seconds(options.seconds, "images")
    return replace(preprocessing, scaled_jpeg=True) if options.scaled_jpeg else preprocessing


def _no_seconds(seconds: float, kind: str) -> DataError:
    return DataError(
        "only sounds have seconds",
        found=f"{seconds:g} seconds, and a backbone of {kind}",
        fix="leave --seconds (seconds=...) out",
    )


def open_files(
    samples: Sequence[tuple[Path, Any]], preprocessing: AnyPreprocessing, policy: str = "none"
) -> ImageFiles | Sounds:
    """Files and labels as a data set; what is augmented is another one each time, and not kept."""
    if isinstance(preprocessing, AudioPreprocessing):
        preprocessing.transform(policy)
        return Sounds([path for path, _ in samples], [y for _, y in samples], preprocessing)
    return ImageFiles(samples, preprocessing.transform(policy), keep=policy == "none")


def open_values(
    values: Sequence[Any], labels: Sequence[Any], preprocessing: AnyPreprocessing, policy: str
) -> Arrays | Sounds:
    """Likewise of what is in memory."""
    if isinstance(preprocessing, AudioPreprocessing):
        preprocessing.transform(policy)
        return Sounds(values, labels, preprocessing)
    return Arrays(values, labels, preprocessing.transform(policy), policy == "none")


def make_whole(preprocessing: AnyPreprocessing, where: str) -> Preprocessing:
    """The same for the whole of every image.

    Raises:
        DataError: It is of sounds.
    """
    if isinstance(preprocessing, AudioPreprocessing):
        raise DataError(
            "only images are read whole, with nothing cropped",
            where=where,
            found="a backbone of sounds",
            fix="leave --whole, and columns of masks and depths, out; --seconds is what is read of a sound",
        )
    return preprocessing.whole()


def describe_inputs(preprocessing: AnyPreprocessing | None) -> dict[str, Any]:
    """Fields of `Data` that say what its inputs are and how they are collated."""
    if not isinstance(preprocessing, AudioPreprocessing):
        if preprocessing is None or not preprocessing.scaled_jpeg:
            return {}
        return {"notes": {"preprocessing": preprocessing.to_dict()}}
    collate = AudioBatch(preprocessing)
    return {
        "kind": collate.kind,
        "collate": collate,
        "notes": {"preprocessing": collate.to_dict()},
    }


def say_cut(data: Data) -> None:
    """Warn of sounds that are longer than what is read of them."""
    splits = [split for split in (data.train, data.val, data.test) if isinstance(split, Sounds)]
    if splits:
        warn_of_cut([each for s in splits for each in s.sounds], splits[0].audio, data.name)


def with_preprocessing(backbone: Backbone, options: DataOptions) -> Backbone:
    """The backbone whose preprocessing has the limit on length, or the way of decoding, that is asked for.

    Raises:
        DataError: The backbone takes no other, no sounds, or no images.
    """
    own = backbone.preprocessing
    if options.scaled_jpeg and not isinstance(own, Preprocessing):
        raise DataError(
            "only images are decoded scaled",
            found=f"a backbone of {'texts' if own is None else 'sounds'}",
            fix="leave --scaled-jpeg (scaled_jpeg=True) out",
        )
    if own is None and options.seconds is not None:
        raise _no_seconds(options.seconds, "texts")
    return backbone if own is None else replace(backbone, preprocessing=_with_limit(own, options))
