"""One way to read a sound, whatever it comes from: a file, bytes, samples with their rate."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from restuning._errors import DataError, require

AUDIO_SUFFIXES = frozenset(
    (".wav", ".wave", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".aifc")
    + (".au", ".snd", ".caf", ".w64", ".rf64")
)
"""Of the files that are taken from a folder, in small letters: what libsndfile reads."""

USUAL_AUDIO = ".wav, .flac, .ogg, .opus, .mp3 and what else libsndfile reads"
"""The same in words."""

FORMATS = ("WAV", "WAVEX", "RF64", "W64", "FLAC", "OGG", "MP3", "MPEG", "AIFF", "AU", "CAF")
"""As libsndfile names them. Its others need settings that no file holds, or are of old samplers."""

RATES = (1_000, 768_000)
"""Samples a second that a file may say: those of a telephone and less, and of the best recorders."""

MOST_CHANNELS = 64

LOUDEST = 4.0
"""Largest sample in size: lossy files overshoot 1 a little, whole numbers that nobody divided by far."""

LONGEST = 3600.0
"""Seconds that are read of any sound, whatever limit a backbone has."""


BLOCK = 2**20
"""Samples of all channels that are decoded at a time."""

LOST = 0.01
"""Share of a sound by which its header may count more than there is, as those of MP3 do."""


UNKNOWN = 2**31 - 2**20
"""Bytes that a header says from here on mean that whoever wrote it did not know."""


class Sound(NamedTuple):
    """Samples in memory; a plain pair `(samples, rate)` is the same.

    Attributes:
        samples: `n`, or `n c` for c channels, floats in -1..1, or whole numbers of 8 (unsigned), 16 or 32 bits.
        rate: Samples a second.
    """

    samples: Any
    rate: int


class Length(NamedTuple):
    """What the header of a sound says.

    Attributes:
        frames: Samples of each channel.
        rate: Samples a second.
        channels: How many.
        format: As libsndfile names it; "" of samples in memory.
    """

    frames: int
    rate: int
    channels: int
    format: str

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return self.frames / self.rate


def read_audio(
    source: Any, rate: int, seconds: float = LONGEST, least: int = 1, name: str = ""
) -> np.ndarray:
    """A sound as one channel at one rate, `n` in float32; the same for the same sound from any source.

    Channels are averaged. Other rates are resampled by soxr at its high quality. Nothing is made louder.

    Args:
        source: A path; the bytes of a file; samples with their rate (`Sound`, or a pair).
        rate: Samples a second of what is given back.
        seconds: What is read at most, from the beginning.
        least: Samples that must come of it.
        name: What an error calls it, where it is no path.

    Raises:
        DataError: It is missing, damaged, empty, shorter than `least` or no sound; samples are no finite numbers
            or too large to be divided already.
        MissingExtraError: soundfile or soxr is not installed.
    """
    if is_samples(source):
        name = name or "a sound in memory"
        samples, from_rate = take_samples(source, name)
        samples = samples[: _count(seconds, from_rate)]
    else:
        name = name or (str(source) if isinstance(source, str | Path) else "a sound in memory")
        samples, from_rate = _decode(source, seconds, name)
    if not samples.size:
        raise _unreadable(name, "no samples")
    if not np.isfinite(samples).all():
        raise _unreadable(name, "samples that are no finite numbers")
    wave = samples.mean(1) if samples.ndim == 2 else samples
    if from_rate != rate:
        soxr = require("soxr", "audio", f"{name}, whose rate is {from_rate:,} and not {rate:,},")
        wave = soxr.resample(np.ascontiguousarray(wave), from_rate, rate)
    if len(wave) < least:
        raise DataError(
            "a sound is too short",
            where=name,
            found=f"{len(wave):,} samples at {rate:,} a second, and the backbone needs {least:,}",
            fix="give a longer one, or take it out",
        )
    return np.ascontiguousarray(wave, np.float32)


def measure_audio(source: Any, name: str = "") -> Length:
    """Length, rate and channels of a sound by its header; nothing is decoded.

    Raises:
        DataError: As `read_audio`, as far as the header tells.
        MissingExtraError: soundfile is not installed.
    """
    if is_samples(source):
        samples, rate = take_samples(source, name)
        return Length(len(samples), rate, samples.shape[1] if samples.ndim == 2 else 1, "")
    name = name or (str(source) if isinstance(source, str | Path) else "a sound in memory")
    with _open(source, name) as file:
        return Length(file.frames, file.samplerate, file.channels, file.format)


def looks_like_audio(content: bytes) -> bool:
    """Whether bytes begin as a file of sound does; that it can be read is not known yet."""
    form = content[8:12]
    if content.startswith((b"RIFF", b"RF64")):
        return form == b"WAVE"
    if content.startswith(b"FORM"):
        return form in (b"AIFF", b"AIFC")
    # An MPEG frame begins with eleven bits.
    frame = len(content) > 1 and content[0] == 0xFF and content[1] & 0xE6 == 0xE2
    return frame or content.startswith((b"fLaC", b"OggS", b"ID3", b".snd", b"caff", b"riff"))


def is_samples(source: Any) -> bool:
    """Whether it is samples with their rate."""
    pair = isinstance(source, tuple) and len(source) == 2
    return pair and isinstance(source[0], np.ndarray | Tensor)


def take_samples(source: Any, name: str = "") -> tuple[np.ndarray, int]:
    """Samples with their rate as floats in -1..1, `n` or `n c`; see `Sound`.

    Raises:
        DataError: They are none.
    """
    name = name or "a sound in memory"
    if not is_samples(source):
        raise _no_sound(name, type(source).__name__)
    given, rate = source
    array = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
    whole = isinstance(rate, int | np.integer) and not isinstance(rate, bool)
    if not whole or not RATES[0] <= rate <= RATES[1]:
        raise _no_sound(name, f"a rate of {rate!r}"[:80])
    if array.ndim not in (1, 2) or (array.ndim == 2 and not 0 < array.shape[1] <= MOST_CHANNELS):
        raise _no_sound(name, f"an array of shape {array.shape}")
    if array.ndim == 2 and len(array) < array.shape[1]:
        raise _no_sound(name, f"an array of shape {array.shape}: channels go last")
    if array.dtype == np.uint8:
        return (array.astype(np.float32) - 128) / 128, int(rate)
    if array.dtype in (np.int16, np.int32):
        return (array / -float(np.iinfo(array.dtype).min)).astype(np.float32), int(rate)
    if array.dtype.kind != "f":
        raise _no_sound(name, f"samples of {array.dtype}")
    loudest = np.abs(array).max(initial=0.0)
    if loudest > LOUDEST:
        raise _no_sound(name, f"floats up to {loudest:g}, which are no samples in -1..1")
    return array.astype(np.float32), int(rate)


def _decode(source: Any, seconds: float, name: str) -> tuple[np.ndarray, int]:
    with _open(source, name) as file:
        try:
            rate = int(file.samplerate)
            wanted = min(_count(seconds, rate), int(file.frames))
            # A block at a time: of many channels all samples together may be far more than their mean.
            blocks, left = [], wanted
            while left > 0:
                size = max(1, min(left, BLOCK // file.channels))
                block = file.read(size, dtype="float32", always_2d=True)
                if not len(block):
                    break
                blocks.append(block.mean(1))
                left -= len(block)
            wave = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
        except (OSError, RuntimeError, ValueError, TypeError, MemoryError) as error:
            raise _unreadable(name, _in_words(error)) from None
    if left > LOST * wanted:
        found = f"{len(wave):,} samples, and its header says {wanted:,} and more"
        raise _unreadable(name, found)
    return wave, rate


@contextmanager
def _open(source: Any, name: str) -> Iterator[Any]:
    """A file of soundfile, whose header is that of a sound."""
    if isinstance(source, str | Path):
        _require_file(Path(source))
    elif not isinstance(source, bytes | bytearray | memoryview):
        raise _no_sound(name, type(source).__name__)
    soundfile = require("soundfile", "audio", f"{name}, a sound,")
    with ExitStack() as stack:
        stream: Any = None
        # By contents: of a path the library would believe the suffix, and of `.raw` want settings.
        try:
            file = isinstance(source, str | Path)
            stream = stack.enter_context(Path(source).open("rb")) if file else io.BytesIO(source)
            _refuse_cut_off(stream, name)
            opened = stack.enter_context(soundfile.SoundFile(stream))
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            empty = stream is not None and not stream.seek(0, io.SEEK_END)
            raise _unreadable(name, "an empty file" if empty else _in_words(error)) from None
        if opened.format not in FORMATS:
            raise _unreadable(name, f"a file of {opened.format}")
        if not RATES[0] <= opened.samplerate <= RATES[1]:
            raise _unreadable(name, f"a rate of {opened.samplerate:,}")
        if not 0 < opened.channels <= MOST_CHANNELS:
            raise _unreadable(name, f"{opened.channels} channels")
        if opened.frames <= 0:
            raise _unreadable(name, "no samples")
        yield opened


def _refuse_cut_off(stream: Any, name: str) -> None:
    """Refuse WAV and AIFF of which the end is missing: the library would read what there is without a word."""
    begin, there = stream.read(8), stream.seek(0, io.SEEK_END)
    stream.seek(0)
    order: Any = {b"RIFF": "little", b"FORM": "big"}.get(begin[:4])
    if order is None or len(begin) < 8:
        return
    said = int.from_bytes(begin[4:], order) + 8
    # Who writes into a pipe does not know how long it will be.
    if there < said < UNKNOWN:
        raise _unreadable(
            name, f"{there:,} bytes, and its header says {said:,}: the end is missing"
        )


def _count(seconds: float, rate: int) -> int:
    return round(min(seconds, LONGEST) * rate)


def _in_words(error: BaseException) -> str:
    # "Error opening <_io.BytesIO ...>: Format not recognised."
    said = str(error).strip().splitlines() or [type(error).__name__]
    return said[0].rpartition(">: ")[2][:200]


def _require_file(path: Path) -> None:
    """A pipe or a device would be waited for; a directory has no bytes."""
    try:
        kind = path.stat().st_mode
    except FileNotFoundError:
        raise DataError(
            "a sound is missing",
            where=str(path),
            found=f"a link to {os.readlink(path)}" if path.is_symlink() else "",
            fix="restore it, or correct the list",
        ) from None
    except (OSError, ValueError) as error:
        raise _unreadable(str(path), getattr(error, "strerror", "") or str(error)) from None
    if not stat.S_ISREG(kind):
        raise _unreadable(str(path), "a folder" if stat.S_ISDIR(kind) else "no regular file")


def _unreadable(name: str, found: str) -> DataError:
    return DataError(
        "a sound cannot be read",
        where=name,
        found=found,
        fix=f"give a file of {USUAL_AUDIO} (ffmpeg -i FILE sound.wav makes one of most others), restore "
        "it, or leave corrupt ones out (--skip-bad, skip_bad=True)",
    )


def _no_sound(name: str, found: str) -> DataError:
    return DataError(
        "not a sound",
        where=name,
        found=found,
        fix="give paths, bytes of files, or pairs (samples, rate): samples `n` or `n c`, floats in -1..1, int16, "
        "int32 or uint8",
    )
