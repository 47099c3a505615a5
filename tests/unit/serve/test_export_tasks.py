"""Tasks and their backbone in one file, which answers as a `Predictor` does."""

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from restuning import Predictor, export_tasks, load_backbone, methods, save
from restuning._errors import EngineError, FormatError
from restuning.backbones import open_engine
from restuning.backbones.engines.program import make_two_inputs
from restuning.cli.app import app
from restuning.problems import MultiLabel, Regression
from restuning.serve.export import KEY

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SAME = 1e-4
"""Of probabilities: fp32 kernels that add in another order."""
STEEP = 1e4
"""Times a usual head: about 2e-4 of rounding, where SAME is not kept and nothing is wrong."""
X = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Tasks of every kind of answer and of several methods, saved, and a predictor of all."""
    folder = tmp_path_factory.mktemp("tasks")
    backbone = load_backbone("restuning-tiny")
    host = backbone.host()
    torch.manual_seed(0)
    made = {
        # As nodes of a graph are called.
        "linear": methods.build("linear", host, num_classes=4),
        "beside": methods.build("res-tuning-bypass", host, num_classes=3),
        "again": methods.build("res-tuning-bypass", host, num_classes=3),
        "places": methods.build("mixing-bypass", host, num_classes=5),
        "solved": methods.build("ridge", host, num_classes=3),
        "near": methods.build("knn", host, num_classes=3),
        "tags": methods.build("linear", host, num_classes=6),
        "number": methods.build("res-tuning-bypass", host, num_classes=1),
        "inside": methods.build("res-tuning", host, num_classes=2),
    }
    for task in made.values():
        with torch.no_grad():
            for p in task.parameters():
                p.add_(0.3 * torch.randn_like(p))
    for name in ("solved", "near"):
        needs = made[name].needs(host.readout_rule)
        made[name].side.solve([(host.features(X, keep=needs), torch.arange(5) % 3)])
    made["linear"].temperature = 2.5
    made["tags"].problem = MultiLabel()
    made["number"].problem = Regression(mean=[20.0], deviation=[3.0])
    for name, task in made.items():
        task.labels = [f"{name} {n}" for n in range(task.head.out_features)]
        save(task, host, folder / f"{name}.task", backbone="restuning-tiny")
    return folder, Predictor.load([folder / f"{name}.task" for name in made], device="cpu")


def told(predictor):
    with torch.no_grad():
        logits = predictor.multi(X)
    return {name: predictor.tasks[name].values(z) for name, z in logits.items()}


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnx", "pt2"])
def test_one_file_answers_all_tasks_as_a_predictor_does(world, tmp_path, runtime):
    _, predictor = world
    done = export_tasks(predictor, tmp_path / f"all.{runtime}", runtime=runtime)
    assert done.forwards == predictor.forwards == 2
    assert done.largest <= SAME
    ours = told(predictor)
    if runtime == "pt2":
        theirs = torch.export.load(done.file).module()(X)
    else:
        session = ort.InferenceSession(str(done.file))
        assert [each.name for each in session.get_outputs()] == list(ours)
        theirs = [torch.from_numpy(y) for y in session.run(None, {"input": X.numpy()})]
    for (name, mine), other in zip(ours.items(), theirs, strict=True):
        size = mine.abs().max().clamp(min=1)
        assert float((mine - other).abs().max() / size) <= SAME, name


@pytest.fixture(scope="module")
def exported(world):
    """What the command writes of three tasks, and what it says."""
    folder, _ = world
    some = ",".join(f"{folder}/{name}.task" for name in ("linear", "beside", "number"))
    done = CliRunner().invoke(app, ["export", some, "--out", str(folder / "b.onnx"), "--json"])
    assert done.exit_code == 0, done.exception
    return some, json.loads(done.stdout)


def test_the_command_says_what_it_wrote_and_that_answers_as_a_predictor(world, exported):
    said = exported[1]
    assert said["tasks"] == ["linear", "beside", "number"]
    assert said["forwards"] == 1
    session = ort.InferenceSession(said["file"])
    ours = told(world[1])
    theirs = session.run(None, {"input": X.numpy()})
    for name, other in zip(said["tasks"], theirs, strict=True):
        size = max(1.0, float(ours[name].abs().max()))
        assert np.allclose(ours[name].numpy(), other, atol=SAME * size), name


def test_labels_problems_and_preprocessing_lie_beside_the_graph(world, exported):
    meta = ort.InferenceSession(exported[1]["file"]).get_modelmeta().custom_metadata_map
    said = json.loads(meta[KEY])
    assert said["outputs"]["linear"]["labels"] == [f"linear {n}" for n in range(4)]
    assert said["outputs"]["linear"]["temperature"] == 2.5
    assert said["outputs"]["number"]["problem"]["kind"] == "regression"
    assert said["inputs"] == {"input": {"shape": [None, 3, 32, 32], "dtype": "float32"}}
    own = world[1].backbone.preprocessing.to_dict()
    assert said["preprocessing"] == json.loads(json.dumps(own))
    with pytest.raises(FormatError, match="engine"):
        open_engine("onnx", exported[1]["file"])


def test_what_cannot_be_written_is_refused_and_nothing_is_left(world, exported, tmp_path):
    bad = CliRunner().invoke(
        app, ["export", exported[0], "--out", str(tmp_path / "x"), "--to", "x"]
    )
    assert isinstance(bad.exception, EngineError)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_would_answer_otherwise_is_not_written(world, tmp_path, monkeypatch):
    folder, _ = world
    some = Predictor.load(folder / "linear.task", device="cpu")
    monkeypatch.setattr("restuning.serve.export.TOLERANCE", -1.0)
    with pytest.raises(EngineError, match="otherwise than PyTorch"):
        export_tasks(some, tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_task_that_is_steep_where_it_is_asked_is_written(tmp_path):
    """One that is sure of all it has seen has logits of hundreds; between classes they make more of rounding."""
    backbone = load_backbone("restuning-tiny")
    host = backbone.host()
    (x,) = make_two_inputs(backbone)
    torch.manual_seed(0)
    task = methods.build("linear", host, num_classes=3)
    with torch.no_grad():
        feature = host.readout(host.features(x)[host.sites.taps[-1]])[0]
        task.head.weight.mul_(STEEP)
        task.head.bias.copy_(-task.head.weight @ feature)
    predictor = Predictor(backbone, {"steep": task}, host=host, device="cpu")
    done = export_tasks(predictor, tmp_path / "steep.onnx")
    assert done.largest > SAME
