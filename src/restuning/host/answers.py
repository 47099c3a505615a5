"""What a backbone answers to a fixed input: equal weights may be computed with in another way.

Another number of heads, another activation, another base of rotary positions leave every tensor as it
is. Their names differ from library to library and from version to version, so they are not compared by
what they are called but by what they do: the last stream and the feature of one input that everybody
makes alike, each as its size and eight sums with fixed signs. Two machines agree to rounding, which is
what `TOLERANCE` allows for; what changes less than that is not seen.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from restuning._torch import tree_leaves, tree_map
from restuning.sites import Features, Needs

SUMS = 8
TOKENS = 4
"""Of a text that is asked; rotary positions and masks differ from the second on."""
TOLERANCE = {"exact": 2e-4, "matmul": 1e-2, "half": 1e-1}
"""Largest difference relative to an answer's size: on CPUs in fp32 (other kernels; deep untrained
networks double rounding layer by layer), with an accelerator on either side (TF32 keeps 10 bits), and
where either computes in half precision."""


class Answering(Protocol):
    """What is asked: a host."""

    def features(self, *args: Any, keep: Needs, **kwargs: Any) -> Features:
        """Taps of one forward."""
        ...


class Question:
    """A fixed input of the form that a host was shown.

    Numbers are drawn by arithmetic that no library changes, and token numbers are 0 and 1, which every
    vocabulary has. What is one number throughout (masks of ones, time steps) stays, as does what is no
    tensor.

    Args:
        args: The example's positional arguments.
        kwargs: Those by keyword.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        rows = {t.shape[0] for t in tree_leaves((args, kwargs)) if _is_batched(t)}
        ids = [t for t in tree_leaves((args, kwargs)) if _is_tokens(t)]
        lengths = {t.shape[1] for t in ids}
        self._batch = rows.pop() if len(rows) == 1 else None
        self._length = lengths.pop() if len(lengths) == 1 else None
        self.args, self.kwargs = tree_map(self._shape_of, (tuple(args), dict(kwargs)))

    def _shape_of(self, value: Any) -> Any:
        """What is needed to make a tensor again: the example itself is not held."""
        if not isinstance(value, Tensor):
            return value
        shape = list(value.shape)
        if shape and shape[0] == self._batch:
            shape[0] = 1
        # Texts of any length are asked as one of a few tokens, with the mask that belongs to them.
        if _is_tokens(value) and shape[1] == self._length:
            shape[1] = min(TOKENS, shape[1])
        flat = value.detach().reshape(-1)
        constant = flat[0].item() if len(flat) and bool((flat == flat[0]).all()) else None
        if value.is_floating_point() and len(shape) > 1:
            constant = None
        return _Shape(tuple(shape), value.dtype, constant)

    def on(self, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The input itself."""
        return tree_map(
            lambda each: each.make(device) if isinstance(each, _Shape) else each,
            (self.args, self.kwargs),
        )

    def digest(self) -> str:
        """Tells two questions apart, 16 hexadecimal digits."""
        # Of what is no tensor only plain values: the text of an object names its place in memory.
        plain = (_Shape, str, int, float, bool, type(None))
        parts = [
            repr(each) for each in tree_leaves((self.args, self.kwargs)) if isinstance(each, plain)
        ]
        return hashlib.sha256("|".join([*sorted(self.kwargs), *parts]).encode()).hexdigest()[:16]


class _Shape:
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, constant: float | None) -> None:
        self.shape, self.dtype, self.constant = shape, dtype, constant

    def __repr__(self) -> str:
        # Half precision asks the same as fp32: answers are then compared more loosely.
        kind = "float" if self.dtype.is_floating_point else str(self.dtype)
        return f"{kind} {list(self.shape)} {self.constant}"

    def make(self, device: torch.device) -> Tensor:
        if self.constant is not None:
            return torch.full(self.shape, self.constant, dtype=self.dtype, device=device)
        numbers = torch.arange(math.prod(self.shape)).mul(7919).add(104_729).remainder(1009)
        # Of variance one, without a pattern that matters; tokens by the last bit but one.
        if self.dtype.is_floating_point:
            values = (numbers - 504).to(torch.float32) / 291
        else:
            values = numbers.bitwise_right_shift(1).bitwise_and(1)
        return values.reshape(self.shape).to(device=device, dtype=self.dtype)


def ask(
    host: Answering, question: Question, last: str, device: torch.device
) -> dict[str, Any] | None:
    """What a host answers, for a task file; None where it does not answer such an input.

    Args:
        host: In eval mode.
        question: Of the form it was shown.
        last: Its last tap.
        device: Where it takes its input.

    Cost: one forward of one input.
    """
    args, kwargs = question.on(device)
    try:
        with torch.no_grad(), _in_full(device), _eagerly():
            taps = host.features(*args, keep=Needs((last,)), **kwargs)
            stream = taps[last]
            feature = taps.readout(stream)
    # Whatever a model raises that was not made for such an input; then its weights alone tell it.
    except Exception:  # noqa: BLE001
        return None
    values = [_measure(each) for each in (stream, feature)]
    if not all(math.isfinite(number) for row in values for number in row):
        return None
    return {
        "question": question.digest(),
        "device": device.type,
        "dtype": str(stream.dtype).removeprefix("torch."),
        "stream": values[0],
        "feature": values[1],
    }


def compare_answers(
    theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> tuple[float, float] | None:
    """How far two answers lie apart, relative to their size, and how far they may.

    Args:
        theirs: Of a task file.
        ours: Of the host that is here.

    Returns:
        None where they answer different questions.

    Raises:
        KeyError, TypeError, ValueError: The file's are malformed.
    """
    if theirs["question"] != ours["question"]:
        return None
    kind = "exact"
    if {theirs["device"], ours["device"]} != {"cpu"}:
        kind = "matmul"
    if {theirs["dtype"], ours["dtype"]} != {"float32"}:
        kind = "half"
    apart = 0.0
    for name in ("stream", "feature"):
        size = max(abs(theirs[name][0]), abs(ours[name][0])) or 1.0
        apart = max(
            apart, *(abs(a - b) / size for a, b in zip(theirs[name], ours[name], strict=True))
        )
    return apart, TOLERANCE[kind]


def _measure(value: Tensor) -> list[float]:
    """Root mean square, and sums with fixed signs over the square root of their number."""
    flat = value.detach().float().cpu().reshape(-1)
    place = torch.arange(len(flat))
    numbers = [float(flat.square().mean().sqrt())]
    for k in range(SUMS):
        signs = (place * (2 * k + 40_503)).bitwise_right_shift(4).bitwise_and(1) * 2 - 1
        numbers.append(float((flat * signs).sum() / math.sqrt(len(flat))))
    # As many digits as rounding leaves.
    return [float(f"{number:.6g}") for number in numbers]


def _is_batched(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 1


def _is_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


def _in_full(device: torch.device) -> Any:
    """Without a caller's autocast."""
    return torch.autocast(device.type, enabled=False)


def _eagerly() -> Any:
    """Without compiling anything for this one input."""
    # Where nothing was compiled, asking for it would import the compiler, which takes seconds.
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
