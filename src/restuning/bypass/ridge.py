"""A linear classifier on pooled taps, solved in closed form, and its answers to rows left out.

Training takes no step. What it would have said of a training row without that row follows from the
same solution, so what is trained after it (a head, a side network) learns from honest answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import MissingInputError, TrainingError, TunerShapeError
from restuning.bypass.pooling import Token
from restuning.bypass.side_network import Rows, SideNetwork, side_network
from restuning.sites import Needs, resolve_tokens, take_one_token
from restuning.tuners import BINS

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Penalties on the squared weights that are tried; the squared length of an input is about 1."""
SCALES = tuple(2.0 ** (k / 2) for k in range(15))
"""Factors that are tried to turn answers between 0 and 1 into logits: from 1 to 128."""
WEIGHED_ROWS, WEIGHT_STEPS, WEIGHT_RATE, TOGETHER, INTERCEPT = 1024, 20, 0.3, 500.0, 10.0
"""Of the weights of blocks, see `learn_weights`. How strongly they are drawn together was chosen where random labels
teach nothing, with an eye on six of the shared tasks, by scripts that are not kept (`docs/mixing.md`)."""
MOST_ROWS = 8192
"""Rows that are solved for: 0.5 GiB of products between them. Others are answered as new rows are."""


Block = tuple[str, str]
"""What is read of a tap, and the tap: ("mean", "block.3")."""

_ROWS = {"mean": 0, "largest": 1, "deviation": 2}
"""Rows of the parts "patches" and "tokens" of a tap."""


@side_network("ridge")
class Ridge(SideNetwork):
    r"""`tau (W z + b)` with `W, b = argmin sum_i |W z_i + b - y_i|^2 + a |W|^2`, y one-hot.

    z is made of blocks, each of one tap with tokens normalised (no parameters): a token, the mean, the
    largest values or the deviation of the others, or on a grid the means along rows and columns (7 bins
    each; a mean forgets where things are). Each number is divided by its deviation and each block by its
    size; with `weighted`, block k is multiplied by `sqrt(w_k)`, w the weights with the lowest
    cross-entropy of rows left out (`learn_weights`). The penalty a and the scale tau have the lowest
    cross-entropy of rows left out as well; no validation split is read.

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

    Shape:
        taps: mapping of name to what `needs` names; answers `b C`.

    Attributes:
        name: Of the tap by which answers to rows left out are handed in; see `fit`.

    Cost: `f (C + 2) + C` numbers that are solved for and kept with the task (buffers: no gradient), f
    about `(4 L + 42) d` for L taps; the solution takes min(n, f)^3 operations, a second for 1000 rows,
    and the weights those of `learn_weights`.
    Start: it has no answers until `prepare` has solved it, which training does first.
    Reference: not in the paper. Leave-one-out residuals of ridge regression: Allen 1974. A penalty of its
    own for each group of features: banded ridge (Nunez-Elizalde et al. 2019). Pooled features of several
    layers: Head2Toe (Evci et al. 2022).

    Raises:
        TunerShapeError: No taps, not a width for each, or a block of no such tap.
        TrainingError: It is asked before it is solved.
    """

    weight: Tensor
    bias: Tensor
    # By tau. A temperature on top changed its cross-entropy on test splits by less than 1 % on average, and
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
        self._read, self.kinds = self._plan_blocks()
        self.register_buffer("weight", torch.zeros(classes, sum(self.kinds)))
        self.register_buffer("bias", torch.zeros(classes))
        self._solved = False

    def _plan_blocks(self) -> tuple[list[Block], tuple[int, ...]]:
        """What is read in order, and how many numbers stand together and count alike."""
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
    def solved_parameters(self) -> int:
        """How many weights and biases are solved for."""
        return self.weight.numel() + self.bias.numel()

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
        return spec

    def needs(self, pool: str) -> Needs:
        """The parts of taps that its blocks are of, and one token or vector of each where it reads that."""
        names = tuple(dict.fromkeys(self._name_of(block) for block in self._read))
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
        mask, parts = getattr(taps, "mask", None), []
        for block in self._read:
            name = self._name_of(block)
            if name not in taps:
                raise MissingInputError(
                    "a classifier in closed form reads parts of taps",
                    where=name,
                    found=f"{len(taps)} taps without it: {', '.join(list(taps)[:3])} ...",
                    fix="keep what the task needs: "
                    "host.features(x, keep=task.needs(host.readout_rule))",
                )
            value = taps[name].detach().to(self.weight.dtype)
            parts.append(self._read_block(block[0], value, mask))
        return torch.cat(parts, -1)

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
        self._check_solved()
        return F.linear(self.inputs(taps), self.weight, self.bias)

    def feature(
        self, taps: Mapping[str, Tensor], readout: Callable[..., Tensor], pool: str | None
    ) -> Tensor:
        """The feature is the logits themselves, which the head weighs."""
        return self(taps)

    def widen(self, head: nn.Linear) -> nn.Linear:
        """A head of the same classes that starts by passing the logits on."""
        passed = nn.Linear(self.classes, head.out_features)
        nn.init.eye_(passed.weight)
        nn.init.zeros_(passed.bias)
        return passed

    def _check_solved(self) -> None:
        # Read off the numbers: so it is right after any way of loading them, and in old files.
        # The bias alone would do: it is zero of no data that have labels.
        if not self._solved and not bool(self.weight.any() or self.bias.any()):
            raise TrainingError(
                "a classifier in closed form was asked before it was solved",
                where=self.kind,
                found="weights that are all zero",
                fix="train its task with restuning.fit, which solves it first, or load one that "
                "was trained; a loop of your own calls restuning.training.prepare before",
            )
        self._solved = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # A file may hold a solution or none. On meta there are no numbers to look at.
        self._solved = not self.bias.is_meta and bool(self.weight.any() or self.bias.any())

    def prepare(self, rows: Rows) -> Mapping[str, Tensor]:
        """Solve for all rows, and return under `name` what each would be answered if left out."""
        inputs, labels = [], []
        for taps, truth in rows:
            inputs.append(self.inputs({n: tap for n, tap in taps.items() if n != self.name}))
            labels.append(truth)
        return {self.name: self.fit(torch.cat(inputs), torch.cat(labels))}

    @torch.no_grad()
    def fit(self, inputs: Tensor, labels: Tensor) -> Tensor:
        r"""Solve for all rows; what each row would be answered if it were left out, `n C`.

        With `U S U^T` the Gram matrix of centred inputs, answers are `m + U (S / (S + a)) U^T (y - m)`, a
        row's own share in its answer is `h = 1/n + sum_k U_k^2 S_k / (S_k + a)`, and left out it is
        `y - (y - answer) / (1 - h)`.

        Args:
            inputs: `n f`, of `inputs`.
            labels: `n`, from 0 to C - 1.

        Raises:
            TunerShapeError: A label beyond the classes, or fewer than two rows.
        """
        if len(labels) < 2 or int(labels.max()) >= self.classes or int(labels.min()) < 0:
            raise TunerShapeError(
                "a closed-form classifier cannot be solved",
                found=f"{len(labels)} rows, labels "
                f"{labels.unique().tolist()[:6]}, {self.classes} classes",
                fix="give two rows or more and labels from 0 to classes - 1",
            )
        if len(labels) > MOST_ROWS:
            # A generator of its own: the same rows whatever was drawn before.
            draw = torch.Generator().manual_seed(0)
            rows = torch.randperm(len(labels), generator=draw)[:MOST_ROWS].sort().values
            left_out = self.fit(inputs[rows], labels[rows])
            answers = F.linear(inputs, self.weight, self.bias)
            return answers.index_copy(0, rows.to(answers.device), left_out)
        # In double: directions down to 1e-12 of the largest are kept, below what fp32 resolves. One copy
        # that is written in place: it is the largest thing here.
        z = inputs.to(torch.double, copy=True)
        centre, deviation = z.mean(0), z.std(0)
        # So that each kind has the same squared length, however many numbers it is made of.
        parts = torch.cat([z.new_full((k,), float(k)) for k in self.kinds])
        # A number that never changes says nothing; dividing by its deviation would say noise.
        scale = torch.where(deviation > 1e-6, 1 / (deviation * parts.sqrt()), 0.0)
        z.sub_(centre).mul_(scale)
        shares = z.new_full((len(self.kinds),), 1 / len(self.kinds))
        if self.weighted and len(self.kinds) > 1:
            shares = learn_weights(z, self.kinds, labels.to(z.device), self.classes)
        share = torch.cat([shares[n].expand(k) for n, k in enumerate(self.kinds)]).sqrt()
        z.mul_(share)
        scale = scale * share
        values, vectors = _decompose(z)
        truth = F.one_hot(labels.to(z.device), self.classes).to(z.dtype)
        middle = truth.mean(0)
        projected = vectors.T @ (truth - middle)
        best, chosen = math.inf, (PENALTIES[0], SCALES[0], truth)
        for penalty in PENALTIES:
            shrink = values / (values + penalty)
            answers = middle + vectors @ (shrink[:, None] * projected)
            leverage = 1 / len(z) + vectors.square() @ shrink
            # Allen's identity: no second solution for the row that is left out.
            left_out = truth - (truth - answers) / (1 - leverage)[:, None]
            for tau in SCALES:
                loss = float(F.cross_entropy(tau * left_out, labels.to(z.device)))
                if loss < best:
                    best, chosen = loss, (penalty, tau, left_out)
        penalty, tau, left_out = chosen
        solved = tau * (z.T @ (vectors @ (projected / (values + penalty)[:, None]))).T * scale
        self._solved = True
        self.weight.copy_(solved)
        self.bias.copy_(tau * middle - solved @ centre)
        return (tau * left_out).to(self.weight.dtype)


def _check_block(block: Sequence[str], taps: Sequence[str]) -> Block:
    part, tap = block
    if part not in ("token", "vector", "places", *_ROWS) or tap not in taps:
        raise TunerShapeError(
            "a closed-form classifier cannot read this",
            found=f"{part} of {tap}",
            fix=f"give one of token, vector, places, {', '.join(_ROWS)}, of one of its taps",
        )
    return part, tap


def learn_weights(z: Tensor, kinds: Sequence[int], labels: Tensor, classes: int) -> Tensor:
    r"""A weight for each block of inputs, from the cross-entropy of rows left out; they sum to 1.

    With `K = sum_k w_k Z_k Z_k^T` and `M = (K + c + 1)^-1` (c lets the intercept go unpenalised), the
    answer to a row left out is `y_i - (M y)_i / M_ii`. Its cross-entropy, with answers times a scale, plus
    `500 / (n log C)` times the variance of `log w`, is minimised over `log w` and the scale by 20 steps of Adam.
    Drawn together so, weights learn next to nothing from random labels (`tests/laws/test_ridge.py`); free
    ones do, and would make answers to rows left out look better than they are.

    Args:
        z: `n f`, centred, each block of squared length about 1.
        kinds: Sizes of the blocks.
        labels: `n`.
        classes: C.

    Cost: 20 times about `3 n^3` operations in fp32 and `blocks n^2` numbers of memory, of at most 1024 rows.
    """
    if len(z) > WEIGHED_ROWS:
        draw = torch.Generator().manual_seed(0)
        rows = torch.randperm(len(z), generator=draw)[:WEIGHED_ROWS].sort().values.to(z.device)
        z, labels = z[rows], labels[rows]
    rows = len(z)
    # Of few rows and few classes there is little to learn from: a label tells log C.
    together = TOGETHER / (rows * math.log(max(2, classes)))
    blocks = torch.stack([(b @ b.mT).flatten() for b in z.float().split(list(kinds), 1)])
    truth = F.one_hot(labels, classes).to(blocks.dtype)
    # Together they weigh 1 / 0.3: a penalty of 0.3 where each has a squared length of 1.
    logs = blocks.new_full((len(kinds),), -math.log(0.3 * len(kinds)))
    scale = blocks.new_full((1,), math.log(23.0))
    steps = torch.optim.Adam([logs, scale], lr=WEIGHT_RATE, betas=(0.9, 0.95))
    for step in range(WEIGHT_STEPS):
        logs.grad, scale.grad = find_gradient(blocks, logs, scale, truth)
        logs.grad += 2 * together * (logs - logs.mean()) / len(kinds)
        for group in steps.param_groups:
            group["lr"] = WEIGHT_RATE * (1 + math.cos(math.pi * step / WEIGHT_STEPS)) / 2
        steps.step()
    return logs.double().softmax(0)


def find_gradient(
    blocks: Tensor, logs: Tensor, scale: Tensor, truth: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the mean cross-entropy of rows left out, by `log w` and by the log of the scale.

    By hand: preparation runs without a graph, and this needs one product of two `n n` where autograd
    through an inverse needs several.

    Args:
        blocks: `B n*n`, products of rows, one a block.
        logs: `B`.
        scale: `1`.
        truth: `n C`, one-hot.
    """
    weights, rows = logs.exp(), len(truth)
    kernel = (weights @ blocks).view(rows, rows) + INTERCEPT
    kernel.diagonal().add_(1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(kernel))
    solved, own = inverse @ (truth - truth.mean(0)), inverse.diagonal()
    left_out = truth - solved / own[:, None]
    tau = scale.exp()
    by_answer = tau * ((tau * left_out).softmax(1) - truth) / rows
    # From answers left out to the kernel, and from there to its weights.
    by_own = (by_answer * solved).sum(1) / own.square()
    by_kernel = (inverse @ (by_answer / own[:, None])) @ solved.mT - (inverse * by_own) @ inverse
    return weights * (blocks @ by_kernel.flatten()), (by_answer * left_out).sum().view(1)


def _decompose(z: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (`r`) and eigenvectors (`n r`) of `z z^T`, from the smaller of the two products."""
    if len(z) <= z.shape[1]:
        values, vectors = torch.linalg.eigh(z @ z.T)
        return values.clamp(min=0), vectors
    # If v is an eigenvector of z^T z with value s, z v / sqrt(s) is one of z z^T with the same.
    values, turned = torch.linalg.eigh(z.T @ z)
    nonzero = values > values[-1] * 1e-12
    return values[nonzero], z @ (turned[:, nonzero] / values[nonzero].sqrt())
