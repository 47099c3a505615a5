"""Half precision, in which backbones come and nothing is trained."""

from __future__ import annotations

import torch

HALF_PRECISION = frozenset((torch.bfloat16, torch.float16))
"""Of checkpoints that are computed with as they are."""


def is_autocast_to(kind: torch.dtype, device: torch.device) -> bool:
    """Whether autocast is on and computes in this precision, so that it sees to numbers of it itself."""
    return torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == kind
