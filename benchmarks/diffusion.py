"""Memory and time of training diffusion models, every method, on architectures without weights.

    python benchmarks/diffusion.py

Memory is counted, not measured: one training step (forward, mean squared error, backward, AdamW)
runs on tensors that have shapes only (`restuning.forecast`), so that SDXL needs no memory. Rows:
forward-only, full, full + checkpointing, LoRA r8 on all attention maps (PEFT), LoRA +
checkpointing, inline Res-Tuning, and the bypass with 1x1 and 3x3 maps. Step times are measured on
the 50 million parameter UNet, in turns in one process. The paper's
column (Stable Diffusion v1.5 on COCO2017, batch and resolution not known) stands beside ours.
`--only memory` and `--only times` leave the other part of an earlier result as it was.
`--timed` names what is timed; on a GPU it can be Stable Diffusion.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from common import (
    KEEP,
    apart,
    arguments,
    in_turns,
    paired,
    peak_of,
    seconds,
    spread,
    started,
    target,
    write,
)

LORA_RANK = 8
RANK = 64
"""Of the bypass. The paper's layout of 3.76 M parameters is not known; with 1x1 maps ours has 5.5 M."""

INLINE_RANK = 50
"""Of inline Res-Tuning: two adapters in every transformer block, 2.55 M on SD v1.5 (paper: 2.54 M)."""

METHODS = (
    "forward-only",
    "full",
    "full+checkpointing",
    "lora",
    "lora+checkpointing",
    "res-tuning",
    "bypass",
    "bypass-3x3",
)
TIMED = ("forward-only", "full", "lora", "bypass")

PAPER = {
    "full": (72.77, 1.98),
    "lora": (61.03, 1.42),
    "res-tuning": (54.49, 1.38),
    "bypass": (21.35, 0.82),
}
"""GB and hours an epoch of arXiv 2310.19859 (project page)."""


def unet_50m() -> tuple[Any, dict[str, Any]]:
    """The UNet of 50.5 million parameters on 32x32 latents."""
    import torch
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(128, 256, 512),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=256,
        attention_head_dim=8,
    )
    return model, _text(torch.randn(1, 4, 32, 32), 16, 256)


def sd15() -> tuple[Any, dict[str, Any]]:
    """Stable Diffusion v1.5 at 512 pixels."""
    import torch
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    return model, _text(torch.randn(1, 4, 64, 64), 77, 768)


def sdxl() -> tuple[Any, dict[str, Any]]:
    """Stable Diffusion XL at 1024 pixels."""
    import torch
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )
    example = _text(torch.randn(1, 4, 128, 128), 77, 2048)
    example["added_cond_kwargs"] = {
        "text_embeds": torch.randn(1, 1280),
        "time_ids": torch.ones(1, 6),
    }
    return model, example


def dit_xl() -> tuple[Any, dict[str, Any]]:
    """DiT-XL/2 at 256 pixels."""
    import torch
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        sample_size=32,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    return model, {
        "hidden_states": torch.randn(1, 4, 32, 32),
        "timestep": torch.tensor([500]),
        "class_labels": torch.tensor([1]),
    }


def unet_tiny() -> tuple[Any, dict[str, Any]]:
    """A UNet of a moment, for trying."""
    import torch
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
    )
    return model, _text(torch.randn(1, 4, 16, 16), 4, 32)


def _text(sample: Any, words: int, width: int) -> dict[str, Any]:
    import torch

    return {
        "sample": sample,
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, words, width),
    }


ARCHITECTURES: dict[str, tuple[Callable[[], tuple[Any, dict[str, Any]]], int]] = {
    "unet-50m": (unet_50m, 16),
    "sd15": (sd15, 1),
    "sdxl": (sdxl, 1),
    "dit-xl": (dit_xl, 16),
}
"""With the batch of a step. Saved activations grow in proportion to it."""

TINY = {"tiny": (unet_tiny, 2)}


def trained(model: Any, example: dict[str, Any], method: str, *, absent: bool) -> tuple[Any, list]:
    """The module of a method's step, and what it trains."""
    import torch

    import restuning
    from restuning.forecast import AbsentWeights

    if method in ("forward-only", "full", "full+checkpointing", "lora", "lora+checkpointing"):
        model.requires_grad_(method.startswith("full")).train()
        if method.startswith("lora"):
            from peft import LoraConfig, inject_adapter_in_model

            maps = ["to_q", "to_k", "to_v", "to_out.0"]
            # Not every denoiser of diffusers has `add_adapter`.
            config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=maps)
            inject_adapter_in_model(config, model)
        if method.endswith("checkpointing"):
            model.enable_gradient_checkpointing()
        return model, [p for p in model.parameters() if p.requires_grad]
    # Sites do not depend on the grid, and a small one is proved faster.
    small = {k: v[..., :16, :16] if k == "sample" else v for k, v in example.items()}
    with AbsentWeights() if absent else torch.no_grad():
        host = restuning.Host(model, **small)
    options: dict[str, Any] = {"rank": RANK}
    name = "res-tuning-bypass"
    if method == "res-tuning":
        name, options = "res-tuning[mha=adapter,ffn=adapter]", {"rank": INLINE_RANK}
    elif method == "bypass-3x3":
        options["kernel"] = 3
    with torch.device("meta" if absent else "cpu"):
        task = restuning.methods.build(name, host, **options)
    return restuning.Tuned(host, task).train(), list(task.parameters())


def count(name: str, method: str) -> dict[str, Any]:
    """One row of memory, from shapes alone."""
    import torch

    from restuning.forecast import forecast_step

    make, batch = ARCHITECTURES[name]
    with torch.device("meta"):
        model, example = make()
    example = _real(example)
    module, parameters = trained(model, example, method, absent=True)
    found = forecast_step(
        module,
        example,
        batch,
        trained=parameters if method != "forward-only" else (),
        loss=lambda out: out.sample.float().square().mean(),
    )
    return {
        "architecture": name,
        "method": method,
        "batch": batch,
        "backbone_parameters": sum(
            p.numel() for n, p in model.named_parameters() if "lora" not in n
        ),
        "trained_parameters": sum(p.numel() for p in parameters) if method != "forward-only" else 0,
        "saved_for_backward_bytes": found.saved_bytes,
        "peak_bytes_above_weights": found.peak_bytes,
        "optimiser_bytes": found.optimiser_bytes,
        "total_bytes": found.total_bytes,
        "flops": found.cost.flops,
    }


def _real(value: Any) -> Any:
    import torch

    if isinstance(value, dict):
        return {k: _real(v) for k, v in value.items()}
    if not value.is_floating_point():
        return torch.ones(value.shape, dtype=value.dtype)
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(0))


def step_of(args: argparse.Namespace, method: str) -> tuple[Callable[[], None], int]:
    """One real step of a method on what is timed, and the number of weights it trains."""
    import torch

    make, batch = {**ARCHITECTURES, **TINY}[args.timed]
    torch.manual_seed(0)
    with torch.device(args.device):
        model, example = make()
    module, parameters = trained(model, example, method, absent=False)
    module, inputs = module.to(args.device), {}
    for key, value in example.items():
        inputs[key] = value.expand(args.batch or batch, *value.shape[1:]).contiguous()
    parameters = parameters if method != "forward-only" else []
    return _step(module, inputs, parameters), sum(p.numel() for p in parameters)


def measure(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """Peak memory and times of a real step, in this process."""
    step, size = step_of(args, method)
    # The optimiser's state is not the step's memory.
    step()
    peak = peak_of(step, args.device)
    return {
        "architecture": args.timed,
        "method": method,
        "trained_parameters": size,
        "peak_bytes_above_weights": peak,
        "step_seconds": spread([seconds(step, args.device) for _ in range(args.rounds)]),
    }


def times(args: argparse.Namespace) -> dict[str, Any]:
    """Step times, in turns."""
    steps = {method: step_of(args, method)[0] for method in TIMED}
    found = in_turns(steps, args.rounds, args.device)
    return {
        "batch": args.batch or {**ARCHITECTURES, **TINY}[args.timed][1],
        "seconds": {m: spread(t) for m, t in found.items()},
        "over_full": {m: paired(t, found["full"]) for m, t in found.items()},
    }


def _step(module: Any, inputs: dict[str, Any], parameters: list) -> Callable[[], None]:
    import torch

    optimiser = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None

    def run() -> None:
        with torch.set_grad_enabled(optimiser is not None):
            loss = module(**inputs).sample.square().mean()
        if optimiser is not None:
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    return run


def options() -> argparse.ArgumentParser:
    """What can be asked for."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--architectures", nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=["memory", "times"])
    parser.add_argument(
        "--timed", default="unet-50m", choices=["unet-50m", "sd15", *TINY], help="whose steps"
    )
    parser.add_argument("--batch", type=int, help="of timed steps; default the architecture's own")
    return parser


def main() -> None:
    """Count and measure, and write the JSON."""
    args = started(options())
    if args.one == "times":
        print(json.dumps(times(args)))
        return
    before = json.loads(args.out.read_text()) if args.only and args.out.exists() else {}
    rows: list[dict[str, Any]] = before.get("rows", []) if args.only == "times" else []
    skipped = {}
    for name in args.architectures if args.only != "times" else ():
        full = None
        for method in args.methods:
            row = count(name, method)
            full = row["saved_for_backward_bytes"] if method == "full" else full
            row["saved_over_full"] = row["saved_for_backward_bytes"] / full if full else None
            rows.append(row)
            print(
                f"{name:9s} {method:19s} {row['trained_parameters'] / 1e6:8.2f} M   saved "
                f"{row['saved_for_backward_bytes'] / 2**20:8.0f} MiB   peak "
                f"{row['peak_bytes_above_weights'] / 2**20:8.0f} MiB   all "
                f"{row['total_bytes'] / 2**30:6.1f} GiB",
                flush=True,
            )
    measured: dict[str, Any] = (
        before.get("times", {}) if args.only == "memory" else apart(args, "times", KEEP)
    )
    if "not_measured" in measured:
        skipped["times"] = measured["not_measured"]
        measured = {}
    by = {(r["architecture"], r["method"]): r["saved_for_backward_bytes"] for r in rows}

    def ratio(name: str, method: str, base: str) -> float | None:
        ours, theirs = by.get((name, method)), by.get((name, base))
        return ours / theirs if ours is not None and theirs else None

    write(
        args,
        "one training step of denoisers: counted memory, measured times of the small one",
        rows=rows,
        times=measured,
        not_measured=skipped,
        paper={
            m: {
                "memory_gb": gb,
                "hours_an_epoch": h,
                "memory_over_full": gb / PAPER["full"][0],
                "time_over_full": h / PAPER["full"][1],
            }
            for m, (gb, h) in PAPER.items()
        },
        targets=[
            target(
                "50 M UNet, batch 16: bypass, saved activations over full",
                ratio("unet-50m", "bypass", "full"),
                0.12,
            ),
            target(
                "50 M UNet, batch 16: bypass, saved activations over LoRA",
                ratio("unet-50m", "bypass", "lora"),
                0.15,
            ),
            target(
                "50 M UNet, batch 16: bypass, step time over full, in turns",
                None
                if args.timed != "unet-50m" or args.batch
                else measured.get("over_full", {}).get("bypass", {}).get("median"),
                0.40,
            ),
            target(
                "SD v1.5, 512 px: bypass, saved activations over full",
                ratio("sd15", "bypass", "full"),
                0.10,
            ),
        ],
    )


if __name__ == "__main__":
    main()
