"""Trained copies of a backbone's weights, for methods that train those: full fine-tuning, BitFit."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from restuning._errors import BackboneError
from restuning.fingerprint import is_offloaded
from restuning.sites import is_plain


def copies(model: nn.Module, wanted: Callable[[str, Tensor], bool]) -> dict[str, Tensor]:
    """Copies of some parameters by name; the model keeps its own.

    Args:
        model: The backbone.
        wanted: Name and parameter to whether it is trained.

    Raises:
        BackboneError: One of them is quantised, or the backbone is offloaded.
    """
    named = {n: p for n, p in model.named_parameters() if wanted(n, p)}
    packed = [n for n, p in named.items() if not is_plain(p)]
    if packed or is_offloaded(model):
        raise BackboneError(
            "trained copies are made of weights that are there, in floating point",
            where=packed[0] if packed else type(model).__name__,
            found="quantised ones" if packed else "weights that are kept elsewhere (offloaded)",
            fix="use res-tuning or res-tuning-bypass, or the backbone as it was before",
        )
    return {name: weight.clone() for name, weight in named.items()}
