"""The zero-shot start through the command line in this process."""

import json

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from restuning import load_backbone, load_data
from restuning.cli.app import app

pytest.importorskip("transformers")
import towers  # noqa: E402 (needs transformers)

COLOURS = {"cat": (90, 90, 90), "red_panda": (200, 60, 30), "truck": (20, 40, 200)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A CLIP in `clip`, an open_clip in `open` where there is one, photographs in `pics`."""
    folder = tmp_path_factory.mktemp("zero-shot")
    towers.saved(towers.clip(), folder / "clip")
    generator = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / "pics" / name).mkdir(parents=True)
        for i in range(30):
            noisy = np.array(colour) + generator.normal(0, 30, (40, 40, 3))
            picture = Image.fromarray(np.clip(noisy, 0, 255).astype("uint8"))
            picture.save(folder / "pics" / name / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def there(place, monkeypatch):
    monkeypatch.chdir(place)


def invoke(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def run(*args):
    done = invoke(*args)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def refused(*args):
    """An error of ours, which `main` prints without a traceback."""
    done = invoke(*args)
    assert done.exit_code != 0
    return str(done.exception)


@pytest.mark.parametrize(
    "method",
    ["linear", pytest.param("res-tuning", marks=pytest.mark.slow), "res-tuning-bypass", "ridge"],
)
def test_training_starts_at_zero_shot_and_the_task_is_answered_later(place, tmp_path, method):
    (tmp_path / "prompts.txt").write_text("a photo of a {}.\n\na picture of the {}\n")
    given = ("--backbone", "hf:clip", "--zero-shot", tmp_path / "prompts.txt")
    row = json.loads(
        run(
            "train",
            "pics",
            *given,
            "--method",
            method,
            "--epochs",
            40,
            "--batch-size",
            16,
            "--lr",
            "2e-2",
            "--out",
            tmp_path / "run",
            "--store",
            tmp_path / "store",
            "--json",
        )
    )
    assert row["test_accuracy"] > 0.9
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    backbone = load_backbone("clip:clip")
    data = load_data("pics", backbone)
    head = backbone.text.head(data.labels, ["a photo of a {}.", "a picture of the {}"])
    right = [
        int(head(backbone.model(x[None])).argmax()) == y
        for x, y in (data.val[i] for i in range(len(data.val)))
    ]
    assert metrics["zero_shot_val_accuracy"] == pytest.approx(np.mean(right))
    task = tmp_path / "run" / "pics.task"
    assert json.loads((task / "task.json").read_text())["backbone"]["name"] == "clip:clip"
    again = json.loads(run("eval", task, "pics", "--json"))
    assert again["accuracy"] == row["test_accuracy"]
    answer = json.loads(run("predict", "pics/truck/0.png", "--task", task, "--json"))
    assert answer["predictions"][0]["label"] == "truck"


def test_open_clip_goes_the_same_way(place, tmp_path):
    pytest.importorskip("open_clip")
    name = towers.openclip("ViT", place / "open").replace(str(place / "open"), "open")
    given = ("--backbone", name, "--zero-shot", "a photo of a {}.", "--class-names", "names.txt")
    (place / "names.txt").write_text("cat\nred panda\nbig truck\n")
    run(
        "train",
        "pics",
        *given,
        "--method",
        "res-tuning-bypass",
        "--epochs",
        1,
        "--out",
        tmp_path / "run",
        "--store",
        tmp_path / "store",
    )
    answer = json.loads(
        run("predict", "pics/cat/0.png", "--task", tmp_path / "run" / "pics.task", "--json")
    )
    assert answer["predictions"][0]["label"] in COLOURS


def test_weights_of_both_towers_come_from_one_file(place, tmp_path):
    file = place / "clip" / "model.safetensors"
    given = (
        "--backbone",
        "clip:clip",
        "--weights",
        file,
        "--zero-shot",
        "{}",
        "--method",
        "linear",
        "--epochs",
        1,
        "--store",
        tmp_path / "store",
    )
    run("train", "pics", *given, "--out", tmp_path / "run")
    from_file = json.loads((tmp_path / "run" / "metrics.json").read_text())
    run("train", "pics", "--backbone", "clip:clip", *given[4:], "--out", tmp_path / "other")
    from_folder = json.loads((tmp_path / "other" / "metrics.json").read_text())
    for key in ("fingerprint", "zero_shot_val_accuracy", "test_accuracy"):
        assert from_file[key] == from_folder[key]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--zero-shot", "a {}"), "needs a text tower"),
        (("--backbone", "hf:clip", "--zero-shot", "no place"), "one place for the class name"),
        (("--backbone", "hf:clip", "--zero-shot", "none.txt"), "cannot be read"),
        (
            ("--backbone", "hf:clip", "--zero-shot", "{}", "--class-names", "two.txt"),
            "2 names for 3",
        ),
        (("--backbone", "clip:text", "--zero-shot", "{}"), "not a model of an image and a text"),
        (("--backbone", "openclip:Nope", "--zero-shot", "{}"), "no such model"),
        (("--backbone", "openclip:ViT-B-32", "--zero-shot", "{}"), "which weights"),
        (("--backbone", "openclip:local-dir:clip", "--zero-shot", "{}"), "could not be loaded"),
    ],
)
def test_what_a_user_gets_wrong_is_said_in_words(place, given, said):
    if given[1].startswith("openclip"):
        pytest.importorskip("open_clip")
    (place / "two.txt").write_text("cat\ntruck\n")
    if not (place / "text").exists():
        from zoo import folders

        folders.bert(place / "text")
    error = refused("train", "pics", "--method", "linear", *given)
    assert said in error, error
    assert "do:" in error or "found:" in error


def test_without_open_clip_the_line_that_installs_it_is_printed(monkeypatch):
    import builtins
    import sys

    real = builtins.__import__

    def none(name, *args, **kwargs):
        if name.partition(".")[0] == "open_clip":
            raise ImportError("No module named 'open_clip'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", none)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert "pip install 'restuning[openclip]'" in refused("sites", "openclip:ViT-B-32")
