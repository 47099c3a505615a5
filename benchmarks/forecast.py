"""What the planner predicts beside what is measured: memory of one training step, and its time.

    python benchmarks/forecast.py

ViT-Ti/16, ViT-S/16 and ViT-B/16 (timm architectures, random weights), 224 px, fp32, one AdamW step,
for forward-only, linear, full, LoRA (PEFT, r 8), res-tuning, its bypass, and the bypass on stored
features; and backbones of other kinds. Each row is a process of its own: it forecasts from shapes,
then builds and measures. Measured is the peak above weights, optimiser state and the batch, as in
`step.py`, and what autograd saves. Times are not measured again: those of `step.py` stand beside
the forecasts. Rows on stored features take `--cached-batch` inputs: with 16
class tokens a step is about one megabyte, less than the allocator's own wandering.
"""

from __future__ import annotations

import json
from typing import Any

import rivals
from common import RESULTS, apart, arguments, peak_of, saved_bytes, started, target, write

ARCHITECTURES = {
    "vit_tiny_patch16_224": 16,
    "vit_small_patch16_224": 16,
    "vit_base_patch16_224": 4,
}
OTHERS = {"swin_tiny_patch4_window7_224": 4, "mixer_s32_224": 16, "bert": 8}
MODES = ("forward-only", "linear", "full", "lora", "res-tuning", "bypass", "cached-bypass")
TIMED = "vit_small_patch16_224"
"""What `step.py` measures, at the same batch: its times stand beside these forecasts."""
CLASSES = 100
TOKENS = 128
"""Of a text in the rows on BERT."""


def backbone(name: str, classes: int) -> tuple[Any, Any]:
    """A network with random weights, and one input."""
    import torch

    torch.manual_seed(0)
    if name == "bert":
        from transformers import BertConfig, BertModel

        ids = torch.randint(1000, (1, TOKENS))
        return BertModel(BertConfig()), {"input_ids": ids, "attention_mask": ids * 0 + 1}
    import timm

    return timm.create_model(name, num_classes=classes), torch.randn(1, 3, 224, 224)


def build(name: str, mode: str) -> tuple[Any, Any, list[Any]]:
    """The module whose step is measured, one input, and what is trained."""
    import restuning
    from restuning.forecast import OnTaps, split_inputs

    theirs = mode in ("linear", "full", "lora") and name in ARCHITECTURES
    model, example = backbone(name, CLASSES if theirs else 0)
    if mode == "forward-only":
        return model.eval().requires_grad_(False), example, []
    if theirs:
        module = {"linear": rivals.linear, "full": rivals.full, "lora": rivals.lora}[mode](model)
        return module, example, rivals.trained(module)
    args, kwargs = split_inputs(example)
    host = restuning.Host(model, *args, **kwargs)
    method = "res-tuning-bypass" if "bypass" in mode else mode
    task = restuning.methods.build(method, host, num_classes=CLASSES)
    trained = [p for p in task.parameters() if p.requires_grad]
    if mode == "cached-bypass":
        taps = host.features(*args, keep=task.needs(host.readout_rule), **kwargs)
        return OnTaps(host, task), dict(taps), trained
    return restuning.Tuned(host, task).train(), example, trained


def measure(args: Any, row: str) -> dict[str, Any]:
    """One row, in this process."""
    import time

    import torch
    import torch.nn.functional as F  # noqa: N812

    from restuning.forecast import call_module, forecast_forward, forecast_step

    name, mode = row.split("/")
    batch = {**ARCHITECTURES, **OTHERS}[name]
    batch = args.cached_batch if mode == "cached-bypass" else batch
    module, example, trained = build(name, mode)
    start = time.perf_counter()
    if mode == "forward-only":
        told = forecast_forward(module, example, batch)
    else:
        told = forecast_step(module, example, batch, trained=trained)
    seconds_of_forecast = time.perf_counter() - start

    def wide(value: Any, size: int) -> Any:
        if isinstance(value, dict):
            return {k: wide(v, size) for k, v in value.items()}
        return value.repeat(size, *[1] * (value.dim() - 1))

    inputs, labels = wide(example, 1), torch.zeros(1, dtype=torch.long)
    optimiser = torch.optim.AdamW(trained, lr=1e-3) if trained else None

    def loss() -> Any:
        if optimiser is None:
            with torch.no_grad():
                found = call_module(module, inputs)
                return (found if isinstance(found, torch.Tensor) else found[0]).sum()
        return F.cross_entropy(call_module(module, inputs), labels)

    def step() -> None:
        value = loss()
        if optimiser is not None:
            value.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

    # One input first: lazy initialisations and the optimiser's state are not the step's memory.
    step()
    inputs, labels = wide(example, batch), torch.zeros(batch, dtype=torch.long)
    peak = peak_of(lambda: (step(), step()), args.device)
    kept = saved_bytes(loss, [*module.parameters(), *module.buffers()]) if trained else 0
    return {
        "backbone": name,
        "mode": mode,
        "batch": batch,
        "peak_bytes": {"forecast": told.above_bytes, "measured": peak},
        "scratch_bytes": told.scratch_bytes,
        "saved_bytes": {"forecast": told.saved_bytes, "measured": kept},
        "cost": {"flops": told.cost.flops, "moved": told.cost.moved, "calls": told.cost.calls},
        "forecast_seconds": seconds_of_forecast,
    }


def main() -> None:
    """Measure all rows and write the JSON."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--cached-batch", type=int, default=1024)
    parser.add_argument(
        "--backbones", nargs="*", default=list(ARCHITECTURES), help=f"also {', '.join(OTHERS)}"
    )
    parser.add_argument("--modes", nargs="*", default=MODES)
    args = started(parser)
    if args.one:
        print(json.dumps(measure(args, args.one)))
        return
    from restuning.forecast import Cost, measure_rates

    rows, skipped = [], {}
    rates = measure_rates(args.device)
    for name in args.backbones:
        for mode in args.modes:
            row = apart(args, f"{name}/{mode}")
            if "not_measured" in row:
                skipped[f"{name}/{mode}"] = row["not_measured"]
                print(f"{name} {mode}: not measured: {row['not_measured']}", flush=True)
                continue
            told, found = row["peak_bytes"]["forecast"], row["peak_bytes"]["measured"]
            row["peak_error"] = told / found - 1
            rows.append(row)
            print(
                f"{name:30s} {mode:14s} batch {row['batch']:5d}   peak {told / 2**20:7.1f} "
                f"forecast {found / 2**20:7.1f} measured MiB {row['peak_error']:+6.1%}   saved "
                f"{row['saved_bytes']['forecast']} {row['saved_bytes']['measured']}  "
                f"forecast took {row['forecast_seconds']:.2f} s",
                flush=True,
            )
    steps = RESULTS / f"step-{args.device}.json"
    measured = (
        {}
        if not steps.exists()
        else {
            r["mode"].replace("res-tuning-bypass", "bypass"): r["step_seconds"]["median"]
            for r in json.loads(steps.read_text())["rows"]
        }
    )
    forwards = {r["backbone"]: r for r in rows if r["mode"] == "forward-only"}
    for row in rows:
        base = forwards.get(row["backbone"])
        if base and row["mode"] != "cached-bypass":
            one, other = (Cost(**r["cost"]).seconds(rates) for r in (row, base))
            row["time_over_forward"] = {"forecast": one / other}
            if row["backbone"] == TIMED and row["mode"] in measured:
                ratio = measured[row["mode"]] / measured["forward-only"]
                row["time_over_forward"]["measured"] = ratio
    main_rows = [r for r in rows if r["backbone"] in ARCHITECTURES]
    write(
        args,
        "one AdamW step, 224 px, fp32: forecast from shapes beside measurement",
        rows=rows,
        rates=vars(rates),
        not_measured=skipped,
        targets=[
            target(
                "largest error of peak memory on ViT-Ti, S and B",
                max((abs(r["peak_error"]) for r in main_rows), default=None),
                0.15,
            ),
        ],
    )


if __name__ == "__main__":
    main()
