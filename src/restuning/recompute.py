"""Activation checkpointing that runs a block again with the record it was first run with.

Where a task trains copies of the backbone's weights, the block is run again with those: by then the
forward that had put them in place is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    CheckpointWrapper,
    checkpoint_wrapper,
)

from restuning.record import Call, current, in_use
from restuning.sites import Sites

Contexts = Callable[[], tuple[AbstractContextManager, AbstractContextManager]]


def checkpoint_blocks(model: nn.Module, sites: Sites, slot: str, on: bool) -> None:
    """Put every block into a checkpoint, or take it out again.

    Args:
        model: The backbone.
        sites: Its sites.
        slot: The host's slot, whose record of the first run is used for the second.
        on: Put in, or take out.
    """
    # A weight that several modules share is trained under its first name.
    first = {id(p): n for n, p in model.named_parameters()}

    def contexts_of(block: nn.Module) -> Contexts:
        names = {n: first[id(p)] for n, p in block.named_parameters(remove_duplicate=False)}

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            call = current(slot)
            if call is None:
                return nullcontext(), in_use(slot, None)
            return nullcontext(), _as_before(slot, call.again(), block, names)

        return contexts

    for site in sites.pick("block").values():
        parent_path, _, name = site.module.rpartition(".")
        parent = model.get_submodule(parent_path)
        block = getattr(parent, name)
        if on and not isinstance(block, CheckpointWrapper):
            # The reentrant form would lose the gradients of tuners without a word.
            wrapped = checkpoint_wrapper(
                block, CheckpointImpl.NO_REENTRANT, context_fn=contexts_of(block)
            )
            setattr(parent, name, wrapped)
        elif not on and isinstance(block, CheckpointWrapper):
            setattr(parent, name, block._checkpoint_wrapped_module)


@contextmanager
def _as_before(slot: str, call: Call, block: nn.Module, names: Mapping[str, str]) -> Iterator[None]:
    """The record of the first run, and the weights that it ran with."""
    own = {n: call.weights[whole] for n, whole in names.items() if whole in call.weights}
    with in_use(slot, call), torch.nn.utils.stateless._reparametrize_module(block, own):
        yield
