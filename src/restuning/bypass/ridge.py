"""A linear classifier on pooled taps, solved in closed form, and its answers to rows left out.

Training takes no step. What it would have said of a training row without that row follows from the
same solution: that is how its penalty and scale are chosen, and what else is trained on its answers gets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import MissingInputError, TrainingError, TunerShapeError
from restuning.bypass.closed_form import ClosedForm
from restuning.bypass.pooling import Token
from restuning.bypass.side_network import Rows, SharedRows, read_share, side_network
from restuning.bypass.solution import Solution, solve
from restuning.bypass.sums import Sums, keys_of_numbers
from restuning.sites import FEATURE, Needs, parse_pool, resolve_tokens, take_one_token
from restuning.tuners import BINS

Block = tuple[str, str]
"""What is read of a tap, and the tap: ("mean", "block.3")."""

FITTED = 1024
"""Rows that are answered at a time."""

_Batch = tuple[Sequence[int], Tensor, Tensor]
"""Numbers, labels and keys of rows."""

_ROWS = {"mean": 0, "largest": 1, "deviation": 2}
"""Rows of the parts "patches" and "tokens" of a tap."""


@side_network("ridge")
class Ridge(ClosedForm):
    r"""`u x + v D(x)` of `x = W z + b` with `W, b = argmin sum_i |W z_i + b - y_i|^2 + a |W|^2`, y one-hot.

    D is the linear discriminant of what x would be of rows left out: it tells classes that lie between others, which
    are the largest x nowhere (`bypass/discriminant.py`). All of it is linear, and kept as one map of z.

    z is made of blocks, each of one tap with tokens normalised (no parameters): a token, the mean, the
    largest values or the deviation of the others, or on a grid the means along rows and columns (7 bins
    each; a mean forgets where things are). Each number is divided by its deviation and each block by its
    size; with `weighted`, block k is multiplied by `sqrt(w_k)`, w the weights with the lowest
    cross-entropy of rows left out (`learn_weights`). The penalty a, u, v and the discriminant have the lowest
    cross-entropy of rows left out as well; no validation split is read. Of another problem than one class of several
    (`restuning.problems`, which the task says) y are its columns and its loss stands in the place of cross-entropy:
    0 and 1 for each label, or standardised numbers, whose scale u is 1; and there is no discriminant.

    With weights of classes (`weigh`) each row counts `w_{y_i}` times in the sum that is minimised, in the discriminant and in
    the losses that choose: as if it were there so often. Of several labels each would ask for a solution of its own, and
    they are refused.

    Where a head made of the names of the classes is its start (`start_from`), what that answers is one more block of z, and is
    added to the rest with a weight of its own, which rows left out decide as well. Before it is solved it answers what
    that head does.

    Args:
        taps: Names of those that are read, in order.
        dims: Their widths.
        classes: C.
        token: The token that is read, "cls" or "last", or None.
        grid: Whether tokens form a square, after the fewest that leave one.
        blocks: What is read of which tap: "token", "mean", "largest", "deviation", "places", or "vector"
            (a tap that is one vector already). None for what files of before had: token and mean of every
            tap, and the places of the middle one, these three kinds counting alike.
        weighted: Whether each block has a weight of its own.
        start: Readout and width of the feature that a head of class names reads; None for no such head.

    Shape:
        taps: mapping of name to what `needs` names; answers `b C`.

    Attributes:
        name: Of the tap by which answers to rows left out are handed in; see `fit`.
        sums: That it was solved from in this process; None of one that was loaded, copied or sent.
        left_out_accuracy: Of the kept rows of these.

    Cost: `C (f + 1)` numbers that are solved for and kept with the task (buffers: no gradient), f
    about `(4 L + 42) d` for L taps; the pass holds `Sums`, and the solution is that of `solution.solve`.
    Start: it has no answers until `prepare` has solved it, which training does first.
    Reference: not in the paper. Leave-one-out residuals of ridge regression: Allen 1974. A penalty of its
    own for each group of features: banded ridge (Nunez-Elizalde et al. 2019). Pooled features of several
    layers: Head2Toe (Evci et al. 2022).

    Raises:
        TunerShapeError: No taps, not a width for each, or a block of no such tap.
        TrainingError: It is asked before it is solved.
    """

    start_weight: Tensor
    start_bias: Tensor
    # By u and v. A temperature on top changed its cross-entropy on test splits by less than 1 % on average, and
    # one fitted to 30 examples raised it on four of five tasks (`recipes/calibration.json`, measured when all
    # blocks counted alike).
    calibrated = True

    def __init__(
        self,
        taps: Sequence[str],
        dims: Sequence[int],
        classes: int,
        *,
        token: Token | None = "cls",
        grid: bool = True,
        blocks: Sequence[Sequence[str]] | None = None,
        weighted: bool = False,
        start: Sequence[str | int] | None = None,
    ) -> None:
        super().__init__()
        if not len(taps) == len(dims) > 0:
            raise TunerShapeError(
                "a closed-form classifier needs a width for every tap",
                found=f"{len(taps)} taps, {len(dims)} widths",
                fix="give as many of both",
            )
        self.taps, self.dims, self.classes = tuple(taps), tuple(dims), classes
        self.token: Token | None = token
        self.grid, self.weighted = grid, weighted
        self.blocks = None if blocks is None else [_check_block(b, self.taps) for b in blocks]
        self.start: tuple[str, int] | None = None
        if start is not None:
            if len(start) != 2 or not isinstance(start[1], int) or start[1] < 1:
                raise TunerShapeError(
                    "a closed-form classifier starts from a head on one feature",
                    found=f"start={list(start)}",
                    fix="give its readout and its width",
                )
            self.start = parse_pool(str(start[0])), start[1]
            self.register_buffer("start_weight", torch.zeros(classes, self.start[1]))
            self.register_buffer("start_bias", torch.zeros(classes))
        self._read, self.kinds = self._plan_blocks()
        self.register_buffer("weight", torch.zeros(classes, sum(self.kinds)))
        self.register_buffer("bias", torch.zeros(classes))
        self.sums: Sums | None = None
        self.left_out_accuracy: float | None = None

    @torch.no_grad()
    def start_from(self, head: nn.Linear) -> None:
        """Take a head of this `start`'s width as what is known before any row; it is copied."""
        self.start_weight.copy_(head.weight)
        self.start_bias.copy_(head.bias)
        # What it answers is the last block of z: passed on, it is the answer before the solution.
        self.weight.zero_()[:, -self.classes :] = torch.eye(self.classes)
        self.bias.zero_()

    def _plan_blocks(self) -> tuple[list[Block], tuple[int, ...]]:
        """What is read in order, and how many numbers stand together and count alike."""
        read, sizes = self._plan_parts()
        return read, sizes if self.start is None else (*sizes, self.classes)

    def _plan_parts(self) -> tuple[list[Block], tuple[int, ...]]:
        width = dict(zip(self.taps, self.dims, strict=True))
        if self.blocks is not None:
            sizes = (2 * BINS * width[t] if p == "places" else width[t] for p, t in self.blocks)
            return self.blocks, tuple(sizes)
        tokens: list[Block] = [("token", tap) for tap in self.taps] if self.token else []
        middle = self.taps[(len(self.taps) - 1) // 2]
        places: list[Block] = [("places", middle)] if self.grid else []
        kinds = [sum(self.dims)] * (2 if self.token else 1)
        kinds += [2 * BINS * width[middle]] if self.grid else []
        return [*tokens, *[("mean", tap) for tap in self.taps], *places], tuple(kinds)

    @property
    def name(self) -> str:
        """Name of the tap under which answers to left-out rows are handed in."""
        return f"ridge of {' '.join(self.taps)}"

    @property
    def prepared_taps(self) -> Mapping[str, tuple[int, ...]]:
        """The answers to left-out rows, one number a class."""
        return {self.name: (self.classes,)}

    def spec(self) -> dict[str, Any]:
        """Everything needed to build it again, as JSON; what files of before had is written as they have it."""
        spec = super().spec()
        if self.blocks is None:
            del spec["blocks"]
        if not self.weighted:
            del spec["weighted"]
        if self.start is None:
            del spec["start"]
        return spec

    def needs(self, pool: str) -> Needs:
        """The parts of taps that its blocks are of, and one token or vector of each where it reads that."""
        names = tuple(dict.fromkeys(self._name_of(block) for block in self._read))
        names += () if self.start is None else (f"{FEATURE}/{self.start[0]}",)
        own = resolve_tokens(pool) == "pool"
        return Needs(names, "pool" if own else "last" if self.token == "last" else "cls")

    def _name_of(self, block: Block) -> str:
        part, tap = block
        # Files of before that read neither token nor places are of backbones that pool by themselves.
        pooled = self.blocks is None and self.token is None and not self.grid
        if part in ("token", "vector") or pooled:
            return tap
        return f"{tap}/{part if part == 'places' else 'patches' if self.grid else 'tokens'}"

    def inputs(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Compute the inputs z of the classifier, `b f`. The taps are detached first.

        Raises:
            MissingInputError: A part that it reads is not among the taps.
        """
        # A bank may hand in all tokens, where another task reads them.
        mask = getattr(taps, "mask", None)
        parts = [
            self._read_block(block[0], self._take(taps, self._name_of(block)), mask)
            for block in self._read
        ]
        if self.start is not None:
            feature = self._take(taps, f"{FEATURE}/{self.start[0]}").flatten(1)
            parts.append(F.linear(feature, self.start_weight, self.start_bias))
        return torch.cat(parts, -1)

    def _take(self, taps: Mapping[str, Tensor], name: str) -> Tensor:
        if name not in taps:
            raise MissingInputError(
                "a classifier in closed form reads parts of taps",
                where=name,
                found=f"{len(taps)} taps without it: {', '.join(list(taps)[:3])} ...",
                fix="keep what the task needs: host.features(x, keep=task.needs(host.readout_rule))",
            )
        return taps[name].detach().to(self.weight.dtype)

    def _read_block(self, part: str, value: Tensor, mask: Tensor | None) -> Tensor:
        if part == "token":
            # Of a map, one of its places.
            value = take_one_token(value.flatten(1, -2), self.token or "cls", mask)
        if part == "places":
            # Bins of a channel side by side, means over rows before those over columns.
            return value.unflatten(1, (2, BINS)).mT.flatten(1)
        if part in _ROWS and value.shape[1] > 1:
            return value[:, _ROWS[part]]
        return F.layer_norm(value[:, 0], value.shape[-1:])

    def forward(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Logits; those of rows left out where they were handed in under `name`.

        Raises:
            TrainingError: It is not solved yet.
        """
        if self.name in taps:
            return taps[self.name].to(self.weight.dtype)
        self.check_solved()
        return F.linear(self.inputs(taps), self.weight, self.bias)

    def solve(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Solve for all rows in one pass, which holds `Sums` of them; `sums` then has these.

        Every process of a launcher reads its share; sums are added, and all end with one solution.

        Returns:
            What the rows that are kept would be answered had each been left out, `k C`, and their labels, `k`, or
            targets.

        Raises:
            TunerShapeError: A label beyond the classes, or fewer than two rows.
            TrainingError: More rows than features, and the products of these do not fit into memory.
        """
        solution = self.solve_sums(self._collect(rows, []))
        return solution.left_out.to(self.weight.dtype), solution.targets

    def prepare(self, rows: Rows) -> Mapping[str, Tensor]:
        """Solve for all rows, and return under `name` what each would be answered if left out.

        Cost: of more rows than are kept (`Sums`) a second reading of them; `solve` does without.

        Raises:
            TrainingError: There are more, and they can be read once only.
        """
        batches: list[_Batch] = []
        solution = self.solve_sums(self._collect(rows, batches))
        shared = isinstance(rows, SharedRows)
        count = len(rows) if shared else sum(len(labels) for _, labels, _ in batches)
        answers = solution.left_out.new_zeros(count, self.classes)
        kept = {name: n for n, name in enumerate(_names(solution.kept.labels, solution.kept.keys))}
        others: set[int] = set()
        for numbers, labels, keys in batches:
            for number, name in zip(numbers, _names(labels, keys), strict=True):
                if name in kept:
                    answers[number] = solution.left_out[kept[name]]
                else:
                    others.add(number)
        # The same answer on every process, or some would read again and wait for the others.
        if solution.count > len(solution.kept.keys):
            if iter(rows) is rows:
                raise TrainingError(
                    "rows that are not kept have to be read a second time",
                    found=f"{solution.count:,} rows, {len(solution.kept.keys):,} of them kept, and an "
                    "iterator that ends",
                    fix="give what can be iterated over again, such as a list or a data set; "
                    "Ridge.solve needs no second reading",
                )
            for numbers, taps, labels in read_share(rows):
                left = [n for n, number in enumerate(numbers) if number in others]
                if left:
                    z = self.inputs(self._without_answers(taps))[left]
                    at = [numbers[n] for n in left]
                    answers[at] = solution.leave_out(z, self._targets(labels)[left])
        if shared and rows.together:
            torch.distributed.all_reduce(answers)
        return {self.name: answers.to(self.weight.dtype)}

    def fit(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Solve for all rows; what each row would be answered if it were left out, `n C`.

        Args:
            inputs: `n f`, of `inputs`.
            labels: `n`, from 0 to C - 1.

        Raises:
            TunerShapeError: A label beyond the classes, or fewer than two rows.
        """
        labels = self._targets(labels)
        sums, keys = self._new_sums(), keys_of_numbers(range(len(labels)))
        sums.add(inputs, labels, keys)
        solution = self.solve_sums(sums)
        answers = torch.cat(
            [
                solution.leave_out(*part)
                for part in zip(inputs.split(FITTED), labels.split(FITTED), strict=True)
            ]
        )
        kept = {key: n for n, key in enumerate(keys.tolist())}
        answers[[kept[key] for key in solution.kept.keys.tolist()]] = solution.left_out
        return answers.to(self.weight.dtype)

    @torch.no_grad()
    def solve_sums(self, sums: Sums) -> Solution:
        """Take the solution from sums that are there, of `inputs` of this network; see `solution.solve`.

        Raises:
            TunerShapeError: They are of other classes or features, or of fewer than two rows.
        """
        columns = not self.problem.one_hot
        if (sums.width, sums.classes, sums.columns) != (sum(self.kinds), self.classes, columns):
            raise TunerShapeError(
                "sums of other inputs",
                found=f"{sums.width} features and {sums.classes} classes, here {sum(self.kinds)} and "
                f"{self.classes}",
                fix="give sums that were made by a classifier of this spec",
            )
        solution = solve(
            sums,
            self.kinds,
            weighted=self.weighted,
            problem=self.problem,
            started=self.start is not None,
        )
        # Rounded where they are: not every device that a task runs on knows double precision.
        self.weight.copy_(solution.weight.to(self.weight.dtype))
        self.bias.copy_(solution.bias.to(self.bias.dtype))
        self.marked_solved, self.sums, self.left_out_accuracy = True, sums, solution.accuracy
        return solution

    @property
    def weighs(self) -> bool:
        """Of one class of several, where a row has one weight for all columns."""
        return self.problem.one_hot

    def _new_sums(self) -> Sums:
        return Sums(
            sum(self.kinds),
            self.classes,
            dtype=self.weight.dtype,
            device=self.device_of_sums,
            columns=not self.problem.one_hot,
            weights=self.class_weights,
        )

    def _targets(self, labels: Tensor) -> Tensor:
        """Labels as sums take them."""
        return labels if self.problem.one_hot else self.problem.columns(labels, self.classes)

    @torch.no_grad()
    def _collect(self, rows: Rows, batches: list[_Batch]) -> Sums:
        """Sums of all rows, in one reading; `batches` takes what is small of it."""
        sums = self._new_sums()
        known = rows.keys if isinstance(rows, SharedRows) else None
        for numbers, taps, labels in read_share(rows):
            keys = keys_of_numbers(numbers) if known is None else known[list(numbers)]
            labels = self._targets(labels)
            sums.add(self.inputs(self._without_answers(taps)), labels, keys)
            batches.append((numbers, labels, keys))
        if isinstance(rows, SharedRows) and rows.together:
            sums.add_over_processes()
        return sums

    def _without_answers(self, taps: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: tap for name, tap in taps.items() if name != self.name}

    def __getstate__(self) -> dict[str, Any]:
        """For copies and other processes: without the sums, which may be gigabytes."""
        return {**vars(self), "sums": None}


def _names(labels: Tensor, keys: Tensor) -> list[tuple[int, Any]]:
    """Rows of one key and label have one answer."""
    named = labels.tolist() if labels.ndim == 1 else map(tuple, labels.tolist())
    return list(zip(keys.tolist(), named, strict=True))


def _check_block(block: Sequence[str], taps: Sequence[str]) -> Block:
    part, tap = block
    if part not in ("token", "vector", "places", *_ROWS) or tap not in taps:
        raise TunerShapeError(
            "a closed-form classifier cannot read this",
            found=f"{part} of {tap}",
            fix=f"give one of token, vector, places, {', '.join(_ROWS)}, of one of its taps",
        )
    return part, tap
