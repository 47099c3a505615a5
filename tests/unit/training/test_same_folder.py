"""Another run in the same folder: other data, labels, class names or backbone are named and refused."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

from restuning import FitSettings, fit
from restuning._errors import DataError, RestuningWarning, TrainingError
from restuning.training import checkpoint
from restuning.training.identity import NAMES, describe_classes

SETTINGS = FitSettings(epochs=1, batch_size=8, lr=0.05)
INPUTS = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(16) % 3


def pairs(x=INPUTS, y=LABELS):
    return [(row, int(label)) for row, label in zip(x, y, strict=True)]


def changed(place=3):
    x = INPUTS.clone()
    x[place, 0] += 1e-4
    return x


def corrected(place=3):
    y = LABELS.clone()
    y[place] = (y[place] + 1) % 3
    return y


@pytest.fixture
def run(make_tuned, tmp_path):
    def run(train=None, val=None, *, labels=("a", "b", "c"), shift=0.0, **how):
        tuned = make_tuned()
        torch.manual_seed(0)
        tuned.host = nn.Linear(6, 6).requires_grad_(False)
        with torch.no_grad():
            # Inside, where a few tensors by name would not be looked at.
            tuned.host.weight[2, 3] += shift
        tuned.task.labels = list(labels)
        data = pairs() if train is None else train
        return fit(tuned, data, val, settings=SETTINGS, out=tmp_path, progress=False, **how)

    return run


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        ({}, {"train": pairs(changed())}, "the training data:"),
        ({}, {"train": pairs(y=corrected())}, "the labels of the training data:"),
        ({"val": pairs()}, {"val": pairs(changed())}, "the validation data:"),
        ({"val": pairs()}, {"val": pairs(y=corrected())}, "the labels of the validation data:"),
        ({}, {"train": [pairs()[i] for i in (3, 1, 2, 0, *range(4, 16))]}, "the training data:"),
        ({}, {"labels": ("b", "a", "c")}, "the class names:"),
        ({}, {"labels": ("a", "b", "d")}, "the class names:"),
        ({}, {"shift": 1e-3}, "the backbone:"),
    ],
)
def test_what_differs_is_named_and_nothing_of_the_old_run_returned(run, first, second, named):
    run(**first)
    with pytest.raises(TrainingError, match=named) as error:
        run(**second)
    assert "--out" in error.value.fix
    assert error.value.found.count(" then, ") == 1, "nothing else is said to differ"
    again = run(**first)
    assert run(**second, resume=False) != again


def test_equal_data_made_anew_are_the_same_run(run):
    first = run(pairs(), pairs())
    assert run(pairs(INPUTS.clone()), pairs()) == first
    assert run(TensorDataset(INPUTS, LABELS), pairs()) == first
    assert run(Subset(pairs(), range(16)), pairs()) == first


def test_a_run_that_was_killed_does_not_go_on_with_other_data(run, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr("restuning.training.loop.Loop._finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run()
    assert not checkpoint.is_finished(tmp_path / "checkpoints")
    with pytest.raises(TrainingError, match="the labels of the training data"):
        run(pairs(y=corrected()))


@pytest.mark.parametrize("final", [True, False])
def test_a_run_of_before_data_were_written_down_is_refused_in_words(run, tmp_path, final):
    run()
    folder = tmp_path / "checkpoints"
    snapshot = checkpoint.read_newest(folder)
    old = {n: v for n, v in snapshot.state["run"].items() if "the " not in n} | {"task": "form"}
    snapshot.state["run"] = old
    if not final:
        snapshot.state["result"] = None
        checkpoint.clear(folder)
    checkpoint.write(folder, snapshot, final=final)
    with pytest.raises(TrainingError, match="does not say what it was trained on") as error:
        run()
    assert "the training data" in error.value.found
    assert run(resume=False).steps == 2


def test_files_that_change_while_they_are_trained_on_end_the_run(make_tuned, points, tmp_path):
    data = points(16)
    data.files = [tmp_path / f"{number}.bin" for number in range(16)]
    for file in data.files:
        file.write_bytes(b"before")
    data.broken = lambda seen: data.files[5].write_bytes(b"after!") if seen == 12 else None
    with pytest.raises(DataError, match="changed while they were read") as error:
        fit(make_tuned(), data, settings=SETTINGS, out=tmp_path / "run", progress=False)
    assert error.value.where == str(data.files[5])
    # What was trained on both is not gone on from.
    assert checkpoint.read_newest(tmp_path / "run" / "checkpoints") is None


def test_generators_and_weights_are_those_of_a_data_set_that_says_what_it_is(make_tuned, tmp_path):
    class Own(torch.utils.data.Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, index):
            return INPUTS[index] + torch.randn(6) + np.random.rand(), int(LABELS[index])

    read, told = Own(), Own()
    told.identity = "own, version 1"
    trained = []
    for number, data in enumerate((read, told)):
        tuned = make_tuned()
        fit(tuned, data, settings=SETTINGS, out=tmp_path / str(number), progress=False)
        trained.append(tuned.task.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_what_is_not_compared_is_said(make_tuned, tmp_path):
    class Own(torch.utils.data.Dataset):
        draws = np.random.default_rng()

        def __len__(self):
            return 16

        def __getitem__(self, index):
            return INPUTS[index] + float(self.draws.random()), int(LABELS[index])

    with pytest.warns(RestuningWarning, match="were not compared"):
        fit(make_tuned(), Own(), settings=SETTINGS, out=tmp_path, progress=False)


def test_many_class_names_are_told_apart_by_a_digest():
    many = [str(n) for n in range(NAMES + 1)]
    assert describe_classes(many[:NAMES]) == many[:NAMES]
    assert str(describe_classes(many)).startswith(f"{NAMES + 1} names")
    assert describe_classes(many) != describe_classes(many[::-1])
    assert describe_classes(None) is None
