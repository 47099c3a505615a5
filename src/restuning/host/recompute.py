"""Activation checkpointing that runs a block again with the record it was first run with.

Where a task trains weights of the backbone, what ran was a block of a copy (`trained_copy.py`), and that
is what is run again.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from restuning._torch import CheckpointWrapper, wrapped_module
from restuning.host.call import active, current_call
from restuning.sites import Sites, has_past, leave_out_caches


class RecomputedBlock(CheckpointWrapper):
    """A block whose activations are dropped and computed again in the backward pass.

    It finds record and block through itself, so that a copy of the backbone recomputes its own.

    Args:
        block: A block of the backbone.
        slot: The host's, whose record of the first run is used for the second.

    Cost: one more forward of the block.
    """

    def __init__(self, block: nn.Module, slot: str) -> None:
        super().__init__(block)
        self.slot = slot

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block: its arguments, its output.

        Earlier tokens in a cache are read; where there are none, nothing is put into it. A second run
        would find there what the first has put.
        """
        block = wrapped_module(self)
        if torch.is_grad_enabled():
            if any(map(has_past, (*args, *kwargs.values()))):
                return block(*args, **kwargs)
            args, kwargs = leave_out_caches(args, kwargs)
        # The reentrant form would lose the gradients of tuners without a word.
        return checkpoint(
            block,
            *args,
            use_reentrant=False,
            context_fn=self.make_contexts,
            **kwargs,
        )

    def make_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """What surrounds the block's first run, and what its second: `checkpoint` asks for both."""
        call = current_call(self.slot)
        if call is None:
            # What ran without a task is run again without one, whatever is in use by then.
            return nullcontext(), active(self.slot, None)
        return nullcontext(), active(self.slot, call.copy_for_recompute())


def checkpoint_blocks(model: nn.Module, slot: str, sites: Sites | None) -> None:
    """Put every block into a checkpoint, or take out again those that this host put there.

    Args:
        model: The backbone.
        slot: The host's slot, whose record of the first run is used for the second.
        sites: Its sites; None takes the checkpoints out.
    """
    if sites is None:
        for path, module in list(model.named_modules(remove_duplicate=False)):
            # Others' stay: the user's own, and those of another host.
            if isinstance(module, RecomputedBlock) and module.slot == slot:
                _replace(model, path, wrapped_module(module))
        return
    for site in sites.pick("block").values():
        block = model.get_submodule(site.module)
        if not isinstance(block, CheckpointWrapper):
            _replace(model, site.module, RecomputedBlock(block, slot))


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
