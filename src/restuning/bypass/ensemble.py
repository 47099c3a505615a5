"""Several side networks that answer together, weighed by their answers to rows that they did not see.

A closed form is best where classes are natural things and is solved in seconds; networks that mix tokens
are best where labels say where or how many. Which it is, rows left out tell; so nobody has to choose.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import TunerShapeError
from restuning._registry import construct
from restuning.bypass.side_network import (
    Rows,
    SharedRows,
    SideNetwork,
    from_spec,
    pass_on,
    side_network,
)
from restuning.bypass.stacking import find_weights
from restuning.problems import Problem, SingleLabel
from restuning.sites import ONE_TOKEN, Features, Needs, resolve_readout, unite_needs

SHARES = 6
"""Shares that training rows are cut into, of which a trained network is shown all but one: enough rows to
weigh by (a third of them for two networks), and few that a network misses."""


@side_network("ensemble")
class Ensemble(SideNetwork):
    r"""`sum_k w_k a_k`: logits of several side networks, each with a head of its own, weighed.

    The k-th trained network is not shown the k-th of six shares of the training rows (drawn once,
    by row number). After the last step its answers to that share, beside those that a closed form gives to
    rows left out, tell what each is worth: weights `w >= 0` have the lowest cross-entropy there. Networks
    of one form have a weight together, which they share equally: trained on other rows, they also
    steady each other.

    A training step deals the rows of its batch out to the trained networks, so that two of them cost as
    much as one; each makes as many steps as there are, on its part of the batch.

    Args:
        parts: Side networks. Those that are solved (`SideNetwork.solved`) answer by themselves.
        widths: Of their features, in order; None for those that are solved.
        classes: C.

    Shape:
        taps: mapping of name to what `needs` names; `feature` returns the logits, `b C`; `b h w C` of parts that answer at
            every place of one grid.

    Attributes:
        name: Of the tap by which the share of a row is handed in; see `prepare`.
        left_out: Once it was concluded in this process: answers to rows as if they were left out, and their targets.

    Cost: a step as one of the trained networks; inference all of them. After training one forward of
    each on a sixth of the rows.
    Start: networks of equal weight, heads as `widen` of each starts them on a head of zeros.
    Reference: not in the paper. Weights on answers left out: `stacking.find_weights`.

    Raises:
        TunerShapeError: Numbers of parts and widths do not agree, none is trained, or two are solved alike.
    """

    weight: Tensor
    # Its weights are found by the cross-entropy of rows left out, a temperature among them.
    calibrated = True
    answers = True
    deals = True

    def __init__(
        self,
        parts: Sequence[SideNetwork],
        widths: Sequence[int | None],
        classes: int,
    ) -> None:
        super().__init__()
        self._problem: Problem = SingleLabel()
        self.left_out: tuple[Tensor, Tensor] | None = None
        solved = [part.solved for part in parts]
        if all(solved) or [width is None for width in widths] != solved:
            raise TunerShapeError(
                "an ensemble needs side networks that are trained, and the width of each feature",
                found=f"{len(parts)} networks, {sum(solved)} of them solved, widths {list(widths)}",
                fix="give as many of both, None for one that is solved in closed form",
            )
        beside = [name for part in parts for name in part.prepared_taps]
        if len(set(beside)) < len(beside):
            raise TunerShapeError(
                "an ensemble holds two networks that prepare one thing",
                found=max(beside, key=beside.count),
                fix="give one of them",
            )
        self.parts = nn.ModuleList(parts)
        self.widths, self.classes = tuple(widths), classes
        self.heads = nn.ModuleList(
            nn.Identity() if width is None else nn.Linear(width, classes) for width in widths
        )
        for head in self.heads:
            if isinstance(head, nn.Linear):
                # What it says comes from what it learns: a random head says noise of every row.
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
        names = dict.fromkeys(name for part in parts for name in part.taps)
        # The one that all end at last.
        self.taps = (*(n for n in names if n != parts[-1].taps[-1]), parts[-1].taps[-1])
        forms = len(self._forms())
        self.register_buffer("weight", self._share_equally(torch.full((forms,), 1 / forms)))

    @property
    def _networks(self) -> list[SideNetwork]:
        return [part for part in self.parts if isinstance(part, SideNetwork)]

    @property
    def _trained(self) -> list[int]:
        """Numbers of the parts that are trained by steps."""
        return [k for k, width in enumerate(self.widths) if width is not None]

    def _forms(self) -> list[list[int]]:
        """Numbers of parts, those of one form together."""
        forms: dict[str, list[int]] = {}
        for number, part in enumerate(self._networks):
            forms.setdefault(json.dumps(part.spec(), sort_keys=True), []).append(number)
        return list(forms.values())

    def _share_equally(self, weights: Tensor) -> Tensor:
        """Weights of forms as weights of parts."""
        found = torch.zeros(len(self.parts))
        for weight, form in zip(weights.tolist(), self._forms(), strict=True):
            found[form] = weight / len(form)
        return found

    @property
    def problem(self) -> Problem:  # type: ignore[override]
        """What its task answers; its parts are told."""
        return self._problem

    @problem.setter
    def problem(self, value: Problem) -> None:
        self._problem = value
        for part in self._networks:
            part.problem = value

    @property
    def weighs(self) -> bool:
        """Whether all its parts do."""
        return all(part.weighs for part in self._networks)

    def weigh(self, weights: Tensor | None) -> None:
        """As every side network; its parts are told."""
        super().weigh(weights)
        for part in self._networks:
            part.weigh(weights)

    @property
    def recompute(self) -> bool:  # type: ignore[override]
        """Whether parts compute again in the backward pass what they do not keep."""
        return any(part.recompute for part in self._networks)

    @recompute.setter
    def recompute(self, value: bool) -> None:
        for part in self._networks:
            part.recompute = value

    @property
    def lambda_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Those of its parts."""
        return tuple(
            f"parts.{number}.{name}"
            for number, part in enumerate(self._networks)
            for name in part.lambda_names
        )

    @property
    def solved_parameters(self) -> int:
        """Those of its parts, and a weight for each."""
        return len(self.parts) + sum(part.solved_parameters for part in self._networks)

    @property
    def name(self) -> str:
        """Name of the tap under which the share of a row is handed in."""
        return f"share of {len(self.parts)} networks"

    @property
    def prepared_taps(self) -> Mapping[str, tuple[int, ...]]:
        """What its parts prepare, and the share that a row is of."""
        parts = {n: shape for part in self._networks for n, shape in part.prepared_taps.items()}
        return {**parts, self.name: (1,)}

    def needs(self, pool: str) -> Needs:
        """What its parts read, each thing once."""
        return unite_needs([part.needs(pool) for part in self._networks], self.taps)

    def forward(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Logits, with the readout that came with the features."""
        return self.feature(taps, resolve_readout(taps, None), None)

    def feature(
        self, taps: Mapping[str, Tensor], readout: Callable[..., Tensor], pool: str | None
    ) -> Tensor:
        """The logits; while training those of one network a row."""
        if self.training and self.name in taps:
            return self._answer_in_turn(taps, readout, pool)
        answers = [self._answer(k, taps, readout, pool) for k in range(len(self.parts))]
        # Added one by one: a stack of all would be as large again.
        total = self.weight[0] * answers[0]
        for weight, answer in zip(self.weight[1:], answers[1:], strict=True):
            total = total + weight * answer
        return total

    def _answer(
        self,
        number: int,
        taps: Mapping[str, Tensor],
        readout: Callable[..., Tensor],
        pool: str | None,
    ) -> Tensor:
        """Logits of one part, `b C`, or `b h w C` where it answers at every place."""
        part, head = self._networks[number], self.heads[number]
        feature = part.feature(_name_as_read(taps, part), readout, pool)
        if isinstance(head, nn.Linear):
            feature = head(feature.to(head.weight.dtype))
        return feature

    def _answer_in_turn(
        self, taps: Mapping[str, Tensor], readout: Callable[..., Tensor], pool: str | None
    ) -> Tensor:
        """Logits of the network that a row was dealt to; zeros where it was dealt to none."""
        share = taps[self.name][:, 0].long()
        answers: Tensor | None = None
        for number, rows, shown in zip(self._trained, *self._deal(share), strict=True):
            logits = self._answer(number, _take_rows(taps, rows), readout, pool)
            # Autocast leaves them in half precision.
            shown = shown.view(-1, *[1] * (logits.ndim - 1))
            logits = torch.where(shown, logits.float(), 0.0)
            if answers is None:
                answers = logits.new_zeros(len(share), *logits.shape[1:])
            answers = answers.index_add(0, rows, logits)
        assert answers is not None
        return answers

    def _deal(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of a batch that each trained network answers, `k n`, and which of them it is shown.

        Of `b` rows each network is dealt `n = b / k`, rounded up: numbers that no row decides, so that a step
        takes the same time and memory whatever is in it, and all parameters take part in each. Rows that one may not
        see are dealt first, to another; the rest in the order of the batch. What finds no place (one batch in
        thousands has so many rows of one share) is shown to nobody.
        """
        held = list(self._held.values())
        networks, count = len(held), len(share)
        size = -(-count // networks)
        # For each share the next network that may see it, where one may not; `networks` where all may.
        others = []
        for number in range(SHARES):
            at = held.index(number) if number in held else networks
            after = (p % networks for p in range(at + 1, at + networks))
            allowed = (p for p in after if held[p] != number)
            others.append(networks if at == networks else next(allowed, networks))
        to = torch.tensor(others, device=share.device)[share]
        ones = F.one_hot(to, networks + 1)
        turn = (ones.cumsum(0) * ones).sum(1) - 1
        first = (to < networks) & (turn < size)
        places = networks * size
        place = torch.where(first, to * size + turn, places)
        taken = share.new_zeros(places + 1).scatter(0, place, 1)[:places]
        # The rest of the rows in order, to the rest of the places: those of networks in turn, and where some stay
        # empty, as of a batch of one, beginning with one that is drawn.
        order = torch.arange(places, device=share.device)
        if places > count:
            drawn = torch.randint(networks, (), device=share.device)
            order = (order - drawn * size) % places
        rank = first.long().argsort(stable=True).argsort()
        place = torch.where(first, place, (taken * places + order).argsort()[rank])
        rows = share.new_zeros(places).scatter(0, place, torch.arange(count, device=share.device))
        dealt = share.new_zeros(places).scatter(0, place, 1).bool()
        own = torch.tensor(held, device=share.device).repeat_interleave(size)
        shown = dealt & (share[rows] != own)
        return rows.view(networks, size), shown.view(networks, size)

    @property
    def _held(self) -> dict[int, int]:
        """The share that a trained part is not shown, by its number: its place among those of its form."""
        held = {n: place for form in self._forms() for place, n in enumerate(form)}
        return {n: held[n] % SHARES for n in self._trained}

    def widen(self, head: nn.Linear) -> nn.Linear:
        """A head of the same classes that passes the logits on."""
        return pass_on(self.classes, head.out_features)

    def prepare(self, rows: Rows) -> Mapping[str, Tensor]:
        """What its parts prepare; and for every row its share, 0 to 5."""
        beside: dict[str, Tensor] = {}
        for part in self._networks:
            if part.prepared_taps:
                shared = isinstance(rows, SharedRows)
                beside |= part.prepare(_RowsOfPart(rows, part) if shared else rows)
        # Other rows are read once more to be counted.
        known = isinstance(rows, SharedRows)
        count = len(rows) if known else sum(len(labels) for _, labels in rows)
        # A generator of its own: the same shares whatever was drawn before.
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(0)) % SHARES
        if isinstance(rows, SharedRows) and rows.keys is not None:
            # What stands there twice is of one share: else it would be shown and left out.
            _, same = rows.keys.unique(return_inverse=True)
            first = torch.full((count,), count).scatter_reduce(0, same, torch.arange(count), "amin")
            drawn = drawn[first[same]]
        return {**beside, self.name: drawn.float().unsqueeze(1)}

    @torch.no_grad()
    def conclude(self, rows: Rows, readout: Callable[..., Tensor], pool: str | None) -> None:
        """Weigh the parts by their answers to rows that they were not shown."""
        forms = self._forms()
        trained = [len(form) for form in forms if self.widths[form[0]] is not None]
        # Shares that a network of every form was not shown; what is solved leaves out each row.
        places = range(min([*trained, SHARES]))
        was_training = self.training
        self.eval()
        answers, truth = [], []
        problem = self.problem
        for taps, labels in rows:
            share = taps[self.name][:, 0].long()
            for place in places:
                held = (share == place).nonzero()[:, 0]
                if not len(held):
                    continue
                left_out = _take_rows(taps, held)
                numbers = [form[min(place, len(form) - 1)] for form in forms]
                # On the CPU: in double precision, which not every device has, a row is little work.
                each = [
                    self._answer(number, left_out, readout, pool).float().cpu()
                    for number in numbers
                ]
                # Those of all parts side by side, so that of all the same is taken.
                thin = self.problem.thin(torch.cat(each, -1), labels.cpu()[held.cpu()])
                if thin is not None:
                    problem, logits, targets = thin
                    answers.append(logits)
                    truth.append(targets)
        if truth:
            # Targets of the problem itself are what error bars are of.
            whole, targets = problem == self.problem, torch.cat(truth)
            logits = torch.stack(torch.cat(answers).chunk(len(forms), -1))
            weights = find_weights(logits, targets, problem, self.class_weights)
            self.weight.copy_(self._share_equally(weights))
            total = torch.einsum("m,m...->...", weights, logits)
            self.left_out = (total, targets) if whole else None
        self.train(was_training)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and other processes: without answers to rows."""
        return {**vars(self), "left_out": None}

    def spec(self) -> dict[str, Any]:
        """Everything needed to build it again, as JSON."""
        return {
            **self._kind_of_spec(),
            "parts": [part.spec() for part in self._networks],
            "widths": list(self.widths),
            "classes": self.classes,
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Ensemble:
        """Build an ensemble from its `spec`."""
        parts = [from_spec(each) for each in spec["parts"]]
        arguments = {**spec, "parts": parts}
        del arguments["kind"]
        return construct(cls, arguments, "side network")


class _RowsOfPart(SharedRows):
    """The rows of a training split as one part reads them."""

    def __init__(self, rows: SharedRows, part: SideNetwork) -> None:
        self.rows, self.part = rows, part
        self.keys, self.together = rows.keys, rows.together

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[Mapping[str, Tensor], Tensor]]:
        return ((_name_as_read(taps, self.part), labels) for taps, labels in self.rows)

    def share(self) -> Iterator[tuple[Sequence[int], Mapping[str, Tensor], Tensor]]:
        for numbers, taps, labels in self.rows.share():
            yield numbers, _name_as_read(taps, self.part), labels


def _name_as_read(taps: Mapping[str, Tensor], part: SideNetwork) -> Mapping[str, Tensor]:
    """The taps under the names that a part has for them: one token of a tap is a part of it beside whole ones."""
    single = [(name, f"{name}/{token}") for name in part.taps for token in ONE_TOKEN]
    more = {n: taps[one] for n, one in single if n not in taps and one in taps}
    if not more:
        return taps
    if isinstance(taps, Features):
        return Features({**taps, **more}, taps.readout, taps.mask, taps.time)
    return {**taps, **more}


def _take_rows(taps: Mapping[str, Tensor], rows: Tensor) -> Mapping[str, Tensor]:
    if isinstance(taps, Features):
        return taps.select(lambda tap: tap[rows])
    return {name: tap[rows] for name, tap in taps.items()}
