"""A sweep or a choice in a folder that was begun with other data, class names or another backbone."""

from dataclasses import replace

import pytest
import torch
from torch.utils.data import Subset

from restuning import FitSettings, Host, load_backbone
from restuning._errors import TrainingError
from restuning.search import choose_method
from restuning.search import sweep as sweeps
from restuning.search.candidates import Candidate
from restuning.training.run import open_inputs

SETTINGS = FitSettings(epochs=1, batch_size=32)
ONE = (Candidate("linear", (5e-3,), 1),)


def sweep(inputs, out):
    return sweeps.sweep(inputs, "linear", {"lr": [1e-2]}, seeds=(0,), settings=SETTINGS, out=out)


def choose(inputs, out):
    return choose_method(inputs, SETTINGS, out, candidates=ONE)


def other_images(world):
    train = Subset(world.data.train.dataset, [*range(95), 96])
    return replace(world.data, train=train)


def other_order(world):
    return replace(world.data, train=Subset(world.data.train.dataset, [1, 0, *range(2, 96)]))


def other_names(world):
    return replace(world.data, labels=[*world.data.labels[1:], "zero"])


def other_validation(world):
    return replace(world.data, val=Subset(world.data.val.dataset, range(1, 49)))


@pytest.fixture(scope="module", params=[sweep, choose], ids=["sweep", "choice"])
def begun(request, world, tmp_path_factory):
    """A search that is finished, and its folder."""
    out = tmp_path_factory.mktemp("search")
    data = replace(world.data, test=world.data.val)
    request.param(world.inputs(data), out)
    return request.param, out


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (other_images, "the training data:"),
        (other_order, "the training data:"),
        (other_validation, "the validation data:"),
        (other_names, "the class names:"),
    ],
)
def test_other_data_in_the_folder_of_a_search_are_refused_and_named(change, named, world, begun):
    search, out = begun
    data = change(world)
    with pytest.raises(TrainingError) as told:
        search(world.inputs(replace(data, test=data.val)), out)
    assert named in told.value.found
    assert "another --out" in told.value.fix


def test_another_backbone_in_the_folder_of_a_search_is_refused_and_named(world, begun):
    search, out = begun
    backbone = load_backbone("restuning-tiny")
    with torch.no_grad():
        # One weight inside, which no few tensors by name would show.
        backbone.model.blocks[3].mlp.fc1.weight[5, 7] += 1e-3
    data = replace(world.data, test=world.data.val)
    with pytest.raises(TrainingError, match="the backbone:"):
        search(open_inputs(Host(backbone.model, *backbone.example), backbone, data), out)
