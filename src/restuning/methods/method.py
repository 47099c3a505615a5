"""What a row of the table is, and what rows share."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import nn

from restuning._errors import TunerShapeError
from restuning.sites import Site
from restuning.task import Task
from restuning.tuners import DropPath, FilmAdapter, ResAdapter, Tuner

PAPER = "Jiang et al. 2023, arXiv 2310.19859"
RANK = 10
"""Bottleneck, prefix and prompt length in every layer (paper, by its parameter counts)."""

Options = dict[str, Any]
COMMON = frozenset({"rank", "scale", "query", "layers", "drop_path", "pool", "residual"})
"""Options that every method may be given, because several are compared under one setting; see `build`."""
START = ("zero",)
"""Of methods whose tuners may start as no change or at random."""
OVER_TIME = frozenset({"film", "time_scale", "kernel", "form"})
"""Options on diffusion models; see `build`."""


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table.

    Attributes:
        build: `(host, head, options) -> Task`.
        what: One line.
        source: Where the defaults come from.
        takes: Options it knows beside `COMMON`.
        unused: Those of `COMMON` that change nothing of it.
        inside: Whether it runs inside the backbone, which then must be a host.
        takes_head: Whether a head that is there already can be its start.
        solved: Whether it is solved in closed form and takes no step: epochs and rates mean nothing to it.
    """

    build: Callable[..., Task]
    what: str
    source: str
    takes: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    inside: bool = True
    takes_head: bool = True
    solved: bool = False


# The authors' code starts tuners at random (Xavier). On a pretrained ViT-Ti that destroys the features:
# on caltech101, six epochs at 5e-3 end at 1 % on validation, and at 75 % from no change
# (`recipes/paper/start.py`). So named methods start as no change; `zero=False` is the authors' start.
def make_adapter(site: Site, options: Options) -> Tuner:
    """A Res-Adapter of the site's width."""
    return ResAdapter(site.dim, rank=options.get("rank", RANK), zero=options.get("zero", True))


def make_film_adapter(site: Site, options: Options) -> Tuner:
    """A Res-Adapter that knows the time step of a diffusion model."""
    return FilmAdapter(
        site.dim,
        rank=options.get("rank", RANK),
        zero=options.get("zero", True),
        time_scale=options.get("time_scale", 1.0),
    )


def add_drop_path(tuner: Tuner, options: Options) -> Tuner:
    """Wrap a tuner so that it is dropped at random, where the options ask for it."""
    return DropPath(tuner, options["drop_path"]) if options.get("drop_path") else tuner


STD = 0.02
"""Standard deviation of a new head's weights, as timm draws those of its ViTs."""


def make_head(dim: int, classes: int | None, given: nn.Linear | None) -> nn.Linear | None:
    """Make the head of a task: a copy of one that is given, else a new one, else None.

    Args:
        dim: Width of the feature.
        classes: Number of classes; None for no head, or for as many as the given one has.
        given: A head that is there already.

    Raises:
        TunerShapeError: The head that is given reads another width, or has other classes.
    """
    if given is not None:
        if given.in_features != dim or classes not in (None, given.out_features):
            raise TunerShapeError(
                "the head does not fit",
                found=f"{given.in_features} to {given.out_features}; the feature is {dim} wide "
                f"and {classes or 'any number of'} classes are wanted",
                fix="give a head that was made for this backbone's feature and these classes",
            )
        # A copy: the tower that it came from keeps its own. It may come frozen.
        return deepcopy(given).requires_grad_(True)
    if not classes:
        return None
    return new_head(dim, classes)


def new_head(dim: int, classes: int) -> nn.Linear:
    """Make a linear head: every method and every rival starts from the same kind."""
    head = nn.Linear(dim, classes)
    nn.init.trunc_normal_(head.weight, std=STD)
    nn.init.zeros_(head.bias)
    return head
