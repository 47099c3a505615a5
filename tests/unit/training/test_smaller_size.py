"""A size below the backbone's own is said once, in one sentence, wherever a method cannot repair it."""

import json
from dataclasses import replace

import pytest
from torch import nn
from torch.utils.data import Subset
from typer.testing import CliRunner

import restuning
from restuning import methods
from restuning._errors import TrainingError
from restuning.backbones import Backbone, Preprocessing
from restuning.bench.entries import is_detached
from restuning.bench.grid import Entry
from restuning.bench.rivals import RIVALS
from restuning.cli.app import app
from restuning.data import load_data
from restuning.features import StoreOptions
from restuning.search import AUTO
from restuning.search import train as training
from restuning.search.sweep import SweepRequest, run_sweep
from restuning.training.own_size import note_smaller_size, size_in_words
from restuning.training.run import Source

WORDS = "the backbone's own is"


def backbone(size=112, own=(224, 224), weights="pretrained"):
    prepared = Preprocessing((size, size)) if size else None
    return Backbone(
        f"timm:x@{size}", nn.Identity(), (), {}, prepared, weights=weights, own_size=own
    )


@pytest.fixture(scope="module")
def small():
    """The embedded backbone, as if its weights were for twice the size that it runs at."""
    return replace(restuning.load_backbone("restuning-tiny"), own_size=(64, 64))


@pytest.fixture(scope="module")
def few(small):
    digits = load_data("digits", small)
    splits = {"train": 64, "val": 16, "test": 16}
    return digits.with_splits(
        **{name: Subset(getattr(digits, name), range(n)) for name, n in splits.items()}
    )


def test_the_sentence_says_both_sizes_what_that_costs_and_what_to_do():
    said = note_smaller_size(backbone(), detached=True)
    assert said.startswith(f"image size 112 px, {WORDS} 224 px: methods beside the backbone cannot")
    assert "linear probing on cifar100" in said
    assert said.endswith("leave --image-size or @PIXELS out")
    assert "\n" not in said


@pytest.mark.parametrize(
    "nothing",
    [
        note_smaller_size(backbone(), detached=False),
        note_smaller_size(backbone(size=224), detached=True),
        note_smaller_size(backbone(size=384), detached=True),
        note_smaller_size(backbone(own=None), detached=True),
        note_smaller_size(backbone(size=None), detached=True),
        note_smaller_size(backbone(weights="random"), detached=True),
    ],
    ids=["inside", "its own size", "a larger one", "not known", "of texts", "drawn weights"],
)
def test_where_there_is_nothing_to_say_nothing_is(nothing):
    assert nothing == ""


def test_a_smaller_side_is_a_smaller_size():
    assert note_smaller_size(backbone(size=112, own=(112, 224)), detached=True)
    assert size_in_words((112, 224)) == "112x224 px"


@pytest.mark.parametrize("name", methods.names())
def test_a_method_is_inside_where_it_tunes_what_the_backbone_computes(name, small):
    task = methods.build(name, small.host(), num_classes=3)
    changes = bool(task.inline_tuners) or bool(len(task.weights))
    assert methods.runs_inside(name) == changes


def test_entries_of_a_grid_are_detached_where_what_they_train_is():
    assert is_detached(Entry("a", "linear")) and is_detached(Entry("a", AUTO))
    assert not is_detached(Entry("a", "res-tuning[mha=prompt]"))
    beside = {name for name in RIVALS if is_detached(Entry("a", name))}
    assert beside == {"side-tuning", "lst", "ms-swift"}


@pytest.mark.parametrize(
    ("method", "times"),
    [
        ("linear", 1),
        ("bitfit", 0),
        (["linear", "ridge", "bitfit"], 1),
    ],
    ids=str,
)
def test_train_says_it_once_for_all_detached_methods(method, times, small, few, tmp_path):
    lines = []
    restuning.train(
        few,
        backbone=small,
        method=method,
        epochs=1,
        store=tmp_path / "s",
        out=tmp_path / "run",
        log=lines.append,
    )
    assert sum(WORDS in line for line in lines) == times


def test_auto_says_it_before_it_chooses(small, few, tmp_path, monkeypatch):
    def end(*args, **more):
        raise TrainingError("far enough")

    monkeypatch.setattr(training, "choose_method", end)
    lines = []
    with pytest.raises(TrainingError, match="far enough"):
        restuning.train(few, backbone=small, method=AUTO, out=tmp_path / "run", log=lines.append)
    assert sum(WORDS in line for line in lines) == 1


def test_a_sweep_says_it(small, few, tmp_path):
    lines = []
    store = StoreOptions(tmp_path / "s", progress=False, log=lines.append)
    source = Source(few, store=store)
    request = SweepRequest(
        source, "linear", {"lr": [1e-2]}, (0,), restuning.FitSettings(epochs=1), small
    )
    run_sweep(request, out=tmp_path / "sweep")
    assert sum(WORDS in line for line in lines) == 1


@pytest.mark.parametrize(("method", "times"), [("linear", 1), ("res-tuning", 0)])
def test_a_plan_shows_the_size_and_says_what_it_costs(method, times):
    words = ("plan", "--backbone", "timm:test_vit@96", "--method", method, "--batch", "2")
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    assert "at 96 px (its own is 160 px)" in " ".join(done.stderr.split())
    assert done.stderr.count(WORDS) == times
    found = json.loads(done.stdout)
    assert (found["image_size"], found["own_size"]) == ([96, 96], [160, 160])
    assert bool(found["note"]) == times


def test_a_plan_at_the_backbone_s_own_size_shows_it_and_says_no_more():
    done = CliRunner().invoke(app, ["plan", "--method", "linear", "--batch", "2"])
    assert "restuning-tiny at 32 px, batch 2" in done.output
    assert "own is" not in done.output
