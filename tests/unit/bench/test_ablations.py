"""Ablations: every entry can be built and has a step; layers are read in words."""

import pytest
import torch

from restuning import Host, RestuningError, methods
from restuning.backbones import load_backbone
from restuning.bench import rivals
from restuning.bench.grid import layer_numbers
from restuning.bench.studies.ablations import ABLATIONS, ablation_entries

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def host():
    backbone = load_backbone("restuning-tiny")
    return Host(backbone.model, *backbone.example)


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_entry_of_an_ablation_can_be_built(host, name):
    entries = ablation_entries(name)
    assert len({e.label for e in entries}) == len(entries)
    for entry in entries:
        if entry.method in rivals.RIVALS:
            continue
        options = {k: layer_numbers(v, host.sites.layers) for k, v in entry.options}
        task = methods.build(entry.method, host, num_classes=3, **options)
        assert task.trainable_parameters() > 0


def test_the_combinations_are_those_of_the_papers_table():
    labels = [e.label for e in ablation_entries("combinations")]
    assert len(labels) == 9 + 9 + 3


@pytest.mark.parametrize(
    ("words", "numbers"),
    [("first-2", [1, 2]), ("last-1/3", [5, 6]), ("every-2", [2, 4, 6]), ([3], [3]), (4, 4)],
)
def test_layers_are_read_in_words(words, numbers):
    assert layer_numbers(words, 6) == numbers


@pytest.mark.parametrize("words", ["first-0", "last-7"])
def test_layers_that_are_not_there_are_refused(words):
    with pytest.raises(RestuningError, match="no such layers"):
        layer_numbers(words, 6)


def test_a_fixed_lambda_is_not_trained_and_the_rest_is(host):
    task = methods.build("res-tuning-bypass", host, num_classes=3, gate=0.5, zero=False)
    whole = methods.build("res-tuning-bypass", host, num_classes=3)
    assert whole.trainable_parameters() - task.trainable_parameters() == host.sites.layers
    taps = host.features(IMAGE, keep=task.needs(host.readout_rule))
    task(taps).sum().backward()
    assert task.side.gate.grad is None
    assert all(p.grad is not None for p in task.parameters() if p.requires_grad)
    torch.testing.assert_close(task.side.gate.sigmoid(), torch.full((6,), 0.5))
    for wrong in (0, 1, 2.5):
        with pytest.raises(RestuningError, match="lambda out of its range"):
            methods.build("res-tuning-bypass", host, num_classes=3, gate=wrong)


def test_a_bypass_on_fewer_taps_reads_those_alone(host):
    task = methods.build("res-tuning-bypass", host, num_classes=3, taps=[2, 4])
    assert task.needs(host.readout_rule).taps == ("block.0", "block.2", "block.4", "block.6")
    assert task(host.features(IMAGE, keep=task.needs(host.readout_rule))).shape == (2, 3)
    rebuilt = type(task).from_spec(task.spec())
    assert rebuilt.side.taps == task.side.taps
    with pytest.raises(RestuningError, match="no such tap"):
        methods.build("res-tuning-bypass", host, num_classes=3, taps=[7])
