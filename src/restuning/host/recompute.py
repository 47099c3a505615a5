"""Activation checkpointing that runs a block again with the record it was first run with.

Where a task trains copies of the backbone's weights, the block is run again with those: by then the
forward that had put them in place is over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from restuning._torch import CheckpointWrapper, substitute_weights, wrapped_module
from restuning.host.call import Call, active, current_call
from restuning.sites import Sites


class RecomputedBlock(CheckpointWrapper):
    """A block whose activations are dropped and computed again in the backward pass.

    It finds record, block and weights through itself, so that a copy of the backbone recomputes its own.

    Args:
        block: A block of the backbone.
        slot: The host's, whose record of the first run is used for the second.
        names: Names of its parameters inside it, to their names in the backbone.

    Cost: one more forward of the block.
    """

    def __init__(self, block: nn.Module, slot: str, names: Mapping[str, str]) -> None:
        super().__init__(block)
        self.slot, self.names = slot, dict(names)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block: its arguments, its output."""
        # The reentrant form would lose the gradients of tuners without a word.
        return checkpoint(
            wrapped_module(self),
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
        block = wrapped_module(self)
        return nullcontext(), _restore_record(
            self.slot, call.copy_for_recompute(), block, self.names
        )


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
    # A weight that several modules share is trained under its first name.
    first = {id(p): n for n, p in model.named_parameters()}
    for site in sites.pick("block").values():
        block = model.get_submodule(site.module)
        if not isinstance(block, CheckpointWrapper):
            # A block's own second name for a shared weight must lead to the first one.
            names = {n: first[id(p)] for n, p in block.named_parameters(remove_duplicate=False)}
            _replace(model, site.module, RecomputedBlock(block, slot, names))


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


@contextmanager
def _restore_record(
    slot: str, call: Call, block: nn.Module, names: Mapping[str, str]
) -> Iterator[None]:
    """The record of the first run, and the weights that it ran with."""
    # Only this block's: the rest of the backbone is not run again.
    own = {n: call.weights[whole] for n, whole in names.items() if whole in call.weights}
    with active(slot, call), substitute_weights(block, own):
        yield
