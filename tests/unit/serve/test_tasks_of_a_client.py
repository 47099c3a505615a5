"""A client asks the tasks that it was given, and knows a server of ours from another."""

import httpx
import pytest

from restuning import Client
from restuning._errors import DataError, ServerError

TASK = {"kind": "image", "labels": ["ant", "bee"], "version": "1"}


@pytest.fixture
def answering(monkeypatch):
    """Sets what a server answers by its path, in place of the network."""
    made = httpx.Client

    def set_answers(answers):
        def answer(request):
            return httpx.Response(200, json=answers[request.url.path])

        transport = httpx.MockTransport(answer)
        monkeypatch.setattr(httpx, "Client", lambda **how: made(transport=transport, **how))

    return set_answers


def test_of_no_task_none_is_asked_and_not_all(answering):
    answering({"/v1/tasks": {"tasks": [{"name": "t0"}]}, "/v1/tasks/t0": TASK})
    assert [*Client("http://here").tasks] == ["t0"]
    assert [*Client("http://here", tasks=["t0"]).tasks] == ["t0"]
    with pytest.raises(DataError, match="no task"):
        Client("http://here", tasks=[])


@pytest.mark.parametrize("listing", [{}, {"tasks": None}, {"tasks": [1]}, {"tasks": [{"id": 1}]}])
def test_a_server_that_lists_tasks_in_another_form_is_told_from_ours(answering, listing):
    answering({"/v1/tasks": listing})
    with pytest.raises(ServerError, match="no form of ours"):
        Client("http://here")


@pytest.mark.parametrize("missing", TASK)
def test_a_task_that_is_described_in_another_form_is_told_from_ours(answering, missing):
    told = {name: value for name, value in TASK.items() if name != missing}
    answering({"/v1/tasks": {"tasks": [{"name": "t0"}]}, "/v1/tasks/t0": told})
    with pytest.raises(ServerError, match="no form of ours"):
        Client("http://here")
