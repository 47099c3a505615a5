"""Without any extra: the library is imported, fits, saves and answers; what needs an extra says the line that installs it."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[2]

BLOCKED = {
    "transformers": "transformers",
    "open_clip_torch": "open_clip",
    "soundfile": "soundfile",
    "soxr": "soxr",
    "diffusers": "diffusers",
    "pyarrow": "pyarrow",
    "scipy": "scipy",
    "torch-fidelity": "torch_fidelity",
    "datasets": "datasets",
    "ray": "ray",
    "pillow-heif": "pillow_heif",
    "fastapi": "fastapi",
    "uvicorn": "uvicorn",
    "httptools": "httptools",
    "prometheus-client": "prometheus_client",
    "python-multipart": "python_multipart",
    "httpx": "httpx",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "onnxruntime": "onnxruntime",
    "onnx": "onnx",
    "onnxscript": "onnxscript",
    "openvino": "openvino",
    "torchao": "torchao",
    "bitsandbytes": "bitsandbytes",
    "peft": "peft",
    "ms-swift": "swift",
    "scikit-learn": "sklearn",
    "lightning": "lightning",
    "s3fs": "s3fs",
    "pandas": "pandas",
}
"""Modules that an environment without extras has not, by the name of their package."""

AT_HAND = {"huggingface_hub", "pillow", "fsspec"}
"""What extras name, and the core brings as well (timm the first, torch the last)."""

BEFORE = f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_distributions(self, context):
        if (context.name or "").lower().replace("_", "-") in {[n.replace("_", "-") for n in BLOCKED]!r}:
            return []
        return getattr(self.finder, "find_distributions", lambda context: [])(context)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(BLOCKED.values())!r}:
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
"""

FLOW = """
import torch, restuning
from restuning import FitSettings, Predictor, load_backbone, methods
from restuning.data import load_data
run = restuning.train("digits", method="ridge", out="run")
assert run.metrics["test_accuracy"] > 0.9, run.metrics
backbone = load_backbone("restuning-tiny")
host = backbone.host()
task = methods.build("res-tuning-bypass", host, num_classes=10)
restuning.save(task, host, "x.task", backbone=backbone.name, preprocessing=backbone.preprocessing.to_dict())
from PIL import Image
answer = Predictor.load("x.task")([Image.new("RGB", (9, 9))])[0]
assert answer.label in map(str, range(10)), answer
import restuning.cli.app
for name in restuning.cli.app.COMMANDS:
    restuning.cli.app.load_command(name)
print("held")
"""

ASKING = {
    "transformers": 'load_backbone("hf:somebody/model")',
    "openclip": 'load_backbone("openclip:ViT-B-32")',
    "audio": 'from restuning.data import read_audio; read_audio(b"RIFF", 16000)',
    "diffusion": 'load_backbone("diffusers:somebody/model")',
    "bench": "from restuning.bench.report import critical_difference; critical_difference(3, 4)",
    "datasets": 'from restuning.data import load_data; load_data("hf:somebody/images", load_backbone("restuning-tiny"))',
    "parquet": 'open("t.parquet", "wb").write(b"PAR1"); restuning.train("t.parquet", method="linear", image="a", label="b")',
    "ray": 'from restuning.features import StoreOptions, build_on_ray; build_on_ray("digits", options=StoreOptions("s"))',
    "heif": 'open("a.heic", "wb").write(b"\\0\\0\\0\\x18ftypheic" + bytes(12)); from restuning.backbones.images import read_image; read_image("a.heic")',
    "serve": "restuning.serve.app({})",
    "lightning": "import restuning.integrations.lightning",
    "tracking": 'restuning.train("digits", method="linear", epochs=1, track=("wandb",), out="tracked")',
    "onnx": 'restuning.export_engine(load_backbone("restuning-tiny"), "x.onnx")',
    "quantized": 'load_backbone("restuning-tiny+int8")',
}
"""For each extra something that needs it."""


def read_extras():
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]


def run(script, folder):
    done = subprocess.run(
        [sys.executable, "-c", BEFORE + textwrap.dedent(script)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_blocked_modules_are_those_of_the_extras():
    project = read_extras()
    names = {
        line.split(">")[0].split("[")[0]
        for extra, lines in project["optional-dependencies"].items()
        if extra not in ("all", "test", "docs", "dev")
        for line in lines
    }
    assert names - {"restuning"} - AT_HAND <= BLOCKED.keys()
    core = {line.split(">")[0] for line in project["dependencies"]}
    assert not core & BLOCKED.keys()


def test_the_core_alone_imports_fits_saves_and_answers(tmp_path):
    assert run(FLOW, tmp_path).split()[-1] == "held"


def test_what_needs_an_extra_says_the_line_that_installs_it(tmp_path):
    lines = ["import json, restuning", "from restuning import load_backbone", "said = {}"]
    for extra, action in ASKING.items():
        lines += [
            "try:",
            f"    {action}",
            f"    said[{extra!r}] = 'nothing'",
            "except restuning.RestuningError as error:",
            f"    said[{extra!r}] = str(error)",
        ]
    said = json.loads(
        run("\n".join([*lines, "print(json.dumps(said))"]), tmp_path).splitlines()[-1]
    )
    assert {
        e: f"pip install 'restuning[{e}]'" in text for e, text in said.items()
    } == dict.fromkeys(ASKING, True), said
