"""Sounds with labels, and how they are collated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from restuning._errors import DataError, warn
from restuning.backbones.audio import measure_audio
from restuning.backbones.audio_preprocessing import AudioPreprocessing
from restuning.data.data import MediaDataset
from restuning.data.digests import Tell, digest_value, quiet
from restuning.data.identity import Samples, describe_reading, file_inputs, label_digests

ROUNDED = 0.01
"""Seconds by which a sound may be longer than what is read of it without a word: files end in whole blocks."""


class Sounds(MediaDataset):
    """Sounds with labels, read when asked for: files are known by their bytes, what is in memory by its samples.

    Args:
        sounds: Whatever `read_audio` takes: paths, bytes of files, pairs of samples and their rate.
        labels: One each.
        audio: How a sound becomes the backbone's input.
        keep: Prepare once and keep the tensors, where they are few.
    """

    def __init__(
        self,
        sounds: Sequence[Any],
        labels: Sequence[Any],
        audio: AudioPreprocessing,
        keep: bool = True,
    ) -> None:
        super().__init__(audio.prepare, keep)
        self.sounds, self.labels, self.audio = list(sounds), list(labels), audio
        self._known: list[bytes] | None = None

    def __len__(self) -> int:
        """Number of sounds."""
        return len(self.labels)

    @property
    def files(self) -> list[Path]:
        """One a sound; empty where some are in memory."""
        paths = [each for each in self.sounds if isinstance(each, Path)]
        return paths if len(paths) == len(self.sounds) else []

    def read(self, index: int) -> np.ndarray:
        """One channel at the backbone's rate.

        Raises:
            DataError: It cannot be read.
        """
        sound = self.sounds[index]
        return self.audio.read(sound, "" if isinstance(sound, Path) else f"sound {index}")

    def label(self, index: int) -> Any:
        """As it was given."""
        return self.labels[index]

    def sample_digests(self, tell: Tell = quiet) -> Samples:
        """Those of the files' bytes as they are now, or of what is in memory."""
        reading = describe_reading(self.audio)
        if self.files:
            inputs = file_inputs(self.files, tell)
            self.forget_changed(inputs)
        else:
            inputs = self._known = self._known or [digest_value(each) for each in self.sounds]
        return Samples(inputs, label_digests(self.labels), reading)


class AudioBatch:
    """Prepared sounds and labels to `(dict of tensors, labels)`, filled up as the backbone bears it.

    Args:
        audio: How a sound becomes the backbone's input.
    """

    kind = "audio"

    def __init__(self, audio: AudioPreprocessing) -> None:
        self.audio = audio

    def __call__(self, samples: Sequence[tuple[Tensor, Any]]) -> tuple[dict[str, Tensor], Tensor]:
        """A batch of `(prepared sound, label)`."""
        prepared, labels = zip(*samples, strict=True)
        stacked = isinstance(labels[0], Tensor)
        return self.audio.collate(prepared), torch.stack(labels) if stacked else torch.tensor(
            labels
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for a task file and the key of a store."""
        return self.audio.to_dict()


def drop_unreadable_sounds(
    samples: Sequence[tuple[Path, int]], audio: AudioPreprocessing
) -> tuple[list[tuple[Path, int]], list[Path]]:
    """The samples whose files decode, and the files that do not."""
    good, bad = [], []
    for path, label in samples:
        try:
            audio.read(path)
        except DataError:
            bad.append(path)
            continue
        good.append((path, label))
    return good, bad


def warn_of_cut(sounds: Sequence[Any], audio: AudioPreprocessing, where: str) -> None:
    """Say of how many sounds the end is not read, by their headers.

    One whose header cannot be read is passed over: whoever reads it is told.
    """
    lengths: list[tuple[float, str]] = []
    for number, sound in enumerate(sounds):
        try:
            seconds = measure_audio(sound).seconds
        except DataError:
            continue
        if seconds > audio.seconds + ROUNDED:
            name = str(sound) if isinstance(sound, Path) else f"sound {number}"
            lengths.append((seconds, name))
    if lengths:
        longest = max(lengths)
        fix = "cut them into pieces where their ends matter"
        if audio.padding != "own":
            fix = f"give --seconds (seconds=...) for more of them, or {fix}"
        warn(
            f"sounds are read for {audio.seconds:g} seconds, and the rest of longer ones is not",
            where=where,
            found=f"{len(lengths):,} of {len(sounds):,} are longer, up to {longest[0]:.1f} s ({longest[1]})",
            fix=fix,
        )
