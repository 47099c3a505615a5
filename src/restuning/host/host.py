"""The host owns the hooks on one frozen backbone: the only file that registers a hook.

Hooks are registered once, at construction (a compiled model ignores later ones), and hold only
plain data. Everything that changes from call to call, the tuners in use and the taps to keep,
travels in a record of the calling thread. A hook that finds no record returns what it was given.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from restuning._errors import BackboneChangedError, MissingInputError, WrongTaskError
from restuning._torch import has_values, remove_hooks, sharded_modules
from restuning.host.answers import Question, ask
from restuning.host.attach import list_hooks
from restuning.host.call import (
    Call,
    active,
    check_all_reached,
    check_tuners,
    count_inputs,
    drop_thread,
    register_thread,
    sites_without_projections,
)
from restuning.host.extractor import Extractor, is_image
from restuning.host.find_sites import find_sites
from restuning.host.fingerprint import (
    earlier_fingerprint,
    find_device,
    fingerprint,
    full_digest,
    weights_digest,
)
from restuning.host.frozen import freeze, give_back
from restuning.host.listeners import RecordTimestep
from restuning.host.precision import find_half_precision, fit_inputs, outside_autocast
from restuning.host.recompute import checkpoint_blocks
from restuning.host.side_by_side import SideBySide
from restuning.host.snapshot import Snapshot
from restuning.host.trained_copy import copy_with_weights
from restuning.host.weights import list_contents
from restuning.sites import (
    Declaration,
    Features,
    LentProjections,
    Needs,
    Readout,
    Sites,
    first_tensor,
)
from restuning.tuners import Tuner

if TYPE_CHECKING:
    from restuning.bypass import SideNetwork


class Host(Extractor):
    """A frozen backbone, kept in eval mode, with the places to tune it.

    `host(x)` is the backbone's own output, bit for bit; its `state_dict` is under `model.` and
    the backbone object's own keys do not change.

    Args:
        model: The backbone. It stays the user's object; its parameters are frozen until `release`.
        example: One input (random or zeros will do) for the forward that proves the sites.
        sites: What structure does not show, declared (`Sites.declare`), or sites that are known
            already; found otherwise.
        readout: How the last stream becomes a feature; found otherwise.
        kwargs: The example's keyword arguments.

    Raises:
        NoSitesError: No site was found, or what is declared is not so.
        ProjectionsError: Declared projections do not give what their layer returned.
        BackboneError: It answers at random: two answers to the example differ.

    A backbone in bf16 or fp16 stays in it: inputs are brought to its precision, autocast stays outside,
    and what trains beside it is in fp32.

    Cost: two forwards and 0.2 s a gigabyte of weights (sums of their bytes) at construction; two to four
        Python calls a layer in every forward, and 0.3 ms to see that nothing has changed.
    """

    released = False

    def __init__(
        self,
        model: nn.Module,
        *example: Any,
        sites: Sites | Declaration | None = None,
        readout: Readout | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        self.model = model
        self._slot = f"host_{uuid.uuid4().hex}"
        # Before the first forward, in which 4-bit weights would pack themselves.
        freeze(model, self, self._slot)
        try:
            self._stand_on(model, example, sites, readout, kwargs)
        except BaseException:
            self.release()
            raise

    def _stand_on(
        self,
        model: nn.Module,
        example: Sequence[Any],
        sites: Sites | Declaration | None,
        readout: Readout | None,
        kwargs: Mapping[str, Any],
    ) -> None:
        self._half = find_half_precision(model)
        declared, known = (sites, None) if isinstance(sites, Declaration) else (None, sites)
        if known is None or readout is None:
            example, kwargs = fit_inputs(self._half, (example, kwargs))
            found_sites, found_readout = find_sites(model, *example, declared=declared, **kwargs)
            known, readout = known or found_sites, readout or found_readout
        self.sites: Sites = known
        self.readout_rule: Readout = readout
        self.images = any(is_image(value) for value in (*example, *kwargs.values()))
        register_thread(self._slot)
        self._projections = {
            s.name: LentProjections(model, s.projections)
            for s in self.sites.values()
            if s.projections is not None
        }
        self._last = self.sites.taps[-1]
        self._question = Question(example, kwargs)
        self._register()
        # Last: what the forward above prepares (scales of packed weights) is part of it.
        self._snapshot = Snapshot(model)
        self._snapshot.take()
        if self.has_time and all(map(has_values, model.parameters())):
            # Now, for later a forward of a denoiser is a step that somebody counts.
            self._snapshot.remember(answers=self._ask)

    def _register(self) -> None:
        for path, hook in list_hooks(self._slot, self.model, self.sites):
            module = self.model.get_submodule(path)
            self.has_time |= isinstance(hook, RecordTimestep)
            if hook.after:
                module.register_forward_hook(hook)
            else:
                # Libraries give streams, masks and caches by keyword.
                module.register_forward_pre_hook(hook, with_kwargs=True)

    @property
    def device(self) -> torch.device:
        """Where the backbone runs, also where its weights are kept elsewhere (offloaded)."""
        return find_device(self.model)

    def train(self, mode: bool = True) -> Host:
        """Frozen is frozen: dropout stays off and BatchNorm statistics stay where they are."""
        # Of its children only the backbone has a mode, and that stays eval, or its user's own again.
        self.training = mode
        if not self.released:
            self.model.eval()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The backbone's own output."""
        return self.model(*args, **kwargs)

    def lacks_projections(self, tuners: Mapping[str, Tuner]) -> list[str]:
        """Sites where a tuner needs W_q, W_k, W_v, W_o of the layer's attention, and none are known.

        Empty where all of them can run. Projections are proved with weights: a backbone without
        any (`forecast.load_shapes`) has none.

        Args:
            tuners: By site name, as `task.inline_tuners`.
        """
        return sites_without_projections(tuners, self.sites, self._projections)

    def features(
        self, *args: Any, keep: Needs | Sequence[str] | None = None, **kwargs: Any
    ) -> Features:
        """Taps of one forward, without gradient; they carry the readout and the mask with them.

        Args:
            args: The backbone's input.
            keep: `Needs` (of a task or a bank), or tap names for all tokens; None for all taps.
            kwargs: The backbone's input by keyword.

        Raises:
            NoSitesError: A tap has no such name.
        """
        needs = self.resolve_needs(keep)
        call = Call({}, needs, self._projections, self._last, inputs=count_inputs(args, kwargs))
        with torch.no_grad():
            output = self._run(call, self.model, args, kwargs)
        call.keep_own_feature(output, self.readout_rule, self.readout)
        # In the order that was asked for, whatever the order of the forward.
        call.taps = {tap: call.taps[tap] for tap in needs.taps}
        return call.features(self.readout)

    def run_tuned(
        self,
        tuners: Mapping[str, Tuner],
        needs: Needs,
        *args: Any,
        weights: Mapping[str, Tensor] | None = None,
        side: SideNetwork | None = None,
        **kwargs: Any,
    ) -> tuple[Features, Any]:
        """One forward with tuners in use: the kept streams, and the backbone's own output.

        The streams carry the readout with them, with the weights that the forward ran with.

        Args:
            tuners: By site name.
            needs: What to keep; the tap "last" is the last stream.
            args: The backbone's input.
            weights: Tensors that take the place of the backbone's for this forward; the backbone itself
                is not written (`copy_with_weights`).
            side: Its state takes the place of the last stream; its taps must be in `needs`.
            kwargs: The backbone's input by keyword.
        """
        check_tuners(tuners, self.sites, self._projections)
        model, projections, readout = self.model, self._projections, self.readout
        if weights:
            # The backbone object is never changed: other threads may be running it.
            model = copy_with_weights(self.model, self._narrow(weights))
            projections = {n: p.of(model) for n, p in projections.items() if n in tuners}
            readout = partial(self.readout, model=model)
        call = Call(tuners, needs, projections, self._last, side, count_inputs(args, kwargs))
        output = self._run(call, model, args, kwargs)
        call.keep_own_feature(output, self.readout_rule, readout)
        return call.features(readout), output

    def _run(
        self, call: Call, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """The output of the backbone or of a copy of it; what its hooks keep is in the call."""
        args, kwargs = fit_inputs(self._half, (args, kwargs))
        with active(self._slot, call), outside_autocast(self._half, self.model):
            output = model(*args, **kwargs)
        check_all_reached(call)
        self._snapshot.check()
        return output

    def _narrow(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Trained copies of the backbone's weights in the precision that it computes in."""
        if self._half is None:
            return weights
        return {n: w.to(self.model.get_parameter(n).dtype) for n, w in weights.items()}

    def predict_side_by_side(
        self, bypasses: Sequence[Any], *args: Any, base: bool = True, **kwargs: Any
    ) -> Tensor:
        """Predictions of a diffusion model and of k bypasses beside it, from one forward of it.

        Returns `1+k ...` of the backbone's output, or `k ...` without `base`. Only what follows
        the last block runs k times.

        Args:
            bypasses: `task.side` of bypass tasks without a head.
            args: The backbone's input.
            base: Whether the backbone's own prediction goes first.
            kwargs: The backbone's input by keyword.

        Raises:
            MissingInputError: The backbone takes no time step: it is no diffusion model.
        """
        if not self.has_time:
            raise MissingInputError(
                "predictions side by side are made by diffusion models",
                found=f"{type(self.model).__name__}, whose forward takes no timestep",
                fix="use Bank(tasks)(host.features(x, keep=...))",
            )
        streams = SideBySide(bypasses, base=base)
        call = Call({}, Needs(streams.taps), self._projections, self._last, streams)
        output = self._run(call, self.model, args, kwargs)
        predictions = first_tensor(output)
        assert predictions is not None
        return predictions

    @contextmanager
    def using(self, task: Any) -> Iterator[None]:
        """Every forward of the backbone in this thread and block uses the task.

        For the user's own loop, `generate()` and pipelines. Tuners run at their sites; a bypass
        without a head gives the last stream, which the backbone's own final norm and output map
        then read. None switches a task off. Do not hold it across an `await`.

        Args:
            task: An inline task, or a bypass task without a head; several of them as a `Blend` or
                as `Rows`; or None.

        Raises:
            WrongTaskError: The task is a bypass with a head, which reads a state of its own, or trains
                weights of the backbone.
        """
        if task is None:
            with active(self._slot, None):
                yield
            return
        if len(getattr(task, "weights", ())):
            raise WrongTaskError(
                "a task with weights of its own in the backbone's place cannot run inside it",
                where=task.method,
                found="the backbone object is shared, and is not changed for one of its users",
                fix="call Tuned(host, task)(x)",
            )
        side = getattr(task, "side", None)
        if side is not None and task.head is not None:
            raise WrongTaskError(
                "a bypass task with a head runs beside the backbone, not inside it",
                fix="call Tuned(host, task)(x), or task(host.features(x, keep=...), host.readout)",
            )
        check_tuners(task.inline_tuners, self.sites, self._projections)
        needs = Needs(side.taps if side is not None else ())
        call = Call(task.inline_tuners, needs, self._projections, self._last, side)
        self._snapshot.check()
        with active(self._slot, call):
            yield
        # Where no forward ran inside, nothing was missed.
        if call.reached or call.taps:
            check_all_reached(call)

    def checkpoint(self, on: bool = True) -> None:
        """Activation checkpointing of every block that keeps the tuners.

        A block is run again inside backward with the record it was run with. Gradients are equal;
        does not compile with `fullgraph`: checkpoint or compile.

        Args:
            on: False takes it away again.
        """
        checkpoint_blocks(self.model, self._slot, self.sites if on else None)

    def release(self) -> None:
        """Give the backbone back as it was: no hook and no checkpoint, its gradients and its modes.

        Which parameters ask for gradients and which modules are in training mode is as it was before
        the first of the hosts that stand on it now, and comes back with the last of them, whatever
        their order. A copy of a host was made with a frozen backbone, which stays as it is.
        """
        checkpoint_blocks(self.model, self._slot, None)
        for module in self.model.modules():
            # By slot: other hosts on the same backbone keep their hooks.
            remove_hooks(module, lambda hook: getattr(hook, "slot", None) == self._slot)
        drop_thread(self._slot)
        give_back(self)
        self.released = True

    def __enter__(self) -> Host:
        """`with Host(...) as host:` releases the backbone at the end."""
        return self

    def __exit__(self, *_exception: object) -> None:
        """Release the backbone."""
        self.release()

    def check_unchanged(self) -> None:
        """Refuse a backbone that is no longer what it was when this host was built.

        Every use of the host compares what costs next to nothing; this compares all values, but those of
        parameters that somebody lets train again.

        Raises:
            BackboneChangedError: Weights were written to, modules replaced, or adapters switched.

        Cost: 0.2 s a gigabyte on a CPU.
        """
        self._snapshot.check_values(trained=False)

    def fingerprint(self) -> dict[str, Any]:
        """What a task file stores to know its backbone again; see `fingerprint.py`."""
        return fingerprint(self.model, self.sites)

    def earlier_fingerprint(self) -> dict[str, Any]:
        """The same as files have it that were written before wrappers were looked through."""
        return earlier_fingerprint(self.model, self.sites)

    def apart(self) -> dict[str, Any] | None:
        """Fingerprint and digest with LoRA of PEFT apart from its weights, as files of before have them.

        None where no adapter is in use.
        """
        if not list_contents(self.model).adapters:
            return None
        known = self._snapshot.remember(apart=partial(full_digest, merged=False))
        return {
            "fingerprint": fingerprint(self.model, self.sites, merged=False),
            "digest": known["apart"],
        }

    def digest(self) -> str:
        """sha256 over all weights as they are now, 16 hexadecimal digits.

        Cost: about 1 s a gigabyte, once while they stay what they are.
        """
        try:
            return self._snapshot.remember(short=weights_digest)["short"]
        except BackboneChangedError:
            # A key tells what is there; whoever uses the host is refused.
            return weights_digest(self.model)

    def identity(self) -> dict[str, Any]:
        """The digest of all weights that files keep, and what the backbone answers to a fixed input.

        Raises:
            BackboneChangedError: The weights are no longer those that this host was built on.

        Cost: about 1 s a gigabyte and a forward of one input, once.
        """
        known = self._snapshot.remember(digest=full_digest, answers=self._ask)
        return {name: value for name, value in known.items() if value is not None}

    def _ask(self, model: nn.Module) -> dict[str, Any] | None:
        # Of a sharded backbone every process would have to ask.
        return (
            None if sharded_modules(model) else ask(self, self._question, self._last, self.device)
        )
