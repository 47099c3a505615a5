"""Find sites: run one forward of a backbone in which every module is heard, and prove what was seen.

It stands here and not in `sites` because it registers hooks, if only for that one forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import NoSitesError
from restuning.host.randomness import refuse_randomness
from restuning.host.weights import is_offloaded
from restuning.sites import (
    Declaration,
    Finder,
    Readout,
    Sites,
    StageFinder,
    vary_example,
)


def find_sites(
    model: nn.Module, *example: Any, declared: Declaration | None = None, **kwargs: Any
) -> tuple[Sites, Readout]:
    """Find the sites and the readout of a backbone by structure, proved by one forward.

    A second one must answer the same; it looks for stages where the first has shown no residual sum.

    Args:
        model: The backbone, in eval mode.
        example: One input as the model takes it, batch 1 is enough.
        declared: What structure does not show, as its user says it (`Sites.declare`).
        kwargs: The same by keyword.

    Raises:
        NoSitesError: None found, or what is declared is not so.
        ProjectionsError: Declared projections do not give what the layer returned.
        BackboneError: The backbone answers at random.
    """
    # Stages are a last resort: a declaration that does not hold is the user's to mend.
    finder, stages = Finder(model, declared), StageFinder(model)
    finder.readout.sounds = "input_values" in kwargs
    first = _run_and_listen(model, finder, example, kwargs)
    try:
        found = finder.conclude(first)
    except NoSitesError:
        if declared is not None:
            raise
        again = _run_and_listen(model, stages, example, kwargs)
        if not _lacks_weights(model):
            refuse_randomness(model, first, again)
        if (found := stages.conclude(again)) is None:
            raise
        return found
    _refuse_turned(finder.readout.last, kwargs)
    if not _lacks_weights(model):
        with torch.no_grad():
            again = model(*map(vary_example, example), **kwargs)
        refuse_randomness(model, first, again)
    return found


def _refuse_turned(stream: Tensor | None, kwargs: Mapping[str, Any]) -> None:
    """Refuse streams of texts whose first axis is the position (XLNet): all else reads them as inputs.

    Raises:
        NoSitesError: They are so.
    """
    ids = kwargs.get("input_ids")
    if not isinstance(ids, Tensor) or stream is None or ids.dim() != 2 or stream.dim() != 3:
        return
    if ids.shape[0] != ids.shape[1] and stream.shape[:2] == ids.mT.shape:
        raise NoSitesError(
            "streams with positions before inputs cannot be tuned",
            found=f"a stream of {tuple(stream.shape)} for texts of {tuple(ids.shape)}",
            fix="use a model whose blocks give (inputs, positions, width)",
        )


def _lacks_weights(model: nn.Module) -> bool:
    """Whether products are noise (a forecast), and two answers to one input say nothing."""
    return any(p.is_meta for p in model.parameters()) and not is_offloaded(model)


def _run_and_listen(
    model: nn.Module, finder: Finder | StageFinder, example: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Run one forward in which a finder hears every module; returns the output."""
    handles = []
    for path, module in model.named_modules():
        # `path` is bound as a default: a plain closure would see the last path of the loop.
        def enter(m: nn.Module, a: tuple, k: dict, path: str = path) -> None:
            finder.enter(path, m, a, k)

        def leave(m: nn.Module, a: tuple, out: Any, path: str = path) -> None:
            finder.leave(path, out)

        handles += [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave),
        ]
    try:
        with torch.no_grad():
            return model(*map(vary_example, example), **kwargs)
    finally:
        for handle in handles:
            handle.remove()
