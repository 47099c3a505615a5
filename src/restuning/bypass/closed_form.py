"""What classifiers in closed form have in common: numbers that are solved for, and logits that a head passes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import TrainingError
from restuning.bypass.side_network import SideNetwork, pass_on


class ClosedForm(SideNetwork):
    """A side network whose logits are one linear map, that is solved for and no step trains.

    Subclasses register the buffers `weight` and `bias`, say what they answer in `forward` (after `check_solved`), and
    set `marked_solved` when `solve` has put numbers in.

    Attributes:
        classes: C.
        marked_solved: Whether numbers are known to be there, so that they are looked at once.
    """

    weight: Tensor
    bias: Tensor
    classes: int
    solved = True
    marked_solved = False

    @property
    def solved_parameters(self) -> int:
        """How many weights and biases are solved for."""
        return self.weight.numel() + self.bias.numel()

    def feature(
        self, taps: Mapping[str, Tensor], readout: Callable[..., Tensor], pool: str | None
    ) -> Tensor:
        """The feature is the logits themselves, which the head weighs."""
        return self(taps)

    def widen(self, head: nn.Linear) -> nn.Linear:
        """A head of the same classes that starts by passing the logits on."""
        return pass_on(self.classes, head.out_features)

    def check_solved(self) -> None:
        """Refuse to answer with numbers that nobody solved for.

        Raises:
            TrainingError: All of them are zero.
        """
        # Read off the numbers: so it is right after any way of loading them, and in old files. And once: a graph that is
        # recorded has none to look at. The bias alone would do: it is zero of no data that have labels.
        if not self.marked_solved and not self._has_numbers():
            raise TrainingError(
                "a classifier in closed form was asked before it was solved",
                where=self.kind,
                found="weights that are all zero",
                fix="train its task with restuning.fit, which solves it first, or load one that "
                "was trained; a loop of your own calls restuning.training.prepare before",
            )
        self.marked_solved = True

    def _has_numbers(self) -> bool:
        return bool(self.weight.any() or self.bias.any())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # A file may hold a solution or none. On meta there are no numbers to look at.
        self.marked_solved = not self.bias.is_meta and self._has_numbers()

    @property
    def device_of_sums(self) -> torch.device:
        """Where what it is solved from lies: its own device, unless that has no double precision (MPS)."""
        own = self.weight.device
        return torch.device("cpu") if own.type == "mps" else own
