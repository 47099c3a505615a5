"""A watched folder: what is saved there answers, what is gone does not, what is bad changes nothing."""

import os
import shutil

import pytest

from restuning._errors import FormatError
from restuning.serve import Service
from restuning.serve.watch import Watcher
from serving import save_tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return save_tasks(tmp_path_factory.mktemp("tasks"), 2, inline=False)


def put(source, folder):
    """As `save` leaves it: `task.json` is another file."""
    folder.mkdir(exist_ok=True)
    for file in source.iterdir():
        shutil.copy(file, folder / "new")
        os.replace(folder / "new", folder / file.name)


def test_tasks_come_change_and_go_with_their_folders(tasks, tmp_path):
    service, told = Service(), []
    (tmp_path / "notes.txt").write_text("no task")
    (tmp_path / "empty").mkdir()
    watcher = Watcher(service, tmp_path, told.append)
    watcher.look()
    assert not service.entries and not told
    put(tasks["t0"], tmp_path / "pets.task")
    watcher.look()
    first = service.entries["pets"]
    watcher.look()
    assert service.entries["pets"] is first
    put(tasks["t1"], tmp_path / "pets.task")
    watcher.look()
    assert service.entries["pets"].version != first.version
    shutil.rmtree(tmp_path / "pets.task")
    watcher.look()
    assert not service.entries
    assert [line.split(",")[0] for line in told] == ["task pets answers"] * 2 + [
        "task pets is gone"
    ]


def test_a_bad_folder_is_told_of_once_and_the_old_task_answers(tasks, tmp_path):
    service, told = Service({"t1": tasks["t1"]}), []
    put(tasks["t0"], tmp_path / "pets.task")
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "task.json").write_text("{}")
    watcher = Watcher(service, tmp_path, told.append)
    watcher.look()
    version = service.entries["pets"].version
    weights = tmp_path / "pets.task" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    put_again = (tmp_path / "pets.task" / "task.json").read_text() + "\n"
    (tmp_path / "pets.task" / "task.json").write_text(put_again)
    watcher.look()
    watcher.look()
    assert service.entries["pets"].version == version
    assert "sha256" in service.entries["pets"].error
    assert [line.split(" was")[0] for line in told if "refused" in line] == [
        "task a b",
        "task pets",
    ]
    assert set(service.failed) == {"a b"}
    shutil.rmtree(tmp_path / "a b")
    watcher.look()
    assert not service.failed
    # What the command line named is not the folder's to take away.
    assert set(service.entries) == {"t1", "pets"}


def test_a_task_that_cannot_be_looked_at_holds_up_no_other(tasks, tmp_path):
    service, told = Service(), []
    put(tasks["t0"], tmp_path / "pets.task")
    watcher = Watcher(service, tmp_path, told.append)
    watcher.look()
    version = service.entries["pets"].version
    (tmp_path / "pets.task").rename(tmp_path / "aside")
    # A link to itself: nobody can say what it is.
    (tmp_path / "pets.task").symlink_to("pets.task")
    put(tasks["t1"], tmp_path / "scenes.task")
    (tmp_path / "aside" / "task.json").rename(tmp_path / "aside" / "kept.json")
    watcher.look()
    watcher.look()
    assert service.entries["pets"].version == version and "scenes" in service.entries
    assert "cannot be read" in service.entries["pets"].error
    assert len([line for line in told if "refused" in line]) == 1
    (tmp_path / "pets.task").unlink()
    (tmp_path / "aside" / "kept.json").rename(tmp_path / "aside" / "task.json")
    (tmp_path / "aside").rename(tmp_path / "pets.task")
    watcher.look()
    assert service.entries["pets"].error == "" and not service.failed


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FormatError, match="no folder to watch"):
        Watcher(Service(), tmp_path / "none")


@pytest.mark.parametrize("answering", [False, True])
def test_two_folders_of_one_name_are_refused_until_one_is_gone(tasks, tmp_path, answering):
    service, told = Service({"t1": tasks["t1"]}), []
    watcher = Watcher(service, tmp_path, told.append)
    put(tasks["t0"], tmp_path / "pets.task")
    if answering:
        watcher.look()
    put(tasks["t1"], tmp_path / "pets")
    before = dict(service.entries)
    told.clear()
    for _ in range(2):
        watcher.look()
    (line,) = told
    assert "task pets was refused" in line and "pets, pets.task" in line
    assert before.keys() == service.entries.keys()
    if answering:
        assert before["pets"].version == service.entries["pets"].version
        assert "one name" in service.entries["pets"].error
    else:
        assert "one name" in service.failed["pets"]
    shutil.rmtree(tmp_path / "pets.task")
    watcher.look()
    assert service.entries["pets"].version == service.entries["t1"].version
    assert not service.entries["pets"].error and not service.failed
