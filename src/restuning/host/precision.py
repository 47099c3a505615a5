"""The precision of a backbone: inputs are brought to it, and autocast stays outside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from restuning._torch import tree_map
from restuning.host.fingerprint import find_device
from restuning.runtime.precision import HALF_PRECISION
from restuning.sites import is_plain


def find_half_precision(model: nn.Module) -> torch.dtype | None:
    """bf16 or fp16, where most numbers of a backbone are kept so; None for single precision."""
    sizes: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        if is_plain(parameter):
            sizes[parameter.dtype] += parameter.numel()
    kind = max(sizes, key=lambda k: sizes[k], default=torch.float32)
    return kind if kind in HALF_PRECISION else None


def fit_inputs(half: torch.dtype | None, inputs: Any) -> Any:
    """Inputs as a backbone in half precision takes them: images and sequences in its precision.

    Time steps and what else is one number a sample stay exact.

    Args:
        half: Of the backbone; None leaves everything as it is.
        inputs: Tensors in tuples and dicts.
    """
    if half is None:
        return inputs

    def fit(value: Any) -> Any:
        wide = isinstance(value, Tensor) and value.dtype == torch.float32 and value.dim() > 2
        return value.to(half) if wide else value

    return tree_map(fit, inputs)


@contextmanager
def outside_autocast(half: torch.dtype | None, model: nn.Module) -> Iterator[None]:
    """Without autocast around a backbone in half precision, which it would mix with another one."""
    # Asked only of such a backbone: of a large one it takes a while.
    kind = "" if half is None else find_device(model).type
    if not kind or not torch.is_autocast_enabled(kind):
        yield
        return
    with torch.autocast(kind, enabled=False):
        yield
