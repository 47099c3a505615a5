"""What one step of training takes, found by running it on shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from restuning.forecast.ledger import Ledger, SavedTensors
from restuning.forecast.rates import Rates
from restuning.forecast.shapes import expand_example, shapes_only, strip_weights
from restuning.problems import Problem, find_problem

Loss = Callable[[Any], Tensor]

SCRATCH = 2 * 2**20
"""Bytes that each thread of the CPU's matrix library keeps for packed blocks of operands: 1.5 (width
192) to 2.5 MiB (width 384 and 768) with MKL, in `benchmarks/forecast.py` with one thread and two."""


@dataclass(frozen=True)
class Cost:
    """What operations compute and move.

    Attributes:
        flops: Of products, convolutions and attention.
        moved: Bytes read and written.
        calls: Operations.
    """

    flops: int
    moved: int
    calls: int

    def plus(self, other: Cost, times: int = 1) -> Cost:
        """This, and another so many times."""
        return Cost(
            self.flops + times * other.flops,
            self.moved + times * other.moved,
            self.calls + times * other.calls,
        )

    def minus(self, other: Cost) -> Cost:
        """What this has more than another."""
        return self.plus(other, -1)

    def seconds(self, rates: Rates) -> float:
        """Time at a machine's rates: products, traffic and calls one after the other."""
        return (
            self.flops / rates.flops_per_second
            + self.moved / rates.bytes_per_second
            + self.calls * rates.seconds_per_call
        )


@dataclass(frozen=True)
class StepForecast:
    """One step of training: forward, loss, backward, AdamW.

    Attributes:
        batch: Inputs of the step.
        weights_bytes: Parameters and buffers of backbone and task.
        trained_bytes: Of them, those that are trained.
        optimiser_bytes: AdamW's two moments.
        input_bytes: The batch itself.
        saved_bytes: What autograd saves for backward; shared storage once, weights left out.
        peak_bytes: Most memory of tensors at once above weights, moments and the batch.
        scratch_bytes: What the threads of a CPU's matrix library keep besides.
        cost: Of the step.
    """

    batch: int
    weights_bytes: int
    trained_bytes: int
    optimiser_bytes: int
    input_bytes: int
    saved_bytes: int
    peak_bytes: int
    scratch_bytes: int
    cost: Cost

    @property
    def above_bytes(self) -> int:
        """What a process grows by in the step: what `benchmarks/step.py` measures."""
        return self.peak_bytes + self.scratch_bytes

    @property
    def total_bytes(self) -> int:
        """Everything at the peak."""
        return self.weights_bytes + self.optimiser_bytes + self.input_bytes + self.above_bytes

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "above_bytes": self.above_bytes, "total_bytes": self.total_bytes}


def forecast_step(
    module: nn.Module,
    example: Any,
    batch: int,
    *,
    trained: Sequence[nn.Parameter] | None = None,
    loss: Loss | None = None,
    precision: str = "no",
    pieces: int = 1,
    device: str = "cpu",
) -> StepForecast:
    """Run one training step of any module on tensors that have shapes only.

    The module's own forward, autograd and torch's AdamW run; a `Ledger` follows every storage. So
    nothing is known here about methods, and nothing needs to be. With something to train the copy
    is in training mode, as in `fit`; else in eval mode.

    Args:
        module: What is trained: `Tuned`, `Cached`, a PEFT model, ... Left as it is; its weights
            may be on `meta`.
        example: One input with a batch axis of 1: a tensor, a tuple of positional or a mapping of
            keyword inputs.
        batch: Inputs of a step.
        trained: What the optimiser holds; None for all that require gradients.
        loss: Of the module's output; None for that of its task's problem, on `b c` logits.
        precision: "no", or "bf16" and "fp16" for autocast.
        pieces: Parts the batch is run in (gradient accumulation).
        device: Whose kernels are used; none such needs to be here.

    Cost: 0.1 to 2 s, whatever the size of the weights; no memory.
    """
    mode, ledger = shapes_only(), Ledger()
    parameters = [p for p in module.parameters() if p.requires_grad] if trained is None else trained
    # The copy has other parameters; names lead from one to the other.
    names = {id(p): n for n, p in module.named_parameters(remove_duplicate=False)}
    fake = strip_weights(module, mode, device)
    copies = dict(fake.named_parameters(remove_duplicate=False))
    own = [copies[names[id(p)]] for p in parameters]
    weights = [*fake.parameters(), *fake.buffers()]
    ledger.hold(weights)
    weights_bytes = ledger.live
    optimiser, state = _adamw(own, mode) if own else (None, [])
    ledger.hold(state)
    optimiser_bytes = ledger.live - weights_bytes
    # The largest piece decides the peak.
    size = -(-batch // pieces)
    inputs = expand_example(example, batch, mode, device)
    ledger.hold(_tensors(inputs))
    input_bytes = ledger.live - weights_bytes - optimiser_bytes
    if pieces > 1:
        inputs = _first(inputs, size)
    measure = loss or partial(_measure, find_problem(getattr(module, "task", None)))
    before = ledger.start()
    noted, saved_bytes = SavedTensors(weights), 0
    done = [Cost(0, 0, 0)]
    fake.train(optimiser is not None)
    with ledger, mode:
        for number in range(min(pieces, 2)):
            # Gradients of the first piece are there while the second runs; later ones are alike.
            with torch.no_grad() if optimiser is None else noted.hooks():
                with _autocast(precision, device):
                    output = call_module(fake, inputs)
                value = measure(output)
                del output
            if optimiser is not None:
                saved_bytes = noted.bytes() if number == 0 else saved_bytes
                value.backward()
            del value
            done.append(_cost(ledger))
    if optimiser is not None:
        # Outside the mode: AdamW counts its steps in real tensors.
        with ledger:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
    # Two pieces were run: the others cost what the second did.
    cost = _cost(ledger).plus(done[-1].minus(done[-2]), max(0, pieces - 2))
    return StepForecast(
        batch,
        weights_bytes,
        _bytes(own),
        optimiser_bytes,
        input_bytes,
        saved_bytes,
        ledger.peak - before,
        _scratch(ledger, device),
        cost,
    )


def _cost(ledger: Ledger) -> Cost:
    return Cost(ledger.flops, ledger.moved, ledger.calls)


def _scratch(ledger: Ledger, device: str) -> int:
    # A GPU's library has a workspace of its own, which is there before training starts.
    if torch.device(device).type != "cpu":
        return 0
    return torch.get_num_threads() * min(SCRATCH, ledger.operands)


def forecast_forward(
    module: nn.Module, example: Any, batch: int, *, device: str = "cpu", precision: str = "no"
) -> StepForecast:
    """The same of one forward without gradients, which steps are compared with."""
    return forecast_step(
        module,
        example,
        batch,
        trained=(),
        loss=lambda output: _tensors(output)[0].sum(),
        device=device,
        precision=precision,
    )


def split_inputs(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """A tensor, a tuple of positional or a mapping of keyword inputs as both kinds."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def call_module(module: nn.Module, inputs: Any) -> Any:
    """A module on what `positional` takes."""
    args, kwargs = split_inputs(inputs)
    return module(*args, **kwargs)


def _measure(problem: Problem, output: Any) -> Tensor:
    logits = output if isinstance(output, Tensor) else _tensors(output)[0]
    logits = logits.float()
    # Tokens count as inputs do; of places only the problem knows.
    logits = logits.flatten(0, -2) if logits.ndim < 4 else logits
    return problem.loss(logits, problem.stand_in(logits)) / len(logits)


def _adamw(parameters: Sequence[nn.Parameter], mode: Any) -> tuple[torch.optim.AdamW, list[Tensor]]:
    """An AdamW that has made a step already, and its moments."""
    optimiser = torch.optim.AdamW(parameters, lr=1e-3)
    moments: list[Tensor] = []
    for parameter in parameters:
        with mode:
            first, second = torch.empty_like(parameter), torch.empty_like(parameter)
        # As after its first step: a fresh AdamW would make its moments inside what is measured.
        optimiser.state[parameter] = {
            "step": torch.tensor(1.0),
            "exp_avg": first.detach(),
            "exp_avg_sq": second.detach(),
        }
        moments += [first, second]
    return optimiser, moments


def _autocast(precision: str, device: str) -> AbstractContextManager:
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in kinds:
        return nullcontext()
    return torch.autocast(torch.device(device).type, kinds[precision])


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


def _first(value: Any, count: int) -> Any:
    if isinstance(value, Tensor):
        return value[:count]
    if isinstance(value, Mapping):
        return {k: _first(v, count) for k, v in value.items()}
    return tuple(_first(v, count) for v in value) if isinstance(value, tuple) else value


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
