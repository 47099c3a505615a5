"""Names of what a backbone takes, as data sets and collators of transformers have them."""

from __future__ import annotations

import inspect
from functools import cache
from inspect import Parameter, Signature
from typing import Any

from restuning.host import Engine, Extractor

IMAGES, LABELS = "pixel_values", "labels"
"""What transformers calls a batch of images, and the targets of a batch."""

UNNAMED = "inputs"
"""The input of a backbone whose forward names none."""

ITEMS = "num_items_in_batch"
"""The number of targets of a whole step, which Trainer hands to models that ask for it."""


def own_names(host: Extractor) -> tuple[str, ...]:
    """Names of the inputs in the backbone's own forward, in its order."""
    if isinstance(host, Engine):
        return host.inputs
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    try:
        parameters = inspect.signature(host.model.forward).parameters.values()
    except (TypeError, ValueError):
        # Of a scripted forward nothing is told.
        return ()
    # Targets are ours: a backbone that takes them as well would make a loss of its own.
    return tuple(p.name for p in parameters if p.kind in named and p.name != LABELS)


def input_names(host: Extractor) -> tuple[str, ...]:
    """Names that inputs are given by: the backbone's own, with images under `pixel_values`."""
    own = own_names(host)
    if host.images and IMAGES not in own:
        # timm and torchvision say `x`, which no data set calls its images.
        return (IMAGES, *own[1:])
    return own or (UNNAMED,)


@cache
def with_inputs(base: type, names: tuple[str, ...]) -> type:
    """A subclass whose `forward` says by name what it takes, and else is the same.

    Trainer drops every column of a data set that the signature of `forward` does not name, and which names
    these are depends on the backbone.

    Args:
        base: With a `forward` of keywords.
        names: Of inputs.
    """

    def forward(self: Any, **inputs: Any) -> Any:
        return base.forward(self, **inputs)

    # Once each: a raw column may have the name of an input.
    keywords = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=None)
        for name in dict.fromkeys((*names, LABELS, ITEMS))
    ]
    itself = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = Signature([itself, *keywords])  # type: ignore[attr-defined]
    forward.__doc__ = base.forward.__doc__
    told = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), {**told, "__doc__": base.__doc__, "forward": forward})


def blank(base: type, names: tuple[str, ...]) -> Any:
    """An object of `with_inputs` without contents, which unpickling fills: pickle finds no such class by its name."""
    made: Any = with_inputs(base, names)
    return made.__new__(made)
