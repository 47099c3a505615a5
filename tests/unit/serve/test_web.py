"""The server over HTTP answers as the predictor does, in every protocol, and refuses in words."""

import asyncio
import base64
import io
import json
import logging
import re
import socket
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from restuning import Client, Predictor, load_backbone, serve
from restuning._errors import AnswerError, DataError, MissingExtraError
from restuning.problems import (
    Depth,
    MultiLabel,
    Number,
    Prediction,
    Problem,
    Regression,
    Segmentation,
    SingleLabel,
    answers,
)
from restuning.serve import Answer, Limits, Pace, Service
from restuning.serve.batcher import Reply
from restuning.serve.web import application, guard, json_answers, open_inference
from restuning.serve.web.run import bind
from serving import (
    LABELS,
    ROUNDING,
    picture,
    running,
    save_all_kinds,
    save_overflowing,
    save_task,
)

TOKEN = "0123456789abcdef"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return save_all_kinds(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def application_(tasks, tmp_path_factory):
    file = tmp_path_factory.mktemp("token") / "token.txt"
    file.write_text(f"{TOKEN}\n")
    limits = Limits(body=200_000, inputs=8, pixels=10_000, text=1000, seconds=20)
    return serve.app(tasks, admin_token=file, limits=limits)


@pytest.fixture(scope="module")
def address(application_):
    with running(application_) as found:
        yield found


@pytest.fixture(scope="module")
def client(address):
    with httpx.Client(base_url=address, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def images(tasks):
    return Predictor.load({n: tasks[n] for n in ("t0", "t1", "inline")})


@pytest.fixture(scope="module")
def texts(tasks):
    return Predictor.load({"mood": tasks["mood"]})


def close(said, prediction):
    """Whether an answer in JSON says what a prediction does."""
    best = prediction.top(5)
    return [c["label"] for c in said["top"]] == [c.label for c in best] and np.allclose(
        [said["probability"], *(c["probability"] for c in said["top"])],
        [prediction.probability, *(c.probability for c in best)],
        atol=ROUNDING,
    )


def in_base64(data):
    return base64.b64encode(data).decode()


FORMS = {
    "multipart": lambda image: {"files": [("images", ("a.png", image, "image/png"))]},
    "json": lambda image: {"json": {"images": [in_base64(image)]}},
    "data address": lambda image: {"json": {"images": f"data:image/png;base64,{in_base64(image)}"}},
    "the file itself": lambda image: {"content": image, "headers": {"content-type": "image/png"}},
}


@pytest.mark.parametrize("form", FORMS)
def test_an_image_is_answered_by_every_task_in_whatever_form_it_comes(client, images, form):
    answer = client.post("/v1/predict", **FORMS[form](picture(1)))
    assert answer.status_code == 200, answer.text
    (said,) = answer.json()["answers"]
    (right,) = images(picture(1))
    assert set(said["tasks"]) == {"t0", "t1", "inline"}
    for name, told in said["tasks"].items():
        assert close(told, right[name])
    assert said["input"] == ("a.png" if form == "multipart" else "0")


def test_texts_words_and_images_are_answered_in_one_request(client, texts):
    body = {
        "images": in_base64(picture(2)),
        "texts": ["a good film", "bad"],
        "tasks": ["t0", "mood"],
    }
    answers = client.post("/v1/predict", json=body | {"top": 1, "probabilities": True}).json()
    image, *said = answers["answers"]
    assert list(image["tasks"]) == ["t0"]
    assert len(image["tasks"]["t0"]["top"]) == 1
    for told, right in zip(said, texts(body["texts"]), strict=True):
        found = torch.tensor(told["tasks"]["mood"]["probabilities"])
        assert torch.allclose(found, right["mood"].probabilities, atol=ROUNDING)
    assert set(answers["versions"]) == {"t0", "mood"}
    told = client.post("/v1/predict", json={"texts": "a good film", "tasks": ["words"]}).json()
    assert [w["word"] for w in told["answers"][0]["tasks"]["words"]] == ["a", "good", "film"]


def test_labels_and_numbers_are_told_as_such_in_every_protocol(tmp_path):
    backbone = load_backbone("restuning-tiny")
    host, names = backbone.host(), ["width", "height"]
    size = Regression([10.0, 20.0], [2.0, 3.0], [0.5, 0.25])
    tasks = {
        "size": save_task(backbone, tmp_path / "s", host=host, labels=names, problem=size),
        "tags": save_task(backbone, tmp_path / "t", host=host, problem=MultiLabel()),
    }
    (right,) = Predictor.load(tasks)(picture())
    with running(serve.app(tasks)) as address, httpx.Client(base_url=address) as client:
        said = client.post("/v1/predict", files={"images": picture()}).json()
        (told,) = said["answers"]
        assert said["problems"] == {"size": "regression", "tags": "multi-label"}
        assert told["tasks"]["size"]["label"] == right["size"].label
        numbers = told["tasks"]["size"]["numbers"]
        assert [(n["label"], n["error"]) for n in numbers] == [("width", 0.5), ("height", 0.25)]
        values = [n.value for n in right["size"].numbers]
        assert np.allclose([n["value"] for n in numbers], values, atol=1e-3)
        assert [(t["label"], t["probability"]) for t in told["tasks"]["tags"]["tags"]] == [
            (c.label, pytest.approx(c.probability, abs=ROUNDING)) for c in right["tags"].tags
        ]
        body = {"inputs": in_base64(picture())}
        scores = client.post("/size/classify", json=body).json()
        assert [row["label"] for row in scores] == names
        chances = {s["label"]: s["score"] for s in client.post("/tags/classify", json=body).json()}
        given = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [body["inputs"]]}
        outputs = client.post("/v2/models/size/infer", json={"inputs": [given]}).json()["outputs"]
        assert {o["name"]: o["shape"] for o in outputs} == {"values": [1, 2], "label": [1]}
        assert np.allclose(outputs[0]["data"], values, atol=1e-3)
        kinds = {t["name"]: t["problem"] for t in client.get("/v1/tasks").json()["tasks"]}
        assert kinds == {"size": "regression", "tags": "multi-label"}
        (said,) = Client(address)(picture())
    assert said["size"].numbers == tuple(
        Number(n.label, pytest.approx(n.value, abs=1e-3), n.error) for n in right["size"].numbers
    )
    assert said["tags"].label == right["tags"].label
    assert [c.label for c in said["tags"].tags] == [c.label for c in right["tags"].tags]
    assert chances == pytest.approx(
        dict(zip(LABELS, right["tags"].probabilities.tolist(), strict=True)), abs=ROUNDING
    )


def test_masks_are_told_as_pictures_in_the_size_of_each_image(tmp_path):
    backbone = load_backbone("restuning-tiny")
    host = backbone.host()
    more = {"problem": Segmentation(), "pool": "grid"}
    tasks = {
        "parts": save_task(backbone, tmp_path / "p", host=host, **more),
        # Of a forward of its own.
        "inside": save_task(backbone, tmp_path / "i", "bitfit", host=host, **more),
        "kind": save_task(backbone, tmp_path / "k", host=host),
    }
    stream = io.BytesIO()
    Image.open(io.BytesIO(picture())).resize((50, 21)).save(stream, "PNG")
    (right,) = Predictor.load(tasks)(stream.getvalue())
    # All of it is seen but the edges of the longer side.
    assert (right["parts"].mask != 255).sum() == 21 * 22
    with running(serve.app(tasks)) as address, httpx.Client(base_url=address) as client:
        for known in (False, True):
            said = client.post("/v1/predict", files={"images": stream.getvalue()}).json()
            (told,) = said["answers"]
            assert told["cached"] == known
            for name in ("parts", "inside"):
                picture_of = told["tasks"][name]
                mask = np.array(Image.open(io.BytesIO(base64.b64decode(picture_of["mask"]))))
                assert np.array_equal(mask, right[name].mask.numpy())
                assert picture_of["shares"] == right[name].to_json()
        (said,) = Client(address)(stream.getvalue())
    assert torch.equal(said["parts"].mask, right["parts"].mask)
    assert said["parts"].shares == right["parts"].shares
    assert said["kind"].label == right["kind"].label


def test_masks_are_drawn_beside_what_answers_others_and_those_of_no_palette_refused(
    tmp_path, monkeypatch
):
    backbone = load_backbone("restuning-tiny")
    more = {"host": backbone.host(), "pool": "grid"}
    many = [f"class {n}" for n in range(300)]
    tasks = {
        "parts": save_task(backbone, tmp_path / "p", problem=Segmentation(), **more),
        "many": save_task(
            backbone, tmp_path / "m", labels=many, problem=Segmentation(ignore=-1), **more
        ),
    }
    drawn, draw = [], answers.blend

    def noted(*args):
        drawn.append(threading.current_thread().name)
        return draw(*args)

    monkeypatch.setattr(answers, "blend", noted)
    image = in_base64(picture())
    given = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [image]}
    with running(serve.app(tasks)) as address, httpx.Client(base_url=address) as client:
        body = {"images": image, "tasks": ["parts"]}
        assert client.post("/v1/predict", json=body).status_code == 200
        assert client.post("/v2/models/parts/infer", json={"inputs": [given]}).status_code == 200
        refused = client.post("/v1/predict", json=body | {"tasks": ["many"]})
        assert refused.status_code == 422 and "no picture" in refused.text
    assert drawn and all(name.startswith("asyncio_") for name in drawn)


def save_of_pixels(folder):
    """Tasks on masks, on depths and on classes that see images whole, with windows of 24 pixels; by name."""
    backbone = load_backbone("restuning-tiny")
    host, whole = backbone.host(), backbone.preprocessing.whole()
    backbone = replace(backbone, preprocessing=whole)
    of_pixels = {"host": host, "pool": "grid"}
    window = (24, 24)
    return {
        "parts": save_task(
            backbone, folder / "p", problem=Segmentation(window=window), **of_pixels
        ),
        "far": save_task(
            backbone,
            folder / "f",
            labels=["far"],
            problem=Depth(5.0, 2.0, 0.25, window),
            **of_pixels,
        ),
        "kind": save_task(backbone, folder / "k", host=host),
    }


def make_picture(width, height, seed=0):
    stream = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_depths_are_told_with_their_scale_and_as_a_picture(tmp_path):
    tasks, given = save_of_pixels(tmp_path), make_picture(50, 21)
    right = Predictor.load(tasks)(given)[0]["far"]
    with running(serve.app(tasks)) as address, httpx.Client(base_url=address) as client:
        (answer,) = client.post("/v1/predict", files={"images": given}).json()["answers"]
        (said,) = Client(address)(given)
        (other,) = Client(address, tiles=False)(given)
    told = answer["tasks"]["far"]
    assert told["label"] == right.label
    assert told["depth"]["error"] == 0.25
    assert told["depth"]["least"] == pytest.approx(float(right.depth.min()))
    shown = Image.open(io.BytesIO(base64.b64decode(told["depth"]["picture"])))
    assert (shown.mode, shown.size) == ("P", (50, 21))
    step = float(right.depth.max() - right.depth.min()) / 65534
    for each in (said, other):
        torch.testing.assert_close(each["far"].depth, right.depth, rtol=1e-6, atol=step)
        assert each["far"].error == 0.25


@pytest.mark.parametrize("window", [None, 20])
def test_windows_of_a_request_answer_as_those_of_a_predictor(window, tmp_path):
    tasks, large, small = save_of_pixels(tmp_path), make_picture(70, 50), make_picture(20, 20, 1)
    tiles = window or True
    right = Predictor.load(tasks, tiles=tiles)([large, small])
    pace = Pace(batch=4)
    with running(serve.app(tasks, pace=pace)) as address:
        with Client(address, tiles=tiles) as client:
            said = client([large, small])
            again = client([large])[0]
        with httpx.Client(base_url=address) as client:
            options = {"tiles": "true", **({"window": str(window)} if window else {})}
            form = client.post("/v1/predict", files={"images": large}, data=options).json()
            body = {
                "images": base64.b64encode(large).decode(),
                "tiles": True,
                "window": window,
            }
            by_json = client.post("/v1/predict", json=body).json()
    for one, other in zip([*said, again], [*right, right[0]], strict=True):
        step = float(other["far"].depth.max() - other["far"].depth.min()) / 65534 + ROUNDING
        torch.testing.assert_close(one["far"].depth, other["far"].depth, rtol=1e-5, atol=step)
        assert (one["parts"].mask != other["parts"].mask).float().mean() < 0.01
        assert one["kind"].label == other["kind"].label
    assert form["answers"][0]["cached"]
    assert by_json["answers"][0]["tasks"] == form["answers"][0]["tasks"]
    assert form["problems"] == {"parts": "segmentation", "far": "depth", "kind": "single-label"}


@pytest.fixture(scope="module")
def of_pixels(tmp_path_factory):
    """A server of such tasks, that takes few windows."""
    tasks = save_of_pixels(tmp_path_factory.mktemp("pixels"))
    with running(serve.app(tasks, limits=Limits(windows=100))) as address:
        yield address


@pytest.mark.parametrize(
    ("options", "status", "wrong"),
    [
        ({"tiles": "perhaps"}, 400, "neither true nor false"),
        ({"window": "20"}, 400, "a window is of tiles"),
        ({"tiles": "true", "window": "0"}, 400, "a window is of tiles"),
        ({"tiles": "true", "window": "x"}, 400, "not a number of pixels"),
        ({"tiles": "true", "window": "2"}, 413, "too many windows"),
        ({"tiles": "true", "tasks": "kind"}, 400, "tasks that answer its pixels"),
        ({"tiles": "true", "texts": "a"}, 400, "only images are read in windows"),
        ({"tiles": "true", "tasks": "none"}, 404, "no such task"),
    ],
)
def test_windows_that_cannot_be_are_refused(options, status, wrong, of_pixels):
    with httpx.Client(base_url=of_pixels) as client:
        told = client.post("/v1/predict", files={"images": make_picture(70, 50)}, data=options)
    assert told.status_code == status, told.text
    assert wrong in told.text


class Foreign(Problem):
    """A problem of another package, as far as answers go."""

    kind = "spans"
    values = SingleLabel.values

    def answer(self, values, logits, labels):
        return Span("1 to 2")


Foreign.__abstractmethods__ = frozenset()


@dataclass(frozen=True)
class Span:
    """What another package may answer with."""

    label: str

    def words(self, count=1):
        return [self.label]

    def to_json(self, count=1):
        return {"from": 1, "to": 2}


def test_an_answer_that_another_package_defines_is_told_in_its_own_words(tasks):
    service = Service({"v2-spans": tasks["t0"]})
    made = service.batchers[0].live.predictor
    made.tasks["v2-spans"].problem = spans = Foreign()
    entry = replace(service.entries["v2-spans"], problem=spans)
    service.entries = {"v2-spans": entry}
    image = in_base64(picture())
    given = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [image]}
    with running(serve.app(service)) as address, httpx.Client(base_url=address) as client:
        (said,) = client.post("/v1/predict", json={"images": image}).json()["answers"]
        told = {"label": "1 to 2", "answer": {"from": 1, "to": 2}}
        assert said["tasks"] == {"v2-spans": told}
        refused = client.post("/v2-spans/classify", json={"inputs": image})
        # A task may have the letters of a protocol in its name; errors are those of its address.
        assert refused.status_code == 400
        assert "neither classes nor numbers" in refused.json()["error"]["message"]
        model = client.get("/v2/models/v2-spans").json()
        assert [output["name"] for output in model["outputs"]] == ["label"]
        (label,) = client.post("/v2/models/v2-spans/infer", json={"inputs": [given]}).json()[
            "outputs"
        ]
        assert label["data"] == ["1 to 2"]
        with pytest.raises(DataError, match="neither classes nor numbers"):
            Client(address)(picture())


def test_tasks_say_what_they_are(client, tasks):
    listed = {task["name"]: task for task in client.get("/v1/tasks").json()["tasks"]}
    assert set(listed) == set(tasks)
    assert {n for n, t in listed.items() if t["forward"] == "own"} == {"inline"}
    assert listed["words"]["kind"] == "words"
    whole = client.get("/v1/tasks/t0").json()
    assert whole["labels"] == LABELS
    assert whole["version"] == listed["t0"]["version"]
    assert whole["backbone"] == "restuning-tiny"
    assert client.get("/v1/tasks/dogs").status_code == 404


def test_classify_has_the_shape_that_routers_ask_for(client, texts, images):
    (one,) = client.post("/mood/classify", json={"inputs": ["a good film"]}).json()
    scores = client.post("/mood/classify", json={"inputs": "a good film"}).json()
    assert scores == one
    assert sum(row["score"] for row in scores) == pytest.approx(1)
    assert {row["label"] for row in scores} == set(LABELS)
    assert scores[0]["label"] == texts("a good film")[0].label
    body = {"inputs": in_base64(picture(3)), "parameters": {"top_k": 1}}
    (best,) = client.post("/t1/classify", json=body).json()
    assert best["label"] == images(picture(3))[0]["t1"].label
    (first, *_) = client.post("/words/classify", json={"inputs": "a good film"}).json()
    assert first["word"] == "a" and first["entity"] in LABELS
    refused = client.post("/classify", json={"inputs": "a"})
    assert refused.status_code == 400 and "/TASK/classify" in refused.text


def test_embeddings_have_openai_s_shape(client, texts):
    body = {"input": ["a good film", "bad"], "model": "mood"}
    said = client.post("/v1/embeddings", json=body).json()
    assert [row["index"] for row in said["data"]] == [0, 1]
    assert said["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    batch = texts.inputs.batch(body["input"])
    with torch.no_grad():
        right = texts.host.features(*batch.args, keep=["last"], **batch.kwargs)
        right = texts.host.readout(right["last"], mask=right.mask)
    assert torch.allclose(torch.tensor(said["data"][0]["embedding"]), right[0], atol=ROUNDING)
    body["encoding_format"] = "base64"
    packed = client.post("/v1/embeddings", json=body).json()["data"][1]["embedding"]
    found = np.frombuffer(base64.b64decode(packed), "<f4")
    assert np.allclose(found, right[1], atol=ROUNDING)
    assert client.post("/v1/embeddings", json={"input": "a"}).status_code == 404
    image = {"input": in_base64(picture()), "model": "restuning-tiny"}
    assert len(client.post("/v1/embeddings", json=image).json()["data"][0]["embedding"]) == 128


def test_the_open_inference_protocol_answers_its_public_client(address, images, texts):
    triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    client = triton.InferenceServerClient(address.removeprefix("http://"))
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("t0")
    assert client.get_server_metadata()["name"] == "restuning"
    told = client.get_model_metadata("t0")
    assert told["inputs"] == [{"name": "image", "datatype": "BYTES", "shape": [-1]}]
    version = told["versions"][0]
    files = np.array([picture(4), picture(5)], dtype=np.object_)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), dtype=np.uint8)
    right = images([picture(4), picture(5)])
    for values, kind, wanted in ((files, "BYTES", right), (pixels, "UINT8", images(pixels))):
        coded = np.array([in_base64(each).encode() for each in values], dtype=np.object_)
        for as_bytes in (True, False):
            given = triton.InferInput("image", list(values.shape), kind)
            # In JSON a file is base64.
            values = values if as_bytes or kind == "UINT8" else coded
            given.set_data_from_numpy(values, binary_data=as_bytes)
            outputs = [
                triton.InferRequestedOutput(n, binary_data=as_bytes)
                for n in ("label", "probabilities")
            ]
            said = client.infer("t0", [given], version, outputs=outputs, request_id="7")
            assert said.get_response()["id"] == "7"
            labels = [
                str(x, "utf-8") if isinstance(x, bytes) else x for x in said.as_numpy("label")
            ]
            assert labels == [answer["t0"].label for answer in wanted]
            for row, answer in zip(said.as_numpy("probabilities"), wanted, strict=True):
                assert np.allclose(row, answer["t0"].probabilities, atol=ROUNDING)
    given = triton.InferInput("text", [1], "BYTES")
    given.set_data_from_numpy(np.array([b"a good film"], dtype=np.object_))
    said = client.infer("mood", [given])
    assert said.as_numpy("label")[0].decode() == texts("a good film")[0].label
    with pytest.raises(triton.InferenceServerException, match="no such task"):
        client.infer("dogs", [given])
    with pytest.raises(triton.InferenceServerException, match="send one input, image"):
        client.infer("t0", [given])
    with pytest.raises(triton.InferenceServerException, match="no such version"):
        client.infer("mood", [given], "2")
    client.close()


def oip(data=None, **more):
    return {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": data, **more}]}


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"{",
        b"[" * 10_000,
        {"inputs": {}},
        {"inputs": []},
        {"inputs": [None]},
        oip(["a", "b"]),
        oip([1]),
        oip("a"),
        oip([[[["a"]]]], shape=["1"]),
        oip(["a"], datatype="FP32"),
        oip(["a"], parameters=[]),
        oip(["a"], parameters={"binary_data_size": 4}),
        {**oip(["a"]), "outputs": ["label"]},
        {**oip(["a"]), "outputs": [{"name": "logits"}]},
        b'{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": '
        + b"[" * 900
        + b'"a"'
        + b"]" * 900
        + b"}]}",
        # In 64 bits this product would be 1.
        oip(["a"], shape=[2**32 + 1, 2**32 - 1, 1]),
        oip(["a"], shape=[1] * 6),
    ],
    ids=lambda body: str(body)[:60],
)
def test_a_malformed_inference_request_is_refused_in_a_sentence(client, body):
    content = body if isinstance(body, bytes) else json.dumps(body)
    answer = client.post("/v2/models/mood/infer", content=content)
    assert answer.status_code == 400
    assert "malformed" in answer.json()["error"]


@pytest.mark.parametrize("length", ["9" * 5000, "1000", "-1", "\u00b2".encode("latin-1")], ids=repr)
def test_a_length_of_the_json_that_cannot_be_is_refused(client, length):
    headers = {"Inference-Header-Content-Length": length}
    answer = client.post("/v2/models/mood/infer", json=oip(["a"]), headers=headers)
    assert answer.status_code == 400 and "malformed" in answer.json()["error"]


def test_more_inputs_than_are_taken_are_refused_before_they_are_parted(client):
    body = struct.pack("<I", 0) * 9
    pixels = {"name": "image", "datatype": "UINT8", "shape": [100_000, 0, 1, 3], "data": []}
    assert client.post("/v2/models/t0/infer", json={"inputs": [pixels]}).status_code == 413
    assert client.post("/v2/models/mood/infer", json=oip(["a"] * 9, shape=[9])).status_code == 413
    head = json.dumps(oip(shape=[9], parameters={"binary_data_size": len(body)})).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    answer = client.post("/v2/models/mood/infer", content=head + body, headers=headers)
    assert answer.status_code == 413


def test_nested_data_are_one_list():
    assert open_inference._flatten([[1, [2]], [], 3, [[[[4]]]]]) == [1, 2, 3, 4]
    with pytest.raises(DataError, match="deep"):
        open_inference._flatten([[[[[[]]]]]])


@pytest.mark.parametrize(
    "packed", [b"\1\0\0\0", b"\1", struct.pack("<I", 2**32 - 1) + b"a", b"\1\0\0\0\xff"], ids=repr
)
def test_malformed_binary_tensors_are_refused(client, packed):
    head = json.dumps(oip(parameters={"binary_data_size": len(packed)})).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    answer = client.post("/v2/models/mood/infer", content=head + packed, headers=headers)
    assert answer.status_code == 400


REFUSED = {
    "no task": ({"json": {"texts": "a", "tasks": ["dogs"]}}, 404, "no such task"),
    "another kind": ({"json": {"texts": "a", "tasks": ["t0"]}}, 400, "another kind"),
    "nothing": ({"json": {}}, 400, "nothing to answer"),
    "an unknown name": ({"json": {"text": "a"}}, 400, "malformed"),
    "no classes": ({"json": {"texts": "a", "top": 0}}, 400, "malformed"),
    "no json": (
        {"content": b"{", "headers": {"content-type": "application/json"}},
        400,
        "malformed",
    ),
    "no form": ({"content": b"a", "headers": {"content-type": "text/plain"}}, 400, "another form"),
    "no image": ({"files": {"images": b"no"}}, 400, "cannot be read"),
    "an address": ({"json": {"images": "http://127.0.0.1:1/a.png"}}, 400, "not fetched"),
    "a path": ({"json": {"images": "/etc/passwd"}}, 400, "not opened"),
    "pixels": ({"files": {"images": picture(size=(101, 100))}}, 413, "too many pixels"),
    "a format": ({"files": {"images": picture(form="PPM")}}, 413, "not served"),
    "a text": ({"json": {"texts": "a" * 1001}}, 413, "too long"),
    "inputs": ({"json": {"texts": ["a"] * 9}}, 413, "too many inputs"),
    "a body": ({"json": {"texts": "a" * 200_000}}, 413, "too large"),
    "top": ({"files": {"images": picture()}, "data": {"top": "many"}}, 400, "not a number"),
    "digits": (
        {
            "content": picture(),
            "headers": {"content-type": "image/png"},
            "params": {"top": "9" * 5000},
        },
        400,
        "not a number",
    ),
    "twice": ({"files": {"images": picture()}, "data": {"top": ["1", "2"]}}, 400, "twice"),
    "an unknown field": ({"files": {"images": picture()}, "data": {"task": "t0"}}, 400, "unknown"),
    "an unknown file": ({"files": {"photo": picture()}}, 400, "unknown name"),
    "an unknown option": (
        {"content": picture(), "headers": {"content-type": "image/png"}, "params": {"best": "1"}},
        400,
        "unknown name",
    ),
    "two places of options": ({"json": {"texts": "a"}, "params": {"top": "1"}}, 400, "the address"),
    "no tasks": ({"json": {"texts": "a", "tasks": []}}, 400, "no task is asked"),
    "an input for nobody": (
        {"json": {"images": in_base64(picture()), "texts": "a", "tasks": ["t0"]}},
        400,
        "of the kind text",
    ),
    "half a character": (
        {"content": b'{"texts": "\\ud800"}', "headers": {"content-type": "application/json"}},
        400,
        "malformed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_taken_is_refused_in_words(client, name):
    request, status, words = REFUSED[name]
    answer = client.post("/v1/predict", **request)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]
    assert answer.json()["request"] == answer.headers["x-request-id"]


def test_an_answer_that_is_no_number_is_refused_in_words_in_every_protocol(tmp_path):
    backbone = load_backbone("restuning-tiny")
    host, more = backbone.host(), {"labels": ["size"], "problem": Regression([1.0], [1.0], [0.5])}
    tasks = {
        "right": save_task(backbone, tmp_path / "r", host=host),
        "bad": save_overflowing(backbone, tmp_path / "b", host=host),
        "size": save_overflowing(backbone, tmp_path / "s", host=host, **more),
        "tags": save_overflowing(
            backbone, tmp_path / "t", host=host, problem=Segmentation(), pool="grid"
        ),
    }
    image = in_base64(picture())
    given = {"name": "image", "datatype": "BYTES", "shape": [1], "data": [image]}
    with running(serve.app(tasks)) as address, httpx.Client(base_url=address) as client:
        for task in ("bad", "size", "tags"):
            for path, body in (
                (
                    "/v1/predict",
                    {"images": [in_base64(picture(1)), image], "tasks": ["right", task]},
                ),
                (f"/{task}/classify", {"inputs": image}),
                (f"/v2/models/{task}/infer", {"inputs": [given]}),
            ):
                answer = client.post(path, json=body)
                assert answer.status_code == 422, (path, answer.text)
                told = answer.json()["error"]
                told = told if isinstance(told, str) else told["message"]
                assert f"no number: {task}" in told and "leave this task out" in told
            with pytest.raises(AnswerError, match=f"no number: {task}"):
                Client(address, tasks=["right", task])(picture())
        # Whoever leaves them out is answered, also of the same input.
        assert (
            client.post("/v1/predict", json={"images": image, "tasks": ["right"]}).status_code
            == 200
        )
        counted = {
            task: float(count)
            for task, count in re.findall(
                r'restuning_no_number_total\{.*task="(\w+)"\} (.*)', client.get("/metrics").text
            )
        }
        # One of each protocol, and of the client.
        assert counted.pop("right") == 0 and min(counted.values()) >= 4


def test_a_feature_that_is_no_number_is_refused(tasks):
    service = Service({"t0": tasks["t0"]})
    with running(serve.app(service)) as address:
        norm = service.batchers[0].live.predictor.host.model.norm
        hook = norm.register_forward_hook(lambda *said: said[-1] * torch.nan)
        said = httpx.post(f"{address}/v1/embeddings", json={"input": in_base64(picture())})
        hook.remove()
    assert said.status_code == 422 and "no number: restuning-tiny" in said.text


def test_of_a_request_of_which_one_part_is_refused_nothing_stays_in_the_queue(tasks):
    service = Service({n: tasks[n] for n in ("t0", "mood")})
    images, inside, go = service.entries["t0"].batcher, threading.Event(), threading.Event()
    body = {"images": in_base64(picture(31)), "texts": "a good film"}
    with running(serve.app(service)) as address:
        before = images.counts.forwards

        def hold(*_):
            inside.set()
            go.wait(30)

        hook = images.live.predictor.host.model.register_forward_pre_hook(hold)
        ((first,),) = service.ask("image", [picture(30)])
        assert inside.wait(30)
        service.entries["mood"].batcher.waiting = 0
        for more, status in (({}, 429), ({"tasks": ["t0"]}, 400), ({"tasks": ["t0", "dogs"]}, 404)):
            assert httpx.post(f"{address}/v1/predict", json=body | more).status_code == status
        # One image of two is none: the other is dropped.
        bad = {"images": [in_base64(picture(32)), in_base64(picture(33)[:200])]}
        assert httpx.post(f"{address}/v1/predict", json=bad).status_code == 400
        go.set()
        first.result(30)
        while images.held:
            time.sleep(0.01)
        hook.remove()
        assert (images.counts.forwards - before, images.counts.expired) == (1, 2)


def test_tasks_are_named_in_one_field_of_a_form_or_in_several(client):
    for named in ("t0,t1", ["t0", "t1"]):
        said = client.post("/v1/predict", files={"images": picture()}, data={"tasks": named})
        assert set(said.json()["versions"]) == {"t0", "t1"}


def test_scores_that_are_not_given_are_refused_and_not_passed_over(client):
    for more in ({"raw_scores": True}, {"parameters": {"function_to_apply": "none"}}):
        answer = client.post("/mood/classify", json={"inputs": "a", **more})
        assert answer.status_code == 400 and "another kind" in answer.text
    assert (
        client.post("/mood/classify", json={"inputs": "a", "raw_scores": False}).status_code == 200
    )


def test_half_a_character_is_refused_in_every_protocol(client):
    json_ = {"content-type": "application/json"}
    for path, body in (
        ("/mood/classify", {"inputs": "\ud800"}),
        ("/words/classify", {"inputs": "\ud800"}),
        ("/v1/embeddings", {"input": "\ud800", "model": "mood"}),
        ("/v2/models/mood/infer", oip(["\ud800"])),
        ("/v2/models/mood/infer", {**oip(["a"]), "id": "\ud800"}),
    ):
        answer = client.post(path, content=json.dumps(body), headers=json_)
        assert answer.status_code == 400, (path, answer.text)


def test_words_are_told_by_their_own_numbers():
    said = Prediction("ant", 0.5, torch.tensor([0.5, 0.25, 0.25]), LABELS)
    words = tuple(Answer(word, {"t": said}) for word in ("a", "c"))
    rows = json_answers.scores(Reply(Answer(["a", "", "c"], {}, words), {}, places=(0, 2)), "t")
    assert [(row["index"], row["word"]) for row in rows] == [(0, "a"), (2, "c")]


def test_bodies_that_are_held_at_once_are_counted():
    sent = []

    async def inside(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        return {"type": "http.request", "body": b"12345"}

    async def send(message):
        sent.append(message)

    made = guard.Guard(inside, Limits(held=3), lambda *_: None, lambda: False)
    scope = {"type": "http", "method": "POST", "path": "/v1/predict", "headers": []}
    asyncio.run(made(dict(scope), receive, send))
    # Alone it is answered, beside others it is asked to come again.
    assert sent[0]["status"] == 200 and made.held == 0
    sent.clear()
    made.held = 1
    asyncio.run(made(dict(scope), receive, send))
    assert sent[0]["status"] == 429 and made.held == 1


def test_only_whole_paths_are_of_operation():
    assert guard._is_of_operation({"path": "/tasks/livez", "root_path": "/tasks"})
    assert not guard._is_of_operation({"path": "/mood/livez"})


def test_a_body_that_does_not_say_how_long_it_is_is_still_cut_off(client):
    def pieces():
        for _ in range(40):
            yield b'"' + b"a" * 10_000

    headers = {"content-type": "application/json"}
    try:
        answer = client.post("/v1/predict", content=pieces(), headers=headers)
        assert answer.status_code == 413
    except httpx.TransportError:
        # The server has answered and hung up while we still wrote.
        pass
    assert client.get("/livez").status_code == 200


def test_tasks_are_changed_by_whoever_has_the_token_alone(client, tasks, images):
    files = {
        "task": (tasks["t1"] / "task.json").read_bytes(),
        "weights": (tasks["t1"] / "weights.safetensors").read_bytes(),
    }
    for token in ("", "Bearer", "Bearer wrong", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x"):
        headers = {"authorization": token} if token else {}
        assert client.put("/v1/tasks/new", files=files, headers=headers).status_code == 401
        assert client.delete("/v1/tasks/t0", headers=headers).status_code == 401
    headers = {"authorization": f"Bearer {TOKEN}"}
    made = client.put("/v1/tasks/new", files=files, headers=headers)
    assert made.status_code == 200, made.text
    assert made.json()["version"] == client.get("/v1/tasks/t1").json()["version"]
    (said,) = client.post(
        "/v1/predict", json={"images": in_base64(picture(6)), "tasks": ["new"]}
    ).json()["answers"]
    assert said["tasks"]["new"]["label"] == images(picture(6))[0]["t1"].label
    damaged = files | {"weights": files["weights"][:-1]}
    refused = client.put("/v1/tasks/new", files=damaged, headers=headers)
    assert refused.status_code == 422 and "sha256" in refused.text
    assert client.put("/v1/tasks/new", files={"task": b"{}"}, headers=headers).status_code == 400
    assert client.put("/v1/tasks/a%20b", files=files, headers=headers).status_code == 400
    assert client.get("/v1/tasks/new").json()["version"] == made.json()["version"]
    assert client.delete("/v1/tasks/new", headers=headers).status_code == 204
    assert client.delete("/v1/tasks/new", headers=headers).status_code == 404


def test_a_task_that_is_put_in_too_slowly_keeps_its_folder_until_it_is_read(tasks, tmp_path):
    service = Service({"t0": tasks["t0"]}, limits=Limits(seconds=0.3))
    go, found = threading.Event(), []

    def put(name, folder, **_):
        go.wait(30)
        found.append((folder, (folder / "task.json").exists()))

    service.put = put
    (tmp_path / "token").write_text(TOKEN)
    with running(serve.app(service, admin_token=tmp_path / "token")) as address:
        headers = {"authorization": f"Bearer {TOKEN}"}
        files = {"task": b"{}", "weights": b"-"}
        late = httpx.put(f"{address}/v1/tasks/new", files=files, headers=headers)
        go.set()
        assert late.status_code == 503
        end = time.monotonic() + 30
        while not (found and not found[0][0].exists()) and time.monotonic() < end:
            time.sleep(0.01)
    ((folder, was_there),) = found
    assert was_there and not folder.exists()


def test_without_a_token_nobody_changes_tasks_and_a_short_one_is_none(tasks, tmp_path):
    service = Service({"t0": tasks["t0"]})
    with running(serve.app(service)) as address:
        headers = {"authorization": "Bearer None"}
        assert httpx.delete(f"{address}/v1/tasks/t0", headers=headers).status_code == 403
    (tmp_path / "token").write_text("short")
    for file in ("token", "none"):
        with pytest.raises(DataError, match="token"):
            serve.app(service, admin_token=tmp_path / file)


def test_metrics_count_what_was_done(client, application_):
    def read():
        lines = client.get("/metrics").text.splitlines()
        return {k: float(v) for k, _, v in (x.rpartition(" ") for x in lines if x[0] != "#")}

    image = {"images": in_base64(picture(77)), "tasks": ["t0"]}
    before = read()
    for _ in range(3):
        assert client.post("/v1/predict", json=image).status_code == 200
    after = read()

    def grown(name):
        return after[name] - before.get(name, 0)

    on = '{backbone="restuning-tiny image"}'
    assert grown(f"restuning_forwards_total{on}") == 1
    assert grown(f"restuning_cache_hits_total{on}") == 2
    assert grown(f"restuning_inputs_total{on}") == 3
    assert grown('restuning_requests_total{code="200",method="POST",route="/v1/predict"}') == 3
    assert grown('restuning_request_seconds_count{route="/v1/predict"}') == 3
    assert grown('restuning_answers_total{backbone="restuning-tiny image",task="t0"}') == 3
    assert grown('restuning_batch_size_bucket{backbone="restuning-tiny image",le="1.0"}') == 3
    # An answer is told a moment before its place is free.
    for _ in range(100):
        if not (left := read()[f"restuning_queue{on}"]):
            break
        time.sleep(0.05)
    assert left == 0
    application_.state.metrics.note("/livez", "BREW", 405, 0.0)
    text = client.get("/metrics").text
    assert 'method="other"' in text and "BREW" not in text


def test_every_request_has_a_number_and_a_line_that_a_program_reads(client, caplog):
    with caplog.at_level(logging.INFO, "restuning.serve"):
        given = {"x-request-id": "from-the-proxy.7"}
        answer = client.post("/v1/predict", json={"texts": "secret words"}, headers=given)
        other = client.post("/v1/predict", json={"texts": "a"}, headers={"x-request-id": "a b"})
        client.get("/livez")
    assert answer.headers["x-request-id"] == answer.json()["request"] == "from-the-proxy.7"
    assert other.headers["x-request-id"] != "a b"
    first, second = [json.loads(r.message) for r in caplog.records]
    assert first["request"] == "from-the-proxy.7" and first["status"] == 200
    assert first["path"] == "/v1/predict" and first["inputs"] == 1 and first["seconds"] > 0
    assert second["request"] == other.headers["x-request-id"]
    assert "secret" not in caplog.text


def test_a_request_is_a_span_where_opentelemetry_is_installed(client, application_):
    sdk = pytest.importorskip(
        "opentelemetry.sdk.trace", reason="opentelemetry-sdk is not installed"
    )
    from opentelemetry import trace
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    spans = InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    # Without a provider there is nothing to write to, and nothing is.
    client.get("/v1/tasks")
    trace.set_tracer_provider(provider)
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace_id}-{parent_id}-01"}
    image, numbers = in_base64(picture(8)), {}
    for path, body, status, tasks in (
        (
            "/v1/predict",
            {"images": [image, in_base64(picture(9))], "tasks": ["t1", "t0"]},
            200,
            ("t1", "t0"),
        ),
        ("/t0/classify", {"inputs": image}, 200, ("t0",)),
        ("/v2/models/mood/infer", oip(["a"]), 200, ("mood",)),
        ("/v1/embeddings", {"input": "a", "model": "mood"}, 200, ()),
        ("/v1/predict", {"images": image, "tasks": ["dogs"]}, 404, None),
        ("/v1/predict", {"texts": "a" * 200_000}, 413, None),
    ):
        answer = client.post(path, json=body, headers=headers)
        assert answer.status_code == status, answer.text
        numbers[answer.headers["x-request-id"]] = status, tasks
    # A span ends a moment after its answer has gone.
    end = time.monotonic() + 5
    while len(found := spans.get_finished_spans()) < len(numbers) and time.monotonic() < end:
        time.sleep(0.01)
    if not found:
        pytest.skip("this FastAPI makes no spans")
    assert len(found) == len(numbers)
    for span, (number, (status, tasks)) in zip(found, numbers.items(), strict=True):
        assert f"{span.context.trace_id:032x}" == trace_id
        assert f"{span.parent.span_id:016x}" == parent_id
        assert span.attributes["restuning.request"] == number
        assert span.attributes["http.response.status_code"] == status
        assert span.attributes.get("restuning.tasks") == tasks
        # Nothing of what was asked.
        assert image[:40] not in str(span.attributes)


def test_without_the_package_of_traces_nothing_is_written(monkeypatch):
    monkeypatch.delitem(sys.modules, "opentelemetry.trace", raising=False)
    guard._note_on_span({"number": "1", "told": {"inputs": 1}, "tasks": ("t0",)})
    assert "opentelemetry.trace" not in sys.modules


def test_a_full_server_says_when_to_come_again(tasks):
    service = Service({"t0": tasks["t0"]}, limits=Limits(waiting=1, seconds=0.5))
    with running(serve.app(service)) as address:
        entered, go = threading.Event(), threading.Event()

        def hold(*_):
            entered.set()
            go.wait(30)

        handle = service.batchers[0].live.predictor.host.model.register_forward_pre_hook(hold)
        body = {"images": in_base64(picture())}
        with ThreadPoolExecutor(1) as pool:
            slow = pool.submit(httpx.post, f"{address}/v1/predict", json=body, timeout=30)
            assert entered.wait(30)
            full = httpx.post(f"{address}/v1/predict", json=body)
            late = slow.result()
            go.set()
        handle.remove()
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        assert late.status_code == 503 and int(late.headers["retry-after"]) >= 1
        assert "no answer within" in late.text
        while service.batchers[0].held:
            time.sleep(0.01)
        assert httpx.post(f"{address}/v1/predict", json=body).status_code == 200
        service.close()
        ends = httpx.post(f"{address}/v1/predict", json=body)
        assert ends.status_code == 503 and "retry-after" in ends.headers
        assert httpx.get(f"{address}/readyz").status_code == 503
        assert httpx.get(f"{address}/livez").status_code == 200


def test_who_sends_slowly_does_not_hold_a_place_for_ever(tasks):
    service = Service({"t0": tasks["t0"]}, limits=Limits(seconds=0.3))
    with running(serve.app(service)) as address:
        host, _, port = address.removeprefix("http://").partition(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            assert b" 503 " in connection.recv(1000)


def test_it_mounts_in_another_application(tasks):
    from starlette.applications import Starlette
    from starlette.routing import Mount
    from starlette.testclient import TestClient

    inner = serve.app({"t0": tasks["t0"]})
    with TestClient(Starlette(routes=[Mount("/tasks", app=inner)])) as client:
        body = {"inputs": in_base64(picture())}
        assert len(client.post("/tasks/t0/classify", json=body).json()) == len(LABELS)
        assert client.get("/tasks/v2/models/dogs").json()["error"].startswith("no such task")
    inner.state.service.drain(10)


def test_a_missing_extra_is_told_with_the_line_that_installs_it(monkeypatch):
    def missing(module, extra, purpose):
        raise MissingExtraError(f"{purpose} needs {module}", fix=f"restuning[{extra}]")

    monkeypatch.setattr(application, "require", missing)
    with pytest.raises(MissingExtraError, match=r"restuning\[serve\]"):
        serve.app([])


def test_nothing_of_the_page_comes_from_elsewhere(client):
    for path in ("/", "/docs"):
        page = client.get(path)
        assert page.status_code == 200
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert (
            "http://" not in page.text.replace("http://www.w3.org", "")
            and "https://" not in page.text
        )
    assert client.get("/page/..%2f..%2fbuild.py").status_code == 404
    assert client.get("/page/index.html").status_code == 404
    assert guard.POLICY.decode() == page.headers["content-security-policy"]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_each_part_of_an_answer_leaves_at_once(host):
    # Else the last part waits for the client's kernel, which acknowledges the first after 40 ms.
    at_once = []

    async def note(reader, writer):
        connection = writer.get_extra_info("socket")
        at_once.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def ask():
        try:
            listening = bind(host, 0)
        except DataError:
            pytest.skip("this machine has no such address")
        async with await asyncio.start_server(note, sock=listening):
            reader, writer = await asyncio.open_connection(*listening.getsockname()[:2])
            await reader.read()
            writer.close()

    asyncio.run(ask())
    assert at_once == [1]
