"""A task's probabilities are its own wherever it goes: copied, described, saved, in a bank, in a predictor."""

import copy
import json
import pickle

import pytest
import torch

from awake import solve_parts, tiny_vit, wake
from restuning import Host, MultiTask, Task, Tuned, load, methods, save
from restuning.task import describe

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
TEMPERATURE = 2.5


@pytest.fixture(scope="module")
def host():
    return Host(tiny_vit(), X[:1])


def built(host, name):
    torch.manual_seed(0)
    task = wake(methods.build(name, host, num_classes=3))
    solve_parts(task, host)
    return task.eval()


def answered(host, task):
    with torch.no_grad():
        return task.probabilities(Tuned(host, task)(X))


def rebuilt(task):
    again = Task.from_spec(json.loads(json.dumps(task.spec())))
    again.load_state_dict(task.state_dict())
    return again.eval()


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda task: pickle.loads(pickle.dumps(task)),  # noqa: S301
    "spec": rebuilt,
}


@pytest.mark.parametrize("name", methods.names())
def test_a_task_that_is_saved_and_loaded_or_copied_answers_with_the_same_probabilities(
    host, name, tmp_path
):
    task = built(host, name)
    plain = answered(host, task)
    task.temperature = TEMPERATURE
    ours = answered(host, task)
    assert not torch.equal(ours, plain)
    assert torch.equal(ours.argmax(-1), plain.argmax(-1))
    again = load(save(task, host, tmp_path / "t.task"), host)
    for other in (again, *(make(task) for make in COPIES.values())):
        assert other.temperature == TEMPERATURE
        assert torch.equal(answered(host, other), ours)


@pytest.mark.parametrize("name", methods.names())
def test_logits_know_nothing_of_a_temperature(host, name):
    task = built(host, name)
    with torch.no_grad():
        plain = [Tuned(host, task)(X), MultiTask(host, {"x": task})(X)["x"]]
        task.temperature = TEMPERATURE
        told = [Tuned(host, task)(X), MultiTask(host, {"x": task})(X)["x"]]
    for one, other in zip(plain, told, strict=True):
        assert torch.equal(one, other)


def test_a_task_without_a_temperature_is_written_as_before_there_were_any(host, tmp_path):
    task = built(host, "linear")
    path = save(task, host, tmp_path / "t.task")
    assert "temperature" not in describe(path)["task"]
    assert load(path, host).temperature == 1
    task.temperature = TEMPERATURE
    assert describe(save(task, host, path))["task"]["temperature"] == TEMPERATURE


def test_half_precision_has_probabilities_in_full():
    task = Task(temperature=0.5)
    chances = task.probabilities(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16))
    assert torch.equal(chances, torch.tensor([[2.0, 4.0]]).softmax(-1))
