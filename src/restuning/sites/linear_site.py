"""A linear site is a linear map or convolution inside a block, where `y = W x` may become `y = W x + tuner(x)`.

Plain data, as a `Site` is; `find_linear.py` finds them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from restuning._errors import NoSitesError

Role = Literal["q", "k", "v", "kv", "qkv", "o", "up", "gate", "down", "linear", "conv", "grouped"]
ROLES: tuple[Role, ...] = (
    "q",
    "k",
    "v",
    "kv",
    "qkv",
    "o",
    "up",
    "gate",
    "down",
    "linear",
    "conv",
    "grouped",
)
"""What a map is for. "qkv" and "kv" are one map that makes several, "linear" is any other linear map,
"conv" a convolution and "grouped" one of several groups of channels."""

TARGETS = ("all", *ROLES)
"""What `LinearSites.pick` knows."""


@dataclass(frozen=True, slots=True)
class LinearSite:
    """One linear map or convolution to tune.

    Attributes:
        name: `q.3`, what files store: role and layer, counted on (`conv.3.2`) where a layer has several.
        role: What it is for, see `ROLES`.
        layer: Layer number, 1 to L.
        module: Path of the map.
        dim_in: Channels that it reads.
        dim: Channels that a tuner here adds to.
        op: The operation that it is a part of: mha, cross, ffn; "" where that is not known.
        start: The first of those channels in what the map returns; more than 0 in a fused map only.
        part: Whether these are a part of its channels (one of three in a fused qkv).
        kernel, stride, padding, groups: Of a convolution; an empty kernel for a linear map.
        per_row: Whether the first axis is the batch, so that rows can be told apart.
        proof: "product": one row of what it returned is W x + b with its own weight; "shape": only the
            shapes fit (a packed weight, none at all, a convolution, or a class that does more).
        evidence: What its role was told by: "projections", "widths" or "name"; "" for none.
    """

    name: str
    role: Role
    layer: int
    module: str
    dim_in: int
    dim: int
    op: str = ""
    start: int = 0
    part: bool = False
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] | str = ()
    groups: int = 1
    per_row: bool = True
    proof: Literal["product", "shape"] = "shape"
    evidence: str = ""

    @property
    def kind(self) -> str:
        """Whether it is a linear map ("linear") or a convolution ("conv")."""
        return "conv" if self.kernel else "linear"

    @property
    def channels(self) -> str:
        """Which channels of the map a tuner adds to, in words."""
        return f"{self.start}:{self.start + self.dim} of " if self.part else ""


class LinearSites(Mapping[str, LinearSite]):
    """The linear sites of one backbone, by name, in the order of the forward."""

    def __init__(self, sites: Iterable[LinearSite] = ()) -> None:
        self._sites = {site.name: site for site in sites}

    def __getitem__(self, name: str) -> LinearSite:
        """The site of a name; KeyError for none."""
        return self._sites[name]

    def __contains__(self, name: object) -> bool:
        """Whether a site of this name is there."""
        return name in self._sites

    def __iter__(self) -> Iterator[str]:
        """Names in the order of the forward."""
        return iter(self._sites)

    def __len__(self) -> int:
        """Number of sites."""
        return len(self._sites)

    def pick(self, *targets: str, layers: slice | Iterable[int] = slice(None)) -> LinearSites:
        """The sites of some roles and layers.

        Args:
            targets: Roles. "qkv" is the fused map, and where a layer has none its q, k and v; "q", "k" and
                "v" are parts of a fused map, or maps of their own; "all" is every linear map, each once
                and whole, without convolutions. None is all sites.
            layers: As in `Sites.pick`.

        Raises:
            NoSitesError: Nothing fits, or one of the roles is nowhere.
        """
        numbers = pick_layers(layers, max((s.layer for s in self.values()), default=0))
        here = [s for s in self.values() if s.layer in numbers]
        fused = {(s.layer, s.op) for s in here if s.role in ("qkv", "kv")}

        def fits(site: LinearSite, target: str) -> bool:
            if target == "all":
                return site.kind == "linear" and not site.part
            if target == "qkv":
                return not site.part and site.role in ("q", "k", "v", "kv", "qkv")
            return site.role == target

        missing = [t for t in targets if not any(fits(s, t) for s in here)]
        picked = [s for s in here if not targets or any(fits(s, t) for t in targets)]
        if missing or not picked:
            roles = Counter(s.role for s in here)
            parts = " (q, k and v are parts of a fused map)" if fused and "q" in roles else ""
            raise NoSitesError(
                "no linear map fits the selection",
                where=f"targets={'+'.join(missing or targets) or 'any'}, layers={sorted(numbers)}",
                found=f"here are {', '.join(f'{n} {role}' for role, n in roles.items()) or 'none'}{parts}",
                fix=f"choose among {', '.join(roles)} and all; `restuning sites NAME --linear` lists them"
                if roles
                else "use res-tuning, whose tuners stand beside whole operations",
            )
        return LinearSites(picked)

    def rows(self) -> list[dict[str, Any]]:
        """One row a site, as `restuning sites --linear` prints them."""
        return [
            {
                "name": s.name,
                "map": f"{s.dim_in} to {s.dim}",
                "adds": f"output {s.channels}{s.module}",
                "proof": s.proof,
                "role by": s.evidence,
            }
            for s in self.values()
        ]


def pick_layers(layers: slice | Iterable[int], count: int) -> set[int]:
    """Numbers of layers: of a slice over all of them counted from 0, or as they are given.

    Args:
        layers: What is wanted.
        count: How many there are.
    """
    return set(range(1, count + 1)[layers]) if isinstance(layers, slice) else set(layers)
