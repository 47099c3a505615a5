"""A server whose backbone is an engine: one run for all tasks, the predictor's answers, refusals in words."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from starlette.testclient import TestClient
from typer.testing import CliRunner

from restuning import Predictor, export_engine, load_backbone, serve
from restuning._errors import EngineError, WrongBackboneError
from restuning.cli.app import app
from restuning.serve import Service
from restuning.serve.web import run
from serving import picture, same, save_task

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

PATIENCE = 60

ENGINES = {
    "onnx": ("onnx", "fp32"),
    "onnx int8": ("onnx", "int8"),
    "openvino": ("openvino", "fp32"),
    "pt2": ("pt2", "fp32"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An engine's file of each kind, by runtime and precision; one file serves two runtimes."""
    folder, plain = tmp_path_factory.mktemp("engines"), load_backbone("restuning-tiny")
    made = {
        ("onnx", "fp32"): folder / "tiny.onnx",
        ("onnx", "int8"): folder / "tiny8.onnx",
        ("pt2", "fp32"): folder / "tiny.pt2",
    }
    for (runtime, precision), file in made.items():
        export_engine(plain, file, runtime=runtime, precision=precision)
    return {**made, ("openvino", "fp32"): made["onnx", "fp32"]}


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, files):
    """The name of an engine, and what it is."""
    runtime, precision = ENGINES[request.param]
    if runtime == "openvino" and importlib.util.find_spec("openvino") is None:
        pytest.skip("openvino is not installed")
    return f"{runtime}:{files[runtime, precision]}", runtime, precision


@pytest.fixture(scope="module")
def tasks(engine, tmp_path_factory):
    """Tasks that were trained on the engine, by name."""
    folder, backbone = tmp_path_factory.mktemp("tasks"), load_backbone(engine[0])
    methods = ("res-tuning-bypass", "res-tuning-bypass", "linear", "bypass-vertical")
    return {
        f"t{i}": save_task(backbone, folder / f"t{i}.task", method, seed=i)
        for i, method in enumerate(methods)
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Tasks that were trained on the PyTorch backbone; `inline` has tuners inside it."""
    folder, backbone = tmp_path_factory.mktemp("plain"), load_backbone("restuning-tiny")
    made = {
        "beside": save_task(backbone, folder / "beside.task"),
        "inline": save_task(backbone, folder / "inline.task", "bitfit"),
    }
    return made | {"all": save_task(backbone, folder / "all.task", pool="mean")}


@pytest.fixture
def opened(monkeypatch):
    """Engines that were opened, each with the number of inputs of each of its runs."""
    from restuning.backbones import load

    found, open_described = [], load.open_described

    def counted(runtime, file):
        engine, about = open_described(runtime, file)
        runs, real = [], engine.run
        engine.run = lambda inputs: runs.append(len(next(iter(inputs.values())))) or real(inputs)
        found.append(runs)
        return engine, about

    monkeypatch.setattr(load, "open_described", counted)
    return found


def ask(service, given, tasks=None):
    return [future.result(PATIENCE) for future in service.ask("image", [given], tasks)[0]]


def test_all_tasks_are_answered_by_one_run_as_the_predictor_answers_on_the_engine(
    engine, tasks, opened
):
    name, runtime, precision = engine
    # A file of `torch.export` is opened only where its user names it.
    given = {"backbone": name} if runtime == "pt2" else {}
    service = Service({n: tasks[n] for n in ("t0", "t1", "t2")}, **given)
    service.warm_up()
    (runs,) = opened
    runs.clear()
    (reply,) = ask(service, picture())
    assert runs == [1]
    # Exchanged and added while it runs, tasks stay on the engine that is open.
    service.put("t0", tasks["t1"])
    service.put("t3", tasks["t3"])
    (later,) = ask(service, picture())
    assert runs == [1] if later.cached else runs == [1, 1]
    assert len(opened) == len(service.batchers) == 1
    wanted = Predictor.load(tasks, **given)(picture())[0]
    before = type(wanted)(None, {n: wanted[n] for n in ("t0", "t1", "t2")})
    assert same(reply.answer, before)
    exchanged = {**wanted.predictions, "t0": wanted["t1"]}
    assert same(later.answer, type(wanted)(None, exchanged))
    service.drain(PATIENCE)


def test_listing_and_metrics_say_which_engine_runs(engine, tasks):
    name, runtime, precision = engine
    service = Service({"t0": tasks["t0"]}, backbone=name)
    with TestClient(serve.app(service)) as client:
        (told,) = client.get("/v1/tasks").json()["tasks"]
        digest = service.batchers[0].live.predictor.host.digest()
        assert told["engine"] == {"runtime": runtime, "precision": precision, "file": digest}
        assert told["runs_on"] == told["backbone"] == name
        text = client.get("/metrics").text
        labels = f'file="{digest}",precision="{precision}",runtime="{runtime}"'
        assert f'restuning_engine{{backbone="{name} image",{labels}}} 1.0' in text
        said = client.post("/v1/embeddings", json={"input": in_base64(picture())})
        host = service.batchers[0].live.predictor.host
        x = service.batchers[0].inputs.batch([picture()]).args[0]
        wanted = host.readout(host.features(x, keep=["last"])["last"])[0]
        assert torch.allclose(torch.tensor(said.json()["data"][0]["embedding"]), wanted, atol=1e-5)
    service.drain(PATIENCE)


def in_base64(data):
    import base64

    return base64.b64encode(data).decode()


def test_one_engine_is_given_for_tasks_of_the_pytorch_backbone_and_of_itself(
    engine, tasks, plain, opened
):
    name = engine[0]
    with pytest.raises(WrongBackboneError, match="--any-backbone"):
        Service({"beside": plain["beside"]}, backbone=name)
    opened.clear()
    service = Service(
        {"beside": plain["beside"], "t0": tasks["t0"]}, backbone=name, any_backbone=True
    )
    service.put("again", plain["beside"], known_backbone=True)
    assert len(opened) == len(service.batchers) == 1
    (reply,) = ask(service, picture())
    wanted = Predictor.load(
        {"beside": plain["beside"], "t0": tasks["t0"], "again": plain["beside"]},
        backbone=name,
        any_backbone=True,
    )(picture())[0]
    assert same(reply.answer, wanted)
    service.drain(PATIENCE)


def test_what_an_engine_cannot_do_is_refused_before_anybody_asks(engine, tasks, plain):
    name, how = engine[0], {"backbone": engine[0], "any_backbone": True}
    refused = {
        "inline": "nothing can be tuned inside an engine",
        "all": "the engine gives other tokens than the task reads",
    }
    for task, words in refused.items():
        with pytest.raises(EngineError, match=words):
            Service({task: plain[task]}, **how)
    service = Service({"t0": tasks["t0"]}, **how)
    for task, words in refused.items():
        with pytest.raises(EngineError, match=words):
            service.put("t0", plain[task])
    # What answered goes on.
    assert same(
        ask(service, picture())[0].answer,
        Predictor.load({"t0": tasks["t0"]}, backbone=name)(picture())[0],
    )
    service.drain(PATIENCE)


def test_an_engine_without_what_the_feature_is_made_of_answers_tasks_and_refuses_the_feature(files):
    backbone = load_backbone(f"onnx:{files['onnx', 'fp32']}")
    backbone.model.readout_rule = replace(backbone.model.readout_rule, pool="mean")
    from restuning import methods
    from restuning.serve.batcher import Batcher, Live

    task = methods.build("res-tuning-bypass", backbone.host(), num_classes=3, pool="cls")
    batcher = Batcher(Live(Predictor(backbone, {"t": task}), {"t": "1"}))
    (future,) = batcher.ask([picture()])
    assert future.result(PATIENCE).answer["t"].labels
    (future,) = batcher.ask([picture()], [], embed=True)
    with pytest.raises(EngineError, match="--tokens all"):
        future.result(PATIENCE)
    assert batcher.drain(PATIENCE)


def test_the_command_serves_a_task_on_the_engine_that_is_named(files, plain, monkeypatch):
    served = []
    monkeypatch.setattr(run, "run", lambda application, *_, **__: served.append(application))
    name = f"onnx:{files['onnx', 'int8']}"
    command = ["serve", str(plain["beside"]), "--port", "0", "--any-backbone", "--backbone"]
    done = CliRunner().invoke(app, [*command, name])
    assert done.exit_code == 0, (done.output, done.exception)
    assert name in done.output.replace("\n", "")
    (application,) = served
    (entry,) = application.state.service.entries.values()
    assert entry.batcher.live.engine["precision"] == "int8"
    application.state.service.drain(PATIENCE)
    refused = CliRunner().invoke(app, [*command[:1], str(plain["inline"]), *command[2:], name])
    assert "nothing can be tuned inside an engine" in str(refused.exception)
    assert json.dumps(str(refused.exception)).count("do:") == 1
