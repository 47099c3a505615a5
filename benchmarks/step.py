"""Peak memory above the weights and time of one training step, every method in its own process.

    python benchmarks/step.py --out benchmarks/results/step-cpu.json

ViT-S/16, batch 16, 224 px, fp32, random weights (they change neither memory nor time). On CPU the
measured processes run with glibc told to give memory back; without that, peaks wander threefold.
Rows: forward-only, linear, full, full + checkpointing, LoRA r8 (PEFT), LoRA + checkpointing,
ms-swift's ResTuning (when installed), and ours. Beside the peak stand the bytes that autograd
saves for backward. Times are medians over `--steps` steps after two warm-ups; every ratio is
against forward-only of the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODES = [
    "forward-only",
    "linear",
    "full",
    "full+checkpointing",
    "lora",
    "lora+checkpointing",
    "ms-swift-restuning",
    "res-tuning",
    "res-tuning-bypass",
]
GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}
CLASSES = 100


def build(mode: str, device: str) -> tuple[Any, Any, Any]:
    """The step's module, what to optimise, and the host of ours (or None)."""
    import timm
    import torch
    from torch import nn

    torch.manual_seed(0)
    classes = 0 if mode in ("res-tuning", "res-tuning-bypass", "forward-only") else CLASSES
    model = timm.create_model("vit_small_patch16_224", num_classes=classes).to(device)
    example = torch.randn(1, 3, 224, 224, device=device)
    if mode == "forward-only":
        return model.eval().requires_grad_(False), [], None
    if mode.startswith("res-tuning"):
        import restuning

        host = restuning.Host(model, example)
        task = restuning.methods.build(mode, host, num_classes=CLASSES).to(device)
        return restuning.Tuned(host, task).train(), list(task.parameters()), host
    if mode.startswith("lora"):
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=8, lora_alpha=8, target_modules=["qkv"], modules_to_save=["head"])
        model = get_peft_model(model, config)
        if mode.endswith("checkpointing"):
            model.base_model.model.set_grad_checkpointing(True)
        return model.train(), [p for p in model.parameters() if p.requires_grad], None
    if mode == "ms-swift-restuning":
        from swift.tuners import ResTuningConfig, Swift

        model.requires_grad_(False)
        config = ResTuningConfig(
            dims=384, root_modules=r".*blocks.0$", stem_modules=r".*blocks\.\d+$",
            target_modules=r"norm", tuner_cfg="res_adapter",
        )  # fmt: skip
        model = Swift.prepare_model(model, config)
        nn.init.zeros_(model.head.bias)
        model.head.requires_grad_(True)
        return model.train(), [p for p in model.parameters() if p.requires_grad], None
    if mode == "linear":
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    if mode.endswith("checkpointing"):
        model.set_grad_checkpointing(True)
    return model.train(), [p for p in model.parameters() if p.requires_grad], None


def peak_bytes(device: str) -> int:
    """Highest memory of this process so far."""
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(ln for ln in status.read_text().splitlines() if ln.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def now_bytes(device: str) -> int:
    """Memory of this process now."""
    import torch

    if device == "cuda":
        return torch.cuda.memory_allocated()
    line = next(
        ln for ln in Path("/proc/self/status").read_text().splitlines() if ln.startswith("VmRSS")
    )
    return int(line.split()[1]) * 1024


def saved_bytes(run: Any, parameters: list[Any]) -> int:
    """Bytes that autograd saves for backward, parameters and shared storage counted once."""
    import torch

    weights = {p.untyped_storage().data_ptr() for p in parameters}
    seen: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = run()
    del loss
    return sum(seen.values())


def measure(mode: str, batch: int, steps: int, device: str) -> dict[str, Any]:
    """One mode, measured in this process."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    module, trained, _ = build(mode, device)
    x = torch.randn(batch, 3, 224, 224, device=device)
    y = torch.randint(CLASSES, (batch,), device=device)

    def loss() -> Any:
        if mode == "forward-only":
            with torch.no_grad():
                return module(x).sum()
        return F.cross_entropy(module(x), y)

    optimiser = torch.optim.AdamW(trained, lr=1e-3) if trained else None

    def step() -> None:
        value = loss()
        if optimiser is not None:
            value.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    # One image first: lazy initialisations and the optimiser's state are not the step's memory.
    small, x = x, x[:1]
    labels, y = y, y[:1]
    step()
    x, y = small, labels
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    before = now_bytes(device)
    step()
    step()
    peak = peak_bytes(device) - before
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    saved = 0 if mode == "forward-only" else saved_bytes(loss, list(module.parameters()))
    return {
        "mode": mode,
        "peak_bytes_above_weights": peak,
        "saved_for_backward_bytes": saved,
        "step_seconds_median": statistics.median(times),
        "step_seconds_min": min(times),
        "step_seconds_max": max(times),
        "trained_parameters": sum(p.numel() for p in trained),
    }


def main() -> None:
    """Measure all modes and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step-cpu.json"))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--modes", nargs="*", default=MODES)
    parser.add_argument("--one", help="measure one mode in this process and print JSON")
    args = parser.parse_args()
    if args.one:
        import torch

        torch.set_num_threads(args.threads)
        print(json.dumps(measure(args.one, args.batch, args.steps, args.device)))
        return
    environment = {**os.environ, **GIVE_BACK, "OMP_NUM_THREADS": str(args.threads)}
    rows, skipped = [], {}
    for mode in args.modes:
        command = [sys.executable, __file__, "--one", mode, "--batch", str(args.batch), "--steps",
                   str(args.steps), "--threads", str(args.threads), "--device", args.device]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            skipped[mode] = done.stderr.strip().splitlines()[-1]
            print(f"{mode:22s} not measured: {skipped[mode]}")
            continue
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        row = rows[-1]
        print(
            f"{mode:22s} peak {row['peak_bytes_above_weights'] / 2**20:7.0f} MiB   saved "
            f"{row['saved_for_backward_bytes'] / 2**20:7.0f} MiB   step "
            f"{row['step_seconds_median']:.3f} s"
        )
    base = next((r for r in rows if r["mode"] == "forward-only"), None)
    for row in rows:
        if base:
            row["memory_over_forward"] = (
                row["peak_bytes_above_weights"] / base["peak_bytes_above_weights"]
            )
            row["time_over_forward"] = row["step_seconds_median"] / base["step_seconds_median"]
    import timm
    import torch

    result = {
        "what": "ViT-S/16, 224 px, fp32, one AdamW step",
        "command": f"python benchmarks/step.py --batch {args.batch} --steps {args.steps} "
        f"--threads {args.threads} --device {args.device}",
        "batch": args.batch,
        "threads": args.threads,
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(),
        "machine": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
        "rows": rows,
        "not_measured": skipped,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
