"""What a task reads of a backbone, and the features that answer it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from restuning._errors import MissingInputError

Tokens = Literal["cls", "last", "all", "pool"]

IN_WORDS: dict[str, str] = {
    "cls": "class token",
    "last": "last token",
    "all": "all tokens",
    "pool": "pooled",
}

FEATURE = "feature"
"""Among taps, `feature/mean` is the frozen readout of the last stream with that pooling, `b 1 D`."""

PARTS: dict[str, str] = {
    "patches": "mean, largest values and deviation of patches",
    "tokens": "mean, largest values and deviation of tokens",
    "places": "means along rows and columns",
}
"""What may be read of a tap in place of its tokens, as `block.3/patches`, `b k d`: a few numbers a
channel that are small to store. Tokens are normalised first (no parameters)."""


def split_tap(name: str) -> tuple[str, str]:
    """The tap and the part that a name stands for, as of `block.3/patches`; a whole tap has no part."""
    tap, _, part = name.partition("/")
    return tap, part


def is_stream(name: str) -> bool:
    """Whether a name stands for tokens of a tap, and not for a part of it or for the feature."""
    return "/" not in name


def count_taps(names: Sequence[str]) -> str:
    """How many taps are kept, in words: `13 taps`, `13 taps and 15 parts of them`, `1 part of taps`."""
    whole = sum(map(is_stream, names))
    parts = len(names) - whole
    taps = f"{whole} tap{'' if whole == 1 else 's'}"
    if not parts:
        return taps
    more = f"{parts} part{'' if parts == 1 else 's'} of"
    return f"{taps} and {more} them" if whole else f"{more} taps"


@dataclass(frozen=True, slots=True)
class Needs:
    """What a task reads of the backbone: which taps, and which tokens of them.

    Attributes:
        taps: `block.0` ... `block.L`, parts of them (`PARTS`) as
            `block.3/patches`, or the frozen feature as `feature/mean`.
        tokens: Of whole taps: "cls" (the class token only), "last" (the last real token only), "all", or "pool":
            one vector a tap, the mean over its tokens, and for the last tap the backbone's own
            feature.
        pool_patches: With "all", patches are read as means of squares of this many by this many.
            A store keeps them so, but for the last tap, which the readout takes whole; a forward
            gives all.
    """

    taps: tuple[str, ...]
    tokens: Tokens = "all"
    pool_patches: int = 1

    @property
    def form(self) -> str:
        """The tokens as users write them: `cls`, `all`, `all/2`."""
        return self.tokens if self.pool_patches == 1 else f"{self.tokens}/{self.pool_patches}"


def resolve_tokens(pool: str | None) -> Tokens:
    """What a readout reads of the last stream: one token, the backbone's own vector, or all."""
    of: dict[str | None, Tokens] = {"cls": "cls", "last": "last", "own": "pool"}
    return of.get(pool, "all")


def covers_tokens(
    stored: str, needed: str, stored_patches: int = 1, needed_patches: int = 1
) -> bool:
    """Whether tokens that are stored hold those that are needed: all hold the first and the last.

    What is pooled is in no other: the last of it is the backbone's own feature. Where patches were
    pooled, the class token is still there as it was; whole patches can be pooled at any time.
    """
    if stored_patches not in (1, needed_patches):
        return needed == "cls"
    return stored == needed or (stored == "all" and needed in ("cls", "last"))


class Features(dict[str, Tensor]):
    """Taps of one forward by name, with the frozen readout on loan.

    Attributes:
        readout: Final norm and pooling, `(state, pool, mask) -> feature`.
        mask: Which tokens are real, `b n`; None where all are.
        time: Time steps of a diffusion model, `b` or `1`; None where there are none.
    """

    def __init__(
        self,
        taps: Mapping[str, Tensor],
        readout: Callable[..., Tensor],
        mask: Tensor | None = None,
        time: Tensor | None = None,
    ) -> None:
        super().__init__(taps)
        self.readout, self.mask, self.time = readout, mask, time

    def select(self, rows: Callable[[Tensor], Tensor]) -> Features:
        """The features of some inputs of the batch.

        Args:
            rows: Takes their rows of a tensor.
        """
        mask = None if self.mask is None else rows(self.mask)
        time = self.time
        # One step may stand for the whole batch.
        time = time if time is None or time.numel() == 1 else rows(time)
        return Features({n: rows(t) for n, t in self.items()}, self.readout, mask, time)


def resolve_readout(taps: Mapping[str, Tensor], given: Callable[..., Tensor] | None) -> Any:
    """The readout that was given, else the one that came with the features, with their mask.

    Raises:
        MissingInputError: Neither.
    """
    if isinstance(taps, Features):
        # Padding must not enter a mean, whoever's readout it is.
        readout = taps.readout if given is None else given
        return readout if taps.mask is None else partial(readout, mask=taps.mask)
    if given is not None:
        return given
    raise MissingInputError(
        "a task needs the backbone's readout",
        found="plain taps without one",
        fix="pass host.features(...) itself, or give host.readout as the second argument",
    )
