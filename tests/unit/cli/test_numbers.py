"""A number that cannot be meant is refused; zero is a number and not nothing."""

import pytest

from commands import restuning
from restuning import FitSettings, Host, load_backbone, methods, train
from restuning._errors import DataError, RestuningError, RestuningWarning
from restuning.diffusion.settings import DenoiserSettings
from restuning.serve import Predictor

COMMANDS = [
    ("train", "digits", "--method", "linear", "--epochs"),
    ("train", "digits", "--method", "res-tuning", "--rank"),
    ("train", "digits", "--batch-size"),
    ("train", "digits", "--accumulate"),
    ("train", "digits", "--lr"),
    ("train", "digits", "--clip"),
    ("train", "digits", "--ema"),
    ("train", "digits", "--max-tokens"),
    ("train", "digits", "--checkpoint-every"),
    ("train", "digits", "--method", "auto", "--minutes"),
    ("train", "digits", "--method", "auto", "--memory"),
    ("sweep", "digits", "--grid", "lr=1e-3", "--epochs"),
    ("sweep", "digits", "--grid", "lr=1e-3", "--seeds"),
    ("sweep", "digits", "--grid", "lr=1e-3", "--batch-size"),
    ("plan", "--rank"),
    ("plan", "--epochs"),
    ("plan", "--images"),
    ("plan", "--classes"),
    ("predict", "a.png", "--task", "t.task", "--batch-size"),
    ("predict", "a.png", "--task", "t.task", "--top"),
    ("eval", "t.task", "digits", "--batch-size"),
    ("cache", "digits", "--views"),
    ("cache", "digits", "--batch-size"),
    ("methods", "--classes"),
    ("bench", "run", "digits", "--out", "grid", "--epochs"),
    ("bench", "run", "digits", "--out", "grid", "--image-size"),
    ("bench", "run", "digits", "--out", "grid", "--seeds"),
    ("train-image-generation", "photos", "--pipeline", "p", "--rank"),
    ("train-image-generation", "photos", "--pipeline", "p", "--steps"),
    ("train-image-generation", "photos", "--pipeline", "p", "--sample-every"),
    ("train-image-generation", "photos", "--pipeline", "p", "--size"),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_zero_that_cannot_be_meant_is_refused_before_anything_is_left(words, tmp_path):
    done = restuning(*words, 0, cwd=tmp_path)
    assert done.returncode in (1, 2)
    said = done.stderr
    assert words[-1] in said or words[-1].lstrip("-").replace("-", "_") in said or "memory" in said
    assert "Traceback" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"epochs": 0}, {"batch_size": 0}, {"lr": 0.0}])
@pytest.mark.parametrize("method", ["res-tuning", "auto"])
def test_a_zero_in_python_is_refused_as_on_the_command_line(method, wrong, tmp_path):
    with pytest.raises(RestuningError):
        train("digits", method=method, out=tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def host():
    tiny = load_backbone("restuning-tiny")
    return Host(tiny.model, *tiny.example)


@pytest.mark.parametrize("method", ["res-tuning", "res-tuning-bypass", "adaptformer"])
def test_a_rank_wider_than_the_stream_is_warned_of(method, host, recwarn):
    methods.build(method, host, num_classes=2)
    methods.build(method, host, num_classes=2, rank=host.dim)
    assert not recwarn.list
    with pytest.warns(RestuningWarning, match=f"rank {host.dim + 1}, width {host.dim}"):
        methods.build(method, host, num_classes=2, rank=host.dim + 1)


def test_a_length_is_no_width(host, recwarn):
    methods.build("prefix", host, num_classes=2, rank=host.dim + 1)
    assert not recwarn.list


def test_a_batch_of_a_predictor_holds_something():
    tiny = load_backbone("restuning-tiny")
    task = methods.build("linear", tiny.host(), num_classes=2)
    with pytest.raises(DataError, match="batch_size=0"):
        Predictor(tiny, {"a": task}, batch_size=0)


def test_samples_every_zero_steps_are_refused_and_a_warm_up_of_zero_is_one():
    with pytest.raises(RestuningError, match="sample_every"):
        DenoiserSettings(sample_every=0)
    assert DenoiserSettings(warmup_steps=0).warmup == 0


def test_a_seed_that_no_generator_takes_is_refused():
    for kind in (FitSettings, DenoiserSettings):
        assert kind(seed=2**63 - 1).seed == 2**63 - 1
        for seed in (2**63, 2**70, -1):
            with pytest.raises(RestuningError, match="seed"):
                kind(seed=seed)
