"""Activation checkpointing that runs a block again with the record it was first run with."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    checkpoint_wrapper,
)

from restuning.record import current, in_use
from restuning.sites import Sites


def checkpoint_blocks(model: nn.Module, sites: Sites, slot: str, on: bool) -> None:
    """Put every block into a checkpoint, or take it out again.

    Args:
        model: The backbone.
        sites: Its sites.
        slot: The host's slot, whose record of the first run is used for the second.
        on: Put in, or take out.
    """

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        call = current(slot)
        again = None if call is None else call.again()
        return nullcontext(), in_use(slot, again)

    for site in sites.pick("block").values():
        parent_path, _, name = site.module.rpartition(".")
        parent = model.get_submodule(parent_path)
        block = getattr(parent, name)
        if on and not isinstance(block, CheckpointWrapper):
            # The reentrant form would lose the gradients of tuners without a word.
            wrapped = checkpoint_wrapper(block, CheckpointImpl.NO_REENTRANT, context_fn=contexts)
            setattr(parent, name, wrapped)
        elif not on and isinstance(block, CheckpointWrapper):
            setattr(parent, name, block._checkpoint_wrapped_module)
