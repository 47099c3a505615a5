"""A replica of Ray Serve rolls its tasks without an empty moment, and without another backbone."""

import pytest

from restuning import RestuningError
from restuning.serve import predictor as module
from restuning.serve.ray import _Replica
from serving import save_tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return save_tasks(tmp_path_factory.mktemp("tasks"), 3, inline=False)


@pytest.fixture
def replica():
    made = _Replica({"device": "cpu"}, None, None)
    yield made
    assert made.service.drain(60)


def test_tasks_roll_with_none_of_the_old_names_on_the_same_backbone(replica, tasks, monkeypatch):
    replica.reconfigure({"tasks": {"a": tasks["t0"], "b": tasks["t1"]}})
    (before,) = replica.service.batchers
    opened, here = [], []
    monkeypatch.setattr(module, "load_backbone", lambda *_, **__: opened.append(1))
    put = replica.service.put
    monkeypatch.setattr(
        replica.service,
        "put",
        lambda *given: (here.append([*replica.service.entries]), put(*given)),
    )
    replica.reconfigure({"tasks": {"c": tasks["t2"]}})
    assert [*replica.service.entries] == ["c"]
    assert replica.service.batchers == [before] and not opened
    assert here == [["a", "b"]]


def test_a_replica_of_which_no_task_can_be_opened_fails_and_one_that_answers_goes_on(
    replica, tasks, tmp_path
):
    with pytest.raises(RestuningError):
        replica.reconfigure({"tasks": {"a": tmp_path / "none.task"}})
    replica.reconfigure({"tasks": {"a": tasks["t0"]}})
    replica.reconfigure({"tasks": {"a": tmp_path / "none.task"}})
    assert replica.service.entries["a"].error
    with pytest.raises(RestuningError):
        replica.reconfigure({"tasks": {"b": tmp_path / "none.task"}})
