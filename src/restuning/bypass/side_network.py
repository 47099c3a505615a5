"""A side network: taps of a frozen backbone in, a feature out, no gradient towards the taps.

A new one is one class with `@side_network("kind")` above it, or a class of an installed package that
is named by an entry point `restuning.side_networks`. Tasks, files, training from stores, banks,
forecasts and searches then work with it: they ask for what stands here and for nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from restuning._errors import MALFORMED, FormatError, TrainingError
from restuning._registry import Registry, cannot_build, construct, read_arguments
from restuning.problems import Problem, SingleLabel
from restuning.sites import Needs
from restuning.tuners import Tuner, from_json, to_json

Rows = Iterable[tuple[Mapping[str, Tensor], Tensor]]
"""Batches of taps and labels of a training split, in its order, without augmentation."""


class SharedRows(ABC):
    """`Rows` of which each process of a run may read a share, and which are known by their contents.

    Attributes:
        keys: A whole number a row, which follows from its input's contents (`sums.keys_of`), `n`; None where
            inputs have no digests.
        together: Whether all processes of `torch.distributed` read their shares now, and wait for each other.
    """

    keys: Tensor | None
    together: bool

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows, of all processes."""

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        """Batches of all rows."""

    @abstractmethod
    def share(self) -> Iterator[tuple[Sequence[int], Mapping[str, Tensor], Tensor]]:
        """Batches of this process's share: the numbers of their rows, taps, labels."""


def read_share(rows: Rows) -> Iterator[tuple[Sequence[int], Mapping[str, Tensor], Tensor]]:
    """Numbers, taps and labels of the rows that this process reads: its share, or all of them."""
    if isinstance(rows, SharedRows):
        yield from rows.share()
        return
    start = 0
    for taps, labels in rows:
        yield range(start, start + len(labels)), taps, labels
        start += len(labels)


def pass_on(classes: int, outputs: int) -> nn.Linear:
    """A head that passes the logits of a side network on."""
    head = nn.Linear(classes, outputs)
    nn.init.eye_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class SideNetwork(nn.Module, ABC):
    """`taps -> state`, and `feature = readout(state)`, which a task's head reads.

    Subclasses keep every constructor argument as an attribute of the same name (that is their
    `spec`; those with other ways override `spec` and `from_spec`), put a `@side_network("kind")`
    above the class, and detach the taps they read.

    Shape:
        taps: mapping of name to `b n d_l`, or `b h w d_l` on maps. Returns the last state, a stream
        that the backbone's readout takes (`b n d_L`), unless `feature` is overridden.

    Attributes:
        kind: Its name in the table.
        taps: Names of the taps it reads, the one it ends at last.
        recompute: Compute parts again in the backward pass instead of keeping what they saved. It
            means nothing where a side network has no such parts; a search turns it off where memory
            costs nothing.
        lambda_names: Of parameters that mix streams, whose rate `lambda_rate` multiplies.
        calibrated: Whether its answers are scaled on rows left out of what it saw, so that no
            temperature is fitted to them.
        answers: Whether its feature is the answer, so that a task's head passes it on (`pass_on`) and is not trained.
        deals: Whether a step deals the rows of its batch out by their places in it: processes that share a batch train another network
            than one that has it whole, and are refused.
        solved: Whether `solve` finds all that it is: where its feature is the answer, no step is trained.
        solving: Of one that is solved, in place of how it is trained: "solved in closed form from one pass".
        problem: What its task answers, which sets it: whoever solves or weighs does so for its loss.
        class_weights: What training weighs the loss by (`weigh`); None of what weighs all alike. It is no part of the `spec`.
    """

    kind: ClassVar[str] = ""
    taps: tuple[str, ...]
    recompute: bool = False
    lambda_names: tuple[str, ...] = ()
    calibrated: bool = False
    answers: bool = False
    deals: bool = False
    solved: bool = False
    solving: str = "solved in closed form from one pass"
    problem: Problem = SingleLabel()
    class_weights: Tensor | None = None

    @abstractmethod
    def needs(self, pool: str) -> Needs:
        """What is read of the backbone, where the task's readout is `pool`."""

    @abstractmethod
    def forward(self, taps: Mapping[str, Tensor]) -> Tensor:
        """The last state; see the class."""

    @property
    def tuners(self) -> Sequence[Tuner]:
        """Tuners inside it: a decoder with a cache asks whether one of them looks ahead."""
        return [m for m in self.modules() if isinstance(m, Tuner)]

    def feature(
        self, taps: Mapping[str, Tensor], readout: Callable[..., Tensor], pool: str | None
    ) -> Tensor:
        """What the head reads: `readout(self(taps), pool=pool)` unless overridden.

        Args:
            taps: What `needs` names.
            readout: The backbone's frozen norm and pooling, on loan.
            pool: The task's; None for the backbone's own.
        """
        return readout(self(taps), pool=pool)

    def widen(self, head: nn.Linear) -> nn.Linear:
        """The head a task gets: this one, unless the feature is not the backbone's.

        Args:
            head: As wide as the backbone's feature. A side network with a feature of its own
                answers with a head of that width which starts as this one.
        """
        return head

    @property
    def solved_parameters(self) -> int:
        """How many numbers `prepare` solves for: they count among those that are trained."""
        return 0

    def describe_found(self) -> str:
        """What a solution chose and keeps, in words; empty where there is nothing to be told."""
        return ""

    @property
    def prepared_taps(self) -> Mapping[str, tuple[int, ...]]:
        """The names under which `prepare` returns tensors, and the shape that each has for one row."""
        return {}

    def prepare(self, rows: Rows) -> Mapping[str, Tensor]:
        """Called by training once before the first step, with the training split.

        It may set buffers, and may return a tensor for every row (`n ...`), which training then hands
        in beside the row's taps: `ridge` returns what it would have answered to each row without it.
        What it does must follow from `spec` and the rows alone, so that a run that was killed goes
        on as it was. Rows are read only where they are iterated over; then inputs have to be the
        same each time they are read.
        """
        return {}

    def solve(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Of a `solved` network what `prepare` does, where nobody trains on answers to all rows.

        Returns:
            Answers to rows as if each had been left out, `k C`, and the rows' labels, `k`: of all rows or of some.
        """
        raise NotImplementedError(f"{self.kind} is not solved")

    @property
    def solves(self) -> bool:
        """Whether it finds numbers by the targets of rows beside the steps: in closed form, or when it concludes."""
        return self.solved or type(self).conclude is not SideNetwork.conclude

    @property
    def weighs(self) -> bool:
        """Whether the numbers that it finds by targets, if it does, can be found with weights of classes."""
        return not self.solves

    def weigh(self, weights: Tensor | None) -> None:
        """Called by training before `prepare`, with what it weighs the loss by (`Problem.balance`); None weighs all alike.

        Raises:
            TrainingError: It finds numbers by targets (`solves`) and does not weigh them (`weighs`).
        """
        if weights is not None and not self.weighs:
            raise TrainingError(
                "this is solved in closed form without weights of classes",
                where="class_weights",
                found=f"{self.kind}, problem {self.problem.kind}",
                fix="leave out --class-weights, or choose a method that is trained by steps alone",
            )
        self.class_weights = weights

    def conclude(self, rows: Rows, readout: Callable[..., Tensor], pool: str | None) -> None:
        """Called by training after the last step, with the training split; it may set buffers.

        Also after an epoch where the run may end, so it must be possible to go on, and conclude again.

        An ensemble weighs its parts here. What it does must follow from weights and rows alone.

        Args:
            rows: As for `prepare`, with what that returned beside each row.
            readout: The backbone's frozen norm and pooling, on loan.
            pool: The task's; None for the backbone's own.
        """

    def can_fuse(self, streams: Sequence[Tensor]) -> bool:
        """Whether `run_fused` applies to these taps.

        Only where `feature` is the readout of the state: it is not asked for then.
        """
        return False

    def run_fused(self, taps: Mapping[str, Tensor], of: Callable[[nn.Parameter], Tensor]) -> Tensor:
        """Last states of k networks of this form at once, `k b ...`, where `can_fuse` says so.

        Args:
            taps: As for `forward`.
            of: A parameter of this network to the k stacked ones, `k ...`.
        """
        raise NotImplementedError(f"{self.kind} does not run several at once")

    def stack_key(self) -> str | None:
        """Networks with the same key can be answered by one `stack`; None: each runs alone.

        Only where `feature` is the readout of the state: it is not asked for then.
        """
        return None

    @classmethod
    def stack(cls, networks: Sequence[Any]) -> nn.Module:
        """Trained networks of one `stack_key` as one module for inference.

        It is called with the streams of the taps and the numbers of the networks asked for (None
        for all), and returns their last states, `k b ...`.
        """
        raise NotImplementedError(f"{cls.kind} does not stack")

    def spec(self) -> dict[str, Any]:
        """Everything needed to build this network again, as JSON."""
        return {**self._kind_of_spec(), **read_arguments(self, to_json)}

    def _kind_of_spec(self) -> dict[str, str]:
        # Its own and not one that it inherits: as its parent it would load without a word.
        if not vars(type(self)).get("kind"):
            # Imported by hand: the table that would have named it was not asked for yet.
            kinds()
        if not vars(type(self)).get("kind"):
            raise FormatError(
                "a side network of no kind cannot be written down",
                where=type(self).__name__,
                fix='put @side_network("a name") above the class, or install the package that '
                "registers it",
            )
        return {"kind": self.kind}

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> SideNetwork:
        """Build one of this class from its `spec`.

        Raises:
            FormatError: The arguments do not fit.
        """
        arguments = {k: from_json(v) for k, v in spec.items() if k != "kind"}
        return construct(cls, arguments, "side network")


_REGISTRY: Registry[SideNetwork] = Registry("side network", "restuning.side_networks")

side_network = _REGISTRY.register
"""Enter a side network in the table that specs are read from: `@side_network("kind")`."""


def kinds() -> dict[str, type[SideNetwork]]:
    """The table of side networks: ours, and those that installed packages give by entry point.

    A package adds one with `[project.entry-points."restuning.side_networks"]`,
    `kind = "module:Class"`. One that does not import is left out, and named when its kind is asked
    for.
    """
    return _REGISTRY.kinds()


def from_spec(spec: Mapping[str, Any]) -> SideNetwork:
    """Build a side network from its `spec`.

    Raises:
        UnknownNameError: The kind is in no table.
        FormatError: The arguments do not fit the kind.
    """
    cls = _REGISTRY.find(spec)
    try:
        return cls.from_spec(spec)
    except MALFORMED as error:
        raise cannot_build("side network", cls.kind, error) from None
