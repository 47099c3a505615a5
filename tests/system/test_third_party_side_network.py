"""A side network of another distribution: one class, and it trains, is stored, banked and predicts."""

import pytest

from strangers import Distribution

KIND = "centred"

MODULE = '''
"""A side network as a stranger would write it: no decorator, only an entry point."""

import torch
from torch import nn

from restuning import Needs
from restuning.bypass import SideNetwork


class Centred(SideNetwork):
    """The last tap, and a learned map of the tap before, less its mean over the training split."""

    def __init__(self, taps, dim, steep=1.0):
        super().__init__()
        self.taps, self.dim, self.steep = tuple(taps), dim, steep
        self.map = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.map.weight)
        self.register_buffer("centre", torch.zeros(dim))

    def needs(self, pool):
        return Needs(self.taps, "cls" if pool == "cls" else "all")

    @property
    def solved_parameters(self):
        return self.dim

    def prepare(self, rows):
        means = [taps[self.taps[0]][:, 0] for taps, _ in rows]
        self.centre.copy_(torch.cat(means).mean(0))
        return {}

    def forward(self, taps):
        before, last = (taps[name].detach() for name in self.taps)
        return last + self.steep * self.map(before - self.centre)
'''

PRELUDE = f"""
import json, copy, torch
from awake import tiny_vit
from restuning import Bank, FitSettings, Host, MultiTask, Task, Tuned, evaluate, fit, load, save
from restuning._errors import RestuningError
from restuning.bypass import from_spec, kinds

images = torch.linspace(-1, 1, 24 * 3 * 32 * 32).reshape(24, 3, 32, 32)
labels = torch.arange(24) % 2
data = [(x + y, int(y)) for x, y in zip(images, labels)]
host = Host(tiny_vit(seed=3), images[:1])

def task_of():
    torch.manual_seed(0)
    side = from_spec({{"kind": {KIND!r}, "taps": list(host.sites.taps[-2:]), "dim": host.dim, "steep": 2.5}})
    return Task(side=side, head=torch.nn.Linear(host.dim, 2), pool="cls", method="a stranger's")

def logits(task):
    with torch.no_grad():
        return Tuned(host, task).eval()(images[:4])
"""


STRANGER = Distribution(KIND, "restuning.side_networks", "centred_network:Centred", MODULE, PRELUDE)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return STRANGER.install(tmp_path_factory.mktemp("site") / "packages")


@pytest.fixture(scope="module")
def used(installed, tmp_path_factory):
    """Everything a side network is asked for, in one process."""
    folder = tmp_path_factory.mktemp("work")
    return folder, STRANGER.python(
        f"""
        from pathlib import Path
        from restuning import forecast
        from restuning.backbones import Backbone
        from restuning.data import Data
        from restuning.data.data import collate_batch
        from restuning.features import Cached, StoredFeatures
        from restuning.features.stored import StoreOptions, open_or_build
        from restuning.training.parallel_runs import train_in_parallel

        folder, found = Path({str(folder)!r}), {{}}
        task, settings = task_of(), FitSettings(epochs=2, lr=1e-2, batch_size=8)
        found["parameters"] = [task.tuner_parameters(), sum(p.numel() for p in task.side.parameters())]
        fit(Tuned(host, task), data, settings=settings, out=folder / "live", progress=False)
        found["centre"] = float(task.side.centre.abs().sum())
        found["accuracy"] = evaluate(Tuned(host, task), data)["accuracy"]
        found["logits"] = logits(task).tolist()
        save(task, host, folder / "stranger.task")

        step = forecast.forecast_task(host, task, images[:1], 8)
        cached = forecast.forecast_task(host, task, images[:1], 8, form="cached")
        found["forecast"] = [step.above_bytes, cached.above_bytes]
        found["forms"] = forecast.forms(task)

        whole = Data("strange", data, None, None, ["a", "b"], identity="strange")
        backbone = Backbone("tiny", host.model, (images[:1],), {{}}, None, "none")
        kept = open_or_build(
            host, backbone, whole, task.needs(host.readout_rule), StoreOptions(root=folder / "stores")
        )
        stored = task_of()
        fed = kept.data(whole, final=False)
        fit(
            Cached(host, stored, kept.store),
            fed.train,
            settings=settings,
            out=folder / "stored",
            collate=fed.collate,
            progress=False,
        )
        found["stored"] = float((logits(stored) - logits(task)).abs().max())
        arms = train_in_parallel(host, [task_of(), task_of()], [settings, settings], fed.train, None)
        found["arms"] = [float((logits(a.task) - logits(task)).abs().max()) for a in arms]

        bank = Bank({{"a": task, "b": copy.deepcopy(task)}})
        banked = bank(host.features(images[:4], keep=bank.keep))
        together = MultiTask(host, {{"a": task}})(images[:4])
        found["bank"] = [
            float((each - logits(task)).abs().max())
            for each in (banked["a"], banked["b"], together["a"])
        ]
        print(json.dumps(found))
        """,
        installed,
    )


CLOSE = 1e-4
"""Stored and stacked products round elsewhere, over six steps of training."""


def test_it_trains_and_training_prepares_it_first(used):
    _, found = used
    assert found["centre"] > 0
    assert found["accuracy"] > 0.5


def test_it_is_counted_with_what_is_solved_for(used):
    counted, trained = used[1]["parameters"]
    assert counted == trained + 48


def test_it_trains_alike_live_from_a_store_and_in_arms(used):
    assert used[1]["stored"] < CLOSE
    assert max(used[1]["arms"]) < CLOSE


def test_it_answers_in_a_bank_and_beside_other_tasks(used):
    assert max(used[1]["bank"]) < CLOSE


def test_its_steps_are_forecast(used):
    assert all(size > 0 for size in used[1]["forecast"])
    assert set(used[1]["forms"]) == {"cached", "live"}


def test_a_fresh_process_loads_its_task_and_gives_the_same_logits(used, installed):
    folder, found = used
    code = f"print(json.dumps(logits(load({str(folder / 'stranger.task')!r}, host)).tolist()))"
    assert STRANGER.python(code, installed) == found["logits"]


def test_without_the_distribution_or_with_a_broken_one_the_error_says_what_to_do(used, tmp_path):
    STRANGER.check_errors(used[0] / "stranger.task", tmp_path)
