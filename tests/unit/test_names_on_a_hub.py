"""Nothing is asked of a hub twice that does not answer, and paths are taken for paths."""

import json
import os
import socket
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_hub import at_hub

from restuning import RestuningError, load_backbone, methods, save
from restuning._files import SEAL
from restuning.runtime import hub
from restuning.task import HubTask, describe, find_task, load, push_to_hub


@pytest.fixture
def attempts(monkeypatch):
    """Attempts to connect to anything, all of which fail; nothing is remembered from before."""
    made = []

    def connect(self, address):
        made.append(address)
        raise ConnectionRefusedError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    # An address, so that no name server is asked.
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub, "_asked", {})
    return made


NAMES = ("hf:google/no-such-model", "clip:google/no-such-model", "timm:test_vit")


@pytest.mark.parametrize("name", NAMES)
def test_a_hub_that_does_not_answer_is_tried_once(attempts, name):
    with pytest.raises(RestuningError, match="does not answer") as error:
        load_backbone(name)
    assert len(attempts) == 1
    assert "--weights" in str(error.value)
    with pytest.raises(RestuningError):
        load_backbone(name)
    assert len(attempts) == 1


def test_a_task_on_a_hub_that_does_not_answer_is_looked_for_once(attempts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RestuningError, match="does not answer") as error:
        find_task("somebody/pets")
    # A path first: that is what was typed more often.
    assert f"{tmp_path}/somebody/pets" in str(error.value).splitlines()[0]
    assert len(attempts) == 1


def test_a_path_whose_folder_is_there_is_never_asked_for(attempts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "pets.task").mkdir(parents=True)
    with pytest.raises(RestuningError, match=r"pets\.task") as error:
        find_task("runs/pet.task")
    assert str(tmp_path / "runs" / "pet.task") in str(error.value)
    assert attempts == []


def test_no_weights_and_no_folder_ask_for_nothing(attempts, tmp_path):
    load_backbone("timm:test_vit", random=True)
    (tmp_path / "model").mkdir()
    with pytest.raises(RestuningError):
        load_backbone(f"hf:{tmp_path / 'model'}")
    assert attempts == []


def test_an_attempt_ends_though_a_name_server_does_not(monkeypatch):
    monkeypatch.setattr(hub, "ANSWERS_WITHIN", 0.05)
    monkeypatch.setattr(hub, "_asked", {})
    stop = threading.Event()

    def waits(*_, **__):
        stop.wait(20)
        raise OSError("too late")

    monkeypatch.setattr(socket, "create_connection", waits)
    assert not hub.hub_answers("https://nowhere.example")
    stop.set()


def test_behind_a_proxy_the_proxy_must_answer(attempts, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:3128")
    assert not hub.hub_answers("https://example.org")
    assert attempts == [("127.0.0.1", 3128)]


def test_the_switch_of_the_client_is_turned_back_when_all_have_left(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub.offline():
        with hub.offline():
            assert hub.is_offline() and constants.HF_HUB_OFFLINE
        assert constants.HF_HUB_OFFLINE
    assert not hub.is_offline()


@pytest.fixture(scope="module")
def tiny():
    return load_backbone("restuning-tiny").host()


@pytest.fixture
def task(tiny, tmp_path):
    return save(methods.build("linear", tiny, num_classes=3), tiny, tmp_path / "runs" / "x.task")


@pytest.mark.parametrize("name", ["task.json", "weights.safetensors", "README.md"])
def test_a_link_out_of_a_task_folder_is_neither_read_nor_pushed(
    tiny, task, tmp_path, monkeypatch, name
):
    pytest.importorskip("huggingface_hub", reason="needs the extra hub")
    (task / name).rename(tmp_path / "elsewhere")
    (task / name).symlink_to(tmp_path / "elsewhere")
    with at_hub(monkeypatch, tmp_path / "cache") as server:
        with pytest.raises(RestuningError, match="a link that leaves its folder"):
            push_to_hub(task, "someone/x")
        # Nothing is made there for a task that is refused.
        assert server.repositories == {}
        if name != "README.md":
            with pytest.raises(RestuningError, match="a link that leaves its folder"):
                load(task, tiny)
        (task / name).unlink()
        (tmp_path / "elsewhere").rename(task / name)
        # What else lies there, linked or not, stays here.
        (task / "diary.txt").symlink_to("/etc/hostname")
        push_to_hub(task, "someone/x")
        pushed = sorted(server.repositories["someone/x"].files())
    assert pushed == [".gitattributes", "README.md", "task.json", "weights.safetensors"]


def test_links_inside_of_it_and_to_the_whole_folder_are_followed(tiny, task, tmp_path):
    (tmp_path / "latest.task").symlink_to(task)
    assert load(tmp_path / "latest.task", tiny).method == "linear"
    # As the cache of the hub is laid out.
    home = tmp_path / "models--somebody--x"
    (home / "snapshots" / "0").mkdir(parents=True)
    (home / "blobs").mkdir()
    for file in list(task.iterdir()):
        file.rename(home / "blobs" / file.name)
        (home / "snapshots" / "0" / file.name).symlink_to(Path("../../blobs") / file.name)
    assert load(home / "snapshots" / "0", tiny).method == "linear"
    # A task in a folder of its repository, and a blob that repositories share.
    inner = home / "snapshots" / "1" / "pets"
    inner.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for file in list((home / "blobs").iterdir()):
        (inner / file.name).symlink_to(Path("../../../blobs") / file.name)
    weights = home / "blobs" / "weights.safetensors"
    weights.rename(tmp_path / "blobs" / "0")
    weights.symlink_to("../../blobs/0")
    assert load(inner, tiny).method == "linear"
    # A folder that only looks like one of the cache has no such right.
    odd = tmp_path / "x" / "snapshots" / "0"
    odd.mkdir(parents=True)
    (tmp_path / "x" / "blobs").mkdir()
    for file in (home / "blobs").iterdir():
        (odd / file.name).symlink_to(tmp_path / "blobs" / "0")
    with pytest.raises(RestuningError, match="a link that leaves its folder"):
        describe(odd)


@pytest.mark.parametrize(
    ("name", "place", "revision"),
    [
        ("user/pets", "user/pets", None),
        ("user/pets@v1", "user/pets", "v1"),
        ("user/zoo/pets@refs/pr/1", "user/zoo/pets", "refs/pr/1"),
        (Path("user/zoo/pets"), "user/zoo/pets", None),
    ],
)
def test_a_name_of_a_hub_is_repository_task_and_revision(name, place, revision):
    named = HubTask.read(name)
    assert named is not None and (named.place, named.revision) == (place, revision)
    assert named.name == "pets"
    assert HubTask.read(str(named)) == named


@pytest.mark.parametrize(
    "name",
    ["pets", "/user/pets", "./user/pets", "~/pets", "../user/pets", "a/b/c/d", "runs/x/pets.task"]
    + ["user/pets.task", "user/", "user//pets", "hf:user/pets", "restuning-tiny", "a b/c", "C:\\a"],
)
def test_what_is_a_path_or_a_backbone_is_no_name_of_a_hub(name):
    assert HubTask.read(name) is None


@pytest.mark.parametrize("revision", ["../x", "a/../../b", "", "/x", "a\\b", ".x", "v 1"])
def test_what_is_no_revision_is_refused_before_it_becomes_a_path(revision):
    for name, beside in ((f"user/pets@{revision}", None), ("user/pets", revision)):
        with pytest.raises(RestuningError, match="not a revision"):
            HubTask.read(name, beside)


@pytest.mark.parametrize("name", ["runs/photo/pet.task", "runs/photos/pets", "runs/pets"])
def test_what_begins_with_a_folder_that_is_here_is_a_path(attempts, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "photos").mkdir(parents=True)
    with pytest.raises(RestuningError, match="no such folder"):
        find_task(name)
    assert attempts == []


def test_a_name_in_a_file_is_looked_for_in_the_cache_alone(attempts):
    with hub.named_in("grid.json"), pytest.raises(RestuningError, match="named by grid.json"):
        find_task("user/pets@main")
    assert attempts == []


@pytest.mark.skipif(os.name == "nt", reason="pipes have no names there")
@pytest.mark.parametrize("name", ["task.json", "weights.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tiny, task, name):
    description = json.loads((task / "task.json").read_text())
    (task / name).unlink()
    os.mkfifo(task / name)
    if name != "task.json":
        # Of before the sha256 of the weights was kept.
        del description["sha256"], description[SEAL]
        (task / "task.json").write_text(json.dumps(description))
    else:
        with pytest.raises(RestuningError, match="pipe"):
            describe(task)
    with pytest.raises(RestuningError, match="pipe"):
        load(task, tiny)


def test_a_weights_file_that_says_it_is_large_allocates_nothing(tiny, task):
    header = {"head.weight": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    description = json.loads((task / "task.json").read_text())
    del description["sha256"], description[SEAL]
    (task / "task.json").write_text(json.dumps(description))
    for size in (len(text), 2**40, 2**63):
        content = size.to_bytes(8, "little") + text + b"\0\0\0\0"
        (task / "weights.safetensors").write_bytes(content)
        with pytest.raises(RestuningError, match="weights of a task cannot be read"):
            load(task, tiny)


def test_files_that_the_hub_keeps_are_told_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--a--b"
    (home / "snapshots" / "0").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0")
    save_file({"x": torch.zeros(1)}, home / "snapshots" / "0" / "model.safetensors")
    assert hub.first_cached("a/b", ["x", "model.safetensors"]).name == "model.safetensors"
    assert hub.first_cached("a/b", ["x"]) is None
    assert hub.first_cached("not a name", ["x"]) is None
