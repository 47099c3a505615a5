"""LoRA tasks on one untouched backbone: mixed, row by row, beside other tuners, swapped under threads."""

import random
import threading

import pytest
import torch

from awake import tiny_swin, tiny_vit, wake
from peft_families import FAMILIES, first, host_of, run
from restuning import Blend, Host, PerRow, Task, Tuned, load, methods, save
from restuning._errors import PlacementError

X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SAME = 1e-5
"""Sums in another order, through a network whose weights are random."""
TASKS, THREADS, ASKED = 20, 4, 40


@pytest.fixture(scope="module")
def host():
    return Host(tiny_vit(), X[:1])


def lora(host, seed, **options):
    return wake(methods.build("lora", host, rank=3, **options), seed)


def answer(host, task, x=X):
    with torch.no_grad(), host.using(task):
        return host.model(x)


def test_a_blend_of_loras_is_the_backbone_with_their_weighted_products(host):
    tasks = lora(host, 1, targets="qkv"), lora(host, 2, targets="qkv+down")
    weights = 0.7, -0.4
    merged = tiny_vit()
    with torch.no_grad():
        for task, weight in zip(tasks, weights, strict=True):
            for name, tuner in task.inline_tuners.items():
                module = merged.get_submodule(host.sites.linear[name].module)
                module.weight += weight * tuner.factor * tuner.b.weight @ tuner.a.weight
        expected = merged(X)
    ours = answer(host, Blend(*zip(tasks, weights, strict=True)))
    torch.testing.assert_close(ours, expected, atol=SAME, rtol=SAME)
    assert not torch.allclose(ours, answer(host, None), atol=1e-2)


@pytest.mark.parametrize("name", ["timm ViT", "BERT", "Llama", "ResNet"])
def test_every_row_is_answered_by_its_own_task(name):
    family = FAMILIES[name]
    host = host_of(family, family.make())
    targets = "conv" if name == "ResNet" else "all"
    tasks = [lora(host, 1, targets=targets), None]

    def rows(task):
        with torch.no_grad(), host.using(task):
            return first(run(host, family.inputs()))

    together = rows(PerRow(tasks))
    for row, task in enumerate(tasks):
        torch.testing.assert_close(together[row], rows(task)[row], atol=SAME, rtol=SAME)
    assert not torch.allclose(rows(tasks[0]), rows(None), atol=1e-2)


def test_rows_inside_windows_are_refused():
    host = Host(tiny_swin(), X[:1])
    with pytest.raises(PlacementError, match="rows of a batch"):
        answer(host, PerRow([lora(host, 1), lora(host, 2)]))
    # Outside of windows, in the feed-forward, rows are inputs.
    answer(host, PerRow([lora(host, 1, targets="down"), lora(host, 2, targets="down")]))


def test_a_task_may_have_lora_and_other_tuners(host, tmp_path):
    parts = [
        lora(host, 1, targets="q+v"),
        wake(methods.build("prefix", host, rank=3), 2),
        wake(methods.build("res-tuning[ffn=adapter]", host, rank=3), 3),
        wake(methods.build("vpt-shallow", host, rank=2), 4),
    ]
    tuners = {name: t for part in parts for name, t in part.inline_tuners.items()}
    task = Task(tuners=tuners, method="lora and others")
    together = answer(host, task)
    # A blend has no tokens of its own at the stem.
    blended = answer(host, Blend(*((p, 1.0) for p in parts[:3])))
    stem = {n: t for part in parts[:3] for n, t in part.inline_tuners.items()}
    torch.testing.assert_close(answer(host, Task(tuners=stem)), blended, atol=SAME, rtol=SAME)
    for name in parts[0].inline_tuners:
        left = {n: t for n, t in tuners.items() if n != name}
        assert not torch.allclose(answer(host, Task(tuners=left)), together, atol=1e-4)
    save(task, host, tmp_path / "t.task")
    assert torch.equal(answer(host, load(tmp_path / "t.task", host)), together)


def test_twenty_tasks_are_swapped_under_four_threads_and_none_answers_for_another(host, tmp_path):
    before = {n: t.clone() for n, t in host.model.state_dict().items()}
    targets = ["qkv", "q+v", "all", "o+up+down"]
    tasks = []
    for number in range(TASKS):
        path = tmp_path / f"{number}.task"
        save(lora(host, number, targets=targets[number % 4]), host, path)
        tasks.append(load(path, host))
    alone = [answer(host, task) for task in tasks]
    wrong, done = [], []

    def ask(seed):
        chosen = random.Random(seed)
        for _ in range(ASKED):
            number = chosen.randrange(TASKS)
            with torch.no_grad():
                tuned = Tuned(host, tasks[number])
                given = tuned(X) if chosen.random() < 0.5 else answer(host, tasks[number])
            nearest = min(range(TASKS), key=lambda i: float((alone[i] - given).abs().max()))
            if nearest != number or not torch.allclose(given, alone[number], atol=SAME):
                wrong.append((number, nearest))
            done.append(number)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == THREADS * ASKED and not wrong
    after = host.model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())


def test_training_changes_the_task_and_nothing_of_the_backbone(host):
    before = {n: t.clone() for n, t in host.model.state_dict().items()}
    task = methods.build("lora", host, 3)
    start = Tuned(host, task)(X)
    torch.testing.assert_close(start, Tuned(host, Task(head=task.head))(X), atol=SAME, rtol=SAME)
    optimiser = torch.optim.SGD(task.parameters(), lr=0.02)
    losses = []
    for _ in range(6):
        loss = torch.nn.functional.cross_entropy(Tuned(host, task)(X), torch.tensor([0, 1, 2, 0]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(float(t.b.weight.abs().max()) > 0 for t in task.inline_tuners.values())
    assert all(torch.equal(host.model.state_dict()[n], t) for n, t in before.items())
