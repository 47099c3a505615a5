"""The mean of several tasks is one task that answers as they do on average."""

import pytest
import torch

from awake import wake
from restuning import Bank, Host, Tuned, load, load_backbone, methods, save
from restuning._errors import FormatError
from restuning.task import average

SAME = 1e-5
"""Means of logits in another order."""
CLASSES = 3


@pytest.fixture(scope="module")
def host():
    backbone = load_backbone("restuning-tiny")
    return Host(backbone.model, *backbone.example)


def made(host, method, seed, **options):
    torch.manual_seed(seed)
    task = methods.build(method, host, CLASSES, **options)
    wake(task)
    task.temperature = 1.0 + seed
    task.labels = ["a", "b", "c"]
    return task.eval()


@pytest.mark.parametrize("method", ["linear", "res-tuning-bypass", "mixing-bypass"])
def test_its_logits_are_the_mean_of_theirs_each_at_its_temperature(host, method, tmp_path):
    tasks = [made(host, method, seed) for seed in range(3)]
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        each = [Tuned(host, task).eval()(images) / task.temperature for task in tasks]
        mean = torch.stack(each).mean(0)
        one = average(tasks)
        assert one.labels == tasks[0].labels and one.temperature == 1
        torch.testing.assert_close(Tuned(host, one).eval()(images), mean, atol=SAME, rtol=SAME)
        again = load(save(one, host, tmp_path / "mean.task"), host)
        torch.testing.assert_close(Tuned(host, again).eval()(images), mean, atol=SAME, rtol=SAME)
        features = host.features(images, keep=one.needs(host.readout_rule))
        found = Bank({"mean": one})(features)["mean"]
        torch.testing.assert_close(found, mean, atol=SAME, rtol=SAME)


def test_what_has_no_mean_that_is_one_task_is_refused_in_words(host):
    linear = made(host, "linear", 0)
    for tasks, found in (
        ([linear], "one task"),
        ([linear, made(host, "res-tuning-bypass", 0)], "some have a side network"),
        ([made(host, "res-tuning", n) for n in range(2)], "inside the backbone"),
        ([made(host, "ridge", n) for n in range(2)], "solved"),
    ):
        with pytest.raises(FormatError, match="cannot be averaged") as error:
            average(tasks)
        assert found in error.value.found
    other = made(host, "linear", 1)
    other.labels = ["b", "a", "c"]
    with pytest.raises(FormatError, match="cannot be averaged"):
        average([linear, other])
