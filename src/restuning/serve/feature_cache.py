"""Features of inputs that were asked about lately: a second question about one costs no forward."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from restuning._errors import DataError
from restuning.backbones.audio import is_samples
from restuning.serve.inputs import Place
from restuning.sites import Features, Needs, is_stream


@dataclass
class Row:
    """What forwards gave of one input.

    Attributes:
        keep: What was kept of the shared forward; None where there was none yet.
        taps: Of it, each without the axis of the batch, and of a text without padding.
        length: Real tokens of a text that is kept with all of them; None for what has no mask.
        tokens: Real tokens that were read; 0 for images.
        words: The token that answers for each word, where words are answered.
        place: Of an image its size, and what is seen of it.
        alone: Logits of tasks with a forward of their own, by name and version.
    """

    keep: Needs | None = None
    taps: dict[str, Tensor] = field(default_factory=dict)
    length: int | None = None
    tokens: int = 0
    words: dict[int, int] | None = None
    place: Place | None = None
    alone: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def holds(self, keep: Needs) -> bool:
        """Whether the shared forward of this input kept what is wanted now."""
        mine = self.keep
        return mine is not None and mine.tokens == keep.tokens and set(keep.taps) <= set(mine.taps)

    def size(self) -> int:
        """Bytes."""
        return sum(t.nbytes for t in (*self.taps.values(), *self.alone.values())) + 1024


def split_rows(features: Features, keep: Needs) -> list[dict[str, Any]]:
    """The fields of a `Row` for each input of a batch, as copies: a view would hold the whole batch."""
    rows = len(next(iter(features.values())))
    lengths = None if features.mask is None else features.mask.sum(1).tolist()
    made = []
    for row in range(rows):
        length = None if lengths is None else int(lengths[row])
        taps = {
            # Texts are padded on the right, so the real tokens are the first.
            name: (
                tap[row, :length] if length is not None and is_stream(name) else tap[row]
            ).clone()
            for name, tap in features.items()
        }
        made.append({"keep": keep, "taps": taps, "length": length})
    return made


def join_rows(rows: Sequence[Row], names: Sequence[str], readout: Any) -> Features:
    """A batch again, padded on the right where its inputs have all their tokens."""
    lengths = [row.length for row in rows if row.length is not None]
    # Rows of different lengths, or nothing was padded and there is nothing to mask.
    padded = len(lengths) == len(rows) and len(set(lengths)) > 1
    join = pad_sequence if padded else _stack
    taps = {
        name: (join if is_stream(name) else _stack)([row.taps[name] for row in rows], True)
        for name in names
    }
    mask = None
    if lengths:
        places = torch.arange(max(lengths))
        mask = places < torch.tensor(lengths)[:, None]
        mask = mask.to(next(iter(taps.values())).device)
    return Features(taps, readout, mask)


def _stack(rows: Sequence[Tensor], _: bool = True) -> Tensor:
    return torch.stack(list(rows))


def digest_input(given: Any, kind: str) -> str:
    """What an input is known by; no other of its kind has the same, and equal ones have equal ones.

    Raises:
        DataError: An image or a sound is given by its name, or as something of which the values are not known here.
    """
    digest = hashlib.sha256()
    if kind == "audio" and is_samples(given):
        samples, rate = given
        given = np.asarray(samples)
        digest.update(f"{rate} ".encode())
    elif kind == "audio" and not isinstance(given, bytes):
        raise DataError(
            "a sound that is neither bytes nor samples",
            found=type(given).__name__,
            fix="give the bytes of its file, or samples with their rate",
        )
    if kind == "image" and not isinstance(given, bytes | np.ndarray):
        raise DataError(
            "an image that is neither bytes nor pixels",
            found=type(given).__name__,
            fix="give the bytes of its file, or an array `h w 3`",
        )
    if isinstance(given, bytes):
        digest.update(given)
    elif isinstance(given, np.ndarray):
        digest.update(f"{given.dtype} {given.shape} ".encode())
        digest.update(np.ascontiguousarray(given).tobytes())
    else:
        digest.update(json.dumps(given).encode())
    return digest.hexdigest()


class FeatureCache:
    """Rows by the digest of their input; the one that was asked longest ago goes first.

    Args:
        most: Bytes that are held; 0 for none.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.bytes = 0
        self._rows: OrderedDict[str, tuple[Row, int]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, digest: str) -> Row | None:
        """The row of an input, if it is still here."""
        with self._lock:
            if digest not in self._rows:
                return None
            self._rows.move_to_end(digest)
            return self._rows[digest][0]

    def put(self, rows: Mapping[str, Row]) -> None:
        """Keep rows, new or grown, and let go what is too much."""
        with self._lock:
            for digest, row in rows.items():
                _, size = self._rows.pop(digest, (None, 0))
                self.bytes -= size
                size = row.size()
                if size <= self.most:
                    self._rows[digest] = row, size
                    self.bytes += size
            while self.bytes > self.most:
                _, (_, size) = self._rows.popitem(last=False)
                self.bytes -= size

    def clear(self) -> None:
        """Let all go."""
        with self._lock:
            self._rows.clear()
            self.bytes = 0
