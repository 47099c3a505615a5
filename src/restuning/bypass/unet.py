"""A bypass beside the decoder of a UNet: taps of its mid and up blocks in, the last map out.

An ordinary `nn.Module` that never sees a host, as `Bypass` is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import FormatError, NoSitesError, TunerShapeError
from restuning.bypass.bypass import Plan, list_specs
from restuning.bypass.side_network import SideNetwork, side_network
from restuning.sites import Needs, Sites
from restuning.tuners import Tuner, at_time, in_own_precision

Form = Literal["correct", "replace"]


@side_network("unet")
class UNetBypass(SideNetwork):
    r"""`c_0 = h_0(x_0)`, `c_l = h_l(x_l) + up(M_l v_l(c_{l-1}))`, output `x_L + c_L`.

    x_0 is the mid block's output and x_1 ... x_L those of the up blocks; h are tuners, v are
    `c + tuner(c)`, M are maps between channels and up fits a map to the next grid (nearest, of any
    size). The output takes the place of the input of the network's own output norm.

    Args:
        taps: Names of x_0 ... x_L, `host.sites.pick("stage")`.
        dims: Their widths.
        horizontal: L+1 tuners (or None each) on x_0 ... x_L.
        vertical: L tuners (or None each) on c_0 ... c_{L-1}.
        kernel: 1: M is one matrix on every pixel, before up (the two commute, and the small grid is
            cheaper); 3: a convolution after up, as in the authors' released example.
        form: "correct" as above. "replace" carries states instead of corrections, as the released
            example does: `x_l' = x_l + h_l(x_l) + up(M_l v_l(x_{l-1}'))` with M zero at the start,
            output `x_L'`.

    Shape:
        taps: mapping of name to `b h_l w_l d_l`. Returns `b h_L w_L d_L`.

    Cost: on Stable Diffusion v1.5 (widths 1280, 1280, 1280, 640, 320) 4.3 M parameters in M.
    Start: with tuners that start as no change the output is x_L, to the last bit, in both forms. In
    "correct" M is not zero and all tuners learn from the first step; in "replace" a stage learns
    only once the M after it has moved.
    Reference: arXiv 2310.19859 does not give the layout of its 3.76 M parameters, and no released
    code has it: this is a reconstruction.
    Departs: sums without a lambda, as in the authors' released code.
    """

    def __init__(
        self,
        taps: Sequence[str],
        dims: Sequence[int],
        horizontal: Sequence[Tuner | None],
        vertical: Sequence[Tuner | None],
        *,
        kernel: int = 1,
        form: Form = "correct",
    ) -> None:
        super().__init__()
        steps = len(taps) - 1
        if not steps == len(dims) - 1 == len(horizontal) - 1 == len(vertical) or steps < 1:
            raise TunerShapeError(
                "a UNet's bypass needs L+1 taps, widths and horizontal tuners, and L vertical ones",
                found=f"{len(taps)} taps, {len(dims)} widths, {len(horizontal)} and "
                f"{len(vertical)} tuners",
                fix="give None where a stage has no tuner",
            )
        if kernel not in (1, 3) or form not in ("correct", "replace"):
            raise FormatError(
                "no such form of a UNet's bypass",
                found=f"kernel={kernel!r}, form={form!r}",
                fix='give kernel 1 or 3, and form "correct" or "replace"',
            )
        self.taps, self.dims = tuple(taps), tuple(dims)
        self.kernel, self.form = kernel, form
        self.horizontal = nn.ModuleList(nn.Identity() if t is None else t for t in horizontal)
        self.vertical = nn.ModuleList(nn.Identity() if t is None else t for t in vertical)
        pairs = zip(dims[:-1], dims[1:], strict=True)
        self.maps = nn.ModuleList(
            nn.Linear(a, b, bias=False)
            if kernel == 1
            else nn.Conv2d(a, b, 3, padding=1, bias=False)
            for a, b in pairs
        )
        # M carries whole states in this form: not zero, x_L' would start elsewhere than at x_L.
        if form == "replace":
            for weight in self.maps.parameters():
                nn.init.zeros_(weight)

    @classmethod
    def plan(
        cls,
        sites: Sites,
        horizontal: Plan | None,
        vertical: Plan | None,
        *,
        kernel: int = 1,
        form: Form = "correct",
    ) -> UNetBypass:
        """A bypass over all stages of a host's sites.

        Args:
            sites: The host's.
            horizontal: Tuners on the taps; None for none.
            vertical: Tuners on what is carried from stage to stage; None for none.
            kernel: See the class.
            form: See the class.

        Raises:
            NoSitesError: The backbone has no decoder on maps.
        """
        if not any(s.op == "stage" for s in sites.values()):
            raise NoSitesError(
                "the backbone has no decoder on maps",
                found="no stage whose grid grows again",
                fix="use Task.bypass, whose taps are the outputs of blocks",
            )
        stages = list(sites.pick("stage").values())
        across = [horizontal(s) if horizontal else None for s in stages]
        below = [vertical(s) if vertical else None for s in stages[:-1]]
        return cls(
            [s.name for s in stages],
            [s.dim for s in stages],
            across,
            below,
            kernel=kernel,
            form=form,
        )

    @property
    def tuners(self) -> list[Tuner]:
        """All tuners: the horizontal ones, then the vertical ones."""
        return [t for t in [*self.horizontal, *self.vertical] if isinstance(t, Tuner)]

    def needs(self, pool: str) -> Needs:
        """The UNet bypass reads every pixel of every stage."""
        return Needs(self.taps)

    def forward(self, taps: Mapping[str, Tensor]) -> Tensor:
        """Compute the corrected last map (see the class). The taps are detached first."""
        streams = [in_own_precision(self, taps[name].detach()) for name in self.taps]
        # No host runs here: tuners learn the time step from what the taps carry.
        with at_time(getattr(taps, "time", None)):
            carried: Tensor | None = streams[0] if self.form == "replace" else None
            for level, stream in enumerate(streams):
                if level > 0 and carried is not None:
                    carried = self._carry_up(carried, level - 1, stream)
                    if self.form == "replace":
                        carried = stream + carried
                tuner = self.horizontal[level]
                if isinstance(tuner, Tuner):
                    carried = tuner(stream) if carried is None else tuner.added(carried, stream)
        # No tuner anywhere had anything to add.
        if carried is None:
            return streams[-1]
        return carried if self.form == "replace" else streams[-1] + carried

    def _carry_up(self, carried: Tensor, level: int, like: Tensor) -> Tensor:
        """Compute `up(M v(c))`: what is carried, on the grid and in the width of the next stage."""
        tuner, channels = self.vertical[level], self.maps[level]
        if isinstance(tuner, Tuner):
            carried = tuner.added(carried, carried)
        # One matrix a pixel commutes with nearest up-sampling and costs less on the small grid.
        if self.kernel == 1:
            return _resize_to(channels(carried), like)
        return channels(_resize_to(carried, like).movedim(-1, 1)).movedim(1, -1)

    def spec(self) -> dict[str, Any]:
        """Everything needed to build this bypass again, as JSON."""
        sides = {"horizontal": self.horizontal, "vertical": self.vertical}
        return super().spec() | {name: list_specs(side) for name, side in sides.items()}


def _resize_to(x: Tensor, like: Tensor) -> Tensor:
    if x.shape[1:3] == like.shape[1:3]:
        return x
    size = (like.shape[1], like.shape[2])
    # Nearest, as the backbone's own up-sampling does it.
    return F.interpolate(x.movedim(-1, 1), size, mode="nearest").movedim(1, -1)
