"""Tasks on sounds answer a predictor, a server and its client alike."""

import base64
import json

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

import sounds
from restuning import Client, Predictor, load_backbone, serve
from restuning._errors import DataError, TooLargeError
from restuning.data import Sound
from restuning.serve import Limits, Service
from serving import picture, running, same, save_task

LABELS = ["low", "high", "noise"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    where = tmp_path_factory.mktemp("tasks")
    made = {}
    for name in ("ast", "wav2vec2"):
        backbone = load_backbone(f"hf:{sounds.save(name, where / name)}")
        made[name] = save_task(backbone, where / f"{name}.task", labels=LABELS)
    made["bird"] = save_task(load_backbone("restuning-tiny"), where / "bird.task", labels=LABELS)
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    where = tmp_path_factory.mktemp("files")
    for n, pitch in enumerate((300, 900, 1500)):
        sounds.write(where / f"{n}.wav", sounds.tone(pitch, 0.3 + 0.2 * n), subtype="FLOAT")
    return where


@pytest.mark.parametrize("name", ["ast", "wav2vec2"])
def test_paths_bytes_folders_and_samples_have_one_answer(name, tasks, files):
    predictor = Predictor.load(tasks[name])
    assert predictor.inputs.kind == "audio"
    wanted = predictor(files)
    assert [each.input for each in wanted] == [str(files / f"{n}.wav") for n in range(3)]
    paths = [files / f"{n}.wav" for n in range(3)]
    waves = [sounds.tone(p, 0.3 + 0.2 * n) for n, p in enumerate((300, 900, 1500))]
    for given in (
        paths,
        [path.read_bytes() for path in paths],
        [(wave, sounds.RATE) for wave in waves],
        [Sound(torch.from_numpy(wave), sounds.RATE) for wave in waves],
    ):
        assert all(same(a, b) for a, b in zip(predictor(given), wanted, strict=True))
        # A single one is no list of many.
        assert same(predictor(given[1])[0], wanted[1])


def test_what_is_no_sound_is_refused_and_what_is_corrupt_may_be_left_out(tasks, files, tmp_path):
    predictor = Predictor.load(tasks["wav2vec2"])
    for given, words in (
        (tmp_path / "none.wav", "no such sound or folder"),
        ("", "a sound without a name"),
        (tmp_path, "a folder without sounds"),
        (b"no sound", "cannot be read"),
        ([np.zeros(900)], "not a sound"),
    ):
        with pytest.raises(DataError, match=words):
            predictor(given)
    (tmp_path / "bad.wav").write_bytes(b"no sound")
    (tmp_path / "notes.txt").write_text("none either")
    good = sounds.write(tmp_path / "good.wav", sounds.tone(300))
    careful = Predictor.load(tasks["wav2vec2"], skip_bad=True)
    assert [each.input for each in careful(tmp_path)] == [str(good)]
    assert careful.skipped == [str(tmp_path / "bad.wav")]
    assert careful.ignored == [str(tmp_path / "notes.txt")]


def test_a_sound_that_is_longer_than_what_is_read_is_told(tasks, tmp_path):
    predictor = Predictor.load(tasks["ast"])
    long = sounds.write(tmp_path / "long.wav", sounds.tone(300, 2.0), subtype="FLOAT")
    whole = predictor(long)[0]
    assert predictor.cut == [str(long)]
    assert same(whole, predictor((sounds.tone(300, 2.0)[:7680], sounds.RATE))[0])


@pytest.fixture(scope="module")
def service(tasks):
    return Service(tasks, limits=Limits(sound=5.0))


@pytest.fixture(scope="module")
def web(service):
    with TestClient(serve.app(service)) as client:
        yield client


def test_the_listing_says_which_tasks_hear(web):
    kinds = {each["name"]: each["kind"] for each in web.get("/v1/tasks").json()["tasks"]}
    assert kinds == {"ast": "audio", "wav2vec2": "audio", "bird": "image"}
    assert web.get("/v1/tasks/ast").json()["preprocessing"]["kind"] == "audio"


def test_a_sound_is_answered_in_every_form_that_it_is_sent_in(web, tasks, files):
    content = (files / "1.wav").read_bytes()
    wanted = Predictor.load(tasks["wav2vec2"])(content)[0].label
    coded = base64.b64encode(content).decode()
    asked = [
        web.post("/v1/predict", content=content, headers={"content-type": "audio/wav"}),
        web.post(
            "/v1/predict", content=content, headers={"content-type": "application/octet-stream"}
        ),
        web.post("/v1/predict", json={"sounds": coded}),
        web.post("/v1/predict", json={"sounds": [f"data:audio/wav;base64,{coded}"]}),
        web.post("/v1/predict", files={"sounds": ("1.wav", content)}),
    ]
    for answer in asked:
        assert answer.status_code == 200, answer.text
        (said,) = answer.json()["answers"]
        assert said["tasks"].keys() == {"ast", "wav2vec2"}
        assert said["tasks"]["wav2vec2"]["label"] == wanted
    assert said["input"] == "1.wav"
    assert said["cached"]


def test_images_and_sounds_of_one_request_are_asked_of_their_own_tasks(web, files):
    content = (files / "0.wav").read_bytes()
    sent = [("sounds", ("a.wav", content)), ("images", ("b.png", picture(0)))]
    both = web.post("/v1/predict", files=sent).json()["answers"]
    assert [(a["input"], sorted(a["tasks"])) for a in both] == [
        ("b.png", ["bird"]),
        ("a.wav", ["ast", "wav2vec2"]),
    ]
    wrong = web.post("/v1/predict", files=sent[:1], data={"tasks": "bird"})
    assert wrong.status_code == 400
    assert "audio" in wrong.json()["error"]["message"]


def test_what_is_too_long_or_no_sound_is_refused(web, service, tmp_path):
    long = sounds.write(tmp_path / "long.flac", sounds.tone(300, 6.0)).read_bytes()
    refused = web.post("/v1/predict", content=long, headers={"content-type": "audio/flac"})
    assert refused.status_code == 413
    assert "6.0 s" in refused.json()["error"]["message"]
    for content in (b"", b"RIFF0000WAVE", picture(0)):
        answer = web.post("/v1/predict", content=content, headers={"content-type": "audio/wav"})
        assert answer.status_code == 400
    with pytest.raises(TooLargeError, match="too long"):
        service.limits.check((sounds.tone(300, 6.0), sounds.RATE), "audio")


def test_other_protocols_take_sounds_in_base64(web, files):
    content = (files / "2.wav").read_bytes()
    coded = base64.b64encode(content).decode()
    scores = web.post("/ast/classify", json={"inputs": coded}).json()
    assert {each["label"] for each in scores} == set(LABELS)
    given = {"name": "audio", "shape": [1], "datatype": "BYTES", "data": [coded]}
    inferred = web.post("/v2/models/ast/infer", json={"inputs": [given]})
    assert inferred.status_code == 200, inferred.text
    assert scores[0]["label"] in json.dumps(inferred.json())
    vector = web.post("/v1/embeddings", json={"input": coded, "model": "wav2vec2"}).json()
    assert len(vector["data"][0]["embedding"]) == 16


def test_a_client_sends_files_and_samples(service, tasks, files):
    predictor = Predictor.load(tasks["wav2vec2"])
    with running(serve.app(service)) as address, Client(address, tasks=["wav2vec2"]) as client:
        for given in (files, (sounds.tone(400), sounds.RATE), [(files / "1.wav").read_bytes()]):
            found, wanted = client(given), predictor(given)
            assert len(found) == len(wanted) > 0
            assert all(same(a, b) for a, b in zip(found, wanted, strict=True))
