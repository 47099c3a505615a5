"""The record of one call, which its thread's hooks read and write.

What changes from call to call travels here, so that hooks hold plain data only: a host can then be
compiled, copied, pickled and used from several threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from restuning._errors import PlacementError, ProjectionsError, SiteNotReachedError
from restuning.host.parts import compute_part
from restuning.host.side_by_side import SideBySide
from restuning.sites import (
    FEATURE,
    AttentionInputs,
    Features,
    LentProjections,
    LinearSite,
    Needs,
    Readout,
    Sites,
    average_tokens,
    first_tensor,
    is_stream,
    read_vector,
    split_tap,
    take_one_token,
)
from restuning.tuners import Tuner

_local = threading.local()
trained_slots: set[str] = set()
"""Slots of hosts that ran a task with gradients: only these can meet a recomputation."""


class LastStream(Protocol):
    """What gives the last stream in the backbone's place: a side network, or several at once."""

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of what it reads; the one that it takes the place of last."""
        ...

    @property
    def tuners(self) -> Iterable[Tuner]:
        """Tuners inside it."""
        ...

    def __call__(self, taps: Any) -> Tensor:
        """The stream."""
        ...


class Call:
    """The record of one call of a backbone: what is in use, and what its hooks have seen so far.

    It belongs to one thread: `active` puts it where the hooks of this thread find it, and takes it
    away at the end. Another thread on the same host has a record of its own, or none.

    Args:
        tuners: In use, by site name.
        needs: Which taps to keep, and which tokens of them.
        projections: Projections of all sites that have any, by site name.
        last: Name of the last tap.
        side: What takes the place of the last stream; None for the backbone's own.
        inputs: Inputs in the batch; 0 where that is the stream's first axis.

    Attributes:
        streams: What entered a site whose tuner is in use, until its tuner has run.
        deltas: What the tuner of a gated site adds, until the end of its block.
        taps: Kept so far.
        attention: What an attention was given beside the stream, by the path of its module.
        counts: Calls of a module that is called more than once, by site name.
        reached: Sites whose tuner has run.
        rows: Rows of the stream where it entered the first block; 0 before.
        appended: Tokens that a stem prompt has appended to the stream.
        real_tokens: Which tokens are real, `b n`; None where all are.
        time: Time steps of a diffusion model.
        lends_projections: Whether attentions must be listened to.
        looks_ahead: Whether a token's delta depends on later tokens.
    """

    def __init__(
        self,
        tuners: Mapping[str, Tuner],
        needs: Needs,
        projections: Mapping[str, LentProjections],
        last: str,
        side: LastStream | None = None,
        inputs: int = 0,
    ) -> None:
        self.tuners, self.needs, self.projections, self.last = tuners, needs, projections, last
        self.side, self.inputs = side, inputs
        self.streams: dict[str, Tensor] = {}
        self.deltas: dict[str, Tensor] = {}
        self.taps: dict[str, Tensor] = {}
        # By the tap that they are made of: of one tap itself and parts may be wanted.
        self.wanted: dict[str, list[tuple[str, str]]] = {}
        for name in needs.taps:
            tap, part = split_tap(name)
            # The feature is made of the last stream.
            tap = last if tap == FEATURE else tap
            self.wanted.setdefault(tap, []).append((name, part))
        self.attention: dict[str, AttentionInputs] = {}
        self.counts: dict[str, int] = {}
        self.reached: set[str] = set()
        self.rows = self.appended = 0
        self.real_tokens: Tensor | None = None
        self.feature_mask: Tensor | None = None
        self.time: Tensor | None = None
        # Appended tokens count as well: the masks that attentions are given must be made longer.
        self.lends_projections = any(t.needs_view or t.appends for t in tuners.values())
        self.looks_ahead = any(t.looks_ahead for t in tuners.values()) or (
            side is not None and any(t.looks_ahead for t in side.tuners)
        )

    def copy_for_recompute(self) -> Call:
        """A fresh record of the same task, for a block that is recomputed."""
        # It keeps what the first run kept: where one token is picked, autograd saves which.
        call = Call(self.tuners, self.needs, self.projections, self.last, inputs=self.inputs)
        # The hooks that note them stand on the whole model, or on a block before, and do not run again.
        call.real_tokens, call.time = self.real_tokens, self.time
        call.rows, call.appended = self.rows, self.appended
        return call

    def mask(self, stream: Tensor, *, appended: bool = False) -> Tensor | None:
        """Which tokens of a stream are real, `b n`; None where all are.

        With a cache of earlier tokens the mask is longer than the stream, which is its end.

        Args:
            stream: The stream.
            appended: With those that a stem prompt appended, which are real.
        """
        length = stream.shape[1] - self.appended
        if self.real_tokens is None or stream.dim() != 3 or self.real_tokens.shape[1] < length:
            return None
        # Earlier tokens in a cache are in the mask and not in the stream.
        own = self.real_tokens[:, self.real_tokens.shape[1] - length :]
        return F.pad(own, (0, self.appended), value=True) if appended else own

    def keep(self, tap: str, stream: Tensor, channels_first: bool = False) -> None:
        """Keep what is wanted of a tap, with channels last: its tokens, parts, or what the feature is of."""
        if channels_first:
            stream = stream.movedim(1, -1)
        # Before appended tokens are cut off: the mask is fitted to the stream's whole length.
        mask = self.mask(stream)
        if self.appended:
            stream = stream[:, : -self.appended]
        for name, part in self.wanted[tap]:
            if not part:
                self.taps[name] = self._keep_tokens(tap, stream, mask)
            elif split_tap(name)[0] == FEATURE:
                # The feature is made of it at the end, with the readout that the forward ran with.
                self.taps[name], self.feature_mask = stream, mask
            else:
                self.taps[name] = compute_part(part, self._unfold(stream), mask)

    def _unfold(self, stream: Tensor) -> Tensor:
        """Places of a map, windows and patches folded into the batch (MobileViT) as tokens, `b n d`."""
        return stream.reshape(self.inputs or stream.shape[0], -1, stream.shape[-1])

    def _keep_tokens(self, tap: str, stream: Tensor, mask: Tensor | None) -> Tensor:
        if self.needs.tokens in ("cls", "last"):
            stream = take_one_token(stream, self.needs.tokens, mask)
            # A slice would hold the whole stream in memory; a copy of one token lets it go.
            stream = stream if stream.requires_grad or mask is not None else stream.clone()
        # The last tap is needed whole: the backbone's own feature is made of it at the end.
        elif self.needs.tokens == "pool" and tap not in ("last", self.last):
            stream = average_tokens(self._unfold(stream), mask).unsqueeze(1)
        return stream

    def keep_own_feature(self, output: Any, rule: Readout, readout: Callable[..., Tensor]) -> None:
        """Make the backbone's own feature, `b 1 d`: what is asked for as such, and under "pool" the last tap.

        Args:
            output: The backbone's.
            rule: How its feature is read.
            readout: The same rule as a function of the last stream and its mask.
        """
        pooled = ("last", self.last) if self.needs.tokens == "pool" else ()

        def read(stream: Tensor, pool: str, mask: Tensor | None) -> Tensor:
            # Of a backbone that pools by itself no readout makes that of its last stream.
            own = rule.pool == "own" and pool == rule.pool
            vector = read_vector(output) if own else readout(stream, pool=pool, mask=mask)
            assert vector is not None
            return vector.unsqueeze(1)

        for name in [n for n in self.needs.taps if split_tap(n)[0] == FEATURE]:
            self.taps[name] = read(self.taps[name], split_tap(name)[1], self.feature_mask)
        for tap in pooled:
            if tap in self.taps:
                stream = self.taps[tap]
                self.taps[tap] = read(stream, rule.pool, self.mask(stream))

    def features(self, readout: Callable[..., Tensor]) -> Features:
        """What was kept, with the readout on loan and the mask of the last stack."""
        # An encoder's mask does not fit its decoder: the readout belongs to the last tap's stack.
        last = next((t for name, t in reversed(self.taps.items()) if is_stream(name)), None)
        mask = None if last is None or self.needs.tokens != "all" else self.mask(last)
        return Features(self.taps, readout, mask, self.time)


def count_inputs(args: tuple, kwargs: Mapping[str, Any]) -> int:
    """Inputs in a batch, the first axis of the first tensor; 0 where there is none."""
    x = first_tensor(args)
    x = first_tensor(dict(kwargs)) if x is None else x
    return 0 if x is None else x.shape[0]


@contextmanager
def active(slot: str, call: Call | None) -> Iterator[None]:
    """The hooks of a slot see this record in this thread, and what was there before afterwards."""
    # Uses may be nested: a task inside another, or None to switch it off for a while.
    before = getattr(_local, slot, None)
    with_gradient = call is not None and call.tuners and torch.is_grad_enabled()
    # A compiled graph needs no guard against recomputation, and must not carry this effect.
    if with_gradient and not torch.compiler.is_compiling():
        trained_slots.add(slot)
    setattr(_local, slot, call)
    try:
        yield
    finally:
        setattr(_local, slot, before)
        if call is not None and isinstance(call.side, SideBySide):
            call.side.close()


def check_tuners(
    tuners: Mapping[str, Tuner], sites: Sites, projections: Mapping[str, LentProjections]
) -> None:
    """Every tuner can do its work at its site.

    Raises:
        ProjectionsError: A tuner needs projections of a layer that has none.
        PlacementError: Appended tokens would be seen by nothing, or the exact scale is none here.
        NoSitesError: There is no such site.
    """
    if torch.compiler.is_compiling():
        return
    without = sites_without_projections(tuners, sites, projections)
    if without:
        tuner: Tuner = tuners[without[0]]
        site: Any = sites.linear.get(without[0]) or sites[without[0]]
        raise ProjectionsError(
            f"{tuner.kind} needs the projections of its layer's attention",
            where=f"{site.name} ({site.module})",
            found="W_q, W_k, W_v, W_o could not be proved by one forward",
            fix='use query="stream", or declare them: Host(model, x, sites=Sites.declare(...))',
        )
    for name, tuner in tuners.items():
        # Stems are worked out from all sites, and this runs in every forward: a look-up goes first.
        if name not in sites and name in sites.stems:
            if tuner.appends and any(each.projections.causal for each in projections.values()):
                raise PlacementError(
                    "tokens appended at the stem are never seen in a causal backbone",
                    where=f"{tuner.kind} at {name}",
                    found="they would come after every token",
                    fix="use the method vpt-deep or prefix",
                )
            continue
        if name in sites.linear:
            _check_at_map(tuner, sites.linear[name])
            continue
        site = sites[name]
        if getattr(tuner, "form", "") == "exact" and not projections[name].projections.direct:
            raise PlacementError(
                "the exact scale is no identity here",
                where=f"{name} ({site.leave})",
                found="a norm or LayerScale stands between W_o and the stream",
                fix='use another form of scale: "channel", or "none"',
            )


def _check_at_map(tuner: Tuner, site: LinearSite) -> None:
    reads = site.dim if tuner.reads == "output" else site.dim_in
    if (tuner.dim, tuner.dim_out) != (reads, site.dim) or tuner.appends:
        raise PlacementError(
            "a tuner does not fit the linear map that it stands beside",
            where=f"{site.name} ({site.module})",
            found=f"{tuner.kind} from {tuner.dim} to {tuner.dim_out} channels, the map from {reads} to {site.dim}",
            fix="give its dim and out the site's dim_in and dim",
        )


def sites_without_projections(
    tuners: Mapping[str, Tuner], sites: Sites, projections: Mapping[str, LentProjections]
) -> list[str]:
    """Sites where a tuner needs the projections of an attention, and none were proved."""
    return [
        n
        for n, t in tuners.items()
        if t.needs_view and n not in projections and n not in sites.stems
    ]


def check_all_reached(call: Call) -> None:
    """Every tuner was reached and every tap kept.

    Raises:
        SiteNotReachedError: Names those that were not.
    """
    missing = [n for n in call.tuners if n not in call.reached]
    missing += [t for t in call.needs.taps if t not in call.taps]
    if missing:
        raise SiteNotReachedError(
            f"{len(missing)} sites were never reached in this forward",
            where=", ".join(missing[:4]),
            found="their modules did not run, or were replaced after Host(...) was built "
            "(quantisation, LoRA)",
            fix="build the Host last; after host.release() if there was one before",
        )


def current_call(slot: str) -> Call | None:
    """The record in use in this thread."""
    return getattr(_local, slot, None)


def register_thread(slot: str) -> None:
    """Make a slot known to this thread: a first use after compilation would cost a second graph."""
    setattr(_local, slot, None)


def drop_thread(slot: str) -> None:
    """A released host leaves nothing behind in this thread."""
    trained_slots.discard(slot)
    vars(_local).pop(slot, None)
