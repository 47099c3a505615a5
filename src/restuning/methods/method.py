"""What a row of the table is, and what rows share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from restuning.sites import Site
from restuning.task import Task
from restuning.tuners import DropPath, FilmAdapter, ResAdapter, Tuner

PAPER = "Jiang et al. 2023, arXiv 2310.19859"
RANK = 10
"""Bottleneck, prefix and prompt length in every layer (paper, by its parameter counts)."""

Options = dict[str, Any]
COMMON = frozenset({"rank", "scale", "zero", "query", "layers", "drop_path", "pool", "residual"})
"""Options of every method; see `build`."""


@dataclass(frozen=True, slots=True)
class Method:
    """One row of the table.

    Attributes:
        build: `(host, head, options) -> Task`.
        what: One line.
        source: Where the defaults come from.
        takes: Options it knows beside `COMMON`.
        inside: Whether it runs inside the backbone, which then must be a host.
    """

    build: Callable[..., Task]
    what: str
    source: str
    takes: tuple[str, ...] = ()
    inside: bool = True


# The authors' code starts tuners at random (Xavier). On a pretrained ViT-Ti that destroys the features:
# on caltech101, six epochs at 5e-3 end at 1 % on validation, and at 75 % from no change
# (`recipes/paper/start.py`). So named methods start as no change; `zero=False` is the authors' start.
def adapter(site: Site, options: Options) -> Tuner:
    """A Res-Adapter of the site's width."""
    return ResAdapter(site.dim, rank=options.get("rank", RANK), zero=options.get("zero", True))


def film_adapter(site: Site, options: Options) -> Tuner:
    """One that knows the time step of a diffusion model."""
    return FilmAdapter(
        site.dim, rank=options.get("rank", RANK), zero=options.get("zero", True),
        time_scale=options.get("time_scale", 1.0),
    )  # fmt: skip


def dropped(tuner: Tuner, options: Options) -> Tuner:
    """The tuner, dropped at random where the options ask for it."""
    return DropPath(tuner, options["drop_path"]) if options.get("drop_path") else tuner
