"""A bypass of our own: a narrow side network whose tuners mix tokens, on detached taps.

The paper's bypass is token-wise: its class token never sees where anything is. Here every token of
a few taps enters a narrow state, on which attention and convolution run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from restuning._errors import TunerShapeError
from restuning._registry import construct
from restuning._torch import is_transformed
from restuning.bypass import pooling
from restuning.bypass.finer import Finer
from restuning.bypass.pooling import Pooling
from restuning.bypass.side_network import SideNetwork, side_network
from restuning.sites import FEATURE, Needs, is_stream, resolve_tokens, split_tap
from restuning.tuners import Tuner, from_spec, real_tokens


@side_network("mixing")
class MixingBypass(SideNetwork):
    r"""`s_k = M_k(s_{k-1} + W_k norm(x_k))`; the feature is `readout(x_L)` and `pool(norm(s_K))`.

    x_k are the taps it reads, s_0 = 0, and M_k adds its tuners one after the other:
    `s + tuner_1(s)`, then `s + tuner_2(s)`. `pool` is a `Pooling`. The norms have no parameters. Both
    parts of the feature stand side by side (`docs/mixing.md`).

    Args:
        taps: Names of those that are read, in order; the last is the backbone's last stream. Or parts of
            taps (`block.3/tokens`), whose few rows then are the tokens: those of texts differ in number,
            what they say together does not. The frozen feature is read beside them.
        dims: Their widths.
        tuners: For every tap, its tuners of width w.
        pool: Of the last state, of width w; or a `Finer`, for an answer at every place.
        drop_path: Chance to leave out a tuner's delta of a sample while training.
        pool_patches: Read patches as means of squares of this many by this many
            (`pooling.pool_patches`): a fourth of the patches at 2. The readout still takes the last tap whole.

    Shape:
        taps: mapping of name to `b n d_k`. `feature` returns `b d_K+f`; `b n d_K+f` for pool "all"; of a `Finer` its own.

    Attributes:
        recompute: Compute each tap's tuners again in the backward pass instead of keeping what they
            saved: the same gradients, about a quarter of the memory, each forward twice.

    Cost: `sum_k d_k w` parameters beside the tuners' and the pooling's, and a head of f more inputs; a
    step holds one state of width w a tap, and what the tuners of a single tap save.
    Start: with `widen(head)` exactly linear probing, whatever the tuners; with a `Finer` a new head on what is drawn
        at random.
    Reference: not in the paper. Side networks on detached features: Ladder Side-Tuning (Sung et al.
    2022), LAST (Tang et al. 2024). Chosen on validation; see `docs/mixing.md`.

    Raises:
        TunerShapeError: Numbers of taps, widths and tuners do not agree, or patches are to be pooled
            where there is no grid, or where every token has an answer of its own.
    """

    recompute = True

    def __init__(
        self,
        taps: Sequence[str],
        dims: Sequence[int],
        tuners: Sequence[Sequence[Tuner]],
        pool: Pooling | Finer,
        drop_path: float = 0.0,
        pool_patches: int = 1,
    ) -> None:
        super().__init__()
        several = isinstance(pool, Finer) or pool.token == "all"
        grid = isinstance(pool, Finer) or pool.grid
        if pool_patches < 1 or (pool_patches > 1 and (several or not grid)):
            raise TunerShapeError(
                "patches cannot be pooled here",
                found=f"pool_patches={pool_patches}"
                + (", an answer for every token" if several else "")
                + ("" if grid else ", no grid of patches"),
                fix="give a whole number from 1 where an image has one answer, else leave pool_patches out",
            )
        widths = {t.dim for row in tuners for t in row}
        if not len(taps) == len(dims) == len(tuners) > 0 or len(widths) != 1:
            raise TunerShapeError(
                "a mixing bypass needs a width and tuners for every tap, the tuners of one width",
                found=f"{len(taps)} taps, {len(dims)} widths, {len(tuners)} rows of tuners of "
                f"width {sorted(widths)}",
                fix="give every tap a list of tuners, all of one dim",
            )
        self.taps, self.dims, self.drop_path = tuple(taps), tuple(dims), drop_path
        self.in_parts = not is_stream(self.taps[-1])
        self.pool_patches = pool_patches
        self.width = widths.pop()
        self.enter = nn.ModuleList(nn.Linear(dim, self.width) for dim in dims)
        self.mix = nn.ModuleList(nn.ModuleList(row) for row in tuners)
        self.pool = pool

    @property
    def tuners(self) -> list[Tuner]:
        """All tuners, in the order they run."""
        return [tuner for number in range(len(self.taps)) for tuner in self._tap_tuners(number)]

    def _tap_tuners(self, number: int) -> list[Tuner]:
        """The tuners of one tap."""
        row = self.mix[number]
        assert isinstance(row, nn.ModuleList)
        return [t for t in row if isinstance(t, Tuner)]

    def needs(self, pool: str) -> Needs:
        """All tokens of its taps; or parts of taps, and the frozen feature or the token that it is read from.

        Raises:
            TunerShapeError: The readout leaves one vector ("own": maps and hierarchies), or of parts of taps
                every token ("all", "grid").
        """
        if pool == "own":
            raise TunerShapeError(
                "a mixing bypass reads streams of tokens",
                found="a backbone read by its own vector",
                fix='use res-tuning-bypass, or pool="mean" where the last stream has tokens',
            )
        if self.in_parts:
            if pool in ("all", "grid"):
                raise TunerShapeError(
                    "parts of taps have no answer for every token",
                    found=f'pool="{pool}"',
                    fix="let it read whole taps",
                )
            tokens, (last, _) = resolve_tokens(pool), split_tap(self.taps[-1])
            whole = tokens == "all"
            return Needs(
                (*self.taps, f"{FEATURE}/{pool}" if whole else last), "cls" if whole else tokens
            )
        # Stores may keep taps with their patches pooled: a fourth of the bytes at 2.
        return Needs(self.taps, "all", self.pool_patches)

    def forward(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Compute the last state s_K, `b n w`. The taps are detached first."""
        # Live taps are all as long as the last one and are pooled here.
        whole = taps[self.taps[-1]].shape[1]
        # Taps from a store that keeps them pooled are shorter than the last one, which is whole.
        streams = [
            pooling.pool_patches(stream, self.pool_patches if stream.shape[1] == whole else 1)
            for stream in (taps[name].detach() for name in self.taps)
        ]
        # Parts of taps know of no padding.
        mask = None if self.in_parts else getattr(taps, "mask", None)
        # s_0 = 0 broadcasts to the first tap, whose number of tokens is not known before.
        state = torch.zeros((), dtype=next(self.enter.parameters()).dtype, device=streams[0].device)
        # A transform of functions (vmap, grad) cannot run a part again.
        transformed = is_transformed()
        again = self.recompute and torch.is_grad_enabled() and not transformed
        for number, stream in enumerate(streams):
            if again:
                state = checkpoint(self._run_tap, number, state, stream, mask, use_reentrant=False)
            else:
                state = self._run_tap(number, state, stream, mask)
        return F.layer_norm(state, state.shape[-1:])

    def _run_tap(self, number: int, state: Tensor, stream: Tensor, mask: Tensor | None) -> Tensor:
        # Padding is told here and not around the loop: a second run comes from the backward pass.
        with real_tokens(mask):
            normed = F.layer_norm(stream.to(state.dtype), stream.shape[-1:])
            state = state + self.enter[number](normed)
            for tuner in self._tap_tuners(number):
                state = self._add_delta(tuner, state)
        return state

    def _add_delta(self, tuner: Tuner, state: Tensor) -> Tensor:
        if not (self.training and self.drop_path):
            return tuner.added(state, state)
        # A draw a sample. Divided by the share that stays, so that the mean is that of eval mode.
        stays = torch.rand(len(state), 1, 1, device=state.device) >= self.drop_path
        return state + tuner(state) * (stays / (1 - self.drop_path)).to(state.dtype)

    def feature(
        self, taps: Mapping[str, Tensor], readout: Callable[..., Tensor], pool: str | None
    ) -> Tensor:
        """The backbone's feature and the side network's own, side by side; see the class."""
        if isinstance(self.pool, Finer):
            return self.pool(self(taps), [taps[name].detach() for name in self.taps])
        mask = None if self.in_parts else getattr(taps, "mask", None)
        frozen = self._read_frozen(taps, readout, pool)
        pooled = self.pool(self(taps), mask)
        return torch.cat([frozen.to(pooled.dtype), pooled], -1)

    def _read_frozen(
        self, taps: Mapping[str, Tensor], readout: Callable[..., Tensor], pool: str | None
    ) -> Tensor:
        """The backbone's own feature, `b d_K`; beside parts of taps it may be one of them."""
        # What was asked for and not what else is there: of a tap another network may read one token.
        if self.in_parts and resolve_tokens(pool) == "all":
            own = {name for name in taps if split_tap(name)[0] == FEATURE}
            name = f"{FEATURE}/{pool}" if pool else next(iter(own), f"{FEATURE}/mean")
            return taps[name][:, 0].detach()
        last, _ = split_tap(self.taps[-1])
        return readout(taps[last].detach(), pool=pool)

    def widen(self, head: nn.Linear) -> nn.Linear:
        """A head that reads both parts and answers as this one, which reads the first, does; of a `Finer` a new one."""
        if isinstance(self.pool, Finer):
            return self.pool.make_head(head.out_features)
        wide = nn.Linear(head.in_features + self.pool.features, head.out_features)
        with torch.no_grad():
            # Zero towards the side network's part: it has no say until it has learned something.
            wide.weight.zero_()[:, : head.in_features] = head.weight
            wide.bias.copy_(head.bias) if head.bias is not None else wide.bias.zero_()
        return wide

    def spec(self) -> dict[str, Any]:
        """Everything needed to build this bypass again, as JSON."""
        return {
            **self._kind_of_spec(),
            "taps": list(self.taps),
            "dims": list(self.dims),
            "tuners": [[t.spec() for t in self._tap_tuners(n)] for n in range(len(self.taps))],
            "pool": self.pool.spec(),
            "drop_path": self.drop_path,
            "pool_patches": self.pool_patches,
        }

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> MixingBypass:
        """Build a bypass from its `spec`."""
        arguments = {**spec, "tuners": [[from_spec(s) for s in row] for row in spec["tuners"]]}
        pooling_spec = {**spec["pool"], "width": arguments["tuners"][0][0].dim}
        if "factor" in pooling_spec:
            pooling_spec["dims"] = spec["dims"]
            arguments["pool"] = construct(Finer, pooling_spec, "pooling")
        else:
            arguments["pool"] = construct(Pooling, pooling_spec, "pooling")
        # Files of format 1 say `merge`, and those of before it was an option say nothing.
        merge = arguments.pop("merge", 1)
        arguments.setdefault("pool_patches", merge)
        arguments.pop("kind", None)
        return construct(cls, arguments, "side network")
