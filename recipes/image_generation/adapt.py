"""How every method adapts the base model: this library's tasks, and a plain loop for the rest.

Learning rates, ranks and forms were chosen by `pilots.py` on scenes of their own and then kept for
both shifts and all seeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import parts
import torch
from torch import Tensor, nn

from restuning import Host, Task, methods
from restuning.diffusion import (
    DenoiserSettings,
    DenoiserTraining,
    EncodedPairs,
    Objective,
    TunedDenoiser,
    as_denoiser,
    linear_alphas,
    train_denoiser,
)
from restuning.diffusion.batch import draw_batch
from restuning.forecast.ledger import SavedTensors
from restuning.training import learning_rate
from restuning.training.randomness import Order

OBJECTIVE = Objective("v", linear_alphas())
"""Velocity: after 600 steps on noise, samples were still noise, because an error of the noise is a
hundredfold one of the picture where there is hardly any picture."""
BATCH = 32
LORA, CHECKPOINTED = "lora", "full + checkpointing"
ATTENTION_MAPS = ["to_q", "to_k", "to_v", "to_out.0"]
"""What diffusers' own examples put LoRA beside."""
ALL_MAPS = [*ATTENTION_MAPS, "conv1", "conv2", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
"""And the convolutions and feed-forward maps of a UNet, at a rank for the same number of parameters."""
ONE_SEED = (CHECKPOINTED,)
"""Methods of one seed: this one has the numbers of full tuning."""


@dataclass(frozen=True)
class Setting:
    """A method as it is run: a name for `methods.build` (or one of the two above) and its options."""

    how: str
    lr: float
    options: dict[str, Any] = field(default_factory=dict)


SETTINGS: dict[str, dict[str, Setting]] = {
    "unet": {
        "full": Setting("full", 1e-3),
        CHECKPOINTED: Setting(CHECKPOINTED, 1e-3),
        "LoRA r8": Setting(LORA, 1e-2, {"rank": 8}),
        "res-tuning": Setting("res-tuning", 1e-2, {"rank": 17}),
        "LoRA r2 everywhere": Setting(LORA, 1e-2, {"rank": 2, "maps": ALL_MAPS}),
        "res-tuning at attention and FFN": Setting(
            "res-tuning[mha=adapter,cross=adapter,ffn=adapter]", 1e-2, {"rank": 18}
        ),
        "bypass": Setting("res-tuning-bypass", 5e-3, {"rank": 32, "form": "replace"}),
    },
    "dit": {
        "full": Setting("full", 3e-4),
        "LoRA r8": Setting(LORA, 3e-3, {"rank": 8}),
        "res-tuning": Setting(
            "res-tuning[mha=adapter,cross=adapter,ffn=adapter]", 3e-3, {"rank": 18}
        ),
        "bypass": Setting("res-tuning-bypass", 3e-3, {"rank": 20}),
    },
}


@dataclass(frozen=True)
class Adapted:
    """A trained denoiser and what its training took.

    Attributes:
        denoiser: As `sample` wants one.
        parameters: Trained.
        saved: Bytes kept from a forward for its backward, without weights.
        seconds: Of the processor, a step.
    """

    denoiser: Callable[..., Tensor]
    parameters: int
    saved: int
    seconds: float


def base(network: str, steps: int, out: Path) -> nn.Module:
    """The base model, trained from scratch on plain pictures without stars, or read."""
    torch.manual_seed(0)
    model, file = parts.NETWORKS[network](), out / f"base-{network}.pt"
    if not file.exists():
        host = hosted(model, network)
        task = methods.build("full", host)
        settings = DenoiserSettings(
            steps=steps, batch_size=BATCH, lr=1e-3, ema=0.995, checkpoint_every=100, warmup_steps=50
        )
        train_denoiser(
            DenoiserTraining(
                host,
                {"base": task},
                parts.base_set(),
                OBJECTIVE,
                settings,
                out / f"base-{network}",
                parts.FIXED[network],
            )
        )
        host.release()
        _take_over(model, task)
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file, weights_only=True))
    return model.eval()


def hosted(model: nn.Module, network: str) -> Host:
    """A host of a denoiser."""
    draw = torch.Generator().manual_seed(0)
    return Host(
        model,
        torch.randn(1, parts.CHANNELS, parts.SIDE, parts.SIDE, generator=draw),
        timestep=torch.tensor([500]),
        **parts.FIXED[network],
        encoder_hidden_states=parts.text_states(["a small red circle at the top left"]),
    )


def adapted(
    network: str,
    model: nn.Module,
    setting: Setting,
    data: EncodedPairs,
    steps: int,
    seed: int,
    folder: Path,
) -> Adapted:
    """Train one row; the model is used up."""
    torch.manual_seed(seed)
    fixed, weights = parts.FIXED[network], list(model.parameters())
    settings = DenoiserSettings(
        steps=steps,
        batch_size=BATCH,
        lr=setting.lr,
        seed=seed,
        checkpoint_every=steps,
        warmup_steps=10,
    )
    x, times = torch.randn(BATCH, parts.CHANNELS, parts.SIDE, parts.SIDE), torch.full((BATCH,), 500)
    fed = data.conditions(list(range(BATCH)))
    if setting.how in (LORA, CHECKPOINTED):
        trained = _injected(model, setting)
        start = time.process_time()
        _plain_loop(model, trained, data, settings, fixed)
        seconds = (time.process_time() - start) / steps
        size = saved_by(lambda: model(x, timestep=times, **fed, **fixed).sample, weights + trained)
        return Adapted(bare(model.eval(), fixed), sum(p.numel() for p in trained), size, seconds)
    host = hosted(model, network)
    task = methods.build(setting.how, host, **setting.options)
    start = time.process_time()
    run = DenoiserTraining(host, {"task": task}, data, OBJECTIVE, settings, folder, fixed)
    train_denoiser(run, resume=False)
    seconds = (time.process_time() - start) / steps
    module = TunedDenoiser(host, {"task": task}, fixed)
    size = saved_by(lambda: module(x, times, fed), weights + list(task.parameters()))
    if not len(task.weights):
        return Adapted(as_denoiser(host, task, fixed), task.tuner_parameters(), size, seconds)
    host.release()
    _take_over(model, task)
    return Adapted(bare(model, fixed), task.tuner_parameters(), size, seconds)


def bare(model: nn.Module, fixed: dict[str, Any]) -> Callable[..., Tensor]:
    """A denoiser without a host."""

    @torch.no_grad()
    def denoiser(x: Tensor, times: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        return model(x, timestep=times, **conditions, **fixed).sample

    return denoiser


def saved_by(run: Callable[[], Tensor], weights: Sequence[Tensor]) -> int:
    """Bytes that autograd saves for backward, apart from weights."""
    with (saved := SavedTensors(weights)).hooks():
        out = run()
    size = saved.bytes()
    del out
    return size


def _take_over(model: nn.Module, task: Task) -> None:
    """Trained copies of weights into the model itself, which is then quicker to run."""
    own = {n.replace("/", "."): w.detach() for n, w in task.weights.items()}
    left = model.load_state_dict(own, strict=False)
    assert not left.unexpected_keys


def _injected(model: Any, setting: Setting) -> list[Tensor]:
    """What a plain loop trains."""
    if setting.how == CHECKPOINTED:
        model.requires_grad_(True).train()
        model.enable_gradient_checkpointing()
    else:
        from peft import LoraConfig, inject_adapter_in_model

        model.requires_grad_(False)
        rank = setting.options["rank"]
        # PixArt's transformer has no `add_adapter` of diffusers.
        maps = setting.options.get("maps", ATTENTION_MAPS)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=maps)
        inject_adapter_in_model(config, model)
    return [p for p in model.parameters() if p.requires_grad]


def _plain_loop(
    model: Any,
    trained: list[Tensor],
    data: EncodedPairs,
    settings: DenoiserSettings,
    fixed: dict[str, Any],
) -> None:
    """A loop without this library, on the very batches and noise that `train_denoiser` draws."""
    optimiser = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
    order = Order(len(data), settings.batch_size, 10_000, settings.seed)
    for step in range(settings.steps):
        noised, fed = draw_batch(data, OBJECTIVE, settings, order, step)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(
                step, total=settings.steps, warmup=settings.warmup, peak=settings.lr
            )
        answer = model(noised.sample, timestep=noised.time, **fed, **fixed).sample
        (answer - noised.target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip or float("inf"))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
