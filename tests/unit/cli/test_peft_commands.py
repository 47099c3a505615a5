"""`restuning import-peft` and `export-peft`, and `--targets` of `train`."""

import json

import pytest
import torch
from safetensors.torch import load_file

from commands import restuning
from restuning import load, load_backbone, methods
from restuning._errors import UnknownNameError

peft = pytest.importorskip("peft")


@pytest.fixture
def adapter(tmp_path):
    model = load_backbone("restuning-tiny").model
    config = peft.LoraConfig(r=2, target_modules=["qkv", "fc2"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_becomes_a_task_and_the_task_the_same_adapter(adapter, tmp_path):
    task, out = tmp_path / "a.task", tmp_path / "out"
    done = restuning(
        "import-peft", adapter, "--backbone", "restuning-tiny", "--out", task, "--json"
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["sites"], facts["prefix"]) == (12, "")
    assert load(task, load_backbone("restuning-tiny").host()).method == "lora"
    done = restuning("export-peft", task, "--out", out)
    assert done.returncode == 0, done.stderr
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, out))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_what_is_refused_is_a_sentence(adapter, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    done = restuning(
        "import-peft", adapter, "--backbone", "restuning-tiny", "--out", tmp_path / "a.task"
    )
    assert done.returncode == 1 and "asks for more than LoRA" in done.stderr
    assert not (tmp_path / "a.task").exists()


def test_linear_sites_are_listed(tmp_path):
    rows = json.loads(restuning("sites", "restuning-tiny", "--linear", "--json").stdout)
    names = [row["name"] for row in rows]
    assert names[:7] == ["qkv.1", "q.1", "k.1", "v.1", "o.1", "up.1", "down.1"]


def test_options_of_lora_are_for_lora_alone():
    host = load_backbone("restuning-tiny").host()
    task = methods.build("lora", host, 3, targets="q+v", alpha=4, rank=2)
    assert {t.alpha for t in task.inline_tuners.values()} == {4.0}
    options = {"targets": "q+v", "rank": 4}
    assert methods.keep_used("lora", options) == options
    assert methods.keep_used("res-tuning", options) == {"rank": 4}
    with pytest.raises(UnknownNameError, match="changes nothing"):
        methods.refuse_unused(["linear", "res-tuning"], {"targets": "q+v"})
    for wrong in ({"targets": "q+nothing"}, {"targets": ""}, {"alpha": 0}, {"dropout": 1}):
        with pytest.raises(UnknownNameError, match="cannot have this value"):
            methods.check("lora", options=wrong)
