"""Which repeated blocks are layers, where the stacks of an encoder-decoder begin, what a hierarchy is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass
