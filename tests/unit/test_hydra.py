"""Every public factory is made from a configuration of Hydra: lists and mappings of OmegaConf are taken as plain ones."""

import inspect
import json

import pytest

import restuning
from restuning import load_backbone, methods

hydra = pytest.importorskip("hydra.utils")
omegaconf = pytest.importorskip("omegaconf")

HOST = load_backbone("restuning-tiny").host()
"""What a configuration cannot hold: found by its name, as Hydra finds objects."""
HELD = "{_target_: hydra.utils.get_object, path: test_hydra.HOST}"
ADAPTER = "{_target_: restuning.ResAdapter, dim: 8, rank: 2}"
TUNED = f"{{_target_: restuning.Task, tuners: {{block.0/mha: {ADAPTER}}}}}"
BUILT = f"{{_target_: restuning.methods.build, name: linear, host: {HELD}, num_classes: 2}}"

CONFIGS = {
    "Bank": f"{{_target_: restuning.Bank, tasks: {{one: {BUILT}}}}}",
    "BestCheckpoint": "{_target_: restuning.BestCheckpoint, monitor: loss}",
    "Blend": f"{{_target_: restuning.Blend, _args_: [[{TUNED}, 0.5], [{TUNED}, 0.5]]}}",
    "Branch": "{_target_: restuning.Branch, module: attn}",
    "Bypass": f"{{_target_: restuning.Bypass, taps: [a, b], dims: [8, 8], horizontal: [{ADAPTER}], vertical: [null]}}",
    "ConvAdapter": "{_target_: restuning.ConvAdapter, dim: 8}",
    "ConvLora": "{_target_: restuning.ConvLora, dim: 8, kernel: [3, 3], padding: [1, 1]}",
    "DropPath": f"{{_target_: restuning.DropPath, tuner: {ADAPTER}}}",
    "EarlyStopping": "{_target_: restuning.EarlyStopping, patience: 3}",
    "FilmAdapter": "{_target_: restuning.FilmAdapter, dim: 8}",
    "FitSettings": "{_target_: restuning.FitSettings, epochs: 2, track: [tensorboard], lr: 1e-3}",
    "Guided": f"{{_target_: restuning.Guided, task: {{_target_: restuning.methods.build, name: res-tuning-bypass, host: {HELD}}}, scale: 2.0}}",
    "Host": "{_target_: test_hydra.host_of, backbone: {_target_: restuning.load_backbone, name: restuning-tiny}}",
    "Layer": "{_target_: restuning.Layer, block: blocks.0}",
    "Lora": "{_target_: restuning.Lora, dim: 8, rank: 2}",
    "MultiTask": f"{{_target_: restuning.MultiTask, host: {HELD}, tasks: {{one: {BUILT}}}}}",
    "Needs": "{_target_: restuning.Needs, taps: [block.1, block.2], tokens: cls}",
    "PerRow": f"{{_target_: restuning.PerRow, tasks: [{TUNED}, null]}}",
    "Readout": "{_target_: restuning.Readout, norm: norm, pool: cls, dim: 8}",
    "ResAdapter": ADAPTER,
    "ResPrefix": "{_target_: restuning.ResPrefix, dim: 8}",
    "ResPrompt": "{_target_: restuning.ResPrompt, dim: 8}",
    "Scaled": f"{{_target_: restuning.Scaled, tuner: {ADAPTER}}}",
    "StemPrompt": "{_target_: restuning.StemPrompt, dim: 8}",
    "Sum": f"{{_target_: restuning.Sum, _args_: [{ADAPTER}, {ADAPTER}]}}",
    "Task": f"{{_target_: restuning.Task, tuners: {{block.0/mha: {ADAPTER}}}, head: {{_target_: torch.nn.Linear, in_features: 8, out_features: 2}}, labels: [a, b]}}",
    "Tuned": f"{{_target_: restuning.Tuned, host: {HELD}, task: {BUILT}}}",
    "UNetBypass": f"{{_target_: restuning.UNetBypass, taps: [a, b], dims: [8, 8], horizontal: [{ADAPTER}, null], vertical: [null]}}",
    "load_backbone": "{_target_: restuning.load_backbone, name: restuning-tiny}",
}

NOT_FROM_A_FILE = {
    # Of live objects that a caller has: models, data, folders, servers; or decorators and bases.
    "Callback",
    "Client",
    "Engine",
    "Extractor",
    "Features",
    "Predictor",
    "Projections",
    "SideNetwork",
    "Site",
    "Sites",
    "Tuner",
    "FrozenAttention",
    "describe",
    "embed",
    "evaluate",
    "evaluate_task",
    "export_engine",
    "export_peft",
    "export_tasks",
    "find_sites",
    "fit",
    "import_peft",
    "load",
    "load_data",
    "merge",
    "push_to_hub",
    "retrieve",
    "save",
    "side_network",
    "train",
    "tuner",
    "update",
}


def host_of(backbone):
    return backbone.host()


def made_of(text):
    return hydra.instantiate(omegaconf.OmegaConf.create(text))


def plain(value):
    """Whether nothing of OmegaConf is left in an object."""
    if isinstance(value, (omegaconf.ListConfig, omegaconf.DictConfig)):
        return False
    if isinstance(value, dict):
        return all(plain(v) for v in value.values())
    return not isinstance(value, (list, tuple)) or all(map(plain, value))


def test_every_public_factory_is_here():
    names = {n for n in restuning.__all__ if callable(getattr(restuning, n))}
    errors = {
        n for n in names if inspect.isclass(e := getattr(restuning, n)) and issubclass(e, Exception)
    }
    assert names - errors == CONFIGS.keys() | NOT_FROM_A_FILE


@pytest.mark.parametrize("name", CONFIGS)
def test_a_factory_takes_its_configuration(name):
    made = made_of(CONFIGS[name])
    assert plain(vars(made)) if hasattr(made, "__dict__") else plain(made)


@pytest.mark.parametrize("name", [n for n in methods.names() if "lora" not in n])
def test_a_method_is_built_by_its_configuration(name):
    task = made_of(
        f"{{_target_: restuning.methods.build, name: {name}, host: {HELD}, layers: [1, 3], num_classes: 3}}"
    )
    assert isinstance(task, restuning.Task)


def test_settings_from_a_configuration_are_written_as_plain_json():
    settings = made_of(CONFIGS["FitSettings"])
    assert settings == restuning.FitSettings(epochs=2, track=("tensorboard",), lr=1e-3)
    json.dumps(settings.to_dict())
