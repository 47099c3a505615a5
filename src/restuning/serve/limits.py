"""What a server takes at most: of everything that a stranger chooses there is a largest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from restuning._errors import DataError, TooLargeError
from restuning.backbones import measure_audio, read_format
from restuning.backbones.audio import is_samples

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
"""Of images: what cameras and browsers write. Pillow's other decoders are not offered to strangers."""


@dataclass(frozen=True)
class Limits:
    """The largest of each, for one request unless it says otherwise.

    Attributes:
        body: Bytes.
        inputs: Images, sounds or texts.
        pixels: Of one image, by its header.
        sound: Seconds of one sound, by its header.
        text: Characters of one text.
        seconds: From its first byte to the answer.
        waiting: Inputs of all requests that are decoded or wait; more are refused.
        task: Bytes of a task that is put in.
        windows: Of one image that is read in windows.
        held: Bytes of the bodies of all requests; who would be beyond it is asked to come again.
    """

    body: int = 32 * 2**20
    inputs: int = 64
    pixels: int = 40_000_000
    sound: float = 600.0
    text: int = 100_000
    seconds: float = 30.0
    waiting: int = 256
    task: int = 256 * 2**20
    windows: int = 1024
    held: int = 2**30

    def check_count(self, count: int) -> None:
        """Refuse more inputs than `inputs`, or than may wait at all: of these "ask again later" would be no help.

        Raises:
            TooLargeError: There are more.
        """
        most = min(self.inputs, self.waiting)
        if count > most:
            raise TooLargeError(
                "too many inputs in one request",
                found=f"{count:,}, and {most:,} are taken",
                fix="ask in several requests",
            )

    def check(self, given: Any, kind: str = "image") -> None:
        """Refuse one input that is too large, before anything is made of it.

        Args:
            given: Bytes of an image or a sound, pixels `h w 3`, samples with their rate, a text, or words.
            kind: Of the task that is asked.

        Raises:
            TooLargeError: It is.
            DataError: It is no image, no sound, or no text.
        """
        if kind == "audio":
            self._check_sound(given)
            return
        if isinstance(given, bytes):
            kind, width, height = read_format(given)
            if kind not in FORMATS:
                raise TooLargeError(
                    "a format of images that is not served",
                    found=kind,
                    fix=f"send one of {', '.join(FORMATS)}",
                )
            self._check_size(width, height)
            return
        if isinstance(given, np.ndarray) and given.ndim > 1:
            self._check_size(given.shape[1], given.shape[0])
        if not isinstance(given, str | list):
            return
        # A word costs a place even where it is empty.
        _check_text(given if isinstance(given, str) else " ".join(given))
        length = len(given) if isinstance(given, str) else sum(len(word) + 1 for word in given)
        if length > self.text:
            raise TooLargeError(
                "a text is too long",
                found=f"{length:,} characters, and {self.text:,} are taken",
                fix="cut it: no more of it than a backbone's longest text is read anyway",
            )

    def _check_sound(self, given: Any) -> None:
        if not isinstance(given, bytes) and not is_samples(given):
            raise DataError("not a sound", found=type(given).__name__, fix="send bytes of files")
        seconds = measure_audio(given).seconds
        if seconds > self.sound:
            raise TooLargeError(
                "a sound is too long",
                found=f"{seconds:,.1f} s, and {self.sound:,.0f} are taken",
                fix="cut it: no more of it than a backbone's longest sound is read anyway",
            )

    def _check_size(self, width: int, height: int) -> None:
        if width * height > self.pixels:
            raise TooLargeError(
                "an image has too many pixels",
                found=f"{width:,} x {height:,}, and {self.pixels:,} are taken",
                fix="send it smaller",
            )


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "a text that is none",
            found=f"half of a pair of UTF-16 at character {error.start:,}",
            fix="send characters of Unicode",
        ) from None
