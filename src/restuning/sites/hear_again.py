"""An attention in half precision, run once more in single: what rounding would hide is seen there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from restuning._torch import tree_map
from restuning.runtime.precision import HALF_PRECISION
from restuning.sites.attention_inputs import AttentionInputs, leave_out_caches
from restuning.sites.half import widen
from restuning.sites.projections import Projections
from restuning.sites.sums import ModuleCall, first_tensor


class Recorded(Protocol):
    """One recorded call of a module: what it read, what it returned, what it was given."""

    input: Tensor | None
    output: Tensor | None
    attention_inputs: AttentionInputs


@dataclass(eq=False, slots=True)
class _Heard:
    input: Tensor | None
    output: Tensor | None = None
    attention_inputs: AttentionInputs = AttentionInputs()  # noqa: RUF009


def hear_again(
    model: nn.Module, projections: Projections, find_call: Callable[[str], ModuleCall | None]
) -> Callable[[str], Recorded | None]:
    """Recorded calls of one attention in single precision, where it ran in half; else as recorded.

    A copy of it with widened weights is given what it was given. In bf16 a wrong reading (no rotary
    positions, another mask) may differ from the right one by less than rounding does.

    Args:
        model: The backbone, which is not touched.
        projections: Of the attention.
        find_call: Path of a module to its recorded call.

    Cost: one run of the attention, and its weights in fp32 for that long.
    """
    own, inner = find_call(projections.module), find_call(projections.q)
    if own is None or own.given is None or inner is None or inner.input is None:
        return find_call
    if inner.input.dtype not in HALF_PRECISION:
        return find_call
    twin = widen(model.get_submodule(projections.module), torch.float32)
    heard: dict[str, _Heard] = {}
    for path in dict.fromkeys((projections.q, projections.out)):
        part = twin.get_submodule(path.removeprefix(projections.module).removeprefix("."))
        # In place of hooks, which the host alone registers: the copy belongs to nobody else.
        part.forward = partial(_listen, part.forward, heard, path)
    args, kwargs = leave_out_caches(*tree_map(_widen_tensor, own.given))
    try:
        with torch.no_grad():
            twin(*args, **kwargs)
    # A copy that does not run proves nothing, and nothing is lent.
    except (RuntimeError, AttributeError, TypeError, IndexError, ValueError, AssertionError):
        return lambda path: None
    inputs = AttentionInputs(*tree_map(_widen_tensor, tuple(own.attention_inputs)))
    whole = heard.setdefault(projections.module, _Heard(own.input))
    whole.attention_inputs = inputs
    return heard.get


def _listen(
    forward: Callable[..., Any], heard: dict[str, _Heard], path: str, *args: Any, **kwargs: Any
) -> Any:
    """Run a part of the copy, and write down what it read and returned."""
    output = forward(*args, **kwargs)
    read = first_tensor(args) if args else first_tensor(kwargs)
    heard[path] = _Heard(read, first_tensor(output))
    return output


def _widen_tensor(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in HALF_PRECISION
    return value.float() if half else value
