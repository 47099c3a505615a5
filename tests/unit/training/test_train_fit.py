import errno
import json
import os
import random
import signal
import warnings

import numpy as np
import pytest
import torch

from restuning._errors import DivergedError, MissingExtraError, TrainingError
from restuning.training import FitSettings, evaluate, fit, fit_until
from restuning.training import checkpoint as checkpoints

SMALL = {"epochs": 3, "batch_size": 8, "lr": 0.05, "checkpoint_every": 2}
PIECES = 1e-6
"""Pieces of a batch are summed in another order."""


def weights(tuned):
    return {n: t.clone() for n, t in tuned.task.state_dict().items()}


def same(one, two):
    return all(torch.equal(one[n], two[n]) for n in one)


def train(tuned, data, out, val=None, resume=True, progress=False, **more):
    settings = FitSettings(**{**SMALL, **more})
    return fit(tuned, data, val, settings=settings, out=out, resume=resume, progress=progress)


def test_training_learns_and_reports_everything(tmp_path, make_tuned, points):
    tuned, data = make_tuned(), points(60)
    result = train(tuned, data, tmp_path, points(60), epochs=15)
    assert result.val_accuracy > 0.8
    assert result.train_loss < result.history[0]["loss"]
    assert result.steps == 15 * 8
    assert [h["epoch"] for h in result.history] == list(range(1, 16))
    assert result.seconds > 0
    assert result.memory_measure
    found = evaluate(tuned, points(60), 16)
    assert found["count"] == 60
    assert not tuned.task.training
    assert all(p.grad is None for p in tuned.parameters())


def test_the_folder_holds_a_log_curves_and_one_small_checkpoint(tmp_path, make_tuned, points):
    train(make_tuned(), points(), tmp_path, points())
    names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert names == {"log.jsonl", "curves.png", "checkpoints/final.safetensors"}
    lines = [json.loads(t) for t in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "val_loss" in x] == [3, 6, 9]
    assert all(x["lr"] > 0 and x["loss"] > 0 for x in lines)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(tmp_path, make_tuned, points):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tuned = make_tuned()
        torch.rand(len(found) + 1)
        train(tuned, points(), tmp_path / name, seed=seed)
        found.append(weights(tuned))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_every_epoch_sees_every_example_once_in_another_order(tmp_path, make_tuned, points):
    data = points(20)
    train(make_tuned(), data, tmp_path)
    epochs = [data.seen[i : i + 20] for i in (0, 20, 40)]
    assert all(sorted(e) == list(range(20)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_pieces_of_a_batch_make_the_same_step(tmp_path, make_tuned, points):
    found = []
    for pieces in (1, 3):
        tuned = make_tuned()
        tuned.task.drop.p = 0.0
        train(tuned, points(), tmp_path / str(pieces), accumulate=pieces)
        found.append(weights(tuned))
    for name in found[0]:
        assert torch.allclose(found[0][name], found[1][name], atol=PIECES)


def test_inputs_by_name_are_called_by_name(tmp_path, make_tuned, points):
    one, two = make_tuned(), make_tuned()
    train(one, points(), tmp_path / "a", points())
    train(two, points(named=True), tmp_path / "b", points(named=True))
    assert same(weights(one), weights(two))


def test_the_callers_random_numbers_and_forward_are_left_alone(tmp_path, make_tuned, points):
    tuned = make_tuned()
    torch.manual_seed(4), random.seed(4), np.random.seed(4)
    wanted = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(4), random.seed(4), np.random.seed(4)
    train(tuned, points(), tmp_path, precision="bf16")
    assert (torch.rand(1).item(), random.random(), np.random.rand()) == wanted
    assert "forward" not in vars(tuned)
    assert tuned(torch.randn(2, 6)).dtype == torch.float32


def test_two_precisions_can_be_used_one_after_the_other(tmp_path, make_tuned, points):
    for precision in ("bf16", "no", "bf16"):
        train(make_tuned(), points(), tmp_path / precision, precision=precision)


def test_fp16_without_a_gpu_is_refused_in_words(tmp_path, make_tuned, points):
    with pytest.raises(TrainingError, match="bf16"):
        train(make_tuned(), points(), tmp_path, precision="fp16")
    train(make_tuned(), points(), tmp_path)


@pytest.mark.parametrize(
    ("at", "ema"),
    [(29, None), (13, 0.9)]
    + [
        pytest.param(at, ema, marks=pytest.mark.slow)
        for at in (1, 13, 29, 45, 59)
        for ema in (None, 0.9)
        if (at, ema) not in ((29, None), (13, 0.9))
    ],
)
def test_a_run_stopped_anywhere_goes_on_bit_equal(tmp_path, make_tuned, points, at, ema):
    whole = make_tuned()
    expected = train(whole, points(), tmp_path / "whole", points(7), ema=ema)

    def stop(seen):
        if seen == at:
            raise RuntimeError("stopped here")

    data = points()
    data.broken = stop
    with pytest.raises(RuntimeError, match="stopped here"):
        train(make_tuned(), data, tmp_path / "halves", points(7), ema=ema)
    halves = make_tuned(seed=9)
    result = train(halves, points(), tmp_path / "halves", points(7), ema=ema)
    assert same(weights(whole), weights(halves))
    logs = [
        [{**json.loads(t), "seconds": 0} for t in (tmp_path / n / "log.jsonl").open()]
        for n in ("whole", "halves")
    ]
    assert logs[0] == logs[1]
    assert (result.val_loss, result.train_loss) == (expected.val_loss, expected.train_loss)


@pytest.mark.skipif(os.name == "nt", reason="no signals to oneself")
@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_signal_ends_the_step_saves_it_and_is_raised(tmp_path, make_tuned, points, number, kind):
    before = signal.getsignal(number)
    data = points()
    data.broken = lambda seen: os.kill(os.getpid(), number) if seen == 10 else None
    with pytest.raises(kind):
        train(make_tuned(), data, tmp_path, checkpoint_every=100)
    assert signal.getsignal(number) is before
    assert checkpoints.read_newest(tmp_path / "checkpoints").state["step"] == 2
    whole, resumed = make_tuned(), make_tuned(seed=4)
    train(whole, points(), tmp_path / "whole")
    train(resumed, points(), tmp_path)
    assert same(weights(whole), weights(resumed))


def test_worker_processes_do_not_change_the_weights(tmp_path, make_tuned, points):
    alone, helped = make_tuned(), make_tuned()
    train(alone, points(), tmp_path / "alone", points())
    train(helped, points(), tmp_path / "helped", points(), workers=2)
    assert same(weights(alone), weights(helped))


def test_skipped_batches_are_not_loaded(tmp_path, make_tuned, points):
    data = points()
    data.broken = lambda seen: 1 / 0 if seen == 45 else None
    with pytest.raises(ZeroDivisionError):
        train(make_tuned(), data, tmp_path)
    again = points()
    train(make_tuned(), again, tmp_path)
    # Stopped in step 7 of 9; the last checkpoint is of step 6, the end of epoch 2.
    assert len(again.seen) == 20


def test_a_finished_run_returns_its_result_and_weights_at_once(tmp_path, make_tuned, points):
    first = make_tuned()
    expected = train(first, points(), tmp_path, points(), ema=0.9)
    (tmp_path / "curves.png").unlink()
    again, data = make_tuned(seed=5), points()
    assert train(again, data, tmp_path, points(), ema=0.9) == expected
    assert data.seen == []
    assert same(weights(first), weights(again))
    assert (tmp_path / "curves.png").exists()


def test_without_resume_a_run_starts_over(tmp_path, make_tuned, points):
    train(make_tuned(), points(), tmp_path)
    data = points()
    train(make_tuned(), data, tmp_path, resume=False, lr=0.01)
    assert len(data.seen) == 60
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("change", "named"), [({"lr": 0.02}, "lr: 0.05 then, 0.02 now"), ({"seed": 3}, "seed")]
)
def test_other_settings_in_the_same_folder_are_named(tmp_path, make_tuned, points, change, named):
    train(make_tuned(), points(), tmp_path)
    with pytest.raises(TrainingError, match=named):
        train(make_tuned(), points(), tmp_path, **change)


def test_settings_without_effect_on_the_weights_may_change(tmp_path, make_tuned, points):
    train(make_tuned(), points(), tmp_path)
    train(make_tuned(), points(), tmp_path, checkpoint_every=7)


def test_other_data_in_the_same_folder_are_named(tmp_path, make_tuned, points):
    train(make_tuned(), points(), tmp_path)
    with pytest.raises(TrainingError, match="training examples: 20 then, 21 now"):
        train(make_tuned(), points(21), tmp_path)


def test_a_loss_that_is_not_finite_names_step_and_rate_and_keeps_a_checkpoint(
    tmp_path, make_tuned, points
):
    data = points()

    def poison(seen):
        if seen == 30:
            data.x[:] = float("nan")

    data.broken = poison
    with pytest.raises(DivergedError, match=r"(?s)step 5, learning rate .*nan.*lower lr"):
        train(make_tuned(), data, tmp_path, epochs=4)
    kept = checkpoints.read_newest(tmp_path / "checkpoints")
    assert kept.state["step"] == 4
    assert all(t.isfinite().all() for t in kept.tensors.values())


def test_a_full_disk_names_the_file_and_loses_nothing(tmp_path, make_tuned, points, monkeypatch):
    genuine = checkpoints.save_file
    calls = []

    def full(tensors, path, metadata):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        genuine(tensors, path, metadata=metadata)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(TrainingError, match=r"(?s)step-000000004.*No space left"):
        train(make_tuned(), points(), tmp_path)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-000000000.safetensors", "step-000000002.safetensors"]
    whole = make_tuned()
    train(whole, points(), tmp_path / "whole")
    resumed = make_tuned(seed=8)
    train(resumed, points(), tmp_path)
    assert same(weights(whole), weights(resumed))


def test_a_label_outside_the_classes_is_refused_in_words(tmp_path, make_tuned, points):
    data = points()
    data.y[3] = 7
    with pytest.raises(TrainingError, match=r"(?s)label 7, 3 classes.*num_classes"):
        train(make_tuned(), data, tmp_path)
    with pytest.raises(TrainingError, match="label 7"):
        evaluate(make_tuned(), data)


def test_what_cannot_be_trained_is_refused_in_words(tmp_path, make_tuned, points):
    frozen = make_tuned()
    frozen.task.requires_grad_(False)
    for tuned, data, val, says in (
        (frozen, points(), None, "nothing to train"),
        (torch.nn.Linear(6, 3), points(), None, "Tuned"),
        (make_tuned(), points(0), None, "empty"),
        (make_tuned(), points(), points(0), "validation data are empty"),
        (make_tuned(), iter([]), None, "map-style"),
    ):
        with pytest.raises(TrainingError, match=says):
            train(tuned, data, tmp_path, val)


def test_a_file_in_the_place_of_the_folder_is_an_error_in_words(tmp_path, make_tuned, points):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        train(make_tuned(), points(), tmp_path / "file")


def test_a_missing_tracker_says_how_to_install_it(tmp_path, make_tuned, points, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(MissingExtraError, match=r"restuning\[tracking\]"):
        train(make_tuned(), points(), tmp_path, track=("wandb",))


def test_the_bar_can_be_forced_and_does_not_change_the_run(tmp_path, make_tuned, points, capsys):
    one, two = make_tuned(), make_tuned()
    train(one, points(), tmp_path / "a", points())
    assert capsys.readouterr().err == ""
    train(two, points(), tmp_path / "b", points(), progress="force")
    assert "3/3" in capsys.readouterr().err
    assert same(weights(one), weights(two))


def test_without_a_terminal_every_epoch_is_one_line(tmp_path, make_tuned, points, capsys):
    train(make_tuned(), points(), tmp_path, points(), progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    assert all("validation accuracy" in line for line in lines)


def test_only_the_mean_weights_are_left_when_a_mean_is_asked_for(tmp_path, make_tuned, points):
    plain, mean = make_tuned(), make_tuned()
    train(plain, points(), tmp_path / "a", points())
    result = train(mean, points(), tmp_path / "b", points(), ema=0.9)
    assert not same(weights(plain), weights(mean))
    assert evaluate(mean, Still(points()), 8)["count"] == 20
    assert result.val_loss is not None


class Still(torch.utils.data.Dataset):
    """The same points without noise."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data.x[index], int(self.data.y[index])


def test_the_last_validation_figure_is_that_of_the_weights_left(tmp_path, make_tuned, points):
    tuned = make_tuned()
    result = train(tuned, points(), tmp_path, Still(points()), ema=0.9)
    assert evaluate(tuned, Still(points()), 8)["loss"] == result.val_loss


def test_evaluation_does_not_depend_on_the_batch_and_leaves_the_mode(make_tuned, points):
    tuned = make_tuned().train()
    found = [evaluate(tuned, Still(points()), size) for size in (1, 7, 20)]
    assert len({f["accuracy"] for f in found}) == 1
    assert found[0]["loss"] == pytest.approx(found[2]["loss"], abs=PIECES)
    assert tuned.training and tuned.task.drop.training


def test_nothing_is_warned_about_in_a_plain_run(tmp_path, make_tuned, points):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        train(make_tuned(), points(), tmp_path, points())


def test_a_run_ends_after_the_epoch_its_caller_has_seen_enough_of(tmp_path, make_tuned, points):
    shown = []

    def stop(history):
        shown.append(len(history))
        return len(history) == 2

    settings = FitSettings(**{**SMALL, "epochs": 5})
    kept = make_tuned()
    result = fit_until(stop, kept, points(), points(), settings=settings, out=tmp_path)
    assert shown == [1, 2]
    assert len(result.history) == 2
    assert result.val_accuracy == result.history[-1]["val_accuracy"]
    again = make_tuned(1)
    assert fit_until(stop, again, points(), points(), settings=settings, out=tmp_path) == result
    assert same(weights(again), weights(kept))
