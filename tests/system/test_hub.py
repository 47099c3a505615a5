"""Tasks go to a hub and come back: a real client against a server on loopback."""

from types import SimpleNamespace

import pytest
import torch
from small_hub import small_hub

from awake import tiny_vit
from children import Child
from restuning import Host, Tuned, methods, save
from restuning.task.save_and_load import _write_card

pytest.importorskip("huggingface_hub", reason="needs the extra hub")

AFRESH = """
import sys
# The client reads its address when it is imported.
for name in [n for n in sys.modules if n.partition(".")[0] == "huggingface_hub"]:
    del sys.modules[name]
"""
PUSH = """
import sys, restuning
print(restuning.push_to_hub(sys.argv[1], "someone/pets", private=True))
"""
LOAD = """
import sys, torch, restuning
from awake import tiny_vit
host = restuning.Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
task = restuning.load(sys.argv[1], host)
torch.manual_seed(1)
torch.save(restuning.Tuned(host, task).eval()(torch.randn(2, 3, 32, 32)), sys.argv[2])
"""
TOKEN = "hf_of_a_test"


def run(script, hub, tmp_path, *arguments, token=TOKEN):
    """A process of its own, with what it said and its exit code."""
    child = Child(
        ["-c", AFRESH + script, *arguments],
        {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": token,
        },
    )
    out, errors = child.communicate(timeout=120)
    return SimpleNamespace(returncode=child.returncode, stdout=out, stderr=errors)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    host = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    torch.manual_seed(0)
    task = methods.build("res-tuning-bypass", host, num_classes=3)
    folder = save(task, host, tmp_path_factory.mktemp("tasks") / "pets.task", backbone="hf:org/vit")
    torch.manual_seed(1)
    with torch.no_grad():
        return folder, Tuned(host, task).eval()(torch.randn(2, 3, 32, 32))


def test_a_task_pushed_to_a_hub_comes_back_by_name_with_the_same_logits(saved, tmp_path):
    folder, logits = saved
    with small_hub() as hub:
        pushed = run(PUSH, hub, tmp_path, folder)
        assert pushed.returncode == 0, pushed.stderr
        assert hub.url in pushed.stdout
        assert hub.private == {"someone/pets": True}
        files = {p.name: p.read_bytes() for p in folder.iterdir()}
        assert files.items() <= hub.repositories["someone/pets"].items()
        loaded = run(LOAD, hub, tmp_path, "someone/pets", tmp_path / "logits.pt")
        assert loaded.returncode == 0, loaded.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits)


def test_without_a_login_the_error_says_how_to_log_in(saved, tmp_path):
    with small_hub() as hub:
        done = run(PUSH, hub, tmp_path, saved[0], token="")
    assert "HubError" in done.stderr
    assert "hf auth login" in done.stderr


def test_a_name_that_the_hub_does_not_have_is_answered_in_words(tmp_path):
    with small_hub() as hub:
        done = run(LOAD, hub, tmp_path, "someone/nothing", tmp_path / "logits.pt")
    assert "the hub gave no such task" in done.stderr


@pytest.mark.parametrize(
    ("backbone", "line"),
    [
        ("hf:org/vit", "base_model: org/vit"),
        (
            "timm:vit_tiny_patch16_224.augreg_in21k",
            "base_model: timm/vit_tiny_patch16_224.augreg_in21k",
        ),
        ("restuning-tiny", ""),
        ("hf:/data/my-model", ""),
        ("timm:vit_tiny_patch16_224", ""),
        ("", ""),
    ],
)
def test_the_card_names_its_base_model_where_that_is_one_of_the_hub(backbone, line):
    host = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    card = _write_card("pets", methods.build("linear", host, num_classes=3), backbone, {})
    found = [ln for ln in card.splitlines() if ln.startswith("base_model")]
    assert found == ([line] if line else [])
