"""Several last streams through the rest of one forward: the backbone's own, and those of bypasses.

What follows the last block (a norm, a modulation, a map, the way back to pixels) is the model's own
code and sees one stream of the shape it knows: the streams are the batch of a `torch.vmap` that is
opened where the last block ends and closed where the model returns. So it is right for any tail, and
all that comes before runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from restuning._torch import close_vmap, gather_vmap, open_vmap


class SideBySide:
    """Stands where a bypass stands in the record of one call.

    Args:
        bypasses: Each gives a last stream.
        base: Whether the backbone's own last stream goes first.
        combine: What becomes of the outputs, `k b ... -> ...`.
    """

    def __init__(
        self,
        bypasses: Sequence[Any],
        *,
        base: bool = True,
        combine: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.bypasses, self.base, self.combine = tuple(bypasses), base, combine
        first = dict.fromkeys(tap for b in self.bypasses for tap in b.taps[:-1])
        self.taps = (*first, self.bypasses[0].taps[-1])
        self.tuners = [t for b in self.bypasses for t in b.tuners]
        self._level: int | None = None
        self._count = 0

    def __call__(self, taps: Mapping[str, Tensor]) -> Tensor:
        """All last streams, as one of the shape of one."""
        # The backbone is frozen, its own answer has nothing to train.
        states = [taps[self.taps[-1]].detach()] if self.base else []
        states += [bypass(taps) for bypass in self.bypasses]
        # An earlier forward under the same record may have raised before it came to `gather`.
        self.close()
        self._count = len(states)
        inside, self._level = open_vmap(torch.stack(states))
        return inside

    def gather(self, output: Tensor) -> Tensor:
        """The model's outputs for all of them, combined."""
        assert self._level is not None
        outputs = gather_vmap(output, self._level, self._count)
        self.close()
        return outputs if self.combine is None else self.combine(outputs)

    def close(self) -> None:
        """Leave nothing open, also where the model's tail has raised."""
        if self._level is not None:
            self._level = None
            close_vmap()
