"""A convolutional backbone from the command line: default methods, stored features, real weights."""

import json

import pytest

from commands import restuning

BACKBONE = "timm:mobilenetv2_035@64:pad_type=same,bn_eps=1e-3"


def train(*args):
    done = restuning("train", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_default_methods_train_on_a_cnn(tmp_path):
    out = tmp_path / "all"
    train(
        "digits",
        "--backbone",
        "timm:test_resnet@32",
        "--random",
        "--epochs",
        1,
        "--store",
        tmp_path / "store",
        "--out",
        out,
    )
    rows = {r["method"]: r for r in json.loads((out / "comparison.json").read_text())}
    assert list(rows) == ["linear", "res-tuning", "res-tuning-bypass"]
    kept = [json.loads((out / m / "metrics.json").read_text())["features"] for m in rows]
    assert kept[1] is None
    assert kept[0]["tokens"] == kept[2]["tokens"] == "pool"
    assert kept[0]["store"] == kept[2]["store"]


def test_stored_and_live_features_train_a_bypass_alike(tmp_path):
    accuracies = []
    for name, more in (("stored", ()), ("live", ("--no-cache",))):
        train(
            "digits",
            "--backbone",
            "timm:test_resnet@32",
            "--random",
            "--epochs",
            1,
            "--method",
            "res-tuning-bypass",
            "--store",
            tmp_path / "store",
            "--out",
            tmp_path / name,
            *more,
        )
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        accuracies.append((metrics["test_accuracy"], metrics["train_loss"]))
    (stored, stored_loss), (live, live_loss) = accuracies
    assert stored_loss == pytest.approx(live_loss, rel=1e-4)
    assert stored == pytest.approx(live, abs=0.01)


@pytest.mark.slow
@pytest.mark.data
def test_a_real_cnn_learns_a_real_task_by_bypass(tmp_path, shared_data):
    """RSSCN7 with MobileNetV2-0.35 at 64 px; chance is 14 %."""
    weights = shared_data / "weights" / "mobilenetv2_035.safetensors"
    train(
        shared_data / "vtab" / "rsscn7",
        "--backbone",
        BACKBONE,
        "--weights",
        weights,
        "--method",
        "res-tuning-bypass",
        "--epochs",
        10,
        "--store",
        tmp_path / "store",
        "--out",
        tmp_path / "run",
    )
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["features"]["tokens"] == "pool"
    assert metrics["test_accuracy"] > 0.5
