"""A backbone exported, stored, trained on, tested and asked, through the command line in this process."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from restuning import Tuned, load, load_backbone
from restuning.cli.app import app
from zoo import folders

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

PADDED = 2e-4
"""One text alone and in a padded batch: attention adds in another order."""


def run(*args, code=0):
    done = CliRunner().invoke(app, [str(a) for a in args])
    if code:
        # What `restuning` itself prints without a traceback, the runner hands on.
        return done.exception
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A class of photos each for dark and light, an int8 engine, and a task trained on it."""
    folder = tmp_path_factory.mktemp("engine")
    random = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6), ("test", 6)):
        for label, brightness in (("dark", 40), ("light", 200)):
            (folder / "photos" / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(brightness - 30, brightness + 30, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"photos/{split}/{label}/{number}.png")
    told = run(
        "engine",
        "export",
        "--backbone",
        "restuning-tiny",
        "--int8",
        "--out",
        folder / "tiny.onnx",
        "--json",
    )
    assert json.loads(told)["taps"] == 7
    run(
        "train",
        folder / "photos",
        "--backbone",
        f"onnx:{folder / 'tiny.onnx'}",
        "--method",
        "res-tuning-bypass",
        "--epochs",
        8,
        "--store",
        folder / "stores",
        "--out",
        folder / "run",
        "--json",
    )
    return folder


@pytest.mark.slow
def test_training_on_an_engine_is_from_a_store_of_its_features(folder):
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    engine = metrics["fingerprint"]["engine"]
    assert (engine["runtime"], engine["precision"]) == ("onnx", "int8")
    assert metrics["features"]["tokens"] == "cls"
    assert metrics["test_accuracy"] > 0.9
    again = run(
        "cache",
        folder / "photos",
        "--backbone",
        f"onnx:{folder / 'tiny.onnx'}",
        "--store",
        folder / "stores",
    )
    assert "reused" in again


@pytest.mark.slow
def test_the_task_is_tested_and_asked_on_the_engine_it_names(folder):
    told = json.loads(run("eval", folder / "run" / "photos.task", folder / "photos", "--json"))
    assert told["accuracy"] > 0.9
    photo = folder / "photos" / "test" / "light" / "0.png"
    answer = json.loads(run("predict", photo, "--task", folder / "run" / "photos.task", "--json"))
    assert answer["predictions"][0]["label"] == "light"
    (folder / "twin.task").mkdir(exist_ok=True)
    for file in (folder / "run" / "photos.task").iterdir():
        (folder / "twin.task" / file.name).write_bytes(file.read_bytes())
    both = f"{folder / 'run' / 'photos.task'},{folder / 'twin.task'}"
    answers = json.loads(run("predict", photo, "--tasks", both, "--json"))["tasks"]
    assert answers["photos"] == answers["twin"]


@pytest.mark.slow
def test_a_sweep_trains_its_arms_on_features_of_the_engine(folder):
    told = run(
        "sweep",
        folder / "photos",
        "--grid",
        "lr=1e-3,1e-2",
        "--seeds",
        1,
        "--epochs",
        2,
        "--backbone",
        f"onnx:{folder / 'tiny.onnx'}",
        "--store",
        folder / "stores",
        "--out",
        folder / "sweep",
        "--json",
    )
    report = json.loads(told)
    assert report["backbone"]["engine"]["precision"] == "int8"
    assert report["arms"] == 2


@pytest.mark.slow
def test_another_backbone_is_refused_and_can_be_accepted(folder):
    task = folder / "run" / "photos.task"
    error = run("eval", task, folder / "photos", "--backbone", "restuning-tiny", code=1)
    assert "another engine of this backbone" in str(error)
    assert "--any-backbone" in str(error)
    told = run(
        "eval", task, folder / "photos", "--backbone", "restuning-tiny", "--any-backbone", "--json"
    )
    assert json.loads(told)["accuracy"] > 0.9


@pytest.mark.slow
def test_inline_methods_and_what_engines_cannot_do_are_refused_in_words(folder):
    name = f"onnx:{folder / 'tiny.onnx'}"
    cases = {
        "nothing can be tuned inside an engine": [
            "train",
            folder / "photos",
            "--backbone",
            name,
            "--method",
            "res-tuning",
            "--out",
            folder / "x",
        ],
        "weights in its file": ["plan", "--backbone", name],
        "as it was exported|what it was exported": ["sites", f"{name}+int8"],
        "no such engine file": ["info", "onnx:nowhere.onnx"],
        "precision it was exported in": [
            "cache",
            folder / "photos",
            "--backbone",
            name,
            "--precision",
            "bf16",
            "--store",
            folder / "stores",
        ],
    }
    for words, command in cases.items():
        error = str(run(*command, code=1))
        assert any(each in error for each in words.split("|")), error
        assert "do:" in error


@pytest.mark.slow
def test_info_says_what_an_engine_is(folder):
    facts = json.loads(run("info", f"onnx:{folder / 'tiny.onnx'}", "--json"))
    assert facts["layers"] == 6
    assert "int8 in onnx" in facts["weights"]
    assert facts["fingerprint"]["class"] == "VisionTransformer"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("texts")
    folders.bert(folder / "bert")
    rows = [
        (f"{a} {word} film" + " very" * (i % 4), word)
        for i in range(10)
        for a in ("a", "the")
        for word in ("good", "bad")
    ]
    with (folder / "reviews.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("text", "label"), *rows])
    run(
        "engine",
        "export",
        "--backbone",
        f"hf:{folder / 'bert'}",
        "--tokens",
        "all",
        "--out",
        folder / "bert.onnx",
    )
    return folder


def test_a_text_engine_takes_any_batch_and_length_and_heeds_padding(texts):
    plain = load_backbone(f"hf:{texts / 'bert'}")
    loaded = load_backbone(f"onnx:{texts / 'bert.onnx'}")
    engine, host = loaded.host(), plain.host()
    tokens = dict(
        loaded.tokenizer(
            ["a good film", "the bad film very very very"], padding=True, return_tensors="pt"
        )
    )
    ours, theirs = host.features(**tokens), engine.features(**tokens)
    for name in ours:
        real = tokens["attention_mask"].bool()
        assert torch.allclose(ours[name][real], theirs[name][real], atol=PADDED)
    for pool in ("mean", "cls", "last"):
        assert torch.allclose(
            host.readout(ours["block.1"], pool, ours.mask),
            engine.readout(theirs["block.1"], pool, theirs.mask),
            atol=PADDED,
        )


def test_texts_are_trained_on_an_engine(texts):
    run(
        "train",
        texts / "reviews.csv",
        "--backbone",
        f"onnx:{texts / 'bert.onnx'}",
        "--method",
        "res-tuning-bypass",
        "--pool",
        "mean",
        "--epochs",
        6,
        "--lr",
        0.02,
        "--out",
        texts / "run",
        "--json",
    )
    answer = run("predict", "a good film", "--task", texts / "run" / "reviews.task", "--json")
    assert json.loads(answer)["text"] == "a good film"
    loaded = load_backbone(f"onnx:{texts / 'bert.onnx'}")
    task = load(texts / "run" / "reviews.task", loaded.host())
    tokens = dict(
        loaded.tokenizer(
            ["a good film", "the bad film very very"], padding=True, return_tensors="pt"
        )
    )
    alone = dict(loaded.tokenizer(["a good film"], return_tensors="pt"))
    tuned = Tuned(loaded.host(), task)
    assert torch.allclose(tuned(**tokens)[:1], tuned(**alone), atol=PADDED)
