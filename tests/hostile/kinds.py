"""Kinds of input that may come from anybody: how a valid one is made, and how it is read to an answer.

A new kind is a row of `KINDS`. `make` writes a valid folder; number 0, 1, ... are different ones.
`read` gives the answer as plain values, compared with `==`. Where a file is the only record of what
it says (an image, a csv), a change of it is another valid input: there `read` gives a pair of the
identity that the library knows the input by, and the answer, and whenever the answer is another
one the identity must be.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

AGAIN = "is made again"
"""Of a result that is not there: the same command makes it, with the same numbers."""
VARIANTS = 4


@dataclass(frozen=True)
class Kind:
    """One row.

    Attributes:
        make: Writes valid folder number `variant`.
        read: The answer of a folder, as of the variant.
        count: Changed folders of the whole fuzz.
        quick: Those of the quick suite.
        identified: Answers are pairs, see above.
    """

    make: Callable[[Path, int], None]
    read: Callable[[Path, int], Any]
    count: int
    quick: int
    identified: bool = False


# ------------------------------------------------------------------ tasks

METHODS = ("res-tuning-bypass", "linear", "res-tuning", "mixing-bypass")


@cache
def backbone():
    import restuning

    return restuning.load_backbone("restuning-tiny")


@cache
def host():
    return backbone().host()


def make_task(folder: Path, variant: int) -> None:
    import torch

    from restuning import methods
    from restuning.task import save

    torch.manual_seed(variant)
    task = methods.build(METHODS[variant], host(), num_classes=3)
    for parameter in task.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    task.labels = ["a", "b", f"c{variant}"]
    task.temperature = 1 + variant / 2
    save(
        task,
        host(),
        folder,
        backbone="restuning-tiny",
        preprocessing=backbone().preprocessing.to_dict(),
    )


@cache
def images():
    import torch

    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def read_task(folder: Path, variant: int) -> Any:
    import restuning

    task = restuning.load(folder, host())
    tuned = restuning.Tuned(host(), task)
    return tuned(images()).tolist(), list(task.labels), task.temperature


def read_predictor(folder: Path, variant: int) -> Any:
    import numpy as np

    from restuning import Predictor

    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    (answer,) = Predictor.load(folder)(pixels)
    prediction = next(iter(answer.predictions.values()))
    return prediction.label, prediction.probabilities.tolist()


def make_peft(folder: Path, variant: int) -> None:
    import torch

    from restuning import export_peft, methods

    torch.manual_seed(variant)
    options = {"targets": ("qkv", "down")[variant % 2], "rank": 2 + variant, "alpha": 4.0}
    task = methods.build("lora", host(), zero=False, layers=[1, 2], **options)
    task.inline_tuners[task.sites[0]].alpha = 3.0
    export_peft(task, host(), folder)


def read_peft(folder: Path, variant: int) -> Any:
    import restuning

    task = restuning.import_peft(folder, host())
    weights = {name: tensor.tolist() for name, tensor in task.state_dict().items()}
    return (task.spec(), weights), restuning.Tuned(host(), task).eval()(images()).tolist()


def make_sums(folder: Path, variant: int) -> None:
    import torch

    from restuning import Task
    from restuning.bypass import Ridge
    from restuning.task import save
    from restuning.training.sums_file import KeptSums, describe_sums, write_sums

    name = host().sites.taps[-1]
    side = Ridge([name], [host().dim], 3, blocks=[("token", name)])
    draw = torch.Generator().manual_seed(variant)
    labels = torch.arange(12) % 3
    side.fit(torch.randn(12, host().dim, generator=draw), labels)
    head = side.widen(torch.nn.Linear(1, 3))
    task = Task(side=side, head=head, method="ridge", labels=["a", "b", f"c{variant}"])
    place = folder / "shades.task"
    preprocessing = backbone().preprocessing.to_dict()
    about = {
        **describe_sums(task, host().digest(), preprocessing),
        "accuracy": 0.5,
        "updates": variant,
    }
    inputs = [bytes([variant, number]) * 16 for number in range(12)]
    write_sums(place, task, KeptSums(side.sums, inputs, labels.tolist(), about))
    save(task, host(), place, backbone="restuning-tiny", preprocessing=preprocessing)


def read_sums(folder: Path, variant: int) -> Any:
    import restuning
    from restuning.training import sums_file

    task = restuning.load(folder / "shades.task", host())
    kept = sums_file.read_sums(folder / "shades.task", task)
    weight = task.side.solve_sums(kept.sums).weight
    return [weight.tolist(), [each.hex() for each in kept.inputs], kept.labels, dict(kept.about)]


# ------------------------------------------------------------------ stores

STORED = (("fp32", "cls"), ("int8", "cls"), ("fp32", "all"), ("bf16", "cls"))
SPLITS = {"train": 12, "val": 4}


def make_store(folder: Path, variant: int) -> None:
    from store_script import Noise, host_and_key

    from restuning.features import build

    dtype, tokens = STORED[variant]
    owner, key = host_and_key(dtype, splits=SPLITS, tokens=tokens)
    parts = {("train", 0): Noise(12), ("val", 0): Noise(4)}
    made = build(owner, key, folder.parent / "made", parts, batch_size=4, progress=False)
    made.path.rename(folder)


def read_store(folder: Path, variant: int) -> Any:
    from restuning.features import Store

    store = Store(folder)
    rows = {s: store.rows(s, 0, range(n)).tolist() for s, n in store.key.splits.items()}
    labels = {s: store.labels(s).tolist() for s in store.key.splits}
    return store.key.to_dict(), rows, labels, store.manifest["error"]


def make_unfinished(folder: Path, variant: int) -> None:
    make_store(folder, variant)
    (folder / "manifest.json").unlink()
    (folder / "val.0.00000000.json").unlink()


def read_unfinished(folder: Path, variant: int) -> Any:
    """What is left of it is gone on with under its own name."""
    from store_script import Noise, host_and_key

    from restuning.features import build, place

    dtype, tokens = STORED[variant]
    owner, key = host_and_key(dtype, splits=SPLITS, tokens=tokens)
    root = folder.parent / f"root-{folder.name}"
    parts = {("train", 0): Noise(12), ("val", 0): Noise(4)}
    try:
        root.mkdir()
        folder.rename(place(root, key))
        build(owner, key, root, parts, batch_size=4, progress=False)
        return read_store(place(root, key), variant)
    finally:
        shutil.rmtree(root, ignore_errors=True)


# ------------------------------------------------------------------ journals


def make_sweep(folder: Path, variant: int) -> None:
    search, runs = sweep_of(folder, variant)
    for number, (kind, run) in enumerate(runs):
        died = 3 if number == 1 else None
        search.write(
            {
                "setting": dict(run.setting),
                "seed": run.seed,
                "settings": {"epochs": 2, "lr": 1e-3},
                "val_accuracy": None if died else 0.5 + number / 50,
                "val_by_epoch": [0.25, 0.5 + number / 50],
                "test_accuracy": 0.75 if kind == "final" else None,
                "train_loss": None if died else 0.125,
                "died_at": died,
                "trainable_parameters": 1000 + number,
                "seconds": 1.5,
                "arms_together": 4,
            },
            kind,
            run.name,
        )


def sweep_of(folder: Path, variant: int):
    from restuning.search.folder import SearchFolder
    from restuning.search.sweep import TRIED, SweepRun

    identity = {"method": "linear", "grid": {"lr": [1e-3, 1e-2]}, "data": f"{variant:016x}"}
    search = SearchFolder(
        folder, identity, file="grid.json", what="this folder holds another sweep"
    )
    runs = [
        (kind, SweepRun((("lr", rate), ("scale", "none")), seed))
        for kind in (TRIED, "final")
        for rate in (1e-3, 1e-2)
        for seed in (0, 1)
    ]
    return search, runs


def read_sweep(folder: Path, variant: int) -> Any:
    from restuning.search.sweep import read_result

    search, runs = sweep_of(folder, variant)
    return {
        (kind, run.name): read_result(search, kind, run) if search.has(kind, run.name) else AGAIN
        for kind, run in runs
    }


CANDIDATES = ("linear", "ridge", "lora")


def choice_of(folder: Path, variant: int):
    from restuning.search.choice_folder import ChoiceFolder

    return ChoiceFolder(folder, {"data": f"{variant:016x}", "candidates": list(CANDIDATES)})


def make_choice(folder: Path, variant: int) -> None:
    import torch

    from restuning.training import checkpoint

    choice = choice_of(folder, variant)
    row = {
        "status": "tried",
        "why": "",
        "epochs": 10,
        "goes_on": True,
        "trial_epochs": 4,
        "form": "stored",
        "accumulate": 1,
        "memory_bytes": None,
        "step_bytes": 10_000,
        "final_seconds": 12.5,
        "lr": 1e-3,
        "standard_error": 0.02,
        "seconds": 3.0,
        "cpu_seconds": 2.5,
    }
    for number, method in enumerate(CANDIDATES):
        score = {"val_accuracy": 0.5 + (number + variant) / 50, "cross_entropy": 1.5 - number / 10}
        tensors = {"task.head.weight": torch.arange(6.0).view(2, 3) + number + variant}
        snapshot = checkpoint.Snapshot(tensors, {"step": 12})
        at = choice.run_folder(method, 1e-3) / "checkpoints"
        checkpoint.write(at, snapshot, final=True)
        choice.write({"method": method, **row, **score})


def read_choice(folder: Path, variant: int) -> Any:
    from restuning.search import rule

    choice = choice_of(folder, variant)
    rows = {method: choice.read(method) or AGAIN for method in CANDIDATES}
    if AGAIN in rows.values():
        return rows
    winner = rule.choose(list(rows.values()))
    assert winner is not None
    weights = choice.weights(winner["method"], winner["lr"])
    return rows | {"taken": (winner["method"], {n: t.tolist() for n, t in weights.items()})}


def grid_of(variant: int):
    from restuning.bench import GridProtocol, list_runs, parse_entries
    from restuning.bench.suites import SuiteTask
    from restuning.training import FitSettings

    protocol = GridProtocol(
        "restuning-tiny",
        settings=FitSettings(epochs=variant + 1, batch_size=8),
        choices={"linear": {"lr": [1e-3, 1e-2]}},
    )
    tasks = [SuiteTask("shades", "natural", "shades"), SuiteTask("tones", "", "tones")]
    return protocol, list_runs(protocol, tasks, parse_entries("linear,bitfit"), 2)


def make_grid(folder: Path, variant: int) -> None:
    from restuning._files import write_json
    from restuning.bench import open_grid, result_file
    from restuning.bench.folder import describe_run, pack_hits

    protocol, runs = grid_of(variant)
    open_grid(folder, protocol, runs)
    for number, run in enumerate(runs):
        hits = [bool((number + variant) >> bit & 1) for bit in range(8)]
        result = {
            **describe_run(run, protocol),
            "status": "done",
            "accuracy": sum(hits) / 8,
            "count": 8,
            "hits": pack_hits(hits),
            "parameters": {"without_head": 100, "head": 10},
            "memory": {},
            "seconds": {"whole": 1.5},
            "settings": {"lr": 1e-3},
            "setting": dict(run.setting),
            "options": {},
            "data": {"classes": 2},
            "versions": {},
            "hardware": {},
            "split": "test",
        }
        if number == 3:
            result |= {"status": "failed", "error": "it diverged", "trace": []}
        write_json(result_file(folder, run), result, sealed=True)
    shutil.rmtree(folder / "work")


def read_grid(folder: Path, variant: int) -> Any:
    from restuning.bench import open_grid, read_results, result_file
    from restuning.bench.folder import read_protocol, read_run
    from restuning.bench.report.summary import summarise

    protocol, runs = grid_of(variant)
    open_grid(folder, protocol, runs)
    found: dict[str, Any] = {
        run.name: read_run(folder, run, protocol) if result_file(folder, run).exists() else AGAIN
        for run in runs
    }
    read_results(folder)
    if AGAIN not in found.values():
        summary = summarise(folder)
        found["table"] = {key: cell.accuracies for key, cell in summary.cells.items()}
    return found | {"protocol": read_protocol(folder).identity()}


def make_checkpoint(folder: Path, variant: int) -> None:
    import torch

    from restuning.training import checkpoint

    tensors = {f"task.{n}": torch.randn(8, 5 + n) + variant for n in range(3)}
    tensors["optimiser.0.step"] = torch.tensor(7.0)
    state = {
        "run": {"seed": variant},
        "step": 7,
        "epoch": 1,
        "log": 300,
        "history": [{"epoch": 1, "loss": 0.5}],
    }
    checkpoint.write(folder, checkpoint.Snapshot(tensors, state))


def read_checkpoint(folder: Path, variant: int) -> Any:
    from restuning.training import checkpoint
    from restuning.training.loop import check_same_run

    file = folder / "step-000000007.safetensors"
    snapshot = checkpoint.read(file)
    check_same_run(snapshot.state["run"], {"seed": variant}, folder)
    return {n: t.tolist() for n, t in snapshot.tensors.items()}, snapshot.state


# ------------------------------------------------------------------ engines


def make_description(folder: Path, variant: int) -> None:
    import torch

    from restuning.backbones.engines import Description
    from restuning.backbones.engines.description import copy_readout

    rule, norm = copy_readout(host().model, host().readout_rule)
    description = Description(
        f"restuning-tiny-{variant}",
        "pretrained",
        host().fingerprint(),
        ("fp32", "int8")[variant % 2],
        {"x": (tuple(torch.zeros(1, 3, 32, 32).shape), "float32")},
        host().sites,
        "cls",
        rule,
        norm,
        backbone().preprocessing.to_dict(),
        None,
    )
    folder.mkdir(parents=True)
    (folder / "description.json").write_text(description.to_json())


def read_description(folder: Path, variant: int) -> Any:
    from restuning import EngineError
    from restuning.backbones.engines import Description

    file = folder / "description.json"
    try:
        # An engine file holds it as one text; what is no text is for the file's own reader.
        text = file.read_text() if file.is_file() and file.stat().st_size < 2**30 else ""
    except (OSError, ValueError) as error:
        raise EngineError("no text", found=str(error)) from None
    description = Description.from_json(text, str(file))
    # As whoever opens one for a task compares it.
    if description.backbone != f"restuning-tiny-{variant}":
        raise EngineError("another engine")
    norm = {n: t.tolist() for n, t in description.norm.state_dict().items()}
    example = {n: t.shape for n, t in description.example().items()}
    return description.to_json(), norm, example


# ------------------------------------------------------------------ data


def make_images(folder: Path, variant: int) -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(variant)
    suffixes = ("png", "jpg", "bmp", "gif", "tiff", "webp", "ppm")
    for number, suffix in enumerate(suffixes):
        at = folder / "train" / f"class{number % 2}"
        at.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (24, 20 + variant, 3), np.uint8)
        image = Image.fromarray(pixels)
        if number == 0:
            image = image.convert("P")
        image.save(at / f"{number}.{suffix}")
    (folder / "test").mkdir()
    for label in ("class0", "class1"):
        shutil.copytree(folder / "train" / label, folder / "test" / label)


def read_images(folder: Path, variant: int) -> Any:
    import restuning

    data = restuning.load_data(str(folder), backbone())
    splits = (data.train, data.val, data.test)
    answer = [[(s[i][0].tolist(), int(s[i][1])) for i in range(len(s))] for s in splits if s]
    # A run and a task know the names of classes beside the data.
    return (data.identity, data.labels), (answer, data.labels)


def make_lists(folder: Path, variant: int) -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(variant)
    (folder / "images").mkdir(parents=True)
    for split, count in (("train800", 6), ("val200", 3), ("test", 4)):
        lines = []
        for number in range(count):
            name = f"images/{split} {number}.png"
            pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name)
            lines.append(f"{name} {number % 3}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    lists = [(folder / f"{name}.txt").read_text() for name in ("train800", "val200")]
    (folder / "train800val200.txt").write_text("".join(lists))
    described = {"group": "natural", "classes": ["a", "b", "c"]}
    (folder / "task.json").write_text(json.dumps(described))


@cache
def language():
    from restuning.backbones import Backbone

    return Backbone("language", backbone().model, (), {}, None, tokenizer=split_words)


def split_words(texts, **how):
    raise AssertionError("nothing is made into tokens here")


TEXTS = (
    "a good film",
    'he said "no", and left',
    "zwei\nZeilen",
    "caf\u00e9, \u65e5\u672c",
    "x",
    "y z",
)


def make_csv(folder: Path, variant: int) -> None:
    import csv

    folder.mkdir(parents=True)
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label", "source"))
            for number in range(count):
                text = f"{TEXTS[(number + variant) % len(TEXTS)]} {split} {number}"
                writer.writerow((text, ("good", "bad")[number % 2], "s"))


def make_conll(folder: Path, variant: int) -> None:
    folder.mkdir(parents=True)
    ends = ("conll", "conll", "iob2", "iob")
    for split, count in (("train", 8), ("test", 4)):
        lines = []
        for number in range(count):
            for place, tag in enumerate(("O", "B-LOC", "I-LOC", "O")[: 2 + number % 3]):
                lines.append(f"word{number + variant}.{place} NN {tag}\n")
            lines.append("\n")
        (folder / f"{split}.{ends[variant]}").write_text("".join(lines), encoding="utf-8")


def read_texts(folder: Path, variant: int) -> Any:
    import restuning

    data = restuning.load_data(str(folder), language())
    splits = (data.train, data.val, data.test)
    return data.identity, ([list(map(list, s)) for s in splits if s is not None], data.labels)


# ------------------------------------------------------------------ captioned images


def make_captions(folder: Path, variant: int) -> None:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(variant)
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(3):
        name = f"images/{number}.png"
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / name)
        rows.append({"file_name": name, "text": f"shade {number % 2 + variant}"})
    lines = "\n".join(map(json.dumps, rows))
    (folder / "metadata.jsonl").write_text(lines)


def read_captions(folder: Path, variant: int) -> Any:
    from restuning.diffusion import load_pairs

    pairs = load_pairs(folder)
    shown = [pairs.image(number, 8).tolist() for number in range(len(pairs))]
    return pairs.digest(), (pairs.captions, shown)


class Flat:
    """Encodes a picture as the mean of its colours and a caption as its length."""

    def __init__(self, variant: int) -> None:
        self.variant = variant

    def images(self, pixels):
        mean = pixels.mean((2, 3), keepdim=True) + self.variant
        return mean, mean * 0 + 0.1

    def texts(self, captions):
        import torch

        return {"words": torch.tensor([[float(len(c))] for c in captions])}

    def identity(self):
        return {"encoder": self.variant}


def captioned(folder: Path, variant: int):
    from restuning.diffusion import load_pairs

    given = folder.parent / "captioned"
    if not given.exists():
        make_captions(given, 0)
    return load_pairs(given), Flat(variant), 8


def make_latents(folder: Path, variant: int) -> None:
    from restuning.diffusion import encode

    root = folder.parent / "made"
    made = encode(*captioned(folder, variant), root)
    (root / made.key).rename(folder)


def read_latents(folder: Path, variant: int) -> Any:
    from restuning.diffusion import encode

    inputs = captioned(folder, variant)
    root = folder.parent / f"root-{folder.name}"
    try:
        root.mkdir()
        folder.rename(root / encode(*inputs).key)
        made = encode(*inputs, root)
        texts = {n: t.tolist() for n, t in made.texts.items()}
        return made.mean.tolist(), made.std.tolist(), made.caption_of.tolist(), texts
    finally:
        shutil.rmtree(root, ignore_errors=True)


# ------------------------------------------------------------------ table


KINDS = {
    "task": Kind(make_task, read_task, 850, 8),
    "task with the backbone it names": Kind(make_task, read_predictor, 150, 2),
    "LoRA of PEFT": Kind(make_peft, read_peft, 100, 4, identified=True),
    "sums of a task": Kind(make_sums, read_sums, 100, 3),
    "store": Kind(make_store, read_store, 240, 8),
    "unfinished store": Kind(make_unfinished, read_unfinished, 60, 2),
    "sweep": Kind(make_sweep, read_sweep, 60, 3),
    "choice": Kind(make_choice, read_choice, 60, 3),
    "grid": Kind(make_grid, read_grid, 60, 3),
    "checkpoint": Kind(make_checkpoint, read_checkpoint, 40, 2),
    "description of an engine": Kind(make_description, read_description, 100, 4),
    "images": Kind(make_images, read_images, 200, 4, True),
    "lists of images": Kind(make_lists, read_images, 100, 3, True),
    "captioned images": Kind(make_captions, read_captions, 40, 2, identified=True),
    "store of latents": Kind(make_latents, read_latents, 60, 2),
    "csv": Kind(make_csv, read_texts, 100, 4, identified=True),
    "tagged words": Kind(make_conll, read_texts, 100, 4, identified=True),
}
