"""Whatever backbones tasks are of, they answer in the order in which they were asked."""

from itertools import permutations

import pytest
from fastapi.testclient import TestClient

from restuning import serve
from restuning.serve import Service
from serving import picture, prepared_otherwise, save_tasks

NAMES = ("t0", "otherwise", "t1")
"""Of two ways of preparing images, hence two forwards, and the second lies between those of the first."""


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    tasks = save_tasks(folder, 2, inline=False)
    tasks["otherwise"] = prepared_otherwise(tasks["t0"], folder / "otherwise.task")
    service = Service({name: tasks[name] for name in NAMES})
    assert len(service.batchers) == 2
    with TestClient(serve.app(service)) as made:
        yield made
    assert service.drain(60)


def orders(said):
    return {(*said["versions"],), (*said["problems"],)} | {
        (*each["tasks"],) for each in said["answers"]
    }


@pytest.mark.parametrize("asked", permutations(NAMES))
def test_tasks_answer_in_the_order_in_which_they_are_named(client, asked):
    files = [("images", picture(seed)) for seed in (0, 1)]
    said = client.post("/v1/predict", files=files, data={"tasks": ",".join(asked)})
    assert orders(said.json()) == {asked}


def test_of_all_tasks_each_answers_where_the_listing_has_it(client):
    said = client.post("/v1/predict", files={"images": picture()}).json()
    assert orders(said) == {(*(task["name"] for task in client.get("/v1/tasks").json()["tasks"]),)}
