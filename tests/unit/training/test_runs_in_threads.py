"""One run at a time in a process; forwards in other threads beside it."""

import threading

import pytest
import torch
from torch.utils.data import TensorDataset

import restuning
from awake import tiny_vit, wake
from restuning import FitSettings, Host, Tuned, fit, methods
from restuning._errors import TrainingError
from restuning.runtime.randomness import preserve_randomness
from restuning.search.sweep import sweep
from restuning.training import together

X = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1))
DATA = TensorDataset(X, torch.arange(24) % 3)
SETTINGS = FitSettings(epochs=3, batch_size=8, seed=1)


class Waiting(TensorDataset):
    """Tells that it was read, and goes on when it may."""

    def __init__(self):
        super().__init__(*DATA.tensors)
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __getitem__(self, index):
        self.reached.set()
        assert self.go_on.wait(60)
        return super().__getitem__(index)


def tuned_on(host, method="res-tuning"):
    torch.manual_seed(0)
    # What is dropped is drawn from the generators of the process.
    return Tuned(host, methods.build(method, host, num_classes=3, drop_path=0.3))


def in_thread(work):
    told = []

    def run():
        torch.set_num_threads(1)
        try:
            told.append(work())
        except TrainingError as error:
            told.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, told


@pytest.fixture(scope="module")
def host():
    return Host(tiny_vit(), X[:1])


@pytest.fixture(scope="module")
def alone(host, tmp_path_factory):
    tuned = tuned_on(host)
    fit(tuned, DATA, settings=SETTINGS, out=tmp_path_factory.mktemp("alone"), progress=False)
    return tuned.task.state_dict()


def same(ours, theirs):
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_second_run_in_another_thread_is_refused_and_the_first_is_what_it_is_alone(
    host, alone, tmp_path
):
    first, second, data = tuned_on(host), tuned_on(host), Waiting()
    thread, told = in_thread(
        lambda: fit(first, data, settings=SETTINGS, out=tmp_path / "first", progress=False)
    )
    assert data.reached.wait(60)
    with pytest.raises(TrainingError, match="another thread of this process is training"):
        fit(second, DATA, settings=SETTINGS, out=tmp_path / "second", progress=False)
    assert not (tmp_path / "second").exists()
    data.go_on.set()
    thread.join()
    assert not isinstance(told[0], TrainingError)
    assert same(first.task.state_dict(), alone)
    # Afterwards it may.
    fit(second, DATA, settings=SETTINGS, out=tmp_path / "second", progress=False)
    assert same(second.task.state_dict(), alone)


def test_forwards_in_other_threads_beside_a_run_are_right_and_leave_it_what_it_is_alone(
    host, alone, tmp_path
):
    others = [
        Tuned(host, wake(methods.build(name, host, num_classes=4), 3)).eval()
        for name in ("res-tuning", "full", "res-tuning-bypass")
    ]
    with torch.no_grad():
        wanted = [other(X[:2]) for other in others]
    ended, wrong, asked = threading.Event(), [], []

    def ask():
        with torch.no_grad():
            while not ended.is_set():
                asked.append(1)
                wrong.extend(
                    1 for o, w in zip(others, wanted, strict=True) if not torch.equal(o(X[:2]), w)
                )

    thread, _ = in_thread(ask)
    tuned = tuned_on(host)
    try:
        fit(tuned, DATA, settings=SETTINGS, out=tmp_path, progress=False)
    finally:
        ended.set()
        thread.join()
    assert asked and not wrong
    assert same(tuned.task.state_dict(), alone)


def test_nothing_is_drawn_for_a_run_that_is_refused(tmp_path):
    with together.alone():
        before = torch.get_rng_state()
        for call in (
            lambda: restuning.train("digits", method="linear", out=tmp_path / "run"),
            lambda: sweep(None, "linear", {}, seeds=[0], settings=SETTINGS, out=tmp_path / "sweep"),
        ):
            thread, told = in_thread(call)
            thread.join()
            assert "another thread of this process is training" in str(told[0])
        assert torch.equal(torch.get_rng_state(), before)
    assert not list(tmp_path.iterdir())


def test_a_run_inside_a_run_of_the_same_thread_is_made(host, alone, tmp_path):
    inner = tuned_on(host)

    class Inside(TensorDataset):
        def __getitem__(self, index):
            if not (tmp_path / "inner").exists():
                with preserve_randomness():
                    fit(inner, DATA, settings=SETTINGS, out=tmp_path / "inner", progress=False)
            return super().__getitem__(index)

    outer = tuned_on(host)
    fit(outer, Inside(*DATA.tensors), settings=SETTINGS, out=tmp_path / "outer", progress=False)
    assert same(inner.task.state_dict(), alone) and same(outer.task.state_dict(), alone)
