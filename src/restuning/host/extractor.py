"""What a bypass task needs of a backbone: its taps, its readout on loan, its fingerprint.

`Host` is an extractor that also runs tuners inside the backbone; `Engine` is one that cannot.
Features, training from a store, banks and task files ask for nothing more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import NoSitesError
from restuning.sites import (
    FEATURE,
    PARTS,
    POOLS,
    Features,
    Needs,
    Readout,
    Sites,
    Tokens,
    parse_pool,
    split_tap,
)


class Extractor(nn.Module, ABC):
    """A frozen backbone as a source of features.

    Attributes:
        model: The network; of an engine what is left of it in PyTorch, its final norm.
        sites: Where it was tapped, and of a host where it can be tuned.
        readout_rule: How its last stream becomes a feature.
        has_time: Whether it is given time steps: whether it is a diffusion model.
        images: Whether it was shown images: its tokens are a grid, not a sequence.
    """

    model: nn.Module
    sites: Sites
    readout_rule: Readout
    has_time: bool = False
    images: bool = False

    @property
    def dim(self) -> int:
        """Width of the feature a head reads."""
        return self.readout_rule.dim

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it takes its inputs and gives its taps."""

    @abstractmethod
    def features(
        self, *args: Any, keep: Needs | Sequence[str] | None = None, **kwargs: Any
    ) -> Features:
        """Taps of one forward, without gradient; they carry the readout and the mask with them.

        Args:
            args: The backbone's input.
            keep: `Needs` (of a task or a bank), or tap names; None for all taps.
            kwargs: The backbone's input by keyword.

        Raises:
            NoSitesError: A tap has no such name.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What a task file stores to know its backbone again."""

    def earlier_fingerprint(self) -> dict[str, Any]:
        """The fingerprint that files of an earlier form may have of the same backbone."""
        return self.fingerprint()

    def apart(self) -> dict[str, Any] | None:
        """Fingerprint and digest that files of before have of a backbone with LoRA of PEFT in it; else None."""
        return None

    def identity(self) -> dict[str, Any]:
        """What a task file compares beside the fingerprint, as JSON; empty where nothing is known.

        `digest` is the sha256 of all weights of the network (of an engine: of the one it was exported
        from), `answers` what it answers to a fixed input.
        """
        return {}

    def check_unchanged(self) -> None:
        """Refuse a backbone that is no longer what it was; nothing of an engine can change."""

    @abstractmethod
    def digest(self) -> str:
        """A hash of everything its features depend on: what a feature store is keyed by."""

    def readout(
        self,
        state: Tensor,
        pool: str | None = None,
        mask: Tensor | None = None,
        *,
        model: nn.Module | None = None,
    ) -> Tensor:
        """The frozen final norm and pooling of real tokens, `b n d -> b d`, on loan to tasks.

        Args:
            state: The last stream.
            pool: Another pooling than the backbone's own, one of `POOLS`.
            mask: Which tokens are real, `b n`; None where all are.
            model: A copy of the backbone whose norm is used; None for the backbone itself.

        Raises:
            UnknownNameError: No such pooling.
        """
        rule = self.readout_rule
        if pool is not None and pool != rule.pool:
            # `pool_first` describes the backbone's own pooling; any other one is of normed tokens.
            rule = replace(rule, pool=parse_pool(pool), pool_first=False)
        return rule(self.model if model is None else model, state, mask)

    def resolve_needs(self, keep: Needs | Sequence[str] | None, tokens: Tokens = "all") -> Needs:
        """What to keep, checked.

        Args:
            keep: As for `features`.
            tokens: Which tokens of each tap, where `keep` is only names (or nothing).

        Raises:
            NoSitesError: A tap has no such name.
        """
        taps = self.sites.taps
        needs = keep if isinstance(keep, Needs) else Needs(tuple(keep or taps), tokens)
        for tap in needs.taps:
            name, part = split_tap(tap)
            known = POOLS if name == FEATURE else ("", *PARTS) if name in taps else ()
            if tap == "last" or part in known:
                continue
            raise NoSitesError(
                "no such tap",
                where=tap,
                fix=f"taps are {taps[0]} to {taps[-1]}, their parts {', '.join(PARTS)} "
                f"({taps[-1]}/tokens), and {FEATURE}/mean",
            )
        return needs


def is_image(value: Any) -> bool:
    """Whether an input is a batch of images, `b c h w`."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 4
