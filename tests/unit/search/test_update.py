"""Tasks that are solved in closed form are updated: as solving anew would, whole or not at all, or refused in words."""

import dataclasses
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import restuning
from children import Child
from restuning import Host, load_backbone, train, update
from restuning._errors import (
    DataError,
    FormatError,
    TrainingError,
    UnknownNameError,
    WrongBackboneError,
)
from restuning.data import DataOptions, load_data
from restuning.training.sums_file import find_updated, read_sums, sums_of

ROUNDED = 2e-4
"""Of the largest weight: images of other batches have features that round elsewhere, and few rows magnify it."""
PATIENCE = 120
"""Seconds; far above what an update takes alone."""


def draw(folder, label, count, seed):
    """Noise around a grey of its own for each class."""
    middle = {"dark": 60, "grey": 110, "light": 170}[label]
    rng = np.random.default_rng(seed)
    (folder / label).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = rng.normal(middle, 60, (32, 32, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / label / f"{seed}-{number:02}.png")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder to train on, one to add, the union, and the run of the first."""
    root = tmp_path_factory.mktemp("update")
    for folder in ("base/train", "union/train"):
        draw(root / folder, "dark", 14, 1)
        draw(root / folder, "light", 16, 2)
    for folder in ("more", "union/train"):
        draw(root / folder, "light", 5, 3)
        draw(root / folder, "grey", 7, 4)
    run_on(root / "base", root / "run")
    return root


def run_on(data, out, **more):
    return train(data, method="ridge", out=out, store=False, **more)


@pytest.fixture
def run(world, tmp_path):
    """A run folder of one's own."""
    return shutil.copytree(world / "run", tmp_path / "run")


def opened(run, name="base"):
    backbone = load_backbone("restuning-tiny")
    return restuning.load(run / f"{name}.task", Host(backbone.model, *backbone.example))


def assert_same(ours, theirs):
    """By the names of their classes, which may stand in another order."""
    assert set(ours.labels) == set(theirs.labels)
    order = [ours.labels.index(name) for name in theirs.labels]
    for name in ("weight", "bias"):
        a, b = getattr(ours.side, name)[order], getattr(theirs.side, name)
        assert float((a - b).abs().max()) <= ROUNDED * float(b.abs().max())


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_is_added_is_as_if_it_had_been_there_from_the_start(world, run, tmp_path):
    said = []
    result = update(run, world / "more", log=said.append)
    assert (result.rows, result.classes) == ((30, 42), (2, 3))
    assert result.new_classes == ("grey",)
    assert any("grey" in line for line in said)
    anew = run_on(world / "union", tmp_path / "anew")
    assert_same(result.task, anew.task)
    assert result.accuracy[1] == pytest.approx(anew.task.side.left_out_accuracy)
    # What was left is what was given.
    again = opened(run)
    assert torch.equal(again.side.weight, result.task.side.weight)
    assert again.labels == ["dark", "light", "grey"]
    assert len(list(run.glob("*.sums-*"))) == 1
    answer = restuning.Predictor.load(run)(world / "more" / "grey" / "4-00.png")[0]
    assert answer.label in again.labels


def test_images_that_are_read_at_random_are_refused(world, run):
    backbone = load_backbone("restuning-tiny")
    data = load_data(world / "union", backbone, DataOptions(augment="timm"))
    refused(run, data, error=TrainingError, match="inputs that stay the same")


def test_what_is_given_twice_is_told_apart_from_what_is_in(world, run, tmp_path):
    draw(tmp_path / "twice", "grey", 3, 11)
    shutil.copytree(tmp_path / "twice/grey", tmp_path / "twice/light")
    refused(run, tmp_path / "twice", match="given twice, under two classes")


def test_what_is_taken_out_was_never_there(world, run, tmp_path):
    update(run, world / "more")
    result = update(run, world / "more", remove=True)
    assert (result.rows, result.classes, result.gone_classes) == ((42, 30), (3, 2), ("grey",))
    assert_same(result.task, opened(world / "run"))


def test_one_class_alone_is_added_and_what_is_in_is_skipped_with_a_word(world, run, tmp_path):
    draw(tmp_path / "few", "grey", 4, 9)
    shutil.copytree(world / "base/train/dark", tmp_path / "few/dark")
    said = []
    result = update(run, tmp_path / "few", log=said.append)
    assert (result.rows, result.skipped) == ((30, 34), 14)
    assert any("in already" in line for line in said)
    before = contents(run)
    nothing = update(run, tmp_path / "few")
    assert (nothing.rows, nothing.skipped) == ((34, 34), 18)
    assert contents(run) == before


def test_a_store_of_features_leaves_the_same_sums_as_images_do(world, tmp_path):
    live = opened(world / "run")
    stored = train(world / "base", method="ridge", out=tmp_path / "run", store=tmp_path / "stores")
    assert_same(stored.task, live)
    ours, theirs = (
        read_sums(folder / "base.task", task)
        for folder, task in ((tmp_path / "run", stored.task), (world / "run", live))
    )
    assert ours.inputs == theirs.inputs
    assert torch.equal(ours.sums.kept_rows().keys, theirs.sums.kept_rows().keys)


def refused(run, *what, error=DataError, match, **how):
    before = contents(run)
    with pytest.raises(error, match=match) as told:
        update(run, *what, **how)
    assert contents(run) == before
    return told.value


def test_an_example_that_is_in_under_another_class_is_refused(world, run, tmp_path):
    (tmp_path / "wrong").mkdir()
    shutil.copytree(world / "base/train/dark", tmp_path / "wrong/light")
    error = refused(run, tmp_path / "wrong", match="under another class")
    assert "in as dark" in error.found


def test_what_is_not_in_is_not_taken_out(world, run, tmp_path):
    draw(tmp_path / "others", "dark", 2, 77)
    error = refused(run, tmp_path / "others", remove=True, match="not in")
    assert "77-00.png" in error.found
    refused(run, world / "more", remove=True, match="class that the task does not have")


def test_a_task_of_one_class_is_not_left(world, run, tmp_path):
    shutil.copytree(world / "base/train/dark", tmp_path / "out/dark")
    refused(run, tmp_path / "out", remove=True, match="two classes")


def test_a_task_of_another_method_or_without_sums_is_refused(world, run, tmp_path):
    linear = train(world / "base", method="linear", out=tmp_path / "linear", epochs=1)
    refused(linear.folder, world / "more", error=FormatError, match="solved in closed form")
    shutil.copytree(run / "base.task", tmp_path / "alone/base.task")
    refused(tmp_path / "alone", world / "more", error=FormatError, match="without its sums")
    refused(run, tmp_path / "nowhere", error=UnknownNameError, match="no such data set")


def test_another_backbone_is_refused(world, run):
    other = load_backbone("restuning-tiny", random=True)
    refused(run, world / "more", backbone=other, error=WrongBackboneError, match="backbone")


def test_sums_of_another_preprocessing_or_backbone_are_refused(world, run):
    from restuning.training import sums_file

    task = opened(run)
    kept = read_sums(run / "base.task", task)
    for name, value in (("preprocessing", {"size": 1}), ("backbone", "another")):
        about = {**kept.about, name: value}
        sums_file.write_sums(run / "base.task", task, dataclasses.replace(kept, about=about))
        error = refused(run, world / "more", error=FormatError, match="of other rows")
        assert name in error.found or "size" in error.found


def test_a_flipped_bit_of_the_sums_is_refused(world, run):
    (path,) = run.glob("*.sums-*")
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    refused(run, world / "more", error=FormatError, match="cannot be read")


def test_sums_of_another_solution_under_this_ones_name_are_refused(world, run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    update(other, world / "more")
    (theirs,) = other.glob("*.sums-*")
    shutil.copy(theirs, sums_of(run / "base.task", opened(run)))
    refused(run, world / "more", error=FormatError, match="another solution|cannot be read")


def test_a_run_is_not_written_over_its_updated_task(world, run):
    update(run, world / "more")
    assert find_updated(run / "base.task") is not None
    before = contents(run)
    with pytest.raises(TrainingError, match="was updated since"):
        run_on(world / "base", run)
    assert contents(run) == before
    run_on(world / "base", run, resume=False)
    assert find_updated(run / "base.task") is None
    assert opened(run).labels == ["dark", "light"]


def test_a_finished_run_gets_its_sums_back_that_were_removed(world, run):
    (path,) = run.glob("*.sums-*")
    path.unlink()
    run_on(world / "base", run)
    assert [p.name for p in run.glob("*.sums-*")] == [path.name]


def test_beyond_the_rows_that_are_held_updates_go_by_products(world, tmp_path, monkeypatch):
    monkeypatch.setattr("restuning.bypass.sums.KEPT", 20)
    # Fewer features than rows: the class token and the mean of one layer are too many still.
    monkeypatch.setattr("restuning.bypass.sums.Sums.most", property(lambda sums: sums.kept))
    monkeypatch.setattr("restuning.training.run.reason_not_kept", lambda *args: "")
    # Each costs a factor of features by features.
    monkeypatch.setattr("restuning.bypass.solution.PENALTIES", (0.1, 1.0))
    small = run_on(world / "base", tmp_path / "run", layers=[6])
    result = update(small.folder, world / "more")
    anew = run_on(world / "union", tmp_path / "anew", layers=[6])
    assert anew.task.side.sums.products is not None
    assert_same(result.task, anew.task)
    update(small.folder, world / "more", remove=True)
    kept = read_sums(small.task_folder, opened(small.folder))
    assert kept.sums.count == 30
    assert len(kept.sums.kept_rows().keys) < 20


STEPS = 30
"""More than an update changes names of files."""

KILLED = """
import os, sys
import restuning
from restuning.backbones import load_backbone
load_backbone("restuning-tiny")
more, *runs = sys.argv[1:]
for left, run in enumerate(runs):
    child = os.fork()
    if child == 0:
        def counted(step):
            def one(*args, **how):
                global left
                if left == 0:
                    os._exit(9)
                left -= 1
                return step(*args, **how)
            return one
        for name in ("replace", "unlink", "link"):
            setattr(os, name, counted(getattr(os, name)))
        restuning.update(run, more)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, flush=True)
    if code == 0:
        print(*[0] * (len(runs) - left - 1))
        break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process that dies at once, of POSIX")
def test_killed_before_any_change_of_a_name_the_task_has_its_sums_and_the_update_ends_the_same(
    world, tmp_path
):
    whole = shutil.copytree(world / "run", tmp_path / "whole")
    wanted = update(whole, world / "more").task
    old = opened(world / "run")
    seen = set()
    runs = [shutil.copytree(world / "run", tmp_path / f"killed {step}") for step in range(STEPS)]
    child = Child(["-c", KILLED, world / "more", *runs])
    said = child.communicate(PATIENCE)
    assert child.returncode == 0, said
    codes = [int(code) for code in said[0].split()]
    # Before the first change of a name, before the second, ... until none is left.
    assert codes == sorted(codes, reverse=True)
    assert {*codes} == {9, 0}
    for step, (run, code) in enumerate(zip(runs, codes, strict=True)):
        task = opened(run)
        kept = read_sums(run / "base.task", task)
        is_new = len(task.labels) == 3
        seen.add(is_new)
        expected = wanted if is_new else old
        assert torch.equal(task.side.weight, expected.side.weight)
        assert kept.sums.count == (42 if is_new else 30)
        if code == 0:
            assert is_new
            break
        # What goes on from there is the same update: every third is enough.
        if step % 3:
            continue
        update(run, world / "more")
        assert torch.equal(opened(run).side.weight, wanted.side.weight)
        assert read_sums(run / "base.task", opened(run)).sums.count == 42
    assert seen == {False, True}
