"""A saved task is whole or was never written, whatever happens to its writer; what is read is what was written."""

import errno
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from awake import tiny_vit
from restuning import Host, RestuningError, Tuned, load, methods, save
from restuning import task as tasks
from restuning._errors import DivergedError, FormatError
from restuning._files import seal
from restuning.task import check_savable, find_task, folder, save_and_load

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
FILES = {"task.json", "weights.safetensors", "README.md"}
ENOUGH = 40
"""More system calls than a save makes of one kind."""
WAIT = 0.5
"""Seconds that a save, which takes hundredths, is given while it should wait."""


@pytest.fixture(scope="module")
def host():
    return Host(tiny_vit(), X[:1])


def task_of(host, seed):
    torch.manual_seed(seed)
    task = methods.build("linear", host, num_classes=3).eval()
    with torch.no_grad():
        task.head.weight.normal_()
    task.labels = [f"{name}{seed}" for name in "abc"]
    return task


def answers(host, task):
    return Tuned(host, task)(X), task.labels


def read(host, path):
    """Which of the two tasks lies there: answers and labels must belong together."""
    logits, labels = answers(host, load(path, host))
    for seed in (1, 2):
        wanted, names = answers(host, task_of(host, seed))
        if torch.equal(logits, wanted):
            assert labels == names
            return seed
    raise AssertionError("neither task")


class Failing:
    """Raises at the n-th call of a function; does the rest as it is."""

    def __init__(self, monkeypatch, owner, name, place):
        self.left, self.real = place, getattr(owner, name)
        monkeypatch.setattr(owner, name, self)

    def __get__(self, instance, owner):
        return lambda *a, **k: self(instance, *a, **k)

    def __call__(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.real(*args, **kwargs)


STEPS = [
    (os, "fsync"),
    (Path, "replace"),
    (os, "link"),
    (folder, "save_file"),
    (Path, "write_text"),
]


@pytest.mark.parametrize(("owner", "name"), STEPS, ids=lambda each: getattr(each, "__name__", each))
def test_a_full_disk_at_any_step_leaves_the_old_task_whole_or_the_new(host, tmp_path, owner, name):
    path = save(task_of(host, 1), host, tmp_path / "t.task")
    old = {p.name: p.read_bytes() for p in path.iterdir()}
    refused = 0
    for place in range(1, ENOUGH):
        with pytest.MonkeyPatch.context() as patch:
            failing = Failing(patch, owner, name, place)
            try:
                save(task_of(host, 2), host, path)
            except FormatError as error:
                refused += 1
                assert "No space left" in error.found
                assert "what was there before is still whole" in error.fix
        if read(host, path) == 1:
            assert {p.name: p.read_bytes() for p in path.iterdir()} == old
        else:
            # The step was made already, or links are copies where there is no room for links.
            save(task_of(host, 1), host, path)
            assert {p.name for p in path.iterdir()} == FILES
        assert os.listdir(tmp_path) == ["t.task"]
        if failing.left > 0:
            break
    else:
        raise AssertionError("it never came to its end")
    assert refused or name == "link"


@pytest.mark.parametrize(("owner", "name"), [s for s in STEPS if s[1] != "link"])
def test_a_full_disk_at_a_first_save_leaves_nothing_not_even_folders(host, tmp_path, owner, name):
    with pytest.MonkeyPatch.context() as patch:
        Failing(patch, owner, name, 1)
        with pytest.raises(FormatError, match="No space left"):
            save(task_of(host, 1), host, tmp_path / "mistyped" / "deep" / "t.task")
    assert not list(tmp_path.iterdir())


def die_at_a_rename(place):
    real, left = Path.replace, iter(range(place - 1))
    Path.replace = lambda *a: real(*a) if next(left, None) is not None else os._exit(9)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork of POSIX")
def test_a_process_that_is_killed_at_any_rename_leaves_a_whole_task(host, tmp_path):
    path = save(task_of(host, 1), host, tmp_path / "t.task")
    seen = set()
    for place in range(1, ENOUGH):
        child = os.fork()
        if child == 0:
            # Whatever happens, this process never goes on as one that runs tests.
            ended = 1
            try:
                die_at_a_rename(place)
                save(task_of(host, 2), host, path)
                ended = 0
            finally:
                os._exit(ended)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        seen.add(read(host, path))
        # The next save ends what was begun.
        save(task_of(host, 1), host, path)
        assert {p.name for p in path.iterdir()} == FILES
        if status == 0:
            break
    assert seen == {1, 2}


def test_a_reader_who_is_overtaken_every_time_makes_the_others_wait(host, tmp_path, monkeypatch):
    path = save(task_of(host, 1), host, tmp_path / "t.task")
    real, writers, waited = save_and_load.find_weights, [], []

    def overtake(folder, description):
        writer = threading.Thread(
            target=save, args=(task_of(host, 2 - len(writers) % 2), host, path)
        )
        writers.append(writer)
        writer.start()
        writer.join(WAIT if len(writers) > save_and_load._TRIES else None)
        waited.append(writer.is_alive())
        return real(folder, description)

    monkeypatch.setattr(save_and_load, "find_weights", overtake)
    read(host, path)
    writers[-1].join()
    assert waited == [False] * save_and_load._TRIES + [True]


def test_whoever_reads_while_others_save_finds_a_whole_task(host, tmp_path):
    path = save(task_of(host, 1), host, tmp_path / "t.task")
    both = [task_of(host, seed) for seed in (1, 2)]
    found, wrong, done = set(), [], threading.Event()

    def look():
        while not done.is_set():
            try:
                found.add(read(host, path))
            except Exception as error:  # noqa: BLE001
                wrong.append(error)

    def write(first):
        for turn in range(12):
            save(both[(first + turn) % 2], host, path)

    reader = threading.Thread(target=look)
    writers = [threading.Thread(target=write, args=(first,)) for first in (0, 1)]
    [t.start() for t in (reader, *writers)]
    [t.join() for t in writers]
    done.set()
    reader.join()
    assert not wrong
    assert read(host, path) in (1, 2)
    assert {p.name for p in path.iterdir()} == FILES
    assert os.listdir(tmp_path) == ["t.task"]


def test_files_that_a_user_put_into_the_folder_stay(host, tmp_path):
    path = save(task_of(host, 1), host, tmp_path / "t.task")
    (path / "notes.txt").write_text("mine")
    (path / "pictures").mkdir()
    save(task_of(host, 2), host, path)
    assert read(host, path) == 2
    assert {p.name for p in path.iterdir()} == FILES | {"notes.txt", "pictures"}


def test_a_task_that_was_left_under_its_other_name_is_pushed_under_its_own(host, tmp_path):
    path = save(task_of(host, 1), host, tmp_path / "t.task")
    digest = json.loads((path / "task.json").read_text())["sha256"]["weights.safetensors"]
    (path / "weights.safetensors").rename(path / f".weights-{digest[:16]}.safetensors")
    assert read(host, path) == 1
    folder.take_usual_names(path, tasks.describe(path))
    assert {p.name for p in path.iterdir()} == FILES
    assert read(host, path) == 1


def test_a_file_where_the_folder_must_be_is_refused_before_and_left(host, tmp_path):
    (tmp_path / "t.task").write_text("mine")
    for refused in (save, check_savable):
        with pytest.raises(FormatError, match="a file of this name is there"):
            refused(task_of(host, 1), host, tmp_path / "t.task")
    assert (tmp_path / "t.task").read_text() == "mine"


@pytest.mark.parametrize(
    "path", ["n" * 300 + ".task", "file/t.task", "file/deep/t.task"], ids=["long", "file", "deep"]
)
def test_a_folder_that_cannot_be_made_is_noticed_before_anything_is_trained(host, tmp_path, path):
    (tmp_path / "file").write_text("mine")
    for refused in (check_savable, save):
        with pytest.raises(FormatError, match="could not be saved"):
            refused(task_of(host, 1), host, tmp_path / path)
    assert os.listdir(tmp_path) == ["file"]


def test_a_try_leaves_nothing(host, tmp_path):
    check_savable(task_of(host, 1), host, tmp_path / "deep" / "t.task")
    assert not list(tmp_path.iterdir())
    path = save(task_of(host, 1), host, tmp_path / "t.task")
    check_savable(task_of(host, 2), host, path)
    assert {p.name for p in path.iterdir()} == FILES
    assert read(host, path) == 1


def test_only_the_first_of_several_processes_writes(host, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert save(task_of(host, 1), host, tmp_path / "t.task") == tmp_path / "t.task"
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    assert read(host, save(task_of(host, 1), host, tmp_path / "t.task")) == 1


NUMBERS = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf")}


@pytest.mark.parametrize("number", NUMBERS)
def test_weights_that_are_no_numbers_are_neither_saved_nor_loaded(host, number, tmp_path):
    path = save(task_of(host, 1), host, tmp_path / "t.task")
    diverged = task_of(host, 2)
    with torch.no_grad():
        diverged.head.bias[1] = NUMBERS[number]
    with pytest.raises(DivergedError, match=r"1 of 3 numbers of head\.bias"):
        save(diverged, host, path)
    assert read(host, path) == 1
    rewrite_weights(path, {"head.bias": torch.full((3,), NUMBERS[number])})
    with pytest.raises(FormatError, match="NaN or infinite"):
        load(path, host)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.complex64, torch.bool])
def test_weights_of_another_type_are_refused_and_halves_become_whole(host, dtype, tmp_path):
    path = save(task_of(host, 1), host, tmp_path / "t.task")
    bias = load_file(path / "weights.safetensors")["head.bias"]
    rewrite_weights(path, {"head.bias": bias.to(dtype)})
    with pytest.raises(FormatError, match=rf"head\.bias is {dtype}"):
        load(path, host)
    rewrite_weights(path, {"head.bias": bias.bfloat16()})
    assert torch.equal(load(path, host).head.bias, bias.bfloat16().float())


def test_a_task_in_double_precision_is_not_saved_as_less(host, tmp_path):
    with pytest.raises(FormatError, match=r"torch\.float64"):
        save(task_of(host, 1).double(), host, tmp_path / "t.task")
    assert not list(tmp_path.iterdir())


def rewrite_weights(path, changed, **entries):
    """As somebody would who writes such files: with the digests that belong to them."""
    tensors = {**load_file(path / "weights.safetensors"), **changed}
    save_file(tensors, path / "weights.safetensors")
    description = json.loads((path / "task.json").read_text())
    digest = folder.sha256_of_file(path / "weights.safetensors")
    description |= {"sha256": {"weights.safetensors": digest}, **entries}
    (path / "task.json").write_text(json.dumps(seal(description)))


@pytest.mark.parametrize(
    "labels", [["a", "b"], ["a", "b", "c", "d"], [], "abc", ["a", "b", 3], {"a": 0}]
)
def test_labels_that_are_not_those_of_the_head_are_neither_saved_nor_loaded(host, labels, tmp_path):
    path = save(task_of(host, 1), host, tmp_path / "t.task")
    wrong = task_of(host, 2)
    wrong.labels = labels
    for refused in (save, check_savable):
        with pytest.raises(FormatError, match="labels"):
            refused(wrong, host, tmp_path / "other.task")
    spec = json.loads((path / "task.json").read_text())["task"] | {"labels": labels}
    rewrite_weights(path, {}, task=spec)
    with pytest.raises(FormatError, match="labels"):
        load(path, host)


@pytest.mark.parametrize("other", [torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)])
def test_weights_of_another_save_are_refused(host, tmp_path, other):
    path = save(task_of(host, 1), host, tmp_path / "t.task")
    tensors = load_file(path / "weights.safetensors") | {"head.bias": other}
    save_file(tensors, path / "weights.safetensors")
    with pytest.raises(FormatError, match="of another save"):
        load(path, host)


@pytest.mark.parametrize("wrong", [None, "0" * 63, 7, {}, "G" * 64])
def test_a_sha256_that_is_none_is_refused_in_words(host, tmp_path, wrong):
    path = save(task_of(host, 1), host, tmp_path / "t.task")
    description = json.loads((path / "task.json").read_text())
    for entry in ({"weights.safetensors": wrong}, wrong):
        (path / "task.json").write_text(json.dumps(seal({**description, "sha256": entry})))
        with pytest.raises(RestuningError, match=r"task\.json"):
            load(path, host)


@pytest.mark.parametrize(
    "preprocessing", [{"mean": float("nan")}, {"size": torch.tensor(3)}, {"size": {1, 2}}]
)
def test_what_json_cannot_say_is_noticed_before_anything_is_written(host, tmp_path, preprocessing):
    for refused in (check_savable, save):
        with pytest.raises(FormatError, match="cannot be described in JSON"):
            refused(task_of(host, 1), host, tmp_path / "t.task", preprocessing=preprocessing)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_all_files_may_be_read_by_whom_the_user_lets(host, tmp_path):
    path = save(task_of(host, 1), host, tmp_path / "t.task")
    assert len({(path / name).stat().st_mode for name in FILES}) == 1


def test_a_run_folder_is_still_found_by_its_task(host, tmp_path):
    path = save(task_of(host, 1), host, tmp_path / "run" / "t.task")
    assert find_task(tmp_path / "run") == path
