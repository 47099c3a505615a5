"""A linear map of patches, solved in closed form: a class or a number for every place of an image, from one pass.

What each patch would be answered without its image chooses the penalty: patches of one image are alike, so one that is
left out alone is known by its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from restuning._errors import TrainingError, TunerShapeError
from restuning._grid import to_grid
from restuning.bypass.closed_form import ClosedForm
from restuning.bypass.side_network import Rows, SharedRows, read_share, side_network
from restuning.bypass.sums import gather, keys_of_numbers, refuse_too_wide, sum_over_processes
from restuning.problems import SCALES, OfPixels
from restuning.sites import Needs

PENALTIES = (0.01, 0.1, 1.0, 10.0)
"""On the squared weights; the squared length of an input is about 1."""
SHARES = 3
"""Shares of images, each of which is answered by a solution of the others."""
KEPT = 64
"""Images that are kept to choose on."""
PLACES = 16384
"""Of these images at most on which it is chosen."""
MAP_STEPS = 60
"""At most, of L-BFGS."""
TOGETHER = 8
"""Images whose products are made at a time."""


class _Kept(NamedTuple):
    """Images to choose on, by key: inputs `k h w f`, targets, shares, keys."""

    inputs: Tensor
    targets: Tensor
    shares: Tensor
    keys: Tensor


@side_network("grid-ridge")
class GridRidge(ClosedForm):
    r"""`V x + c` of `x = W z + b` at every place, with `W, b = argmin sum |W z + b - y|^2 + a |W|^2`.

    z are the tokens that a place has in several taps, each normalised (no parameters); y the shares that classes have of
    its pixels, or the mean of its numbers. Places of which nothing is known do not count. Of classes V and c read the answers together, with the lowest cross-entropy
    at places of images left out: least squares alone hardly answers classes of few pixels. So has the penalty; of numbers it has the lowest loss of the problem, and there are no V and c. There are three solutions for it, each without a
    third of the images.

    With weights of classes (`weigh`) a place counts by the mean weight of its pixels, as if it were there so often, and a
    pixel by its own in the losses that choose.

    Args:
        taps: Names of those that are read, in order.
        dims: Their widths.
        classes: C, or 1 of numbers.
        parts: k: each place is answered in k by k parts, with a W of its own for each. Tokens know more of edges than one
            answer a patch can say.

    Shape:
        taps: mapping of name to `b n d_l`, or `b h w d_l` on maps, which are brought to the finest grid among them.
        Answers `b kh kw C`.

    Cost: `k^2 C (f + 1)` numbers, `f = sum_l d_l`; the pass takes `f^2` operations a patch and holds three matrices `f f` in
        double, the end twelve factors of one, `4 f^3` operations, and three matrices more.
    Start: it has no answers until training has solved it.
    Reference: not in the paper; as `Ridge`.

    Raises:
        TunerShapeError: No taps, or not a width for each.
        TrainingError: It is asked before it is solved.
    """

    calibrated = True

    def __init__(
        self, taps: Sequence[str], dims: Sequence[int], classes: int, parts: int = 1
    ) -> None:
        super().__init__()
        if not len(taps) == len(dims) > 0:
            raise TunerShapeError(
                "a classifier of patches needs a width for every tap",
                found=f"{len(taps)} taps, {len(dims)} widths",
                fix="give as many of both",
            )
        if parts < 1:
            raise TunerShapeError("places have parts", found=f"parts={parts}", fix="give 1 or more")
        self.taps, self.dims, self.classes, self.parts = tuple(taps), tuple(dims), classes, parts
        self.register_buffer("weight", torch.zeros(classes * parts**2, sum(dims)))
        self.register_buffer("bias", torch.zeros(classes * parts**2))
        # By share: weight and bias of a solution that has not seen it.
        self._without: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def weighs(self) -> bool:
        """Always: a place has one weight for all columns."""
        return True

    def needs(self, pool: str) -> Needs:
        """All tokens of its taps, whatever else the backbone is read by."""
        return Needs(self.taps)

    def inputs(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Compute the inputs z, `b h w f`. The taps are detached first."""
        maps = [to_grid(taps[name].detach()).to(self.weight.dtype) for name in self.taps]
        maps = [F.layer_norm(each, each.shape[-1:]) for each in maps]
        finest = max((each.shape[1:3] for each in maps), key=math.prod)
        return torch.cat([_bring_to(each, finest) for each in maps], -1)

    def forward(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Logits, `b h w C`; of images whose share was handed in under `name` by a solution without it.

        Raises:
            TrainingError: It is not solved yet.
        """
        inputs = self.inputs(taps)
        if self.name not in taps:
            self.check_solved()
            return self._lay_out(F.linear(inputs, self.weight, self.bias))
        if not self._without:
            raise TrainingError(
                "images are asked for as if they had been left out, and nothing was solved without them",
                where=self.kind,
                fix="prepare it first: restuning.training.prepare",
            )
        shares = taps[self.name][:, 0].long()
        answers = inputs.new_zeros(*inputs.shape[:3], len(self.bias))
        for share in shares.unique().tolist():
            own, without = shares == share, self._without[share]
            answers[own] = F.linear(inputs[own], *(each.to(inputs) for each in without))
        return self._lay_out(answers)

    @property
    def name(self) -> str:
        """Name of the tap under which the share of an image is handed in; see `prepare`."""
        return f"grid-ridge of {' '.join(self.taps)}"

    @property
    def prepared_taps(self) -> Mapping[str, tuple[int, ...]]:
        """The share of an image."""
        return {self.name: (1,)}

    def prepare(self, rows: Rows) -> Mapping[str, Tensor]:
        """Solve for all images, and return under `name` the share of each, by which it is answered as if left out.

        Cost: three solutions more, which are held in memory and not kept with the task.
        """
        self._solve_rows(rows, leave_out=True)
        shared = isinstance(rows, SharedRows)
        count = len(rows) if shared else sum(len(targets) for _, targets in rows)
        shares = _deal_shares(torch.arange(count), rows.keys if shared else None)
        return {self.name: shares.float().unsqueeze(1)}

    @torch.no_grad()
    def solve(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Solve for all images in one pass.

        Every process of a launcher reads its share; sums are added, and all end with one solution.

        Returns:
            What `KEPT` of the images would be answered had they been left out, `k h w C`, and their targets.

        Raises:
            TunerShapeError: Fewer than two images, or none with a class to choose on.
            TrainingError: The products do not fit into memory.
        """
        return self._solve_rows(rows)

    @torch.no_grad()
    def _solve_rows(self, rows: Rows, leave_out: bool = False) -> tuple[Tensor, Tensor]:
        products, with_truth, kept = self._collect(rows)
        if isinstance(rows, SharedRows) and rows.together:
            products, with_truth = sum_over_processes(products), sum_over_processes(with_truth)
            kept = _keep([_Kept(*each) for each in zip(*map(gather, kept), strict=True)])
        if len(kept.keys.unique()) < 2:
            raise _cannot_solve(f"{len(kept.keys)} images")
        whole = products.sum(0), with_truth.sum(0)
        scale = _find_scale(whole[0])
        best, chosen = (_Reading(math.inf, *whole), PENALTIES[0]), kept.inputs
        for penalty in PENALTIES:
            answers = kept.inputs.new_zeros(*kept.inputs.shape[:3], len(self.bias))
            for share in kept.shares.unique().tolist():
                others = whole[0] - products[share], whole[1] - with_truth[share]
                weight, bias = _solve(*others, scale, penalty)
                own = kept.shares == share
                answers[own] = kept.inputs[own] @ weight.to(answers.dtype) + bias.to(answers.dtype)
            answers = self._lay_out(answers)
            reading = self._read(answers, kept)
            if reading.loss < best[0].loss:
                best, chosen = (reading, penalty), answers
        reading, penalty = best
        if math.isinf(reading.loss):
            raise _cannot_solve("answers that are not finite")
        weight, bias = _solve(*whole, scale, penalty)
        weight, bias = self._join(weight, bias, reading.weight, reading.bias)
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        self.marked_solved, self._without = True, {}
        left_out = torch.zeros_like(chosen, dtype=torch.double)
        for share in range(SHARES):
            # Nor is what reads its answers fitted to the share.
            read, added = reading.without.get(share, (reading.weight, reading.bias))
            own = kept.shares == share
            left_out[own] = chosen[own].double() @ read.T + added
            if leave_out:
                others = whole[0] - products[share], whole[1] - with_truth[share]
                self._without[share] = self._join(*_solve(*others, scale, penalty), read, added)
        return left_out.to(self.weight.dtype), kept.targets

    def _join(
        self, weight: Tensor, bias: Tensor, read: Tensor, added: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weight and bias of one map: a solution, `f k^2 C` and `k^2 C`, and what reads its answers, `C C` and `C`."""
        # Classes come first, then the parts of a place, as in a sub-pixel convolution.
        of_parts = weight.T.unflatten(0, (self.classes, -1)), bias.unflatten(0, (self.classes, -1))
        joined = torch.einsum("cd,dpf->cpf", read, of_parts[0]).flatten(0, 1)
        moved = (read @ of_parts[1] + added[:, None]).flatten()
        return joined.to(self.weight.dtype), moved.to(self.bias.dtype)

    def _collect(self, rows: Rows) -> tuple[Tensor, Tensor, _Kept]:
        """Sums of every share, `s f+1 f+1` and `s f+1 C`, and the images that are kept, in one reading."""
        device = self.device_of_sums
        width = sum(self.dims) + 1
        refuse_too_wide(width, device)
        products = torch.zeros(SHARES, width, width, dtype=torch.double, device=device)
        with_truth = torch.zeros(SHARES, width, len(self.bias), dtype=torch.double, device=device)
        known = rows.keys if isinstance(rows, SharedRows) else None
        kept: list[_Kept] = []
        for numbers, taps, targets in read_share(rows):
            at = torch.tensor(list(numbers))
            keys = keys_of_numbers(numbers) if known is None else known[at]
            shares = _deal_shares(at, known)
            for part in torch.arange(len(at)).split(TOGETHER):
                z = self.inputs({name: taps[name][part] for name in self.taps}).to(device)
                new = _Kept(z, *(each[part].to(device) for each in (targets, shares, keys)))
                truth, weight = self._weigh(*self._means_of(new.targets, z.shape[1:3]))
                for share in new.shares.unique().tolist():
                    own = new.shares == share
                    x = z[own].flatten(0, 2).double()
                    x = torch.cat([x, x.new_ones(len(x), 1)], 1)
                    y, counts = truth[own].flatten(0, 2), weight[own].flatten()
                    # A place counts by how many of its pixels are known.
                    products[share].addmm_((x * counts[:, None]).T, x)
                    with_truth[share].addmm_(x.T, y)
                if (
                    not kept
                    or len(kept[0].keys) < KEPT
                    or bool((new.keys < kept[0].keys[-1]).any())
                ):
                    kept = [_keep([*kept, new])]
        return products, with_truth, kept[0] if kept else self._keep_none(rows)

    def _keep_none(self, rows: Rows) -> _Kept:
        """What a process keeps for which there was no batch, as others of a launcher have it; it reads one for its shapes."""
        taps, targets = next(iter(rows), (None, None))
        if taps is None or targets is None:
            raise _cannot_solve("no images")
        z = self.inputs({name: taps[name][:1] for name in self.taps})
        none = torch.zeros(0, dtype=torch.long)
        return _Kept(*(each[:0].to(self.device_of_sums) for each in (z, targets, none, none)))

    def _means_of(self, targets: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Of each part of a place the mean of its columns times how much of the place is known, `b h w C k^2`; and that, `b h w`.

        What is unknown is zero: no class, of shares. Of numbers a part of which nothing is known has the mean of its place.
        """
        problem = self.problem
        assert isinstance(problem, OfPixels)
        size = [side * self.parts for side in grid]

        def pool(maps: list[Tensor]) -> Tensor:
            return F.pixel_unshuffle(torch.cat(maps), self.parts).movedim(1, -1)

        means, shares = [], []
        # One by one: a column for each pixel and class of a batch may not fit into memory.
        for each in targets.split(1):
            columns = problem.columns(each, self.classes).nan_to_num_(0.0).movedim(-1, 1)
            known = problem.known(each).to(columns)[:, None]
            means.append(F.adaptive_avg_pool2d(columns, (size[0], size[1])))
            shares.append(F.adaptive_avg_pool2d(known, (size[0], size[1])))
        truth, known = pool(means), pool(shares)
        weight = known.mean(-1)
        if not problem.chooses:
            whole = truth.mean(-1) / torch.where(weight > 0, weight, 1.0)
            own = truth / torch.where(known > 0, known, 1.0)
            truth = torch.where(known > 0, own, whole[..., None]) * weight[..., None]
        return truth, weight

    def _weigh(self, truth: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Means `b h w C k^2` of places, and how much of each is known, times the mean weight of its pixels that have a class."""
        if self.class_weights is None:
            return truth, known
        pixels = truth.unflatten(-1, (self.classes, -1)).sum(-1)
        weights = pixels @ self.class_weights.to(pixels) / pixels.sum(-1).clamp(min=1e-12)
        return truth * weights.unsqueeze(-1), known * weights

    def __getstate__(self) -> dict[str, Any]:
        """For copies and other processes: without solutions for what was left out."""
        return {**vars(self), "_without": {}}

    def _lay_out(self, answers: Tensor) -> Tensor:
        """Parts where they stand, `b h w C k^2 -> b kh kw C`."""
        return F.pixel_shuffle(answers.movedim(-1, 1), self.parts).movedim(1, -1)

    def _read(self, answers: Tensor, kept: _Kept) -> _Reading:
        """How answers to images that were left out, laid out, are best made into logits."""
        problem = self.problem
        assert isinstance(problem, OfPixels)
        if problem.chooses:
            return _read(*self._choose(answers, kept), self.class_weights)
        if not bool(problem.known(kept.targets).any()):
            raise _cannot_solve("no known pixel in the images that are kept")
        same = torch.eye(self.classes, dtype=torch.double, device=answers.device)
        several = zip(answers.split(1), kept.targets.split(1), strict=True)
        loss = sum(float(problem.loss(one, wanted)) for one, wanted in several) / len(answers)
        return _Reading(loss if math.isfinite(loss) else math.inf, same, torch.zeros_like(same[0]))

    def _choose(self, answers: Tensor, kept: _Kept) -> tuple[Tensor, Tensor, Tensor]:
        """Answers at places with a class, `m C` in double, these classes, and the share of each place's image."""
        shares = kept.shares.view(-1, 1, 1, 1).expand(*answers.shape[:3], 1)
        chosen = self.problem.choices(torch.cat([answers, shares], -1).double(), kept.targets)
        if chosen is None:
            raise _cannot_solve("no place with a class in the images that are kept")
        # So many say as much as all; they lie evenly.
        logits, labels = (each[:: -(-len(each) // PLACES)] for each in chosen)
        return logits[:, :-1], labels, logits[:, -1].long()


class _Reading(NamedTuple):
    """How answers are best made into logits, `weight answer + bias`, and the loss of that on images left out.

    `without` has by share such a weight and bias that were not fitted to the share.
    """

    loss: float
    weight: Tensor
    bias: Tensor
    without: Mapping[int, tuple[Tensor, Tensor]] = {}  # noqa: RUF012


def _read(
    answers: Tensor, labels: Tensor, shares: Tensor, weights: Tensor | None = None
) -> _Reading:
    """A scale, or a map of all answers where images that it was not fitted to are answered better with it."""
    same = torch.eye(answers.shape[1], dtype=answers.dtype, device=answers.device)
    weights = None if weights is None else weights.to(answers)
    losses = {scale: float(F.cross_entropy(scale * answers, labels, weights)) for scale in SCALES}
    scale = min(losses, key=lambda each: losses[each])
    plain = _Reading(losses[scale], scale * same, torch.zeros_like(same[0]))
    if not math.isfinite(plain.loss):
        return plain._replace(loss=math.inf)
    total, without = 0.0, {}
    for share in shares.unique().tolist():
        out = shares == share
        weight, bias = _fit_map(answers[~out], labels[~out], scale, weights)
        without[share] = weight, bias
        logits = answers[out] @ weight.T + bias
        total += float(F.cross_entropy(logits, labels[out], weights, reduction="sum"))
    mapped = total / (len(labels) if weights is None else float(weights[labels].sum()))
    if not mapped < plain.loss:
        return plain
    return _Reading(mapped, *_fit_map(answers, labels, scale, weights), without)


def _fit_map(
    answers: Tensor, labels: Tensor, scale: float, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""`argmin (sum_i -log softmax(V x_i + b)[y_i] + |V / s - 1|^2) / n`: near a scale s of what they are."""
    same = torch.eye(answers.shape[1], dtype=answers.dtype, device=answers.device)
    weight, bias = same.clone().requires_grad_(), torch.zeros_like(same[0]).requires_grad_()
    steps = torch.optim.LBFGS([weight, bias], max_iter=MAP_STEPS, line_search_fn="strong_wolfe")

    def find_loss() -> Tensor:
        with torch.enable_grad():
            steps.zero_grad()
            loss = F.cross_entropy(scale * answers @ weight.T + bias, labels, weights)
            loss = loss + (weight - same).square().sum() / max(1, len(labels))
            loss.backward()
        return loss

    steps.step(find_loss)
    return scale * weight.detach(), bias.detach()


def _keep(parts: Sequence[_Kept]) -> _Kept:
    """Those with the lowest keys: a random sample that hangs on no order."""
    keys = torch.cat([part.keys for part in parts])
    lowest = keys.argsort(stable=True)[:KEPT]
    return _Kept(*(torch.cat(each)[lowest] for each in zip(*parts, strict=True)))


def _deal_shares(numbers: Tensor, keys: Tensor | None) -> Tensor:
    """The shares of images by number; what is there twice is of one."""
    if keys is None:
        return numbers % SHARES
    return keys.unique(return_inverse=True)[1][numbers] % SHARES


def _find_scale(products: Tensor) -> Tensor:
    """So that an input has about the squared length 1, `f`."""
    count = products[-1, -1].clamp(min=1)
    variance = products.diagonal()[:-1] / count - (products[-1, :-1] / count).square()
    # A number that never changes says nothing; dividing by its deviation would say noise.
    return torch.where(variance > 1e-12, 1 / (variance * len(variance)).sqrt(), 0.0)


def _solve(
    products: Tensor, with_truth: Tensor, scale: Tensor, penalty: float
) -> tuple[Tensor, Tensor]:
    """Weight, `f C`, and bias, `C`, of inputs as they are."""
    count = products[-1, -1].clamp(min=1)
    mean, middle = products[-1, :-1] / count, with_truth[-1] / count
    system = products[:-1, :-1].addr(mean, mean, alpha=-float(count))
    system.mul_(scale).mul_(scale[:, None]).diagonal().add_(penalty)
    right = (with_truth[:-1] - mean[:, None] * with_truth[-1]) * scale[:, None]
    weight = torch.cholesky_solve(right, torch.linalg.cholesky(system)) * scale[:, None]
    return weight, middle - mean @ weight


def _bring_to(maps: Tensor, grid: Sequence[int]) -> Tensor:
    if maps.shape[1:3] == tuple(grid):
        return maps
    large = F.interpolate(maps.movedim(-1, 1), list(grid), mode="bilinear", align_corners=False)
    return large.movedim(1, -1)


def _cannot_solve(found: str) -> TunerShapeError:
    return TunerShapeError(
        "a classifier of patches cannot be solved",
        found=found,
        fix="give two images or more, with masks of several classes, or with depths",
    )
