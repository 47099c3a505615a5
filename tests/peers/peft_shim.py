"""PEFT's names over this library: what PEFT's own tests call, answered by `Host`, `Task` and `merge`.

A shim for tests. Names of adapters, which of them are active and which are merged are kept here; everything
that is computed, saved, loaded, mixed or merged is the library's. A configuration that it has no form for
raises `NotApplicable`, with the library's own refusal as the reason; any other refusal is a failure.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import nn

from restuning import Blend, Host, PerRow, Readout, Task, Tuned, export_peft, import_peft, merge
from restuning._errors import RestuningError
from restuning.sites import LinearSite, Site, Sites
from restuning.sites.find_linear import CONVOLUTIONS
from restuning.sites.linear import is_linear, width_in, width_out
from restuning.task.lora import lora_beside
from restuning.task.peft_files import CONFIG, TENSORS, _read_config

BASE = "__base__"
"""What PEFT calls the bare backbone in `adapter_names`."""


OTHER_METHOD = "another method than LoRA"


class NotApplicable(Exception):  # noqa: N818
    """A case asks for what this library has no form for, and why."""


class PeftModel(nn.Module):
    """PEFT's class of this name: a backbone, adapters by name, and which of them is active."""

    prefix = "lora_"

    def __init__(
        self,
        model: nn.Module,
        config: Any,
        adapter_name: str = "default",
        *,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        self._start(model)
        self.add_adapter(adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype)
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)

    def _start(self, model: nn.Module) -> None:
        self.host = host_on(model)
        self.tasks = nn.ModuleDict()
        self.peft_config: dict[str, Any] = {}
        self.active_adapters: list[str] = []
        # Not children of this module: their tasks are.
        self._tuned: dict[str, Tuned] = {}
        self._blends: dict[str, Blend] = {}
        self._merged: list[str] = []
        self._taken_up: list[nn.Module] = []
        self._off = 0

    # ---------------------------------------------------------------- names

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter, or several of them."""
        one = len(self.active_adapters) == 1
        return self.active_adapters[0] if one else self.active_adapters

    @property
    def active_peft_config(self) -> Any:
        """The configuration of the active adapter."""
        return self.peft_config[self.active_adapters[0]]

    @property
    def base_model(self) -> Any:
        """PEFT's inner model, of which tests ask the same and a little more."""
        return _Inner(self)

    def get_base_model(self) -> nn.Module:
        """The backbone itself, which was never wrapped."""
        return self.host.model

    def __getattr__(self, name: str) -> Any:
        """What this does not have, the backbone may have."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("host").model, name)

    def named_parameters(self, *_args: Any, **_kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Under PEFT's names."""
        for name, parameter in self.host.model.named_parameters():
            yield f"base_model.model.{name}", parameter
        for adapter, task in self.tasks.items():
            for site, tuner in task.inline_tuners.items():
                module = self.host.sites.linear[site].module
                for half in ("a", "b"):
                    at = f"base_model.model.{module}.lora_{half.upper()}.{adapter}.weight"
                    yield at, getattr(tuner, half).weight

    def state_dict(self, *_args: Any, **_kwargs: Any) -> dict[str, Any]:
        """Under PEFT's names."""
        buffers = {f"base_model.model.{n}": b for n, b in self.host.model.named_buffers()}
        return {**{n: p.detach() for n, p in self.named_parameters()}, **buffers}

    # ------------------------------------------------------------- adapters

    def add_adapter(
        self, adapter_name: str, peft_config: Any, *, autocast_adapter_dtype: bool = True, **_: Any
    ) -> None:
        """A task under a name, which is not made active."""
        refuse_more_than_lora(peft_config)
        self._refuse_half(autocast_adapter_dtype)
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name {adapter_name!r} already exists.")
        tuners = {
            site.name: lora_beside(site, **_settings(peft_config, site.module))
            for site in pick_sites(self.host, peft_config)
        }
        self._keep(adapter_name, Task(tuners=tuners, method="lora"), peft_config)

    def load_adapter(
        self,
        folder: str | Path,
        adapter_name: str,
        *,
        is_trainable: bool = False,
        peft_config: Any = None,
        autocast_adapter_dtype: bool = True,
        **_: Any,
    ) -> Any:
        """A task from PEFT's files, which is not made active."""
        self._refuse_half(autocast_adapter_dtype)
        config = peft_config or peft.LoraConfig.from_pretrained(str(folder))
        config.inference_mode = not is_trainable
        self._keep(adapter_name, import_peft(folder, self.host), config)
        self.tasks[adapter_name].requires_grad_(is_trainable)
        self.tasks[adapter_name].train(is_trainable)
        return SimpleNamespace(missing_keys=[], unexpected_keys=[])

    def _keep(self, name: str, task: Task, config: Any) -> None:
        first = next(self.host.model.parameters())
        self.tasks[name] = task.to(first.device).requires_grad_(False)
        self._tuned[name] = Tuned(self.host, task)
        self.peft_config[name] = config

    def _refuse_half(self, autocast_adapter_dtype: bool) -> None:
        kinds = {p.dtype for p in self.host.model.parameters() if p.is_floating_point()}
        if not autocast_adapter_dtype and kinds != {torch.float32}:
            raise NotApplicable("what trains beside a backbone in half precision stays in fp32")

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters active, and their parameters trainable."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        for name in names:
            if name not in self.tasks and name not in self._blends:
                raise ValueError(f"Adapter {name} not found.")
        self.active_adapters = names
        for name, task in self.tasks.items():
            task.requires_grad_(name in names and not inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; the first of the others becomes active in its place."""
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        if adapter_name in self._merged:
            raise ValueError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first."
            )
        del self.peft_config[adapter_name], self.tasks[adapter_name], self._tuned[adapter_name]
        if adapter_name in self.active_adapters:
            left = [n for n in self.active_adapters if n != adapter_name]
            self.active_adapters = left or list(self.tasks)[:1]
            self.set_adapter(self.active_adapters)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        **_: Any,
    ) -> None:
        """A blend under a name: what PEFT calls "cat", the only one of its sums that is exact."""
        if combination_type != "cat":
            raise NotApplicable(
                'add_weighted_adapter: a blend is the sum of the products, which is "cat"; all other '
                "combinations are approximations"
            )
        parts = [(self._task(n), w) for n, w in zip(adapters, weights, strict=True)]
        self._blends[adapter_name] = Blend(*parts)
        self.peft_config[adapter_name] = self.peft_config[adapters[0]]

    def _task(self, name: str) -> Any:
        if name in self._blends:
            return self._blends[name]
        return self.tasks[name]

    # -------------------------------------------------------------- answers

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The backbone's output with what is active; a row each where `adapter_names` says so."""
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else ""
        if adapter_names is None and name in self.tasks and not self._taken_up:
            return self._tuned[name](*args, **kwargs)
        rows = len(next(iter((*args, *kwargs.values()))))
        return self._run(lambda model: model(*args, **kwargs), adapter_names, rows)

    def generate(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Any:
        """The backbone's own `generate`, with what is active in it."""
        rows = len(next(iter((*args, *kwargs.values()))))
        return self._run(lambda model: model.generate(*args, **kwargs), adapter_names, rows)

    def _run(self, ask: Callable[[Any], Any], names: Sequence[str] | None, rows: int) -> Any:
        if self._off:
            return ask(self.host.model)
        if names is not None:
            return ask_in(self.host, self._per_row(names, rows), ask)
        if self._taken_up:
            return ask(self._taken_up[0])
        active = [self._task(n) for n in self.active_adapters]
        several = active[0] if len(active) == 1 else Blend(*((t, 1.0) for t in active))
        return ask_in(self.host, several, ask)

    def _per_row(self, names: Sequence[str], rows: int) -> PerRow:
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if self._merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if len(names) != rows:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {rows} respectively."
            )
        if missing := {n for n in names if n != BASE and n not in self.peft_config}:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(sorted(missing))}"
            )
        return PerRow([None if n == BASE else self._task(n) for n in names])

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the backbone's own answers."""
        self._off += 1
        try:
            with ExitStack() as all_off:
                for tuned in self._tuned.values():
                    all_off.enter_context(tuned.disable_adapter())
                # What was merged stands in a copy; the backbone itself was never touched.
                taken_up, self._taken_up = self._taken_up, []
                yield
                self._taken_up = taken_up
        finally:
            self._off -= 1

    # ---------------------------------------------------------------- merge

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Answer with a copy of the backbone that has taken adapters up."""
        new = [n for n in adapter_names or self.active_adapters if n not in self._merged]
        if not new:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=2)
            return
        self._merged += new
        self._taken_up = [self._merge(self._merged)]

    def unmerge_adapter(self) -> None:
        """Answer with the adapters beside the backbone again."""
        self._merged, self._taken_up = [], []

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> nn.Module:
        """The merged copy, and nothing else."""
        merged = self._merge(list(adapter_names or self.active_adapters))
        self.host.release()
        return merged

    def unload(self) -> nn.Module:
        """The backbone itself, released."""
        self.host.release()
        return self.host.model

    def _merge(self, names: Sequence[str]) -> nn.Module:
        plain = [n for n in names if n in self.tasks]
        parts = [(self.tasks[n], 1.0) for n in plain]
        for name in set(names) - set(plain):
            parts += list(self._blends[name].parts)
        task: Any = parts[0][0] if parts == [(parts[0][0], 1.0)] else Blend(*parts)
        return merge(task, self.host)

    # ---------------------------------------------------------------- files

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        **_: Any,
    ) -> None:
        """PEFT's files: the adapter "default" in the folder itself, others in one of their name."""
        if not safe_serialization:
            raise NotApplicable("a pickle can execute what is in it: none is written or read")
        config = getattr(self.host.model, "config", None)
        base = None if config is None else config.to_dict()["_name_or_path"]
        for name in selected_adapters or list(self.tasks):
            at = Path(save_directory) / ("" if name == "default" else name)
            export_peft(self.tasks[name], self.host, at, base_model=base)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        folder: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: Any = None,
        **kwargs: Any,
    ) -> PeftModel:
        """A backbone and a task from PEFT's files."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._start(model)
        kwargs.pop("device_map", None)
        kwargs.pop("torch_device", None)
        made.load_adapter(
            folder, adapter_name, is_trainable=is_trainable, peft_config=config, **kwargs
        )
        made.set_adapter(adapter_name, inference_mode=not is_trainable)
        return made

    def push_to_hub(self, *_args: Any, **_kwargs: Any) -> None:
        """Its name is asked for; no test calls it."""
        raise NotApplicable("tasks are pushed by `restuning.push_to_hub`")

    # --------------------------------------------------------------- counts

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """As `Tuned` counts them."""
        return self._tuned[self.active_adapters[0]].count_parameters()

    def print_trainable_parameters(self) -> None:
        """As `Tuned` prints them."""
        self._tuned[self.active_adapters[0]].print_trainable_parameters()

    def _apply(self, fn: Any, recurse: bool = True) -> PeftModel:
        """Another precision or device is another backbone: a new host stands on it."""
        before = [(p.dtype, p.device) for p in self.host.model.parameters()]
        super()._apply(fn, recurse)
        if before != [(p.dtype, p.device) for p in self.host.model.parameters()]:
            self.host.release()
            self.host = host_on(self.host.model)
            self._tuned = {n: Tuned(self.host, task) for n, task in self.tasks.items()}
        return self


class _Inner:
    """`model.base_model` of PEFT."""

    def __init__(self, outer: PeftModel) -> None:
        self._outer = outer
        self.model = outer.host.model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._outer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._outer.active_adapters:
            return self.model(*args, **kwargs)
        return self._outer(*args, **kwargs)


# ------------------------------------------------------------------ functions of PEFT


def get_peft_model(
    model: nn.Module, peft_config: Any, adapter_name: str = "default", **kwargs: Any
) -> PeftModel:
    """PEFT's function of this name."""
    if mixed := kwargs.pop("mixed", False):
        raise NotApplicable(f"several kinds of adapters in one model (mixed={mixed})")
    return PeftModel(model, peft_config, adapter_name, **kwargs)


def get_peft_model_state_dict(
    model: PeftModel, adapter_name: str = "default", **_: Any
) -> Mapping[str, Any]:
    """What is in the file that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        export_peft(model.tasks[adapter_name], model.host, folder)
        return load_file(Path(folder) / TENSORS)


def get_base_model_state_dict(model: PeftModel) -> Mapping[str, Any]:
    """The backbone's own: its keys never changed."""
    return model.host.model.state_dict()


def set_base_model_state_dict(model: PeftModel, state: Mapping[str, Any], **kwargs: Any) -> Any:
    """Put back what the backbone was."""
    return model.host.model.load_state_dict(state, **kwargs)


def set_peft_model_state_dict(*_args: Any, **_kwargs: Any) -> None:
    """A task is made from a file, or by `load_state_dict`."""
    raise NotApplicable("a task is read from files, not from a dictionary of PEFT's names")


def inject_adapter_in_model(*_args: Any, **_kwargs: Any) -> None:
    """PEFT rewrites a backbone's modules."""
    raise NotApplicable("a backbone is not rewritten: no layers are put into it")


# ------------------------------------------------------------------ over the library


def refuse_more_than_lora(config: Any) -> None:
    """Hold a configuration to what `import_peft` would say of it."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        assert (Path(folder) / CONFIG).exists()
        try:
            _read_config(Path(folder), ())
        except RestuningError as error:
            entries = ", ".join(re.findall(r"(\w+)=", error.found)) or error.found
            if error.what == "not a LoRA adapter":
                raise NotApplicable(OTHER_METHOD) from error
            raise NotApplicable(f"import_peft: {error.what}: {entries}") from error


def ask_in(host: Host, task: Any, ask: Callable[[Any], Any]) -> Any:
    """What the backbone answers with a task in use."""
    with host.using(task) if task is not None else nullcontext():
        return ask(host.model)


def host_on(model: nn.Module) -> Host:
    """A host on a model of PEFT's tests.

    Its models for custom layers have no blocks, so that nothing can be found in them by structure; every
    linear map and convolution that has a form as a linear site is named as one, which `Host` takes as known.
    """
    maps = [site for path, module in model.named_modules() if (site := _site(path, module))]
    if not maps:
        raise NotApplicable(
            "a backbone without linear maps or convolutions: parameters alone have no sites"
        )
    # A backbone has at least one block; nothing is tuned or kept at this one.
    last = maps[-1]
    block = Site("block.1", "block", 1, last.dim, last.module, last.module, last.module)
    return Host(model, sites=Sites([block], maps), readout=Readout("", "own", last.dim))


def _site(path: str, module: Any) -> LinearSite | None:
    name = path.replace(".", "_")
    if type(module) in CONVOLUTIONS and module.padding_mode == "zeros":
        return LinearSite(
            f"conv_{name}.1",
            "conv" if module.groups == 1 else "grouped",
            1,
            path,
            module.in_channels,
            module.out_channels,
            kernel=tuple(module.kernel_size),
            stride=tuple(module.stride),
            padding=tuple(module.padding),
            groups=module.groups,
        )
    # The map inside an attention of torch is never called: its kernel takes the weight.
    if not is_linear(module) or type(module).__name__ == "NonDynamicallyQuantizableLinear":
        return None
    ins, outs = width_in(module), width_out(module)
    return LinearSite(f"linear_{name}.1", "linear", 1, path, ins, outs, proof="product")


def pick_sites(host: Host, config: Any) -> list[LinearSite]:
    """The sites of the modules that a configuration names, by PEFT's own rule."""
    by_module = {site.module: site for site in host.sites.linear.values()}
    named = {
        path: module
        for path, module in host.model.named_modules()
        if path and check_target_module_exists(config, path)
    }
    if not named:
        raise ValueError(f"Target modules {config.target_modules} not found in the base model.")
    for path, module in named.items():
        if path not in by_module:
            kind = type(module).__name__
            raise NotApplicable(f"LoRA beside {kind}, which is no linear site")
    return [by_module[path] for path in named]


def _settings(config: Any, path: str) -> dict[str, Any]:
    rank_key = get_pattern_key(config.rank_pattern.keys(), path)
    alpha_key = get_pattern_key(config.alpha_pattern.keys(), path)
    return {
        "rank": config.rank_pattern.get(rank_key, config.r),
        "alpha": config.alpha_pattern.get(alpha_key, config.lora_alpha),
        "rslora": config.use_rslora,
        "dropout": config.lora_dropout,
        "zero": config.init_lora_weights is not False,
    }
