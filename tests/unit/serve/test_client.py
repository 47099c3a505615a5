"""A client is asked as a predictor is, and answers alike."""

import threading

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from restuning import Client, Predictor, load_backbone, serve
from restuning._errors import BusyError, DataError, ServerError, TooLargeError, UnknownNameError
from restuning.serve import Limits, Service
from serving import picture, running, same, save_all_kinds, save_task


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return save_all_kinds(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def service(tasks):
    return Service(tasks, limits=Limits(inputs=4, text=1000))


@pytest.fixture(scope="module")
def address(service):
    with running(serve.app(service)) as found:
        yield found


def test_images_in_every_form_are_answered_as_by_a_predictor(address, tasks, tmp_path):
    names = ["t0", "t1", "inline"]
    predictor = Predictor.load({n: tasks[n] for n in names})
    for seed in range(2):
        (tmp_path / f"{seed}.png").write_bytes(picture(seed))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 3), dtype=np.uint8)
    with Client(address, tasks=names, batch_size=2) as client:
        assert client.labels == predictor.labels
        for given in (
            tmp_path,
            tmp_path / "0.png",
            [str(tmp_path / "1.png"), picture(3), picture(4)],
            Image.fromarray(pixels[0]),
            pixels,
            [torch.from_numpy(p).permute(2, 0, 1) for p in pixels],
        ):
            found, wanted = client(given), predictor(given)
            assert len(found) == len(wanted) > 0
            for one, other in zip(found, wanted, strict=True):
                assert same(one, other)
                assert one["t0"].top() == [
                    (c.label, pytest.approx(c.probability, abs=1e-5)) for c in other["t0"].top()
                ]
        (tmp_path / "notes.txt").write_text("no image")
        assert len(client(tmp_path)) == 2
        assert [f.name for files in client.left_out.values() for f in files] == ["notes.txt"]
        with pytest.raises(DataError, match="no such image"):
            client(tmp_path / "none.png")
        with pytest.raises(DataError, match="without a name"):
            client("")
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match="a folder without images"):
            client(tmp_path / "empty")
        with pytest.raises(DataError, match="cannot be read"):
            client(b"no image")
        with pytest.raises(DataError, match="cannot be sent"):
            client(torch.zeros(3, 32, 32))


def test_texts_and_words_are_answered_as_by_a_predictor(address, tasks, tmp_path):
    (tmp_path / "films.txt").write_text("a good film\nbad\n\nthe film\n")
    given = tmp_path / "films.txt"
    for name in ("mood", "words"):
        predictor, client = Predictor.load({name: tasks[name]}), Client(address, tasks=[name])
        for one, other in zip(client(given), predictor(given), strict=True):
            assert same(one, other)
            assert one.input == other.input
    with pytest.raises(TooLargeError, match="too long"):
        client(["a" * 2000])


def test_a_task_that_is_exchanged_is_told_with_its_new_labels(address, service, tasks, tmp_path):
    client = Client(address, tasks=["t1"])
    assert client(picture()).pop().label in client.labels["t1"]
    backbone = load_backbone("restuning-tiny")
    service.put("t1", save_task(backbone, tmp_path / "new.task", labels=["x", "y"]))
    assert client(picture()).pop()["t1"].labels == ["x", "y"]
    service.put("t1", tasks["t1"])


def test_what_a_server_does_not_answer_is_told_in_words(address, service, monkeypatch):
    with pytest.raises(ServerError, match="does not answer"):
        Client("http://127.0.0.1:1")
    with pytest.raises(UnknownNameError, match="no such task: dogs"):
        Client(address, tasks=["dogs"])
    with pytest.raises(DataError, match="one kind"):
        Client(address)
    with pytest.raises(ServerError, match="Not Found"):
        Client(f"{address}/page", tasks=["t0"])
    proxy = httpx.MockTransport(lambda request: httpx.Response(502, text="<html>"))
    between = Client(address, tasks=["t0"])
    between._session = httpx.Client(transport=proxy, base_url=address)
    with pytest.raises(ServerError, match="no form of ours"):
        between(picture())
    for other in (
        httpx.Response(200, text="<html>log in</html>"),
        httpx.Response(200, json=[1]),
        httpx.Response(429, text="", headers={"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}),
    ):
        portal = httpx.MockTransport(lambda request, answer=other: answer)
        between._session = httpx.Client(transport=portal, base_url=address)
        with pytest.raises(ServerError, match="no form of ours"):
            between(picture())
    client = Client(address, tasks=["t0"], patience=0)
    ended = threading.Event()
    ended.set()
    monkeypatch.setattr(service, "_ended", ended)
    with pytest.raises(BusyError, match="about to end"):
        client(picture())
