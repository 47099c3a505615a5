"""Nearest neighbours among the training rows: nothing is trained, the rows themselves are the task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import TrainingError, TunerShapeError
from restuning.bypass.side_network import Rows, SharedRows, SideNetwork, pass_on, side_network
from restuning.sites import FEATURE, Needs, resolve_readout, resolve_tokens

NEIGHBOURS = (1, 2, 3, 5, 10, 20, 50, 100, 200)
"""Numbers of neighbours that are tried; DINO (Caron et al. 2021) reports 10 to 200 on ImageNet."""
TEMPERATURES = (0.01, 0.02, 0.04, 0.07, 0.1, 0.2, 0.5, 1.0)
"""Temperatures of the votes that are tried: 0.07 is that of Wu et al. (2018), at 1 all neighbours nearly count alike."""
LEFT_OUT = 10_000
"""Rows that are left out in turn to choose among them; of more, so many evenly."""
ASKED, COMPARED = 512, 65_536
"""Rows that are answered at a time, and rows that they are compared with at a time."""
NOBODY = -2.0
"""Below any cosine: of a row that may not vote."""

_Found = tuple[Tensor, Tensor]
"""Cosines of neighbours, `b k`, the nearest first, and their rows."""


@side_network("knn")
class Nearest(SideNetwork):
    r"""`sum_j w_j y_j` over the k nearest training rows, `w = softmax(cos(x, x_j) / T)`, as logits.

    x is the backbone's own feature (what `linear` reads) at unit length. Of one class of several the votes are
    probabilities and their logarithms the logits, of several labels each vote's log-odds, of numbers the weighted
    mean (`Problem.logits_of_means`). No vote is none or all: beside the `1 / sum_j w_j^2` neighbours that count, one
    more says what all training rows say together. k and T have the lowest loss of rows left out, each answered by
    all others but copies of itself.

    Args:
        tap: The last tap.
        dim: d, the width of the feature.
        classes: C, numbers of an answer.
        pool: Readout of the feature.
        rows: n, training rows that it keeps; 0 before `solve`.
        columns: Whether it keeps numbers for each row, as of several labels, and not a class.

    Shape:
        taps: mapping of name to what `needs` names; answers `b C`.

    Cost: the task's file holds `n d` numbers in half precision, and so does memory; an answer is `n d` products.
        Choosing compares each row with all others, 10,000 rows at most.
    Reference: not in the paper. Weighted votes: Wu et al. 2018; as a test of features: Caron et al. 2021.

    Raises:
        TrainingError: It is asked before it has seen rows.
    """

    features: Tensor
    targets: Tensor
    neighbours: Tensor
    temperature: Tensor
    solved = True
    solving = "no training: it keeps its training rows and asks the nearest of them"

    def __init__(
        self,
        tap: str,
        dim: int,
        classes: int,
        *,
        pool: str = "cls",
        rows: int = 0,
        columns: bool = False,
    ) -> None:
        super().__init__()
        if min(dim, classes) < 1 or rows < 0:
            raise TunerShapeError(
                "nearest neighbours need a width and something to answer",
                found=f"width {dim}, {classes} classes, {rows} rows",
                fix="give numbers from 1",
            )
        self.tap, self.dim, self.classes, self.pool = tap, dim, classes, pool
        self.rows, self.columns = rows, columns
        self.taps = (tap,)
        self.register_buffer("features", torch.zeros(rows, dim, dtype=torch.float16))
        self.register_buffer("targets", self._no_targets(rows, columns))
        self.register_buffer("neighbours", torch.ones((), dtype=torch.long))
        self.register_buffer("temperature", torch.ones(()))

    def _no_targets(self, rows: int, columns: bool) -> Tensor:
        if columns:
            return torch.zeros(rows, self.classes)
        return torch.zeros(rows, dtype=torch.int32)

    @property
    def solved_parameters(self) -> int:
        """Numbers that are kept of rows."""
        return self.features.numel()

    def describe_found(self) -> str:
        """How many neighbours are asked, and what is kept."""
        size = sum(b.numel() * b.element_size() for b in self.buffers()) / 2**20
        return (
            f"{int(self.neighbours)} neighbours, temperature {float(self.temperature):g}; {self.rows:,} rows "
            f"of {self.dim} numbers in half precision are kept with the task, {size:.1f} MiB"
        )

    @property
    def name(self) -> str:
        """Name of the tap under which answers to left-out rows are handed in."""
        return f"neighbours by {self.tap}"

    @property
    def prepared_taps(self) -> Mapping[str, tuple[int, ...]]:
        """The answers to left-out rows, one number a class."""
        return {self.name: (self.classes,)}

    def needs(self, pool: str) -> Needs:
        """What a head alone reads."""
        if self.pool == "mean":
            return Needs((f"{FEATURE}/{self.pool}",), "cls")
        return Needs((self.tap,), resolve_tokens(self.pool))

    def forward(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Logits, with the readout that came with the features."""
        return self.feature(taps, resolve_readout(taps, None), None)

    def feature(
        self, taps: Mapping[str, Tensor], readout: Callable[..., Tensor], pool: str | None
    ) -> Tensor:
        """The feature is the logits themselves; those of rows left out where they were handed in under `name`.

        Raises:
            TrainingError: It keeps no rows yet.
        """
        if self.name in taps:
            return taps[self.name].to(self.temperature.dtype)
        if not self.rows:
            raise TrainingError(
                "nearest neighbours were asked before there were any",
                where=self.kind,
                fix="train its task with restuning.fit, or load one that was trained",
            )
        asked = self._read(taps, readout)
        # An exported graph has no parts whose number the batch decides.
        parts = (asked,) if torch.compiler.is_compiling() else asked.split(ASKED)
        return torch.cat([self._answer(some) for some in parts]).to(self.temperature.dtype)

    def _answer(self, asked: Tensor) -> Tensor:
        # As many as could ever vote, so that no shape hangs on a number of a file.
        cosines, rows = self._find(asked, min(max(NEIGHBOURS), self.rows))
        place = torch.arange(cosines.shape[1], device=cosines.device)
        cosines = cosines.masked_fill(place >= self.neighbours.clamp(min=1), NOBODY)
        # Whatever a file says: of zero and below nothing is divided by.
        return self._vote((cosines, rows), self.temperature.float().clamp(min=min(TEMPERATURES)))

    def _read(self, taps: Mapping[str, Tensor], readout: Callable[..., Tensor]) -> Tensor:
        """The backbone's feature at unit length, `b d`, in single precision."""
        name = f"{FEATURE}/{self.pool}"
        if self.pool == "mean" and name in taps:
            feature = taps[name][:, 0]
        else:
            feature = readout(taps[self.tap], pool=self.pool)
        return F.normalize(feature.detach().float(), dim=-1)

    def _find(self, asked: Tensor, count: int, excluded: Callable | None = None) -> _Found:
        """The nearest rows, each batch of them compared with those that were nearest so far."""
        best: _Found | None = None
        for start in range(0, self.rows, COMPARED):
            some = self.features[start : start + COMPARED].float()
            cosines = asked @ some.T
            if excluded is not None:
                cosines = cosines.masked_fill(excluded(start, start + len(some)), NOBODY)
            near = cosines.topk(min(count, len(some)), 1)
            found = near.values, near.indices + start
            if best is not None:
                both = torch.cat([best[0], found[0]], 1)
                near = both.topk(min(count, both.shape[1]), 1)
                found = near.values, torch.cat([best[1], found[1]], 1).gather(1, near.indices)
            best = found
        assert best is not None
        return best

    def _vote(self, found: _Found, temperature: float | Tensor) -> Tensor:
        """Logits of neighbours' answers, `b C`."""
        cosines, rows = found
        nobody = cosines <= NOBODY
        # Before the softmax, where a copy would take a share; after it, where nobody else is left.
        weights = (cosines / temperature).masked_fill(nobody, -torch.inf).softmax(1)
        weights = weights.masked_fill(nobody, 0.0)
        targets = self.targets[rows]
        if self.columns:
            means = torch.einsum("bk,bkc->bc", weights, targets.float())
        else:
            # `len` would fix the batch of an exported graph.
            means = weights.new_zeros(weights.shape[0], self.classes)
            means = means.scatter_add(1, targets.long(), weights)
        # Where a row has nothing but copies weights are all zero, and so is the count: the mean of all rows is told.
        count = weights.sum(1, keepdim=True)
        count = count / weights.square().sum(1, keepdim=True).clamp(min=1 / self.rows)
        return self.problem.logits_of_means(means, count, self._middle())

    def _middle(self) -> Tensor:
        """The mean of all rows' answers, `C`."""
        if self.columns:
            return self.targets.mean(0)
        counts = self.temperature.new_zeros(self.classes, dtype=torch.float32)
        counts = counts.index_add(0, self.targets.long(), torch.ones_like(self.targets).float())
        # Half an example more of each: a class without a row is unlikely and not impossible.
        return (counts + 0.5) / (self.rows + 0.5 * self.classes)

    def widen(self, head: nn.Linear) -> nn.Linear:
        """A head of the same classes that passes the logits on."""
        return pass_on(self.classes, head.out_features)

    def prepare(self, rows: Rows) -> Mapping[str, Tensor]:
        """Keep the rows, and return under `name` what each is answered by all others."""
        keys, _ = self._keep(rows)
        at, found = self._leave_out(keys, self.rows)
        return {self.name: self._choose(at, found)}

    def solve(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Keep all rows, and choose how many neighbours are asked.

        Returns:
            What rows are answered by all others, `m C`, and their targets, `m`: of 10,000 at most.

        Raises:
            TunerShapeError: Fewer than two rows.
            TrainingError: A row's feature is not finite.
        """
        keys, labels = self._keep(rows)
        at, found = self._leave_out(keys, min(self.rows, LEFT_OUT))
        return self._choose(at, found), labels[at]

    @torch.no_grad()
    def _keep(self, rows: Rows) -> tuple[Tensor | None, Tensor]:
        """Take up features and answers of all rows; what tells copies of a row, and the targets."""
        features, targets = [], []
        for taps, labels in rows:
            feature = self._read(taps, resolve_readout(taps, None))
            if not bool((finite := feature.isfinite().all(1)).all()):
                # It would be the nearest of all: `topk` holds NaN for the largest.
                raise TrainingError(
                    "a training row has no direction, and would be everybody's nearest",
                    where=f"row {sum(map(len, features)) + int(finite.logical_not().nonzero()[0])}",
                    found="a feature with NaN or infinite values",
                    fix="take the input out, or run the backbone in single precision",
                )
            features.append(feature.half())
            targets.append(labels.to(features[-1].device))
        if sum(map(len, features)) < 2:
            raise TunerShapeError(
                "neighbours are chosen by rows left out",
                found=f"{sum(map(len, features))} rows",
                fix="give two rows or more",
            )
        self.features, labels = torch.cat(features), torch.cat(targets)
        self.rows, self.columns = len(labels), not self.problem.one_hot
        # In single precision: a GPU of Apple's has no double.
        self.targets = (
            self.problem.columns(labels.cpu(), self.classes).float().to(labels.device)
            if self.columns
            else labels.int()
        )
        return rows.keys if isinstance(rows, SharedRows) else None, labels

    @torch.no_grad()
    def _leave_out(self, keys: Tensor | None, number: int) -> tuple[Tensor, _Found]:
        """So many rows evenly, and the nearest of all others to each; a copy of a row is that row."""
        device = self.features.device
        own = torch.arange(self.rows) if keys is None else keys
        own, at = own.to(device), torch.arange(number, device=device) * self.rows // number
        count = min(max(NEIGHBOURS), self.rows - 1)
        parts = [
            self._find(
                self.features[some].float(),
                count,
                lambda start, stop, some=some: own[some][:, None] == own[start:stop],
            )
            for some in at.split(ASKED)
        ]
        return at, (torch.cat([c for c, _ in parts]), torch.cat([r for _, r in parts]))

    @torch.no_grad()
    def _choose(self, at: Tensor, found: _Found) -> Tensor:
        """Set how many neighbours are asked and how they are weighed; the answers to rows left out."""
        truth = self.targets[at]
        truth = self.problem.from_columns(truth) if self.columns else truth.long()
        best = None
        for count in NEIGHBOURS:
            if count > found[0].shape[1]:
                break
            near = found[0][:, :count], found[1][:, :count]
            # Of one neighbour there is nothing to be weighed.
            for temperature in TEMPERATURES[: 1 if count == 1 else None]:
                parts = zip(near[0].split(ASKED), near[1].split(ASKED), strict=True)
                answers = torch.cat([self._vote(part, temperature) for part in parts])
                loss = float(self.problem.mean_loss(answers, truth))
                if best is None or loss < best[0]:
                    best = loss, count, temperature, answers
        assert best is not None
        _, count, temperature, answers = best
        self.neighbours.fill_(count)
        self.temperature.fill_(temperature)
        return answers

    def spec(self) -> dict[str, Any]:
        """Everything needed to build it again, as JSON; what it does not keep yet is not said."""
        spec = super().spec()
        return {n: v for n, v in spec.items() if v or n not in ("rows", "columns")}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A new one takes the rows of a checkpoint; of a file the spec has said how many there are.
        features, targets = (state_dict.get(f"{prefix}{n}") for n in ("features", "targets"))
        if not self.rows and features is not None and targets is not None:
            self.rows, self.columns = len(features), targets.ndim == 2
            self.features = self.features.new_zeros(self.rows, self.dim)
            self.targets = self._no_targets(self.rows, self.columns).to(self.features.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        known = self.columns or self.targets.is_meta or not self.rows
        if not known and not 0 <= int(self.targets.min()) <= int(self.targets.max()) < self.classes:
            args[-1].append(f"a class beyond the {self.classes} there are")
