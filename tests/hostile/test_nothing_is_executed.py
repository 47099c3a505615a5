"""What a file names is neither executed nor fetched, by whatever command the file is opened."""

import json
import os
import shutil
import socket
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from commands import restuning
from restuning import RestuningError, load_backbone, methods, save
from restuning._files import seal
from restuning.bench import Bench, GridProtocol, read_protocol
from restuning.runtime.hub import named_in
from restuning.serve import Predictor
from restuning.training import FitSettings
from zoo import folders

pytest.importorskip("diffusers")
pytest.importorskip("open_clip")


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Every kind of file that runs something where it is opened, and the file that this would leave."""
    root = tmp_path_factory.mktemp("hostile")
    marker = root / "executed"
    code = f"open({str(marker)!r}, 'w').close()\n"
    torch.save({"weight": Payload(marker)}, root / "evil.pth")
    shutil.copy(root / "evil.pth", root / "evil.safetensors")
    shutil.copy(root / "evil.pth", root / "evil.npz")
    os.mkfifo(root / "fifo")
    # A program as torch writes it, with a pickle where constants stand.
    with zipfile.ZipFile(root / "evil.pt2", "w") as archive:
        for name in ("archive_format", "byteorder"):
            archive.writestr(f"x/{name}", "pt2")
        archive.write(root / "evil.pth", "x/data/sample_inputs/model.pt")
        archive.writestr("x/models/model.json", "{}")
    folders.bert(root / "good")
    folders.bert(root / "pickled")
    (root / "pickled" / "model.safetensors").unlink()
    shutil.copy(root / "evil.pth", root / "pickled" / "pytorch_model.bin")
    shutil.copytree(root / "good", root / "coded")
    (root / "coded" / "code.py").write_text(code)
    brought = {"AutoConfig": "code.Config", "AutoModel": "code.Model"}
    (root / "coded" / "config.json").write_text(
        json.dumps({"model_type": "x", "auto_map": brought})
    )
    shutil.copytree(root / "good", root / "tokens")
    (root / "tokens" / "code.py").write_text(code)
    file = root / "tokens" / "tokenizer_config.json"
    said = json.loads(file.read_text()) | {"auto_map": {"AutoTokenizer": ["code.Tok", None]}}
    file.write_text(json.dumps(said | {"tokenizer_class": "Tok"}))
    change_config(root / "good", root / "kernels", _attn_implementation="stranger/kernels")
    change_config(root / "good", root / "deep", num_hidden_layers=10**9)
    change_config(root / "good", root / "wide", hidden_size=2**20, intermediate_size=2**22)
    change_config(root / "good", root / "quantised", quantization_config={"quant_method": "mxfp4"})
    shutil.copytree(root / "good", root / "adapted")
    pointing = {"base_model_name_or_path": "stranger/model", "peft_type": "LORA"}
    (root / "adapted" / "adapter_config.json").write_text(json.dumps(pointing))
    (root / "adapted" / "config.json").unlink()
    (root / "pipeline").mkdir()
    (root / "pipeline" / "code.py").write_text(code)
    index = {"_class_name": ["code", "Pipeline"], "vae": ["code", "Vae"]}
    (root / "pipeline" / "model_index.json").write_text(json.dumps(index))
    (root / "open").mkdir()
    config = {"model_cfg": {"text_cfg": {"hf_model_name": "stranger/model"}, "vision_cfg": {}}}
    (root / "open" / "open_clip_config.json").write_text(json.dumps(config))
    shutil.copytree(root / "open", root / "opened")
    (root / "opened" / "open_clip_config.json").write_text('{"model_cfg": {}}')
    shutil.copy(root / "evil.pth", root / "opened" / "open_clip_pytorch_model.bin")
    return root, marker


def change_config(folder, copy, **values):
    shutil.copytree(folder, copy)
    file = copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


NAMES = (
    "pt2:{root}/evil.pt2",
    "diffusers:{root}/pipeline",
    "diffusers:stranger/pipeline",
    "hf:{root}/pickled",
    "hf:{root}/coded",
    "hf:{root}/kernels",
    "hf:{root}/deep",
    "hf:{root}/wide",
    "hf:{root}/quantised",
    "hf:{root}/adapted",
    "hf://host/share/model",
    "hf:stranger/model",
    "hf:stranger/model+int8",
    "clip:{root}/pickled",
    "clip:{root}/coded",
    "clip:stranger/model",
    "openclip:local-dir:{root}/open",
    "openclip:local-dir:{root}/opened",
    "openclip:hf-hub:stranger/model",
    "openclip:ViT-B-32/laion2b_s34b_b79k",
    "openclip:ViT-B-32/{root}/evil.pth",
    "timm:test_vit",
    "timm:test_vit@99999",
    "timm:test_vit:embed_dim=1000000",
    "timm:hf-hub:stranger/model",
    "timm:local-dir:{root}/opened",
    "timm:test_vit:checkpoint_path={root}/evil.pth",
    "torchvision:squeezenet1_1",
    "onnx://host/share/x.onnx",
    "onnx:{root}/evil.pth",
    "openvino:{root}/evil.pt2",
    "pickle:{root}/evil.pth",
)
"""Backbones that a stranger's file may name: all run something, fetch something, or allocate too much."""


@pytest.fixture
def quiet(world, monkeypatch):
    """The folder of payloads; at the end nothing was run and nothing was connected to."""
    root, marker = world
    reached = []

    def connect(self, address):
        reached.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", connect)
    # As it is for users: the switch of the hub's client is what a file's choice turns.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("TORCH_HOME", str(root / "torch"))
    cache = root / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True, exist_ok=True)
    shutil.copy(root / "evil.pth", cache / "squeezenet1_1-b8a52dc0.pth")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    yield root
    assert not marker.exists()
    assert reached == []


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A task of the embedded backbone."""
    loaded = load_backbone("restuning-tiny")
    host = loaded.host()
    task = methods.build("linear", host, num_classes=10)
    task.labels = [str(digit) for digit in range(10)]
    said = loaded.preprocessing.to_dict()
    folder = tmp_path_factory.mktemp("honest") / "x.task"
    return save(task, host, folder, backbone="restuning-tiny", preprocessing=said)


def hostile(honest, folder, **backbone):
    copy = Path(shutil.copytree(honest, folder / "hostile.task"))
    description = json.loads((copy / "task.json").read_text())
    description["backbone"] |= backbone
    # A stranger seals it as anybody does: there is no secret in it.
    (copy / "task.json").write_text(json.dumps(seal(description)))
    return copy


def test_the_payloads_are_live(world):
    """Or none of these tests would test anything."""
    root, marker = world
    for file in (root / "evil.pth", root / "pickled" / "pytorch_model.bin"):
        torch.load(file, weights_only=False)
        assert marker.exists()
        marker.unlink()
    exec((root / "coded" / "code.py").read_text())  # noqa: S102
    assert marker.exists()
    marker.unlink()


@pytest.mark.parametrize("name", NAMES)
def test_a_task_cannot_choose_what_is_executed_or_fetched(quiet, honest, tmp_path, name):
    task = hostile(honest, tmp_path, name=name.format(root=quiet))
    with pytest.raises(RestuningError):
        Predictor.load(task)
    with pytest.raises(RestuningError):
        Predictor.load(task, any_backbone=True)


@pytest.mark.parametrize("kind", ["pt2:{root}/evil.pt2", "hf:{root}/pickled", "timm:test_vit"])
def test_every_command_says_the_option_that_the_user_may_type(quiet, honest, tmp_path, kind):
    name = kind.format(root=quiet)
    task = hostile(honest, tmp_path, name=name)
    for command in (
        ["predict", "x.png", "--task", task],
        ["predict", "x.png", "--tasks", task, "--any-backbone"],
        ["eval", task, "digits"],
    ):
        ended = restuning(*command, cwd=tmp_path)
        assert ended.returncode == 1
        assert "Traceback" not in ended.stderr
        assert f"--backbone {name}" in ended.stderr
    # What a task says of itself is shown without opening anything.
    assert name in restuning("info", task, "--json").stdout


@pytest.mark.parametrize("name", NAMES)
def test_random_weights_do_not_open_what_a_task_names(quiet, honest, tmp_path, name):
    """`--random` draws weights: a folder's own are not read, but its code and its size are there."""
    task = hostile(honest, tmp_path, name=name.format(root=quiet))
    ended = restuning("predict", "x.png", "--task", task, "--random", cwd=tmp_path)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("file", ["evil.pth", "evil.safetensors", "evil.npz", "executed", "fifo"])
def test_a_task_cannot_choose_a_pickle_as_weights(quiet, honest, tmp_path, file):
    from hashlib import sha256

    weights = quiet / file
    digest = sha256(weights.read_bytes()).hexdigest() if weights.is_file() else "0" * 64
    for name in ("restuning-tiny", "timm:test_vit"):
        said = {"path": str(weights), "sha256": digest}
        with pytest.raises(RestuningError):
            Predictor.load(hostile(honest, tmp_path / name[:4], name=name, weights=said))


@pytest.mark.parametrize("name", NAMES)
def test_a_grid_cannot_choose_what_is_executed_or_fetched(quiet, tmp_path, name):
    protocol = GridProtocol(name.format(root=quiet), settings=FitSettings(epochs=1))
    written = {"format": 1, "protocol": protocol.identity(), "choices": {}}
    (tmp_path / "grid.json").write_text(json.dumps(written))
    with pytest.raises(RestuningError):
        Bench(read_protocol(tmp_path), tmp_path)


def test_a_grid_of_a_program_is_opened_if_the_user_names_it(quiet, tmp_path, monkeypatch):
    protocol = GridProtocol(f"pt2:{quiet}/evil.pt2", settings=FitSettings(epochs=1))
    written = {"format": 1, "protocol": {**protocol.identity(), "named_in": None}, "choices": {}}
    (tmp_path / "grid.json").write_text(json.dumps(written))
    ended = restuning("bench", "robust", "digits", tmp_path, "--methods", "linear")
    assert f"--backbone pt2:{quiet}/evil.pt2" in ended.stderr
    assert read_protocol(tmp_path).named_in == str(tmp_path / "grid.json")
    assert read_protocol(tmp_path, backbone=protocol.backbone).named_in is None
    with pytest.raises(RestuningError, match="another backbone"):
        read_protocol(tmp_path, backbone="restuning-tiny")


COMMANDS = {
    "train": ["digits", "--method", "linear", "--epochs", "1"],
    "sweep": ["digits", "--grid", "lr=1e-3", "--seeds", "1", "--epochs", "1"],
    "cache": ["digits"],
    "plan": [],
    "bench run": ["digits", "--methods", "linear", "--seeds", "1", "--epochs", "1", "--out", "g"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["pt2:{root}/evil.pt2", "hf:{root}/pickled", "timm:test_vit"])
def test_a_file_of_options_cannot_choose_it_either(quiet, tmp_path, command, kind):
    name = kind.format(root=quiet)
    if command == "plan" and not name.startswith("pt2:"):
        pytest.skip("a forecast builds the architecture and reads no weights")
    for file in ("settings.json", "options.yaml"):
        (tmp_path / file).write_text(json.dumps({"backbone": name}))
        line = [*command.split(), *COMMANDS[command], "--config", tmp_path / file]
        ended = restuning(*line, cwd=tmp_path)
        assert ended.returncode == 1, ended.stdout
        assert "Traceback" not in ended.stderr
        assert f"--backbone {name}" in ended.stderr + ended.stdout


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("train", {"data": "hf:stranger/images"}, "hf:stranger/images"),
        ("cache", {"what": "rm", "name": "digits"}, "rm"),
        (
            "train-image-generation",
            {"data": "x", "pipeline": "stranger/x"},
            "--pipeline stranger/x",
        ),
    ],
)
def test_a_file_of_options_fetches_and_removes_nothing(quiet, tmp_path, command, options, said):
    (tmp_path / "options.yaml").write_text(json.dumps(options))
    ended = restuning(command, "--config", tmp_path / "options.yaml", cwd=tmp_path)
    assert ended.returncode == 1
    assert "does not choose" in ended.stderr
    assert said in ended.stderr


def test_what_the_user_types_wins_over_the_file_and_is_the_users_choice(tmp_path, monkeypatch):
    from restuning.runtime.hub import naming_file

    named = []

    def loaded(name, **more):
        named.append((name, naming_file()))
        raise RestuningError("enough")

    monkeypatch.setattr("restuning.search.train.take_backbone", loaded)
    (tmp_path / "options.json").write_text(json.dumps({"backbone": "hf:a/b", "epochs": 1}))
    line = ["train", "digits", "--method", "linear", "--config", tmp_path / "options.json"]
    restuning(*line, cwd=tmp_path)
    restuning(*line, "--backbone", "hf:a/b", cwd=tmp_path)
    assert named == [("hf:a/b", str(tmp_path / "options.json")), ("hf:a/b", "")]


def test_a_folder_that_a_task_names_opens_where_it_holds_tensors_alone(quiet, tmp_path):
    loaded = load_backbone(f"hf:{quiet}/good")
    host = loaded.host()
    task = methods.build("linear", host, num_classes=2)
    said = {"kind": "text", "max_tokens": 6}
    folder = save(task, host, tmp_path / "x.task", backbone=loaded.name, preprocessing=said)
    assert Predictor.load(folder)(["a good film"])[0].label in ("0", "1")


def test_code_that_lies_with_a_model_is_not_run_for_the_user_either(quiet):
    with pytest.raises(RestuningError, match="code of its own"):
        load_backbone(f"hf:{quiet}/coded")
    # transformers has a tokenizer of its own for this one.
    assert load_backbone(f"hf:{quiet}/tokens").tokenizer is not None
    with pytest.raises(RestuningError, match="kernels"):
        load_backbone(f"hf:{quiet}/kernels")


CONFIGS = (
    "",
    "[]",
    "[" * 10_000,
    '{"model_type": 7}',
    '{"model_type": "bert", "hidden_size": "x"}',
    '{"model_type": "bert", "hidden_size": -4}',
    '{"model_type": "bert", "num_attention_heads": 0}',
    '{"model_type": "bert", "num_hidden_layers": null}',
    '{"model_type": "bert", "vocab_size": 1e30}',
    '{"model_type": ["bert"]}',
    '{"model_type": "bert", "auto_map": 3}',
    '{"model_type": "clip", "vision_config": 3}',
    '{"model_type": "timm_wrapper", "architecture": "no_such"}',
)


@pytest.mark.parametrize("text", CONFIGS)
@pytest.mark.parametrize("told", [None, "task.json"])
def test_a_malformed_config_ends_in_an_error_of_ours_whoever_names_it(quiet, tmp_path, text, told):
    folder = shutil.copytree(quiet / "good", tmp_path / "model")
    (folder / "config.json").write_text(text)
    for scheme in ("hf", "clip"):
        with named_in(told), pytest.raises(RestuningError):
            load_backbone(f"{scheme}:{folder}")


def test_code_that_lies_in_a_pipeline_is_not_run_for_the_user_either(quiet, tmp_path):
    others = {"_class_name": "StableDiffusionPipeline", "vae": ["antigravity", "Vae"]}
    (tmp_path / "model_index.json").write_text(json.dumps(others))
    for folder in (quiet / "pipeline", tmp_path):
        with pytest.raises(RestuningError, match="which is not run"):
            load_backbone(f"diffusers:{folder}")


def test_pickled_weights_that_the_user_names_are_read_as_tensors_alone(quiet):
    with pytest.raises(RestuningError, match="could not be loaded"):
        load_backbone(f"hf:{quiet}/pickled")


def test_weights_that_were_fetched_before_open_for_a_file(quiet, tmp_path, monkeypatch):
    """Of timm: from the cache of the hub, in safetensors."""
    import timm

    repository = timm.get_pretrained_cfg("test_vit").hf_hub_id
    home = tmp_path / f"models--{repository.replace('/', '--')}"
    (home / "snapshots" / "0").mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0")
    model = timm.create_model("test_vit")
    save_file(model.state_dict(), home / "snapshots" / "0" / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    with named_in("task.json"):
        loaded = load_backbone("timm:test_vit")
    assert torch.equal(loaded.model.cls_token, model.cls_token)


def test_a_program_is_read_by_its_own_entry_before_torch_sees_it(quiet, honest, monkeypatch):
    """Also where the user names it: without our description, or with another digest, it stays closed."""
    opened = []
    monkeypatch.setattr(torch.export, "load", lambda *a, **k: opened.append(a))
    name = f"pt2:{quiet}/evil.pt2"
    with pytest.raises(RestuningError, match="not an engine of ours"):
        load_backbone(name)
    with pytest.raises(RestuningError, match="another engine, which is not opened"):
        Predictor.load(honest, backbone=name)
    assert opened == []
