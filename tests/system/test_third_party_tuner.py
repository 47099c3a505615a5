"""A tuner of another distribution: installed as pip would leave it, used in processes of its own."""

import pytest

from strangers import BROKEN, Distribution

KIND = "soft_sign"

MODULE = '''
"""A tuner as a stranger would write it: no decorator, only an entry point."""

import torch
from torch import nn

from restuning import Tuner


class SoftSign(Tuner):
    def __init__(self, dim, steep=1.0):
        super().__init__()
        self.dim, self.steep = dim, steep
        self.weight = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.normal_(self.weight)

    def forward(self, x, view=None):
        return self.weight * torch.nn.functional.softsign(self.steep * x)
'''

PRELUDE = """
import json, torch
from awake import tiny_vit, wake
from restuning import Host, Task, Tuned, load, save
from restuning._errors import RestuningError
from restuning.tuners import from_spec, kinds

images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)
host = Host(tiny_vit(seed=3), images[:1])

def task_with(make):
    head = torch.nn.Linear(host.dim, 3)
    task = Task.inline(host.sites.pick("ffn"), lambda site: make(site.dim), head)
    return wake(task, seed=4)

def logits(task):
    with torch.no_grad():
        return Tuned(host, task).eval()(images)
"""


STRANGER = Distribution(KIND, "restuning.tuners", "soft_sign_tuner:SoftSign", MODULE, PRELUDE)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return STRANGER.install(tmp_path_factory.mktemp("site") / "packages")


@pytest.fixture(scope="module")
def saved(installed, tmp_path_factory):
    """A task saved by one process, and the logits it had there."""
    folder = tmp_path_factory.mktemp("tasks") / "soft.task"
    return folder, STRANGER.python(
        f"""
        cls = kinds()[{KIND!r}]
        tuner = from_spec({{"kind": {KIND!r}, "dim": 8, "steep": 2.5}})
        task = task_with(lambda dim: cls(dim, steep=2.5))
        bare = task_with(lambda dim: cls(dim, steep=2.5))
        for p in bare.tuners.parameters():
            p.data.zero_()
        save(task, host, {str(folder)!r})
        found = {{"module": cls.__module__, "spec": tuner.spec(), "kind": cls.kind}}
        found |= {{"logits": logits(task).tolist(), "bare": logits(bare).tolist()}}
        print(json.dumps(found))
        """,
        installed,
    )


def test_an_installed_distribution_adds_its_tuner_to_the_table(saved):
    _, found = saved
    assert found["module"] == "soft_sign_tuner"
    assert found["kind"] == KIND


def test_its_spec_builds_it_and_comes_back(saved):
    assert saved[1]["spec"] == {"kind": KIND, "dim": 8, "steep": 2.5}


def test_it_changes_the_logits_of_an_inline_task(saved):
    assert saved[1]["logits"] != saved[1]["bare"]


def test_a_fresh_process_loads_its_task_and_gives_the_same_logits(saved, installed):
    folder, found = saved
    logits = f"print(json.dumps(logits(load({str(folder)!r}, host)).tolist()))"
    assert STRANGER.python(logits, installed) == found["logits"]


def test_a_task_is_saved_whole_where_the_class_was_imported_by_hand(installed, tmp_path, saved):
    """Nobody has asked for the table yet: the tuner must know its kind all the same."""
    folder = tmp_path / "hand.task"
    spec = STRANGER.python(
        f"""
        from soft_sign_tuner import SoftSign
        task = task_with(lambda dim: SoftSign(dim, steep=2.5))
        save(task, host, {str(folder)!r})
        print(json.dumps(task.spec()["tuners"]))
        """,
        installed,
    )
    assert {s["kind"] for s in spec.values()} == {KIND}
    logits = f"print(json.dumps(logits(load({str(folder)!r}, host)).tolist()))"
    assert STRANGER.python(logits, installed) == saved[1]["logits"]


def test_without_the_distribution_or_with_a_broken_one_the_error_says_what_to_do(saved, tmp_path):
    STRANGER.check_errors(saved[0], tmp_path)


def test_a_distribution_that_does_not_import_leaves_the_other_tuners_alone(tmp_path):
    broken = STRANGER.install(tmp_path / "packages", BROKEN)
    assert "res_adapter" in STRANGER.python("print(json.dumps(sorted(kinds())))", broken)
