"""Adapt small denoisers to a new style and a new concept, by every method, with real learning.

    python recipes/image_generation/run.py --out runs/image-generation
    python recipes/image_generation/run.py --out runs/image-generation --network dit

A base model is trained from scratch on captioned pictures (`shapes.py`), then adapted to the style
"paper" or to the concept "star" by: full, full + checkpointing, LoRA (PEFT), inline Res-Tuning
variants, and the bypass. Every row: error of the predicted noise on held-out pictures by bucket of
time, accuracy of attributes of generated pictures against their captions, Fréchet distance on the
judge's features (FD_judge: no Inception, so it is no FID), saved activations, step time,
parameters, and a sample grid. Rows are files of their own, so a run goes on where it was stopped;
`--table` prints what is there. Hardware: one CPU core, 0.3 to 0.5 s a step.

Learning rates: 1e-3 for the base, 3e-4 for full, 2e-3 for everything small; not tuned for any.
Numbers: `recipes/image_generation/results.json`, written by `--table`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import parts
import shapes
import torch
from torch import nn

from restuning import Host, Task, methods
from restuning.diffusion import (
    DenoiserSettings,
    Objective,
    Predictions,
    Run,
    answers,
    linear_alphas,
    sample,
    save_grid,
    train_denoiser,
)
from restuning.diffusion.evaluate import frechet_distance, held_out_error
from restuning.forecast.ledger import Saved
from restuning.train.randomness import Order, mixed

METHODS = {
    "full": ("full", {}),
    "full+checkpointing": ("plain", {}),
    "lora": ("plain", {"rank": 8}),
    "res-tuning mha+cross+ffn": ("res-tuning[mha=adapter,cross=adapter,ffn=adapter]", {"rank": 8}),
    "res-tuning block": ("res-tuning[block=adapter]", {"rank": 10, "zero": True}),
    "bypass": ("res-tuning-bypass", {"rank": 32}),
    "bypass 3x3": ("res-tuning-bypass", {"rank": 32, "kernel": 3}),
}
RATES = {"full": 3e-4, "full+checkpointing": 3e-4}
GUIDANCE, SAMPLE_STEPS = 2.0, 15


def objective() -> Objective:
    """Noise prediction on the linear schedule."""
    return Objective("epsilon", linear_alphas())


def example(network: str) -> dict[str, Any]:
    """One input of a denoiser."""
    draw = torch.Generator().manual_seed(0)
    return {
        **parts.FIXED[network], "timestep": torch.tensor([500]),
        "encoder_hidden_states": parts.text_states(["a small red circle at the top left"]),
        ("sample" if network == "unet" else "hidden_states"):
            torch.randn(1, 3, shapes.SIZE, shapes.SIZE, generator=draw),
    }  # fmt: skip


def hosted(model: nn.Module, network: str) -> Host:
    """A host of a denoiser."""
    given = example(network)
    sample_ = given.pop("sample" if network == "unet" else "hidden_states")
    return Host(model, sample_, **given)


def base(args: argparse.Namespace) -> nn.Module:
    """The base model, trained from scratch (or read)."""
    torch.manual_seed(0)
    model = parts.NETWORKS[args.network]()
    file = args.out / f"base-{args.network}.pt"
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    host = hosted(model, args.network)
    task = methods.build("full", host)
    settings = DenoiserSettings(steps=args.base_steps, batch_size=32, lr=1e-3, ema=0.995,
                                checkpoint_every=100, warmup_steps=50)  # fmt: skip
    data = parts.encoded(shapes.scenes(3000, 1), "plain", 1)
    train_denoiser(Run(host, {"base": task}, data, objective(), settings,
                       args.out / f"base-{args.network}", fixed=parts.FIXED[args.network]))  # fmt: skip
    weights = {n.replace("/", "."): w.detach() for n, w in task.weights.items()}
    host.release()
    model.load_state_dict(weights, strict=False)
    torch.save(model.state_dict(), file)
    return model.eval()


def judge(out: Path) -> tuple[parts.Judge, float]:
    """The judge, trained once."""
    file, score = out / "judge.pt", out / "judge.json"
    if file.exists():
        known = parts.Judge()
        known.load_state_dict(torch.load(file, weights_only=True))
        return known.eval().requires_grad_(False), json.loads(score.read_text())
    made, right = parts.trained_judge()
    torch.save(made.state_dict(), file)
    score.write_text(json.dumps(right))
    return made, right


def shift_sets(shift: str, seed: int) -> tuple[list[shapes.Scene], list[shapes.Scene], str]:
    """Scenes to train on, held-out scenes, and their style."""
    kinds = shapes.SHAPES[:3] if shift == "style" else ("star",)
    style = "paper" if shift == "style" else "plain"
    return shapes.scenes(256, 100 + seed, kinds), shapes.scenes(256, 999, kinds), style


def plain(model: Any, run: Run, rank: int | None) -> Any:
    """A loop without this library, on the very batches that `train_denoiser` draws.

    Args:
        model: The denoiser.
        run: Data, objective and settings.
        rank: Of PEFT's LoRA on all attention maps; None trains all weights with checkpointing.
    """
    if rank is None:
        model.requires_grad_(True).train()
        model.enable_gradient_checkpointing()
    else:
        from peft import LoraConfig, inject_adapter_in_model

        model.requires_grad_(False)
        maps = ["to_q", "to_k", "to_v", "to_out.0"]
        # The transformer here has no `add_adapter` of diffusers.
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=maps)
        inject_adapter_in_model(config, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    settings, data = run.settings, run.data
    optimiser = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=settings.weight_decay)
    order = Order(len(data), settings.batch_size, 10_000, settings.seed)
    from restuning.train.optimiser import learning_rate

    for step in range(settings.steps):
        rows = order.share(step, 0, 1)
        draw = torch.Generator().manual_seed(mixed("noise", settings.seed, step, 0))
        clean = data.latents(rows, draw)
        noise = torch.randn(clean.shape, generator=draw)
        noised = run.objective.noised(clean, noise, run.objective.times(len(rows), draw))
        dropped = torch.rand(len(rows), generator=draw) < settings.caption_drop
        fed = data.conditions(rows, dropped)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, total=settings.steps, warmup=settings.warmup,
                                        peak=settings.lr)  # fmt: skip
        answer = model(noised.sample, timestep=noised.time, **fed, **(run.fixed or {})).sample
        loss = (answer - noised.target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip or 1e9)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    return trained


def bare(model: nn.Module, fixed: dict[str, Any]) -> Any:
    """A denoiser without a host."""

    def denoiser(x: Any, t: Any, conditions: Any) -> Any:
        with torch.no_grad():
            return model(x, timestep=t, **conditions, **fixed).sample

    return denoiser


def saved_by(run: Any, weights: list) -> int:
    """Bytes that autograd saves for backward."""
    with (saved := Saved(weights)).hooks():
        out = run()
    size = saved.bytes()
    del out
    return size


def one(args: argparse.Namespace, method: str, shift: str, seed: int) -> None:
    """Train and judge one row."""
    name = f"{args.network}-{shift}-{method.replace(' ', '_')}-{seed}"
    file = args.out / "rows" / f"{name}.json"
    if file.exists():
        return
    model, (reader, reads) = base(args), judge(args.out)
    shown, held, style = shift_sets(shift, seed)
    fixed = parts.FIXED[args.network]
    data, test = parts.encoded(shown, style, 10 + seed), parts.encoded(held, style, 77)
    how, options = METHODS.get(method, ("frozen", {}))
    settings = DenoiserSettings(
        steps=args.steps, batch_size=32, lr=RATES.get(method, 2e-3), seed=seed, warmup_steps=10,
        checkpoint_every=50,
    )  # fmt: skip
    folder = args.out / "tasks" / name
    torch.manual_seed(seed)
    weights, saved, seconds, count = list(model.parameters()), 0, 0.0, 0
    x, t = torch.randn(32, 3, shapes.SIZE, shapes.SIZE), torch.full((32,), 500)
    fed = data.conditions(list(range(32)))
    if how == "plain":
        run = Run(None, {}, data, objective(), settings, folder, fixed)  # type: ignore[arg-type]
        start = time.process_time()
        trained = plain(model, run, options.get("rank"))
        seconds, count = (time.process_time() - start) / args.steps, sum(p.numel() for p in trained)
        saved = saved_by(lambda: model(x, timestep=t, **fed, **fixed).sample, weights + trained)
        denoiser = bare(model.eval(), fixed)
    elif how == "frozen":
        denoiser = bare(model, fixed)
    else:
        host = hosted(model, args.network)
        task: Task = methods.build(how, host, **options)
        run = Run(host, {"task": task}, data, objective(), settings, folder, fixed)
        start = time.process_time()
        train_denoiser(run)
        seconds, count = (time.process_time() - start) / args.steps, task.tuner_parameters()
        module = Predictions(host, {"task": task}, fixed)
        saved = saved_by(lambda: module(x, t, fed), weights + list(task.parameters()))
        if how == "full":
            host.release()
            model.load_state_dict({n.replace("/", "."): w for n, w in task.weights.items()},
                                  strict=False)  # fmt: skip
            denoiser = bare(model, fixed)
        else:
            denoiser = answers(host, task, fixed)
    error = held_out_error(denoiser, objective(), test, rows=args.held_out)
    drawn = generated(args, denoiser, held[: args.samples], test)
    real = shapes.pictures(held, style, 77)
    labels = torch.tensor([s.labels for s in held[: args.samples]])
    right = (reader.labels(drawn) == labels).float().mean(0)
    row = {
        "network": args.network, "shift": shift, "method": method, "seed": seed, "steps": args.steps,
        "trained_parameters": count, "saved_for_backward_bytes": saved,
        "cpu_seconds_a_step": seconds, "held_out_error": error.mean,
        "held_out_error_by_time": error.buckets,
        "attribute_accuracy": float(right.mean()),
        "accuracy_by_attribute": dict(zip(shapes.ATTRIBUTES, right.tolist(), strict=True)),
        "fd_judge": frechet_distance(reader(drawn), reader(real)),
        "judge_accuracy_on_drawn_pictures": reads, "samples": args.samples,
        "base_steps": args.base_steps, "guidance": GUIDANCE, "sample_steps": SAMPLE_STEPS,
        "judge": hashlib.sha256((args.out / "judge.pt").read_bytes()).hexdigest()[:16],
    }  # fmt: skip
    save_grid((drawn[:16] + 1) / 2, args.out / "grids" / f"{name}.png", 8, scale=2)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(row, indent=1) + "\n")
    print(f"{name}: error {error.mean:.4f}, attributes {row['attribute_accuracy']:.3f}, FD_judge "
          f"{row['fd_judge']:.2f}, {count:,} parameters, {saved / 2**20:.0f} MiB, {seconds:.2f} s",
          flush=True)  # fmt: skip


def generated(args: argparse.Namespace, denoiser: Any, shown: list, test: Any) -> torch.Tensor:
    """Pictures of the held-out captions."""
    found = []
    for start in range(0, len(shown), 32):
        rows = list(range(start, min(start + 32, len(shown))))
        noise = torch.randn(len(rows), 3, shapes.SIZE, shapes.SIZE,
                            generator=torch.Generator().manual_seed(start))  # fmt: skip
        found.append(
            sample(denoiser, objective(), noise, test.conditions(rows), steps=SAMPLE_STEPS,
                   guidance=GUIDANCE, empty=test.empty, clip=1.0)
        )  # fmt: skip
    return torch.cat(found).clamp(-1, 1)


def table(args: argparse.Namespace) -> None:
    """All rows as one file, mean and spread over seeds."""
    rows = [json.loads(f.read_text()) for f in sorted((args.out / "rows").glob("*.json"))]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["shift"], row["method"]), []).append(row)
    summary = []
    for (network, shift, method), same in groups.items():
        line: dict[str, Any] = {"network": network, "shift": shift, "method": method,
                                "seeds": len(same)}  # fmt: skip
        for key in ("held_out_error", "attribute_accuracy", "fd_judge", "cpu_seconds_a_step"):
            values = [r[key] for r in same]
            line[key] = {"mean": statistics.mean(values),
                         "sd": statistics.stdev(values) if len(values) > 1 else None}  # fmt: skip
        for key in ("trained_parameters", "saved_for_backward_bytes"):
            line[key] = same[0][key]
        summary.append(line)
        print(f"{network:5s} {shift:8s} {method:26s} n={len(same)}  error "
              f"{line['held_out_error']['mean']:.4f}  attributes "
              f"{line['attribute_accuracy']['mean']:.3f}  FD_judge {line['fd_judge']['mean']:7.2f}  "
              f"{line['trained_parameters'] / 1e3:8.1f} k  "
              f"{line['saved_for_backward_bytes'] / 2**20:6.0f} MiB  "
              f"{line['cpu_seconds_a_step']['mean']:.2f} s")  # fmt: skip
    into = Path(__file__).with_name("results.json")
    command = "python recipes/image_generation/run.py --table"
    into.write_text(
        json.dumps({"command": command, "summary": summary, "rows": rows}, indent=1) + "\n"
    )


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/image-generation"))
    parser.add_argument("--network", choices=list(parts.NETWORKS), default="unet")
    parser.add_argument("--base-steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=300, help="of every adaptation")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--methods", nargs="*", default=["frozen", *METHODS])
    parser.add_argument("--shifts", nargs="*", default=["style", "concept"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.table:
        table(args)
        return
    for seed in range(args.seeds):
        for shift in args.shifts:
            for method in args.methods:
                if method == "frozen" and seed:
                    continue
                one(args, method, shift, seed)


if __name__ == "__main__":
    main()
