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

from restuning._errors import TrainingError, TunerShapeError
from restuning.bypass.pooling import BINS, Token, average_profiles
from restuning.bypass.side_network import Rows, SideNetwork, side_network
from restuning.sites import Needs, average_tokens, resolve_tokens, take_one_token
from restuning.tuners import count_tokens_before_grid

PENALTIES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
"""Penalties on the squared weights that are tried; the squared length of an input is about 1."""
SCALES = tuple(2.0 ** (k / 2) for k in range(15))
"""Factors that are tried to turn answers between 0 and 1 into logits: from 1 to 128."""
MOST_ROWS = 8192
"""Rows that are solved for: 0.5 GiB of products between them. Others are answered as new rows are."""


@side_network("ridge")
class Ridge(SideNetwork):
    r"""`tau (W z + b)` with `W, b = argmin sum_i |W z_i + b - y_i|^2 + a |W|^2`, y one-hot.

    z are, of every tap with tokens normalised (no parameters), a token and the mean of the others, and
    on a grid the means along rows and columns of the middle tap (7 bins each): a mean forgets where
    things are. Each of the three kinds counts alike, each number divided by its deviation. The penalty a
    and the scale tau have the lowest cross-entropy of rows left out; no validation split is read.

    Args:
        taps: Names of those that are read, in order.
        dims: Their widths.
        classes: C.
        token: The token beside the mean, "cls" or "last", or None.
        grid: Whether tokens form a square, after the fewest that leave one.

    Shape:
        taps: mapping of name to `b n d_k`; answers `b C`.

    Attributes:
        name: Of the tap by which answers to rows left out are handed in; see `fit`.

    Cost: `f (C + 2) + C` numbers that are solved for and kept with the task (buffers: no gradient), f
    about `(2 K + 14) d`; the solution takes min(n, f)^3 operations, a second for 1000 rows.
    Start: it has no answers until `prepare` has solved it, which training does first.
    Reference: not in the paper. Leave-one-out residuals of ridge regression: Allen 1974. Pooled features
    of several layers: Head2Toe (Evci et al. 2022).

    Raises:
        TunerShapeError: No taps, or not a width for each.
        TrainingError: It is asked before it is solved.
    """

    weight: Tensor
    bias: Tensor
    # By tau. A temperature on top changed its cross-entropy on test splits by less than 1 % on average, and
    # one fitted to 30 examples raised it on four of five tasks (`recipes/calibration.json`).
    calibrated = True

    def __init__(
        self,
        taps: Sequence[str],
        dims: Sequence[int],
        classes: int,
        *,
        token: Token | None = "cls",
        grid: bool = True,
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
        self.grid, self.middle = grid, (len(taps) - 1) // 2
        kinds = [sum(dims)] * (2 if token else 1) + ([2 * BINS * dims[self.middle]] if grid else [])
        self.kinds = tuple(kinds)
        self.register_buffer("weight", torch.zeros(classes, sum(kinds)))
        self.register_buffer("bias", torch.zeros(classes))
        self._solved = False

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

    def needs(self, pool: str) -> Needs:
        """All tokens of its taps, or one vector of each where the backbone pools by itself."""
        return Needs(self.taps, "pool" if resolve_tokens(pool) == "pool" else "all")

    def inputs(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Compute the inputs z of the classifier, `b f`. The taps are detached first."""
        mask = getattr(taps, "mask", None)
        tokens, means, places = [], [], []
        for number, name in enumerate(self.taps):
            stream = taps[name].detach().to(self.weight.dtype)
            stream = F.layer_norm(stream, stream.shape[-1:])
            rest = stream[:, count_tokens_before_grid(stream.shape[1]) :] if self.grid else stream
            means.append(average_tokens(rest, mask))
            if self.token:
                tokens.append(take_one_token(stream, self.token, mask)[:, 0])
            if self.grid and number == self.middle:
                places.append(average_profiles(rest))
        return torch.cat([*tokens, *means, *places], -1)

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
            inputs.append(self.inputs({name: taps[name] for name in self.taps}))
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
        # In double: directions down to 1e-12 of the largest are kept, below what fp32 resolves.
        z = inputs.double()
        centre, deviation = z.mean(0), z.std(0)
        # So that each kind has the same squared length, however many numbers it is made of.
        parts = torch.cat([z.new_full((k,), float(k * len(self.kinds))) for k in self.kinds])
        # A number that never changes says nothing; dividing by its deviation would say noise.
        scale = torch.where(deviation > 1e-6, 1 / (deviation * parts.sqrt()), 0.0)
        z = (z - centre) * scale
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


def _decompose(z: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (`r`) and eigenvectors (`n r`) of `z z^T`, from the smaller of the two products."""
    if len(z) <= z.shape[1]:
        values, vectors = torch.linalg.eigh(z @ z.T)
        return values.clamp(min=0), vectors
    # If v is an eigenvector of z^T z with value s, z v / sqrt(s) is one of z z^T with the same.
    values, turned = torch.linalg.eigh(z.T @ z)
    nonzero = values > values[-1] * 1e-12
    return values[nonzero], z @ (turned[:, nonzero] / values[nonzero].sqrt())
