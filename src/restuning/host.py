"""The host owns the hooks on one frozen backbone: the only file that registers a hook.

Hooks are registered once, at construction (a compiled model ignores later ones), and hold only
plain data. Everything that changes from call to call, the tuners in use and the taps to keep,
travels in a record of the calling thread. A hook that finds no record returns what it was given.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import MapsError, NoSitesError, SiteNotReachedError
from restuning.bypass import Features, Needs
from restuning.call import Call, Enter, Leave, Mask, forget, idle, in_use
from restuning.fingerprint import fingerprint
from restuning.recompute import checkpoint_blocks
from restuning.sites import Finder, LentMaps, Readout, Site, Sites
from restuning.tuners import Tuner


def find_sites(model: nn.Module, *example: Any, **kwargs: Any) -> tuple[Sites, Readout]:
    """Find the sites and the readout of a backbone by structure, proved by one forward.

    Args:
        model: The backbone, in eval mode.
        example: One input as the model takes it, batch 1 is enough.
        kwargs: The same by keyword.

    Raises:
        NoSitesError: None found.
    """
    finder, handles = Finder(model), []
    for path, module in model.named_modules():

        def enter(m: nn.Module, a: tuple, k: dict, path: str = path) -> None:
            finder.enter(path, m, a, k)

        def leave(m: nn.Module, a: tuple, out: Any, path: str = path) -> None:
            finder.leave(path, out)

        handles += [
            module.register_forward_pre_hook(enter, with_kwargs=True),
            module.register_forward_hook(leave),
        ]
    try:
        with torch.no_grad():
            output = model(*map(_telling, example), **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return finder.found(output)


def _telling(value: Any) -> Any:
    """An example whose values differ: a constant image would let wrong sums pass as right."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() < 2:
        return value
    if bool((value == value.flatten()[0]).all()):
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0))
        return noise.to(value)
    return value


class Host(nn.Module):
    """A frozen backbone, kept in eval mode, with the places to tune it.

    `host(x)` is the backbone's own output, bit for bit; its `state_dict` is under `model.` and
    the backbone object's own keys do not change.

    Args:
        model: The backbone. It stays the user's object; its parameters are frozen.
        example: One input (random or zeros will do) for the forward that proves the sites.
        sites: Sites, where they are known or declared; found otherwise.
        readout: How the last stream becomes a feature; found otherwise.
        kwargs: The example's keyword arguments.

    Raises:
        NoSitesError: No site was found.

    Cost: one forward at construction; two to four Python calls a layer in every forward.
    """

    def __init__(
        self,
        model: nn.Module,
        *example: Any,
        sites: Sites | None = None,
        readout: Readout | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        found, seen = (
            (sites, readout) if sites and readout else find_sites(model, *example, **kwargs)
        )
        self.sites: Sites = sites or found
        self.readout_rule: Readout = readout or seen
        self._slot = f"host_{uuid.uuid4().hex}"
        idle(self._slot)
        self._views = {
            s.layer: LentMaps(model, s.maps) for s in self.sites.values() if s.maps is not None
        }
        self._last = self.sites.taps[-1]
        self._register()

    def _register(self) -> None:
        enters: dict[str, list[Site]] = {}
        leaves: dict[str, list[Site]] = {}
        for site in self.sites.values():
            enters.setdefault(site.enter, []).append(site)
            leaves.setdefault(site.leave, []).append(site)
        stem = next(s.enter for s in self.sites.values() if s.op == "block")
        enters.setdefault(stem, [])
        for path, sites in enters.items():
            self.model.get_submodule(path).register_forward_pre_hook(
                Enter(self._slot, tuple(sites), path == stem), with_kwargs=True
            )
        for site in self.sites.values():
            if site.op == "mha" and site.maps is not None:
                self.model.get_submodule(site.module).register_forward_pre_hook(
                    Mask(self._slot, site.layer), with_kwargs=True
                )
        for path, sites in leaves.items():
            self.model.get_submodule(path).register_forward_hook(Leave(self._slot, tuple(sites)))

    @property
    def dim(self) -> int:
        """Width of the feature a head reads."""
        return self.readout_rule.dim

    def train(self, mode: bool = True) -> Host:
        """Frozen is frozen: dropout stays off and BatchNorm statistics stay where they are."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's own output."""
        return self.model(*args, **kwargs)

    def readout(self, state: Tensor, pool: str | None = None) -> Tensor:
        """The frozen final norm and pooling, `b n d -> b d`, on loan to tasks."""
        rule = self.readout_rule
        if pool is not None and pool != rule.pool:
            rule = Readout(rule.norm, pool, rule.dim, rule.skip)  # type: ignore[arg-type]
        return rule(self.model, state)

    def features(
        self, *args: Any, keep: Needs | Sequence[str] | None = None, **kwargs: Any
    ) -> Features:
        """Taps of one forward, without gradient; they carry the readout with them.

        Args:
            args: The backbone's input.
            keep: `Needs` (of a task or a bank), or tap names for all tokens; None for all taps.
            kwargs: The backbone's input by keyword.

        Raises:
            NoSitesError: A tap has no such name.
        """
        needs = keep if isinstance(keep, Needs) else Needs(tuple(keep or self.sites.taps))
        return Features(self.taps(needs, *args, **kwargs), self.readout)

    def taps(self, needs: Needs, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What `features` returns, as a plain dictionary."""
        for tap in needs.taps:
            if tap != "last" and tap not in self.sites.taps:
                raise NoSitesError(
                    "no such tap", where=tap, fix=f"taps are block.0 to {self._last}"
                )
        call = Call({}, needs, self._views, self._last)
        with torch.no_grad(), in_use(self._slot, call):
            self.model(*args, **kwargs)
        self._roll_call(call)
        return {tap: call.kept[tap] for tap in needs.taps}

    def tuned(
        self, tuners: Mapping[str, Tuner], needs: Needs, *args: Any,
        weights: Mapping[str, Tensor] | None = None, **kwargs: Any,
    ) -> tuple[dict[str, Tensor], Any]:  # fmt: skip
        """One forward with tuners in use: the kept streams, and the backbone's own output.

        Args:
            tuners: By site name.
            needs: What to keep; the tap "last" is the last stream.
            args: The backbone's input.
            weights: Tensors that take the place of the backbone's for this forward.
            kwargs: The backbone's input by keyword.
        """
        call = Call(tuners, needs, self._views, self._last)
        self._check(tuners)
        with in_use(self._slot, call):
            if weights:
                output = torch.func.functional_call(self.model, dict(weights), args, kwargs)
            else:
                output = self.model(*args, **kwargs)
        self._roll_call(call)
        return call.kept, output

    @contextmanager
    def using(self, task: Any) -> Iterator[None]:
        """Every forward of the backbone in this thread and block uses the task's tuners.

        For the user's own loop, `generate()` and pipelines. None switches tuners off. Do not hold
        it across an `await`.

        Args:
            task: An inline task (anything with `inline_tuners`), or None.

        Raises:
            MapsError: The task is a bypass, which has nothing inside the backbone.
        """
        if task is None:
            with in_use(self._slot, None):
                yield
            return
        if getattr(task, "bypass", None) is not None:
            raise MapsError(
                "a bypass task runs beside the backbone, not inside it",
                fix="call Tuned(host, task)(x), or task(host.features(x, keep=...), host.readout)",
            )
        self._check(task.inline_tuners)
        call = Call(task.inline_tuners, Needs(()), self._views, self._last)
        with in_use(self._slot, call):
            yield
        if call.reached:
            self._roll_call(call)

    def _check(self, tuners: Mapping[str, Tuner]) -> None:
        if torch.compiler.is_compiling():
            return
        for name, tuner in tuners.items():
            if name == "block.0":
                continue
            site = self.sites[name]
            if tuner.needs_view and site.layer not in self._views:
                raise MapsError(
                    f"{tuner.kind} needs the frozen attention maps of its layer",
                    where=f"{name} ({site.module})",
                    found=f"W_q, W_k, W_v, W_o of {type(self.model).__name__} could not be "
                    "proved by one forward (rotary or relative positions, grouped queries?)",
                    fix='use query="stream", or add a row to sites/families.py',
                )

    def _roll_call(self, call: Call) -> None:
        missing = [n for n in call.tuners if n not in call.reached]
        missing += [t for t in call.needs.taps if t not in call.kept]
        if missing:
            raise SiteNotReachedError(
                f"{len(missing)} sites were never reached in this forward",
                where=", ".join(missing[:4]),
                found="their modules did not run, or were replaced after Host(...) was built "
                "(quantisation, LoRA)",
                fix="build the Host last; after host.release() if there was one before",
            )

    def checkpoint(self, on: bool = True) -> None:
        """Activation checkpointing of every block that keeps the tuners.

        A block is run again inside backward with the record it was run with. Gradients are equal;
        does not compile with `fullgraph`: checkpoint or compile.

        Args:
            on: False takes it away again.
        """
        checkpoint_blocks(self.model, self.sites, self._slot, on)

    def release(self) -> None:
        """Remove every hook of this host; the backbone is as it was before."""
        for module in self.model.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key, hook in list(hooks.items()):
                    if getattr(hook, "slot", None) == self._slot:
                        del hooks[key]
                        module._forward_pre_hooks_with_kwargs.pop(key, None)
        forget(self._slot)

    def __enter__(self) -> Host:
        """`with Host(...) as host:` releases the backbone at the end."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Release the backbone."""
        self.release()

    def fingerprint(self) -> dict[str, Any]:
        """What a task file stores to know its backbone again; see `fingerprint.py`."""
        return fingerprint(self.model, self.sites)
