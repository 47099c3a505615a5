"""Methods that train no tuner: the head alone, all weights, or the biases."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from restuning._errors import BackboneError
from restuning._torch import is_sharded
from restuning.host import Extractor, Host, is_offloaded
from restuning.methods.method import Method, Options
from restuning.runtime.precision import HALF_PRECISION
from restuning.sites import is_plain
from restuning.task import Task


def _build_linear(host: Extractor, head: nn.Linear | None, options: Options) -> Task:
    return Task(head=head)


def _build_full(host: Host, head: nn.Linear | None, options: Options) -> Task:
    return Task(head=head, weights=copy_weights(host.model, lambda name, weight: True))


def _build_bitfit(host: Host, head: nn.Linear | None, options: Options) -> Task:
    weights = copy_weights(
        # A matrix called "bias" is a table of positions, no bias of a layer.
        host.model,
        lambda name, weight: name.endswith("bias") and weight.dim() < 2,
    )
    return Task(head=head, weights=weights)


_UNUSED = ("rank", "scale", "query", "layers", "drop_path", "residual")

ROWS: dict[str, Method] = {
    "linear": Method(
        _build_linear, "a linear head on the frozen feature", "-", unused=_UNUSED, inside=False
    ),
    "full": Method(_build_full, "all backbone weights, as a trained copy", "-", unused=_UNUSED),
    "bitfit": Method(
        _build_bitfit,
        "the backbone's biases, as a trained copy",
        "Ben Zaken et al. 2022",
        unused=_UNUSED,
    ),
}


def copy_weights(model: nn.Module, wanted: Callable[[str, Tensor], bool]) -> dict[str, Tensor]:
    """Copy some parameters of a model, by name; the model keeps its own.

    Args:
        model: The backbone.
        wanted: Decides by name and parameter whether it is trained.

    Raises:
        BackboneError: One of them is quantised, or the backbone is offloaded or sharded.
    """
    named = {n: p for n, p in model.named_parameters() if wanted(n, p)}
    # Quantised weights take no gradient, and offloaded ones are not there to be copied.
    packed = [n for n, p in named.items() if not is_plain(p)]
    shared_out = any(map(is_sharded, named.values()))
    if packed or shared_out or is_offloaded(model):
        elsewhere = "shared out among processes" if shared_out else "kept elsewhere (offloaded)"
        raise BackboneError(
            "trained copies are made of weights that are there, in floating point",
            where=packed[0] if packed else type(model).__name__,
            found="quantised ones" if packed else f"weights that are {elsewhere}",
            fix="use res-tuning or res-tuning-bypass, or the backbone as it was before",
        )
    # In bf16 small steps would vanish; the backbone computes with them in its own precision.
    return {
        name: weight.float() if weight.dtype in HALF_PRECISION else weight.clone()
        for name, weight in named.items()
    }
