"""A tuner is a small module `x -> delta` that runs beside a frozen operation: `OP(x) + tuner(x)`.

Imports torch and `_errors` only: a tuner knows a width, never a backbone, a path, a layer number or
a device. What it must borrow from the frozen layer (Res-Prefix and Res-Prompt need W_q, W_k, W_v
and W_o) is lent for one forward as a `FrozenAttention`.

Letters in shapes: `b` batch, `n` tokens, `d` width, `h` heads, `r` rank or length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from restuning._errors import MALFORMED, TunerShapeError
from restuning._registry import Registry, cannot_build, construct, read_arguments
from restuning.tuners.view import FrozenAttention

Reads = Literal["stream", "output"]


def trait(compute: Callable[[Any], Any]) -> Any:
    """A trait of a tuner that is worked out when it is asked for, in place of a plain value.

    It is a property. The type says Any because type checkers allow no property where a base class
    has a variable, though both are read alike.
    """
    return property(compute)


class Tuner(nn.Module, ABC):
    """`x -> delta`, a tensor of x's shape that is added to an operation's output.

    Subclasses are final, keep every constructor argument as an attribute of the same name (that
    is their `spec`), and put a `@tuner("kind")` above the class. Traits are class attributes; one that
    depends on the arguments is a method under `@trait`.

    Shape:
        x: `(*b, n, d) -> (*b, n, d)`.
    """

    kind: ClassVar[str] = ""
    #: Whether a token's delta depends on other tokens of x (then a bypass needs all tokens).
    mixes_tokens: bool = False
    #: Whether `forward` must be given the frozen attention of the layer.
    needs_view: bool = False
    #: Whether a map is given as `b h w d`; all other tuners see its grid as tokens, `b n d`.
    needs_grid: bool = False
    #: Whether rows of a batch are told apart: each must then be one input, not a window of one.
    tells_rows: bool = False
    #: What is fed in: the residual stream, or OP's output.
    reads: Reads = "stream"
    #: Tokens appended to the stream at the stem (VPT-shallow only).
    appends: int = 0
    dim: int

    @property
    def dim_out(self) -> int:
        """Width of the delta: that of the stream, or what a linear map returns."""
        return self.dim

    @property
    def looks_ahead(self) -> bool:
        """Whether a token's delta depends on later tokens: then it cannot decode with a cache."""
        return self.mixes_tokens

    @abstractmethod
    def forward(self, x: Tensor, view: FrozenAttention | None = None) -> Tensor:
        """Compute the delta; see the class."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draw the start values, also after `to_empty` on a module built on `meta`."""

    def scaled(self, x: Tensor, view: FrozenAttention | None, scale: Tensor) -> Tensor:
        """`scale * tuner(x)`; a tuner ending in a linear map folds the scale into its weight.

        Folding keeps the `b n d` product out of the graph: without it the gradient of the scale
        would hold one stream-sized tensor per tuner.
        """
        return self(x, view) * scale

    def added(
        self, y: Tensor, x: Tensor, view: FrozenAttention | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """`y + scale * tuner(x)`, which is what runs at a site.

        A tuner that ends in a linear map overrides it with one product that starts from y: the
        delta itself, one more pass over the stream, is then never made.

        Args:
            y: OP's output, of x's shape.
            x: What the tuner reads.
            view: The layer's frozen attention, where needed.
            scale: One number a channel, or None for 1.

        Raises:
            TunerShapeError: The delta has another shape than y.
        """
        delta = self(x, view) if scale is None else self.scaled(x, view, scale)
        if delta.shape != y.shape:
            if delta.numel() != y.numel() or delta.shape[-1] != y.shape[-1]:
                raise TunerShapeError(
                    "a tuner changed the shape of the stream",
                    where=self.kind,
                    found=f"returned {tuple(delta.shape)}, the stream is {tuple(y.shape)}",
                    fix="a tuner must keep the shape it is given",
                )
            # The same numbers: a tuner may return a grid as tokens.
            delta = delta.reshape(y.shape)
        return y + delta

    def spec(self) -> dict[str, Any]:
        """Everything needed to build this tuner again, as JSON."""
        if not self.kind:
            # Imported by hand: the table that would have named it was not asked for yet.
            kinds()
        return {"kind": self.kind, **read_arguments(self, to_json)}

    def extra_repr(self) -> str:
        """The constructor's arguments."""
        return ", ".join(
            f"{k}={v!r}" for k, v in self.spec().items() if k != "kind" and not isinstance(v, dict)
        )


_REGISTRY: Registry[Tuner] = Registry("tuner", "restuning.tuners")

tuner = _REGISTRY.register
"""Enter a tuner in the closed table that specs are read from: `@tuner("kind")` above the class."""


def kinds() -> dict[str, type[Tuner]]:
    """The table of tuners: ours, and those that installed packages give by entry point.

    A package adds one with `[project.entry-points."restuning.tuners"]`, `kind = "module:Class"`.
    One that does not import is left out, and named when its kind is asked for.
    """
    return _REGISTRY.kinds()


def from_spec(spec: Mapping[str, Any]) -> Tuner:
    """Build a tuner from its `spec`.

    Raises:
        UnknownNameError: The kind is in no table.
        FormatError: The arguments do not fit the kind.
    """
    try:
        cls = _REGISTRY.find(spec)
        arguments = {k: from_json(v) for k, v in spec.items() if k != "kind"}
    except MALFORMED as error:
        # Tuners in tuners, deeper than Python calls.
        raise cannot_build("tuner", type(spec).__name__, error) from None
    return construct(cls, arguments, "tuner")


def to_json(value: Any) -> Any:
    """A constructor's argument as JSON: tuners become their specs."""
    if isinstance(value, Tuner):
        return value.spec()
    if isinstance(value, (list, tuple, nn.ModuleList)):
        return [to_json(item) for item in value]
    return value


def from_json(value: Any) -> Any:
    """An argument from its JSON: specs become tuners."""
    # A tuner inside a tuner (`Scaled`, `Sum`).
    if isinstance(value, Mapping) and "kind" in value:
        return from_spec(value)
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return value
