"""A command that trains several methods runs the backbone once for each image."""

from collections import Counter
from functools import partial

import pytest
import torch

import restuning
from restuning import Engine, FitSettings, load_backbone
from restuning._errors import TrainingError
from restuning.features import StoreOptions, stores
from restuning.search import CANDIDATES, choose_method
from restuning.search import train as training
from restuning.search.sweep import sweep
from restuning.training.run import Source, open_inputs

DETACHED = ("linear", "ridge", "res-tuning-bypass", "mixing-bypass")
TRIED = tuple(each for each in CANDIDATES if each.method in DETACHED)


class Passes:
    """Counts how often each image of a data set went through a backbone."""

    def __init__(self, backbone):
        self.backbone, self.seen = backbone, Counter()
        self.handle = backbone.model.register_forward_pre_hook(self._count)

    def _count(self, module, args):
        # Shapes alone are run as well, to forecast.
        if type(args[0]) is torch.Tensor and not args[0].is_meta:
            self.seen.update(image.detach().numpy().tobytes() for image in args[0])

    def of(self, *splits):
        """Passes of each image of splits, most often seen first; another image of equal pixels is counted."""
        images = Counter(
            split[i][0].numpy().tobytes() for split in splits for i in range(len(split))
        )
        return {self.seen[image] / count for image, count in images.items()}


@pytest.fixture
def passes():
    counted = Passes(load_backbone("restuning-tiny"))
    yield counted
    counted.handle.remove()


def test_methods_that_are_compared_share_one_pass(few, tmp_path, passes):
    train = partial(
        restuning.train,
        few,
        backbone=passes.backbone,
        method=DETACHED,
        out=tmp_path / "out",
        store=tmp_path / "stores",
        epochs=1,
    )
    train()
    assert passes.of(few.train, few.val, few.test) == {1.0}
    assert len(stores(tmp_path / "stores")) == 1
    train()
    assert passes.of(few.train, few.val, few.test) == {1.0}, "of a finished comparison none is made"


def test_a_choice_and_the_run_that_follows_share_one_pass(few, tmp_path, passes, monkeypatch):
    monkeypatch.setattr(training, "choose_method", partial(choose_method, candidates=TRIED))
    run = restuning.train(
        few, backbone=passes.backbone, out=tmp_path / "out", store=tmp_path / "stores", epochs=1
    )
    assert all(row["status"] in ("tried", "stopped") for row in run.choice.rows)
    assert passes.of(few.train, few.val, few.test) == {1.0}


def test_so_does_a_choice_that_holds_out_its_own_validation_split(
    shades, tmp_path, passes, monkeypatch
):
    monkeypatch.setattr(training, "choose_method", partial(choose_method, candidates=TRIED[:3]))
    restuning.train(
        shades, backbone=passes.backbone, out=tmp_path / "out", store=tmp_path / "stores", epochs=1
    )
    data = Source(shades).load(passes.backbone)
    assert passes.of(data.train, data.test) == {1.0}


def test_settings_that_read_more_and_less_share_one_pass(few, tmp_path, passes):
    host = passes.backbone.host()
    inputs = open_inputs(host, passes.backbone, few, StoreOptions(tmp_path / "stores"))
    report = sweep(
        inputs,
        "mixing-bypass",
        {"pool_patches": [2, 1]},
        seeds=[0],
        settings=FitSettings(epochs=1),
        out=tmp_path / "out",
    )
    assert all(row["mean"] is not None for row in report["settings"])
    assert passes.of(few.train, few.val, few.test) == {1.0}


@pytest.mark.parametrize("method", ["linear", ["linear", "ridge"]])
def test_a_folder_of_other_data_is_refused_before_anything_is_computed(
    few, tmp_path, passes, method
):
    train = partial(
        restuning.train,
        backbone=passes.backbone,
        method=method,
        out=tmp_path / "out",
        store=tmp_path / "stores",
        epochs=1,
    )
    train(few)
    splits = (few.train, few.val, few.test)
    assert passes.of(*splits) == {1.0}
    kept = stores(tmp_path / "stores")
    other = few.with_splits(train=torch.utils.data.Subset(few.train, range(1, 96)))
    with pytest.raises(TrainingError, match="holds a run with other") as told:
        train(other)
    assert "the training data" in told.value.found
    with pytest.raises(TrainingError, match="batch_size"):
        train(few, batch_size=7)
    with pytest.raises(TrainingError, match="training data"):
        train(other, final=True)
    assert (passes.of(*splits), stores(tmp_path / "stores")) == ({1.0}, kept)
    train(other, resume=False)
    assert passes.of(other.train) == {2.0}


def test_a_final_run_is_known_again_whatever_it_was_trained_from(few, tmp_path, passes):
    for store in (tmp_path / "stores", False):
        train = partial(
            restuning.train,
            few,
            backbone=passes.backbone,
            method="linear",
            out=tmp_path / f"out {store is False}",
            store=store,
            final=True,
            epochs=1,
        )
        first = train().test_accuracy
        assert train().test_accuracy == first
        assert store is False or passes.of(few.train, few.val, few.test) == {1.0}


def test_what_an_engine_cannot_give_keeps_no_other_from_a_pass_of_its_own(few, tmp_path, passes):
    host = passes.backbone.host()
    taps = host.sites.taps

    def run(inputs):
        kept = host.features(inputs["x"], keep=restuning.Needs(taps, "cls"))
        return [kept[tap] for tap in taps]

    engine = Engine(
        run,
        inputs=("x",),
        sites=host.sites,
        tokens="cls",
        readout=host.readout_rule,
        model=host.model,
        fingerprint=host.fingerprint(),
        digest="0" * 16,
    )
    inputs = open_inputs(engine, passes.backbone, few, StoreOptions(tmp_path / "stores"))
    found = choose_method(
        inputs, FitSettings(epochs=1), tmp_path / "out", candidates=CANDIDATES[:-1]
    )
    status = {row["method"]: row["status"] for row in found.rows}
    assert status["linear"] == status["res-tuning-bypass"] == "tried"
    assert status["ridge"] == status["ensemble"] == "left out"
    assert passes.of(few.train, few.val) == {1.0}
