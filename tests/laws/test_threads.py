"""Many threads on one backbone, every method, and forwards that fail: each answer is its own task's."""

import random
import threading

import pytest
import torch

from awake import tiny_vit, wake
from restuning import Bank, Host, PerRow, Tuned, methods
from restuning.host.call import current_call
from restuning.tuners import read_real_tokens, read_timestep

THREADS = 4
FAILING = 0.1
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
OWN = {"vpt-deep": {}, "ridge": None, "ensemble": None, "knn": None}
"""Options by method; None where a task answers nothing before it is fitted."""


class Injected(Exception):
    """Raised inside a block."""


class Faults:
    """A hook that raises in the threads that asked for it."""

    def __init__(self):
        self.wanted = threading.local()

    def __call__(self, *_):
        if getattr(self.wanted, "now", False):
            raise Injected


def tasks_of(host):
    names = [name for name in methods.names() if OWN.get(name, {}) is not None]
    tasks = {}
    for seed, name in enumerate((*names, *names)):
        task = wake(methods.build(name, host, num_classes=4), seed)
        tasks[f"{name}, {seed}"] = Tuned(host, task).eval()
    return tasks


def ways_to_ask(host):
    """Functions without arguments that give an answer, by name."""
    asked = {name: (lambda tuned=tuned: tuned(X)) for name, tuned in tasks_of(host).items()}
    inside = [
        wake(methods.build("res-tuning", host), 1),
        wake(methods.build("res-tuning-bypass", host), 2),
    ]

    def used(task):
        def ask():
            with host.using(task):
                return host.model(X)

        return ask

    asked |= {f"inside {i}": used(task) for i, task in enumerate((*inside, PerRow(inside)))}
    bank = Bank(
        {n: wake(methods.build("res-tuning-bypass", host, num_classes=4), n) for n in (5, 6)}
    )

    def ask_bank():
        return torch.stack(list(bank(host.features(X, keep=bank.keep)).values()))

    return {**asked, "bank": ask_bank, "bare": lambda: host(X)}


def state_of(model):
    """What a forward must not change: tensors, their contents and places, hooks, attributes."""
    modules = dict(model.named_modules())
    return {
        "tensors": {
            n: (id(t), t._version, t.detach().clone())
            for n, t in (*model.named_parameters(), *model.named_buffers())
        },
        "hooks": {
            n: [*m._forward_hooks.items(), *m._forward_pre_hooks.items()]
            for n, m in modules.items()
        },
        "attributes": {n: {k: id(v) for k, v in vars(m).items()} for n, m in modules.items()},
    }


def same_state(ours, theirs):
    tensors, others = ours.pop("tensors"), theirs.pop("tensors")
    return ours == theirs and all(
        a[:2] == others[n][:2] and torch.equal(a[2], others[n][2]) for n, a in tensors.items()
    )


def ask_in_threads(forwards):
    host = Host(tiny_vit(), X[:1])
    asked = ways_to_ask(host)
    wanted = {}
    for gradient in (False, True):
        with torch.set_grad_enabled(gradient):
            wanted |= {(name, gradient): ask().detach() for name, ask in asked.items()}
    faults = Faults()
    host.model.blocks[1].mlp.register_forward_hook(faults)
    host.model.blocks[2].register_forward_pre_hook(faults)
    before, digest = state_of(host.model), host.digest()
    told, lock = {"right": 0, "wrong": [], "failed": 0, "left": []}, threading.Lock()

    def work(number):
        torch.set_num_threads(1)
        draw = random.Random(number)
        for _ in range(forwards):
            name, gradient = draw.choice(list(asked)), draw.random() < 0.3
            faults.wanted.now = draw.random() < FAILING
            try:
                with torch.set_grad_enabled(gradient):
                    answer = asked[name]()
                if gradient and answer.requires_grad:
                    answer.square().sum().backward()
            except Injected:
                answer = None
            left = (current_call(host._slot), read_real_tokens(), read_timestep())
            with lock:
                if faults.wanted.now and answer is None:
                    told["failed"] += 1
                elif answer is not None and torch.equal(answer, wanted[name, gradient]):
                    told["right"] += 1
                else:
                    told["wrong"].append((name, gradient))
                if any(each is not None for each in left):
                    told["left"].append(name)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told["wrong"] == [] and told["left"] == []
    assert told["right"] + told["failed"] == THREADS * forwards
    assert told["failed"] > 0
    assert host.digest() == digest
    assert same_state(state_of(host.model), before)
    host.release()
    # Two of ours.
    hooks = [h for m in host.model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert len(hooks) == 2


def test_every_answer_is_its_own_task_s_and_nothing_stays_of_forwards_that_fail():
    ask_in_threads(25)


@pytest.mark.slow
def test_a_thousand_forwards_in_each_of_four_threads_leave_nothing_behind():
    ask_in_threads(1000)
