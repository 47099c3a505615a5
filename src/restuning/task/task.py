"""A task is everything one downstream problem owns; its `state_dict()` is its file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from restuning._errors import MALFORMED, FormatError, NoSitesError, WrongTaskError
from restuning._files import fits
from restuning.bypass import Bypass, Plan, SideNetwork
from restuning.bypass import from_spec as side_from_spec
from restuning.problems import Problem, SingleLabel
from restuning.problems import from_spec as problem_from_spec
from restuning.sites import FEATURE, Needs, Pool, Readout, Sites, resolve_readout, resolve_tokens
from restuning.tuners import Tuner, from_spec

OCTAVES = 10
"""Doublings of a temperature, up and down from 1: beyond them probabilities are 0 and 1, or all alike."""


class Task(nn.Module):
    """Tuners inside the backbone (inline) or a side network (bypass), and a head.

    Build one with `Task.inline`, `Task.bypass` or `methods.build`.

    Attributes:
        tuners: `ModuleDict` of site key (`mha_3`) to tuner; empty for a bypass task.
        side: The side network, or None for an inline task.
        weights: Trained copies of backbone tensors by name with "/" for "." (full fine-tuning,
            BitFit); the backbone itself is never changed.
        head: `nn.Linear` on the feature, or None to return the backbone's own output.
        pool: Readout this task uses ("cls", "mean", "last", "all", "grid", "own"), None for the host's.
        method: Name of the method that built it.
        labels: Names of what the head answers, in the order of the logits: of classes, labels or numbers.
        problem: What kind of answer it gives (`restuning.problems`); one class of several by default.
        temperature: What logits are divided by where `probabilities` are made of them; 1 where
            nothing was fitted. Logits themselves know nothing of it.
    """

    def __init__(
        self,
        *,
        tuners: Mapping[str, Tuner] | None = None,
        side: SideNetwork | None = None,
        weights: Mapping[str, Tensor] | None = None,
        head: nn.Linear | None = None,
        pool: str | None = None,
        method: str = "custom",
        labels: list[str] | None = None,
        temperature: float = 1.0,
        problem: Problem | None = None,
    ) -> None:
        super().__init__()
        if side is not None and (tuners or weights):
            raise FormatError(
                "a task is inline or bypass, not both",
                found=f"{len(tuners or {})} tuners and a bypass",
                fix="make two tasks",
            )
        self.sites = tuple(tuners or {})
        # A ModuleDict takes no dots in names; `sites` keeps them as they are.
        self.tuners = nn.ModuleDict({n.replace(".", "_"): t for n, t in (tuners or {}).items()})
        self.side = side
        # Dots again. "/" can be turned back, which "_" could not: it stands in names of weights.
        self.weights = nn.ParameterDict(
            {n.replace(".", "/"): nn.Parameter(w) for n, w in (weights or {}).items()}
        )
        self.head = head
        if head is not None and side is not None and side.answers:
            # Here and not where it is built: also of a task that is loaded it is not trained.
            head.requires_grad_(False)
        self.pool, self.method = pool, method
        # Whatever sequence they came in: a file of the task holds a plain list.
        self.labels = None if labels is None else [*labels]
        self.temperature = temperature
        self.problem = SingleLabel() if problem is None else problem

    @classmethod
    def inline(
        cls, sites: Sites, plan: Plan, head: nn.Linear | None = None, **settings: Any
    ) -> Task:
        """Tuners inside the backbone: Res-Tuning.

        Args:
            sites: Sites to offer to the plan, e.g. `host.sites.pick("mha", "ffn")`.
            plan: `Site -> Tuner | None`.
            head: Head on the feature.
            settings: `pool`, `method`, `labels`.

        Raises:
            NoSitesError: The plan gave no tuner.
        """
        tuners = {name: t for name, site in sites.items() if (t := plan(site)) is not None}
        if not tuners:
            raise NoSitesError(
                "the plan gave no tuner",
                found=f"{len(sites)} sites were offered",
                fix="return a tuner for at least one site",
            )
        return cls(tuners=tuners, head=head, **settings)

    @classmethod
    def bypass(
        cls,
        sites: Sites,
        plan: Plan | None,
        head: nn.Linear | None = None,
        *,
        vertical: Plan | None = None,
        own: int | None = None,
        residual: bool = False,
        **settings: Any,
    ) -> Task:
        """A side network on all block taps: Res-Tuning-Bypass.

        Args:
            sites: The host's sites.
            plan: Horizontal tuners, `Site -> Tuner | None`; None for none.
            head: Head on the feature.
            vertical: Vertical tuners; None for none.
            own: Width of the feature, `host.dim`, where the readout is "own" (maps, hierarchies).
            residual: Add what the tuners changed to the backbone's own last stream; see `Bypass`.
            settings: `pool`, `method`, `labels`.
        """
        bypass = Bypass.plan(sites, plan, vertical, own=own, residual=residual)
        return cls(side=bypass, head=head, **settings)

    @property
    def temperature(self) -> float:
        """See the class.

        Raises:
            FormatError: It is set to what is no number from 1/1024 to 1024.
        """
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._temperature = check_temperature(value)

    @property
    def problem(self) -> Problem:
        """See the class.

        Raises:
            FormatError: It is set to one of another number of outputs than the head has.
        """
        return self._problem

    @problem.setter
    def problem(self, value: Problem) -> None:
        if self.head is not None:
            value.check_outputs(self.head.out_features)
        self._problem = value
        if self.side is not None:
            # What is solved or weighed in closed form is so for the loss of the problem.
            self.side.problem = value

    @property
    def inline_tuners(self) -> dict[str, Tuner]:
        """Tuners by site name."""
        return {name: cast(Tuner, self.tuners[name.replace(".", "_")]) for name in self.sites}

    def needs(self, readout: Readout) -> Needs:
        """What this task reads of the backbone, given the host's readout."""
        pool = self.pool or readout.pool
        if self.side is not None:
            return self.side.needs(pool)
        beside = not self.inline_tuners and not len(self.weights)
        if beside and pool == "mean":
            # One vector an input, which a store keeps of texts of any length as well.
            return Needs((f"{FEATURE}/{pool}",), "cls")
        return Needs(("last",), resolve_tokens(pool))

    def forward(
        self, taps: Mapping[str, Tensor], readout: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """Features to logits.

        Args:
            taps: What `needs` names; for an inline task the last stream under "last".
            readout: The host's frozen norm and pooling; None takes the one that came with
                `host.features(...)`.

        Shape:
            Returns `b c` (`b n c` for pool "all", `b h w c` for "grid"), or the feature where there is no head.
        """
        lent = resolve_readout(taps, readout)
        if self.side is not None:
            feature = self.side.feature(taps, lent, self.pool)
        elif "last" not in taps and (name := f"{FEATURE}/{self.pool or 'mean'}") in taps:
            feature = taps[name][:, 0]
        else:
            feature = lent(taps["last"], pool=self.pool)
        # A backbone in bf16 gives features that a head in fp32 cannot multiply.
        return feature if self.head is None else self.head(feature.to(self.head.weight.dtype))

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of each class `softmax(logits / temperature)`, of several labels `sigmoid`; in float32.

        Args:
            logits: This task's, `... c`.

        Raises:
            WrongTaskError: It answers with numbers or vectors, which have none.
        """
        if not self.problem.chooses:
            raise WrongTaskError(
                f"a task that answers with {self.problem.noun} has no probabilities",
                found=f"problem {self.problem.kind}",
                fix="ask task.values(logits) for what it answers",
            )
        return self.values(logits)

    def values(self, logits: Tensor) -> Tensor:
        """What is told of logits: a probability for each label, or numbers in their units; `... c` in float32."""
        return self.problem.values(logits, self.temperature)

    def take_prepared(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Take out of named inputs what training hands in beside the taps (`SideNetwork.prepare`)."""
        names = () if self.side is None else self.side.prepared_taps
        return {name: inputs.pop(name) for name in names if name in inputs}

    @property
    def solved(self) -> bool:
        """Whether its side network is solved in closed form and its head, which then learns nothing, passes that on."""
        if self.side is None or not self.side.solved:
            return False
        return self.head is None or _passes_on(self.head)

    def trainable_parameters(self) -> int:
        """Number of parameters that are trained or solved in closed form, head included."""
        # What is solved lies in buffers, which `parameters` does not give.
        solved = 0 if self.side is None else self.side.solved_parameters
        if self.solved:
            return solved
        return solved + sum(p.numel() for p in self.parameters() if p.requires_grad)

    def tuner_parameters(self) -> int:
        """Number of parameters that are trained or solved in closed form, without the head."""
        if self.solved or self.head is None:
            return self.trainable_parameters()
        head = sum(p.numel() for p in self.head.parameters() if p.requires_grad)
        return self.trainable_parameters() - head

    def spec(self) -> dict[str, Any]:
        """Everything needed to build this task again without its weights, as JSON."""
        # Only where there is one: other files are what they always were.
        fitted: dict[str, Any] = {"temperature": self.temperature} if self.temperature != 1 else {}
        if self.problem != SingleLabel():
            fitted["problem"] = self.problem.spec()
        return {
            "method": self.method,
            "tuners": {name: tuner.spec() for name, tuner in self.inline_tuners.items()},
            "side": self.side.spec() if self.side is not None else None,
            "weights": {n.replace("/", "."): list(p.shape) for n, p in self.weights.items()},
            "head": [self.head.in_features, self.head.out_features] if self.head else None,
            "pool": self.pool,
            "labels": self.labels,
            **fitted,
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Task:
        """Build a task from its `spec`; weights are drawn afresh.

        Raises:
            FormatError: The spec is incomplete or malformed.
        """
        try:
            _refuse_parts(spec)
            return cls(
                tuners={name: from_spec(s) for name, s in spec["tuners"].items()},
                side=side_from_spec(spec["side"]) if spec["side"] else None,
                # Zeros of the right shape: `load_state_dict` fills them.
                weights={n: torch.zeros(*shape) for n, shape in spec["weights"].items()},
                head=nn.Linear(*spec["head"]) if spec["head"] else None,
                pool=spec["pool"],
                method=spec["method"],
                labels=spec["labels"],
                temperature=spec.get("temperature", 1.0),
                problem=problem_from_spec(spec["problem"]) if "problem" in spec else None,
            )
        except MALFORMED as error:
            raise FormatError(
                "the description of a task is malformed",
                found=f"{type(error).__name__}: {error}"[:300],
                fix="restore task.json from where it was saved",
            ) from None


def _passes_on(head: nn.Linear) -> bool:
    """Whether a head gives what it is given."""
    weight, bias = head.weight.detach(), head.bias
    # Without numbers to look at, as it is built.
    if weight.is_meta or weight.shape[0] != weight.shape[1]:
        return weight.shape[0] == weight.shape[1]
    same = torch.equal(weight, torch.eye(len(weight), dtype=weight.dtype, device=weight.device))
    return same and (bias is None or not bool(bias.any()))


def check_temperature(value: Any) -> float:
    """A temperature, if it is one.

    Raises:
        FormatError: It is no number from 1/1024 to 1024.
    """
    highest = 2**OCTAVES
    if not fits(value, float) or not 1 / highest <= value <= highest:
        raise FormatError(
            "the temperature of a task is no number in its range",
            where="temperature",
            found=repr(value)[:200],
            fix=f"give a number from 1/{highest} to {highest}, 1 for none; of a file, restore task.json "
            "from where it was saved",
        )
    return float(value)


def refuse_other_sizes(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Compare the sizes that a spec says with weights that are there, before anything is allocated.

    The task is built without contents. One of another package whose constructor looks at its own
    numbers cannot be built so, and is not compared.

    Raises:
        FormatError: The spec is malformed.
        ValueError: Weights are missing, too many, or of another shape.
    """
    kinds = _count_kinds(spec)
    # A tuner and those around it hold a tensor, a third party's maybe none.
    if kinds > 8 * len(tensors) + 1000:
        raise ValueError(f"{kinds:,} modules are described, {len(tensors):,} tensors are there")
    try:
        with torch.device("meta"):
            built = Task.from_spec(spec).state_dict()
    except FormatError as error:
        # What torch says where something looks at numbers that are not there.
        if "meta tensor" not in error.found:
            raise
        return
    wanted = {name: tuple(tensor.shape) for name, tensor in built.items()}
    there = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    differ = [n for n in {**wanted, **there} if wanted.get(n) != there.get(n)]
    if differ:
        told = (
            f"{n}: {there.get(n, 'missing')}, the description says {wanted.get(n, 'nothing')}"
            for n in differ[:4]
        )
        raise ValueError(f"{len(differ)} do not fit their description: {'; '.join(told)}")


def _count_kinds(spec: Any) -> int:
    """How many modules a spec names; it came out of JSON, whose depth is limited."""
    if isinstance(spec, Mapping):
        return ("kind" in spec) + sum(map(_count_kinds, spec.values()))
    return sum(map(_count_kinds, spec)) if isinstance(spec, list) else 0


_PARTS: dict[str, Any] = {
    "tuners": Mapping[str, Any],
    "side": Mapping[str, Any] | None,
    "weights": Mapping[str, Any],
    "head": list[int] | None,
    "pool": Pool | None,
    "method": str,
    "labels": list[str] | None,
}
"""Of a task's spec, with their types."""


def _refuse_parts(spec: Mapping[str, Any]) -> None:
    """Compare the parts of a spec with what they should be.

    Raises:
        TypeError: One is something else.
        KeyError: One is not there.
    """
    for name, hint in _PARTS.items():
        if not fits(spec[name], hint):
            raise TypeError(f"{name} is {spec[name]!r}"[:200])
    if spec["head"] and len(spec["head"]) != 2:
        raise TypeError(f"head is {spec['head']}"[:200])
    for name, shape in spec["weights"].items():
        if not fits(shape, list[int]):
            raise TypeError(f"the shape of {name} is {shape!r}"[:200])
    # Each is a key without dots in a `ModuleDict`: one of two would take the other's place.
    keys = [name.replace(".", "_") for name in spec["tuners"]]
    if len(set(keys)) < len(keys):
        raise ValueError("two sites have one name")
