"""What is computed once, at the command line: `cache`, `train` from a store, `sweep`, many tasks."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from commands import restuning
from restuning import features

TASKS = ("linear", "res-tuning-bypass", "res-tuning")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """An image folder with its three splits; each of three classes has a brightness of its own."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    random = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4), ("test", 4)):
        for label, brightness in (("dark", 40), ("grey", 120), ("light", 200)):
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(brightness - 30, brightness + 30, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def stored(photos, tmp_path_factory):
    root = tmp_path_factory.mktemp("features")
    done = restuning("cache", photos, "--store", root, "--json")
    assert done.returncode == 0, done.stderr
    return root, json.loads(done.stdout)


@pytest.fixture(scope="module")
def trained(photos, stored, tmp_path_factory):
    """A task of each kind, one epoch each, in one command."""
    out = tmp_path_factory.mktemp("tasks")
    done = restuning("train", photos, "--epochs", 1, "--store", stored[0], "--out", out)
    assert done.returncode == 0, done.stderr
    for method in TASKS:
        (out / method / "photos.task").rename(out / f"{method}.task")
    return out, done.stdout


def test_a_store_says_what_it_is_and_is_found_again(photos, stored):
    root, facts = stored
    assert facts["dtype"] == "fp32"
    assert facts["bytes"] >= facts["bytes an input"] * sum(facts["splits"].values())
    again = restuning("cache", photos, "--store", root)
    assert "reused" in again.stdout
    listed = json.loads(restuning("cache", "ls", "--store", root, "--json").stdout)
    assert [row["state"] for row in listed] == ["whole"]
    # A Python user is told the same.
    assert listed == features.list_stores(root)
    (name,) = (row["store"] for row in listed)
    told = json.loads(restuning("cache", "info", name, "--store", root, "--json").stdout)
    assert told == features.describe_store(features.find_store(name, root))


def test_the_list_tells_unfinished_and_unusable_stores_and_sizes_in_few_digits(stored, tmp_path):
    (whole,) = (path for path in stored[0].iterdir() if path.is_dir())
    for name in ("a-whole", "b-unfinished", "c-unusable"):
        shutil.copytree(whole, tmp_path / name)
    (tmp_path / "b-unfinished" / "manifest.json").unlink()
    (tmp_path / "c-unusable" / "manifest.json").write_text("{")
    rows = features.list_stores(tmp_path)
    assert [row["state"] for row in rows] == ["whole", "unfinished", "unusable"]
    assert all(0 < row["MiB"] == float(f"{row['MiB']:.3g}") for row in rows)
    shown = restuning("cache", "ls", "--store", tmp_path, COLUMNS="200").stdout
    assert "None" not in shown
    assert f" {rows[0]['MiB']:g} " in shown


def test_patches_are_merged_where_that_is_asked_for_and_the_loss_is_told(photos, tmp_path):
    done = restuning("cache", photos, "--store", tmp_path, "--tokens", "all/2")
    assert done.returncode == 0, done.stderr
    assert "patches 2 x 2 together" in done.stdout
    assert "merged away" in done.stdout
    done = restuning("cache", photos, "--store", tmp_path, "--tokens", "all/2", "--json")
    facts = json.loads(done.stdout)
    assert facts["tokens"] == "all/2"
    assert all(0 < share < 1 for share in facts["merged away"].values())
    for wrong in ("all/", "all/0", "cls/2", "all/x"):
        done = restuning("cache", photos, "--store", tmp_path, "--tokens", wrong)
        assert done.returncode == 1
        assert "all/2 for patches" in done.stderr


def test_an_option_that_a_verb_does_not_read_is_refused_typed_or_in_a_file(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("shard_size: 8KB\n")
    for arguments, words in (
        (("ls", "--backbone", "restuning-tiny"), "--backbone: `cache ls` takes none"),
        (("ls", "digits"), "'digits': `cache ls` takes none"),
        (("merge", "digits", "--dtype", "fp16"), "--dtype: `cache merge` takes none"),
        (("export", "digits", "--views", "2"), "--views: `cache export` takes none"),
        (("verify", "digits", "--to", "parquet"), "--to: `cache verify` takes none"),
        (("merge", "digits", "--config", file), "--shard-size: `cache merge` takes none"),
        (("digits", "more"), "'more': `cache DATA` takes none"),
        (("digits", "--out", tmp_path), "--out: `cache DATA` takes none"),
    ):
        done = restuning("cache", *arguments, "--store", tmp_path)
        assert done.returncode == 2
        told = re.sub(r"[\s│╭╮╰╯─]+", " ", done.stderr)
        assert words in told


def test_training_takes_the_store_by_itself_and_says_so(stored, trained):
    out, words = trained
    assert words.count("reused") == 2  # linear and the bypass; Res-Tuning runs in the backbone
    for method in TASKS:
        metrics = json.loads((out / method / "metrics.json").read_text())
        used = metrics["features"] and metrics["features"]["digest"]
        assert used == (None if method == "res-tuning" else stored[1]["digest"])


def test_many_tasks_answer_with_one_forward_and_one_more_for_each_inside(trained, tmp_path):
    out, _ = trained
    for name in ("a", "b", "c"):
        Image.new("L", (8, 8), 40 * ord(name) % 255).save(tmp_path / f"{name}.png")
    folders = ",".join(str(out / f"{method}.task") for method in TASKS)
    done = restuning("predict", tmp_path, "--tasks", folders, "--top", 2, "--json")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["image"][-5:] for line in lines] == ["a.png", "b.png", "c.png"]
    for line in lines:
        assert {t: len(best) for t, best in line["tasks"].items()} == dict.fromkeys(TASKS, 2)
    table = restuning("predict", tmp_path, "--tasks", folders).stdout.splitlines()
    assert table[0].split() == ["image", *TASKS]
    assert [row.split()[0][-5:] for row in table[1:4]] == ["a.png", "b.png", "c.png"]
    assert table[-1] == "3 tasks, 2 backbone forwards a batch"
    alone = restuning("predict", tmp_path / "a.png", "--task", out / "linear.task", "--json")
    assert json.loads(alone.stdout)["predictions"][0] == pytest.approx(
        lines[0]["tasks"]["linear"][0]
    )


def test_a_sweep_leaves_a_table_a_picture_and_tasks_that_eval_confirms(photos, stored, tmp_path):
    out = tmp_path / "sweep"
    command = (
        "sweep",
        photos,
        "--grid",
        "lr=1e-2,1e9",
        "--method",
        "linear",
        "--seeds",
        2,
        "--epochs",
        1,
        "--store",
        stored[0],
        "--out",
        out,
    )
    done = restuning(*command, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == json.loads((out / "sweep.json").read_text())
    assert len(report["settings"]) == 2
    assert Image.open(out / "sweep.png").size[0] > 500
    tested = restuning("eval", out / "final" / "seed-1.task", photos, "--json")
    assert json.loads(tested.stdout)["accuracy"] == report["final"]["test_accuracy"][1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["cache", "info", "nothing"], "no such"),
        (["cache", "digits", "--dtype", "fp4"], "fp4"),
        (["sweep", "digits", "--grid", "lr"], "not a grid"),
        (["sweep", "digits", "--grid", "lr=1", "--method", "res-tuning"], "inside the backbone"),
        (["predict", "x.png", "--tasks", "a.task,c.task"], "no task here"),
        (["predict", "x.png", "--tasks", "a.task,b/a.task"], "two tasks have one name"),
        (["predict", "x.png", "--tasks", "b/c.task"], "no task here: b/c.task"),
    ],
)
def test_a_mistake_about_features_is_answered_in_words(arguments, words, tmp_path):
    store = ["--store", str(tmp_path / "s")] if arguments[0] != "predict" else []
    done = restuning(*arguments, *store, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_a_store_with_a_flipped_bit_is_named_and_removed(stored):
    root, name = stored[0], "photos"
    assert restuning("cache", "verify", name, "--store", root).returncode == 0
    shard = max((p for p in root.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = restuning("cache", "verify", name, "--store", root)
    assert done.returncode == 1
    assert shard.name in done.stderr
    assert restuning("cache", "rm", name, "--store", root).returncode == 0
    assert json.loads(restuning("cache", "ls", "--store", root, "--json").stdout) == []
