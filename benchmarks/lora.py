"""LoRA as tasks at linear sites beside PEFT's LoRA with the same weights: agreement, memory, time, swaps.

    python benchmarks/lora.py

Each case is a backbone with random weights, the same maps, rank 8, a linear head, fp32, one AdamW step.
Both sides begin with the same numbers; logits and gradients are compared first. Memory is
counted (a step on tensors that hold nothing, every storage followed) and beside it measured in a process of
its own, whose peak wanders by pages; with it stand the bytes that autograd saves for backward. Times are
taken in turns in one process, and their ratio is the median of the rounds' ratios; `--rounds 0` takes
none, for a machine that does other things. Then 20 tasks are asked at random by 4 threads on one backbone,
and every answer is compared with the task's own.
"""

from __future__ import annotations

import argparse
import json
import random
import threading
from typing import Any

from common import (
    KEEP,
    apart,
    arguments,
    in_turns,
    paired,
    peak_of,
    saved_bytes,
    spread,
    started,
    target,
    write,
)

RANK, CLASSES = 8, 100
TASKS, THREADS, ASKED = 20, 4, 30
CASES = {
    "vit-small, qkv": ("vit_small_patch16_224", "qkv"),
    "vit-small, every map": ("vit_small_patch16_224", "all"),
    "resnet18, convolutions": ("resnet18", "conv"),
    "bert, q and v": ("bert", "q+v"),
}
SIDES = ("lora", "peft")
DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""A host keeps its backbone in eval mode, PEFT does not: with dropout the two would save different things."""
SAME = 1e-4
"""Largest difference of logits relative to their size, for two answers to count as the same."""


def backbone(case: str, args: argparse.Namespace) -> tuple[Any, dict[str, Any], int]:
    """A model, its batch by keyword ("*" is positional), and the width of its feature."""
    import torch

    torch.manual_seed(0)
    name = CASES[case][0]
    if name == "bert":
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
        model = BertModel(
            BertConfig(**sizes, intermediate_size=1536, vocab_size=1000, **DRY), False
        )
        ids = torch.randint(1000, (args.batch, 128), device=args.device)
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return model.to(args.device).eval(), batch, 384
    import timm

    model = timm.create_model(name, num_classes=0).to(args.device).eval()
    x = torch.randn(args.batch, 3, 224, 224, device=args.device)
    return model, {"*": x}, model.num_features


def call(module: Any, batch: dict[str, Any], size: int | None = None) -> Any:
    """A module on a batch, or on its first rows."""
    short = {n: v[:size] for n, v in batch.items()}
    args = (short.pop("*"),) if "*" in short else ()
    return module(*args, **short)


class Side:
    """One of the two with its training step."""

    def __init__(self, case: str, side: str, args: argparse.Namespace) -> None:
        import torch

        import restuning

        model, self.batch, width = backbone(case, args)
        example = {n: v[:1] for n, v in self.batch.items()}
        given = (example.pop("*"),) if "*" in example else ()
        host = restuning.Host(model, *given, **example)
        torch.manual_seed(1)
        task = restuning.methods.build("lora", host, rank=RANK, targets=CASES[case][1], zero=False)
        head = restuning.methods.new_head(width, CLASSES)
        task.head, task.pool = head, host.readout_rule.pool
        task.to(args.device)
        if side == "lora":
            self.module: Any = restuning.Tuned(host, task).train()
            self.trained = [p for t in task.inline_tuners.values() for p in t.parameters()]
        else:
            self.module, self.trained = self._of_peft(host, task)
        self.trained = [*self.trained, *head.parameters()]
        self.optimiser = torch.optim.AdamW(self.trained, lr=1e-3)
        self.y = torch.randint(CLASSES, (args.batch,), device=args.device)

    def _of_peft(self, host: Any, task: Any) -> tuple[Any, list[Any]]:
        """The same model in PEFT's wrapper with the same numbers, and its head on the same feature."""
        import peft
        import torch
        from torch import nn

        sites = {name: host.sites.linear[name] for name in task.sites}
        rule, head, model = host.readout_rule, task.head, host.model
        host.release()
        config = peft.LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=[s.module for s in sites.values()]
        )
        wrapped = peft.get_peft_model(model, config)
        trained = []
        with torch.no_grad():
            for name, tuner in task.inline_tuners.items():
                layer = wrapped.get_submodule(f"base_model.model.{sites[name].module}")
                for own, theirs in ((tuner.a, layer.lora_A), (tuner.b, layer.lora_B)):
                    theirs["default"].weight.copy_(own.weight)
                    trained.append(theirs["default"].weight)

        class WithHead(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.wrapped, self.head = wrapped, head

            def forward(self, *args: Any, **kwargs: Any) -> Any:
                y = self.wrapped(*args, **kwargs)
                y = y if isinstance(y, torch.Tensor) else y.last_hidden_state
                if y.dim() == 3:
                    y = y[:, 0] if rule.pool == "cls" else y.mean(1)
                return self.head(y)

        return WithHead(), trained

    def loss(self, size: int | None = None) -> Any:
        """Of the batch, or of its first rows."""
        import torch.nn.functional as F  # noqa: N812

        return F.cross_entropy(call(self.module, self.batch, size), self.y[:size])

    def __call__(self, size: int | None = None) -> None:
        """Make a step."""
        self.loss(size).backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


def agreement(case: str, args: argparse.Namespace) -> dict[str, float]:
    """Largest differences of logits and of gradients, relative to the largest value."""
    import torch

    ours, theirs = (Side(case, side, args) for side in SIDES)

    def apart_by(a: Any, b: Any) -> float:
        # A unit that is never active has a gradient of zero on both sides.
        return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))

    with torch.no_grad():
        answers = [call(each.module, each.batch, 2) for each in (ours, theirs)]
        with ours.module.disable_adapter():
            bare = call(ours.module, ours.batch, 2)
    logits = apart_by(*answers)
    theirs.y = ours.y
    gradients = [torch.autograd.grad(s.loss(2), s.trained) for s in (ours, theirs)]
    worst = max(apart_by(a, b) for a, b in zip(*gradients, strict=True))
    return {"logits": logits, "gradients": worst, "of_bare": apart_by(answers[0], bare)}


def measure(case: str, side: str, args: argparse.Namespace) -> dict[str, Any]:
    """Memory of one side, in this process."""
    from restuning.forecast.step import forecast_step

    step = Side(case, side, args)
    example = {n: v[:1] for n, v in step.batch.items()}
    one = example.get("*", example)
    counted = forecast_step(step.module, one, args.batch, trained=step.trained)

    def twice() -> None:
        step()
        step()

    step(1)
    return {
        "counted_above_weights_bytes": counted.peak_bytes,
        "peak_above_weights_bytes": peak_of(twice, args.device),
        "saved_for_backward_bytes": saved_bytes(step.loss, list(step.module.parameters())),
        "trained_parameters": sum(p.numel() for p in step.trained),
    }


def swap(args: argparse.Namespace) -> dict[str, Any]:
    """Wrong answers of 20 tasks that are asked by 4 threads on one backbone."""
    import timm
    import torch

    import restuning

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0).to(args.device)
    x = torch.randn(2, 3, 224, 224, device=args.device)
    host = restuning.Host(model, x[:1])
    tuned = []
    for number in range(TASKS):
        targets = ("qkv", "q+v", "all", "o+down")[number % 4]
        task = restuning.methods.build("lora", host, CLASSES, targets=targets, zero=False)
        tuned.append(restuning.Tuned(host, task.to(args.device)).eval())
    with torch.no_grad():
        alone = [each(x) for each in tuned]
    wrong, done = [], []

    def ask(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(ASKED):
            number = chosen.randrange(TASKS)
            with torch.no_grad():
                answer = tuned[number](x)
            gap = float((answer - alone[number]).abs().max())
            if gap > SAME * float(alone[number].abs().max()):
                wrong.append(number)
            done.append(number)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"tasks": TASKS, "threads": THREADS, "answers": len(done), "wrong": len(wrong)}


def main() -> None:
    """Compare both on every case and write the JSON."""
    parser = arguments(__doc__, __file__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    args = started(parser)
    if args.one:
        case, _, what = args.one.partition("/")
        if what == "agreement":
            one: Any = agreement(case, args)
        elif what == "in turns":
            steps = {side: Side(case, side, args) for side in SIDES}
            times = in_turns(steps, args.rounds, args.device)
            one = {
                "step_seconds": {side: spread(values) for side, values in times.items()},
                "step_over_peft": paired(times["lora"], times["peft"]),
            }
        else:
            one = swap(args) if what == "swap" else measure(case, what, args)
        print(json.dumps(one))
        return
    rows, targets = [], []
    for case in CASES:
        both = {side: apart(args, f"{case}/{side}") for side in SIDES}
        agreed = apart(args, f"{case}/agreement")
        turns = apart(args, f"{case}/in turns", KEEP) if args.rounds else {}
        if failed := [
            r["not_measured"] for r in (*both.values(), agreed, turns) if "not_measured" in r
        ]:
            raise SystemExit(f"{case}: {failed[0]}")
        memory = "counted_above_weights_bytes"
        peak = both["lora"][memory] / both["peft"][memory]
        rows.append(
            {
                "case": case,
                **{
                    f"{side} {name}": both[side][name]
                    for name in (memory, "peak_above_weights_bytes", "saved_for_backward_bytes")
                    for side in SIDES
                },
                "trained_parameters": both["lora"]["trained_parameters"],
                "memory_over_peft": peak,
                **turns,
                "logits_apart": agreed["logits"],
                "gradients_apart": agreed["gradients"],
                "logits_apart_from_the_bare_backbone": agreed["of_bare"],
            }
        )
        targets += [
            target(f"{case}: memory of a step over PEFT, counted", peak, 1.0),
            target(f"{case}: logits apart, relative", agreed["logits"], SAME),
        ]
        if turns:
            over = turns["step_over_peft"]["median"]
            targets.append(target(f"{case}: time of a step over PEFT, in turns", over, 1.0))
        print(case, json.dumps(rows[-1]), flush=True)
    swaps = apart(args, "tasks/swap")
    targets.append(target(f"wrong of {swaps['answers']} answers", swaps["wrong"], 0))
    write(
        args,
        f"LoRA at linear sites beside PEFT's, rank {RANK}, fp32, batch {args.batch}, one AdamW step",
        batch=args.batch,
        rows=rows,
        swaps=swaps,
        targets=targets,
    )


if __name__ == "__main__":
    main()
