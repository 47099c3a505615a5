"""What a store is keyed by: everything its values depend on, and nothing else."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

from torch import Tensor

from restuning._errors import StoreError
from restuning.bypass.pooling import pool_patches
from restuning.features.codec import BYTES, check_dtype, check_precision
from restuning.host import Engine, Extractor
from restuning.sites import ONE_TOKEN, Needs, Tokens, covers_tokens, is_stream, split_tap

SCHEMA = 1
"""Raised when stores of an older library can no longer be read."""


@dataclass(frozen=True, slots=True)
class Tap:
    """One kept tap: its name and the shape of its value for one input (`n d` or `h w d`)."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Values of one input."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Column:
    """Values of a row that are read together: where they start, and their shape for one input."""

    start: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """How many they are."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class StoreKey:
    """Everything the values of a store depend on.

    Attributes:
        backbone: Name, fingerprint and the digest of all weights.
        taps: What is kept, in order; a row is their values one after the other.
        tokens: "cls", "last", "all" or "pool"; see `Needs`.
        dtype: How values are kept.
        precision: What the backbone computed in: "fp32", or "bf16" by autocast.
        pool_patches: Patches along a square that is kept as its mean; see `Needs`. The manifest
            calls it "merge", as it always has: its digest names the store.
        preprocessing: How an image became an input.
        data: Name of the data set and its identity: digests of the contents of each split and of
            the names of its classes. In stores of before there were such, a text that follows from
            paths and sizes.
        views: "plain", "flip", "crop.2", ...; of the training split.
        splits: Number of samples by split.
    """

    backbone: Mapping[str, Any]
    taps: tuple[Tap, ...]
    tokens: Tokens
    dtype: str
    preprocessing: Mapping[str, Any]
    data: Mapping[str, Any]
    views: tuple[str, ...]
    splits: Mapping[str, int]
    precision: str = "fp32"
    pool_patches: int = 1

    @property
    def known_by_contents(self) -> bool:
        """Whether it says what its inputs contain, and so which data it is of."""
        identity = self.data.get("identity")
        return isinstance(identity, Mapping) and all(
            isinstance(of := identity.get(split), Mapping)
            and isinstance(of.get("inputs"), str)
            and isinstance(of.get("labels"), str)
            for split in self.splits
        )

    def covers_data(self, other: StoreKey) -> bool:
        """Whether its data are another key's, split by split; splits that are more do no harm."""
        ours, theirs = self.data.get("identity"), other.data.get("identity")
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            return (
                self.data.get("name") == other.data.get("name") and theirs.items() <= ours.items()
            )
        return self.data == other.data

    @property
    def form(self) -> str:
        """The tokens as users write them; see `Needs`."""
        return self.needs.form

    @property
    def values_per_row(self) -> int:
        """Values of one input over all taps."""
        return sum(tap.numel for tap in self.taps)

    @property
    def bytes_per_row(self) -> int:
        """Bytes of one input on disk."""
        return self.values_per_row * BYTES[self.dtype]

    @property
    def rows(self) -> int:
        """Rows of all splits and views."""
        return sum(n * (len(self.views) if s == "train" else 1) for s, n in self.splits.items())

    @property
    def slices(self) -> dict[str, slice]:
        """Where each tap's values stand in a row."""
        # A row is one vector: gathering it is one copy, whatever the number of taps.
        places, at = {}, 0
        for tap in self.taps:
            places[tap.name] = slice(at, at + tap.numel)
            at += tap.numel
        return places

    @property
    def needs(self) -> Needs:
        """All that is kept, as what it would serve."""
        return Needs(tuple(tap.name for tap in self.taps), self.tokens, self.pool_patches)

    @property
    def columns(self) -> dict[str, Column]:
        """All of a row, by tap."""
        slices = self.slices
        return {tap.name: Column(slices[tap.name].start, tap.shape) for tap in self.taps}

    def find(self, needs: Needs, last: str = "") -> dict[str, Column] | None:
        """Where what is needed stands in a row, by tap; None where not all of it is there.

        Args:
            needs: Of a task.
            last: Name of the last tap, which needs may call "last".
        """
        there, found = self.columns, {}
        for name in needs.taps:
            tap = last if name == "last" else name
            whole, single = there.get(tap), there.get(f"{tap}/{needs.tokens}")
            if whole is not None and is_stream(tap):
                stored, wanted = (
                    (self.tokens, self.pool_patches),
                    (needs.tokens, needs.pool_patches),
                )
                has = covers_tokens(stored[0], wanted[0], stored[1], wanted[1])
                whole = self._pick(whole, needs.tokens) if has else None
            column = single if whole is None else whole
            column = self._find_one_token(tap) if column is None else column
            if column is None:
                return None
            found[tap] = column
        return found

    def _find_one_token(self, name: str) -> Column | None:
        """One token of a tap that is asked for as a part (`block.3/cls`), where the tap is there whole."""
        tap, part = split_tap(name)
        whole = self.columns.get(tap)
        if part not in ONE_TOKEN or whole is None or len(whole.shape) != 2:
            return None
        has = self.tokens == "all" and covers_tokens("all", part, self.pool_patches)
        return self._pick(whole, part) if has else None

    def _pick(self, whole: Column, tokens: str) -> Column:
        """One token of all, where that is enough; of a map everything, of which one is taken later."""
        if self.tokens != "all" or tokens not in ONE_TOKEN or len(whole.shape) != 2:
            return whole
        count, width = whole.shape
        return Column(whole.start + (count - 1) * width * (tokens == "last"), (1, width))

    def restrict(self, split: str) -> StoreKey:
        """The key of a store of one split alone."""
        identity = self.data["identity"]
        if isinstance(identity, Mapping):
            others = self.splits.keys() - {split}
            identity = {name: value for name, value in identity.items() if name not in others}
        return replace(
            self,
            data={**self.data, "identity": identity},
            splits={split: self.splits[split]},
            views=self.views if split == "train" else ("plain",),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for the manifest."""
        # The digest is made of this: a field more, or in another shape, is another store.
        values = asdict(self) | {"schema": SCHEMA}
        values["taps"] = [[tap.name, list(tap.shape)] for tap in self.taps]
        values["views"] = list(self.views)
        side = values.pop("pool_patches")
        # Left out where it is 1: stores of before it was an option have the same digest.
        if side > 1:
            values["merge"] = side
        return json.loads(json.dumps(values))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StoreKey:
        """From a manifest.

        Raises:
            KeyError, TypeError, ValueError: A field is missing or of another kind.
        """
        return cls(
            dict(values["backbone"]),
            tuple(Tap(str(n), tuple(int(i) for i in shape)) for n, shape in values["taps"]),
            _check_tokens(values["tokens"]),
            check_dtype(values["dtype"]),
            dict(values["preprocessing"]),
            dict(values["data"]),
            tuple(map(str, values["views"])),
            {str(k): int(v) for k, v in values["splits"].items()},
            check_precision(values.get("precision", "fp32")),
            _check_merge(values.get("merge", 1)),
        )

    @property
    def digest(self) -> str:
        """sha256 over all of it, 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class DataKey:
    """The data side of a key: everything about the inputs that features depend on.

    Attributes:
        name: Of the data set.
        identity: Digests of its contents (`Data.contents`), or a text that stands for them.
        splits: Samples by split.
        preprocessing: How a sample becomes the backbone's input.
        views: Of the training split.
    """

    name: str
    identity: str | Mapping[str, Any]
    splits: Mapping[str, int]
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    views: Sequence[str] = ("plain",)


def store_key(
    host: Extractor,
    needs: Needs,
    example: Mapping[str, Any] | Sequence[Any],
    data: DataKey,
    *,
    backbone: str,
    dtype: str = "fp32",
    precision: str = "fp32",
) -> StoreKey:
    """The key of the store that would hold these features.

    Args:
        host: The frozen backbone.
        needs: Taps and tokens to keep.
        example: One input, batch 1, as positional or keyword arguments.
        data: What the features are of.
        backbone: Its name.
        dtype: One of `DTYPES`.
        precision: One of `PRECISIONS`; "bf16" is about twice as fast where the processor has it
            (AVX512-BF16, AMX, any recent GPU), and differs from fp32 in the third digit.

    Raises:
        StoreError: An unknown form, or bf16 of an engine.

    Cost: one forward, and a digest of all weights.
    """
    if check_precision(precision) != "fp32" and isinstance(host, Engine):
        raise StoreError(
            "an engine computes in the precision it was exported in",
            found=precision,
            fix="leave --precision (--cache-precision) out",
        )
    return StoreKey(
        {"name": backbone, **host.fingerprint(), "all weights": host.digest()},
        measure_taps(host, needs, example),
        needs.tokens,
        check_dtype(dtype),
        dict(data.preprocessing),
        {"name": data.name, "identity": data.identity},
        tuple(data.views),
        dict(data.splits),
        precision,
        needs.pool_patches,
    )


def measure_taps(
    host: Extractor, needs: Needs, example: Mapping[str, Any] | Sequence[Any]
) -> tuple[Tap, ...]:
    """What a store would keep of one input, by name and shape; arguments as for `store_key`."""
    # Shapes come from a forward, so that no rule about networks has to foretell them.
    if isinstance(example, Mapping):
        taps = host.features(keep=needs, **example)
    else:
        taps = host.features(*example, keep=needs)
    taps = pool_taps(taps, needs.pool_patches, host.sites.taps[-1])
    return tuple(Tap(name, tuple(taps[name].shape[1:])) for name in needs.taps)


def pool_taps(taps: Mapping[str, Tensor], side: int, last: str) -> Mapping[str, Tensor]:
    """Taps as they are stored: patches pooled in squares, but for the last tap."""
    if side == 1:
        return taps
    whole = {n for n in taps if n == last or not is_stream(n)}
    return {n: tap if n in whole else pool_patches(tap, side) for n, tap in taps.items()}


def _check_tokens(value: Any) -> Tokens:
    if value not in get_args(Tokens):
        raise ValueError(f"tokens {value!r}")
    return value


def _check_merge(value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"merge {value!r}")
    return value
