"""Callbacks are told what a training does, may end it, and survive that it is killed."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import Subset

from restuning import BestCheckpoint, Callback, EarlyStopping
from restuning._errors import CallbackError, RestuningWarning, TrainingError
from restuning.training import FitSettings, evaluate, fit
from restuning.training import checkpoint as checkpoints
from restuning.training.callbacks import Callbacks, Record
from restuning.training.run_report import _describe_notes

SMALL = {"epochs": 6, "batch_size": 8, "lr": 0.3, "checkpoint_every": 2}
STEPS_OF_AN_EPOCH = 3
"""20 points in batches of 8."""


def train(tuned, data, out, val=None, callbacks=(), resume=True, **more):
    settings = FitSettings(**{**SMALL, **more})
    return fit(
        tuned,
        data,
        val,
        settings=settings,
        out=out,
        progress=False,
        callbacks=callbacks,
        resume=resume,
    )


def weights(tuned):
    return {n: t.clone() for n, t in tuned.task.state_dict().items()}


def same(one, two):
    return all(torch.equal(one[n], two[n]) for n in one)


class Seen(Callback):
    """Writes down all that it is told, and counts across resumes."""

    def __init__(self):
        self.steps, self.epochs, self.ends, self.count = [], [], [], 0

    def on_step(self, record):
        self.count += 1
        self.steps.append(record)

    def on_epoch(self, record):
        self.epochs.append(record)

    def on_end(self, record):
        self.ends.append(record)

    def state(self):
        return {"count": self.count, "as a tensor": torch.tensor(self.count)}

    def restore(self, state):
        self.count = state.get("count", 0)
        assert self.count == int(state.get("as a tensor", 0))


class Fails(Callback):
    """Raises where it is told to, once."""

    def __init__(self, event, at):
        self.event, self.at = event, at

    def _fail(self, event, record):
        if (event, record.step) == (self.event, self.at):
            self.at = None
            raise ValueError("out of paper")

    def on_step(self, record):
        self._fail("on_step", record)

    def on_epoch(self, record):
        self._fail("on_epoch", record)

    def on_end(self, record):
        self._fail("on_end", record)


def at_epoch(epoch, score, loss=1.0, **more):
    return Record(epoch, 9, epoch, loss, {}, {"accuracy": score, "loss": loss}, "accuracy", **more)


def test_a_callback_is_told_every_step_every_epoch_and_the_end(tmp_path, make_tuned, points):
    seen = Seen()
    result = train(make_tuned(), points(), tmp_path, points(), [seen], epochs=2)
    assert [r.step for r in seen.steps] == list(range(1, 7))
    assert [r.epoch for r in seen.steps] == [1, 1, 1, 2, 2, 2]
    assert [(r.epoch, r.step) for r in seen.epochs] == [(1, 3), (2, 6)]
    assert [r.metrics["accuracy"] for r in seen.epochs] == [
        entry["val_accuracy"] for entry in result.history
    ]
    assert [r.score for r in seen.epochs] == [r.metrics["accuracy"] for r in seen.epochs]
    assert [r.rates["lr"] for r in seen.epochs] == [entry["lr"] for entry in result.history]
    first = sum(r.loss * size for r, size in zip(seen.steps[:3], (8, 8, 4), strict=True)) / 20
    assert first == pytest.approx(result.history[0]["loss"])
    assert len(seen.ends) == 1
    assert seen.ends[0].metrics["loss"] == result.val_loss


def test_without_validation_data_a_record_has_no_metrics(tmp_path, make_tuned, points):
    seen = Seen()
    train(make_tuned(), points(), tmp_path, callbacks=[seen], epochs=1)
    assert seen.epochs[0].metrics == {}
    assert seen.epochs[0].score is None


def test_looking_on_and_drawing_numbers_changes_no_weight(tmp_path, make_tuned, points):
    class Draws(Seen):
        def on_step(self, record):
            super().on_step(record)
            torch.manual_seed(record.step)
            torch.rand(5)

    one, two = make_tuned(), make_tuned()
    train(one, points(), tmp_path / "a", points(), ema=0.9)
    train(two, points(), tmp_path / "b", points(), [Draws()], ema=0.9)
    assert same(weights(one), weights(two))
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
        ]
        for name in "ab"
    ]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_record_gives_the_weights_that_would_be_left_now(tmp_path, make_tuned, points, ema):
    class Keeps(Callback):
        def on_end(self, record):
            self.last = record.weights()

        def on_step(self, record):
            self.step = record.weights()

    keeps, tuned = Keeps(), make_tuned()
    train(tuned, points(), tmp_path, points(), [keeps], ema=ema)
    assert same(keeps.last, weights(tuned))
    assert same(keeps.step, weights(tuned))


def test_early_stopping_waits_for_so_many_epochs_no_better_than_the_best():
    stopping = EarlyStopping(2)
    # An equal value is no better, one that is not defined neither.
    scores = [0.5, 0.6, 0.6, 0.7, None, 0.7]
    ends = [stopping.on_epoch(at_epoch(e, s)) for e, s in enumerate(scores, 1)]
    assert ends == [False] * 5 + [True]
    assert stopping.best_epoch == 4
    assert "best after epoch 4 and no better for 2" in stopping.ending()


def test_early_stopping_on_the_loss_takes_the_lower_one():
    stopping = EarlyStopping(1, monitor="loss")
    assert not stopping.on_epoch(at_epoch(1, 0.1, loss=2.0))
    assert not stopping.on_epoch(at_epoch(2, 0.1, loss=1.5))
    assert stopping.on_epoch(at_epoch(3, 0.9, loss=1.6))


@pytest.mark.parametrize("patience", [0, 1.5, True, "3"])
def test_a_patience_that_is_no_number_of_epochs_is_refused(patience):
    with pytest.raises(TrainingError, match="whole number"):
        EarlyStopping(patience)


def test_a_run_that_stops_early_says_so_and_leaves_its_last_weights(tmp_path, make_tuned, points):
    tuned = make_tuned()
    result = train(tuned, points(), tmp_path, points(), early_stopping=1, epochs=30)
    last = result.history[-1]["epoch"]
    assert last < 30
    assert f"ended after epoch {last}" in result.describe_end()
    assert "the last weights are left" in result.describe_end()
    assert result.kept is None
    # Trained anew to just there by hand, on the schedule of the whole run.
    other = make_tuned()

    class Until(Callback):
        def on_epoch(self, record):
            return record.epoch == last

    train(other, points(), tmp_path / "other", points(), [Until()], epochs=30)
    assert same(weights(tuned), weights(other))
    # A finished run says it again.
    again = train(make_tuned(), points(), tmp_path, points(), early_stopping=1, epochs=30)
    assert again == result


def test_the_best_weights_are_left_where_they_are_asked_for(tmp_path, make_tuned, points):
    tuned, seen = make_tuned(), Seen()
    result = train(tuned, points(), tmp_path, points(), [seen], keep_best=True, monitor="loss")
    losses = [entry["val_loss"] for entry in result.history]
    best = losses.index(min(losses))
    assert best < len(losses) - 1, "a run whose last epoch is its best tells nothing"
    assert result.kept == best + 1
    assert result.val_loss == losses[best]
    assert seen.ends[0].kept == result.kept
    assert f"the weights of epoch {result.kept} are left" in result.describe_end()
    torch.manual_seed(0)
    again = evaluate(tuned, points(), 8)
    assert again["accuracy"] == pytest.approx(result.val_accuracy, abs=0.11)
    # What a finished run opens is what it left.
    other = make_tuned()
    train(other, points(), tmp_path, points(), keep_best=True, monitor="loss")
    assert same(weights(tuned), weights(other))


@pytest.mark.parametrize("at", [2, 7, 10])
@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_run_that_is_interrupted_ends_as_a_whole_one_with_callbacks(
    tmp_path, make_tuned, points, at, ema
):
    more = {"early_stopping": 2, "keep_best": True, "monitor": "loss", "ema": ema}
    whole, broken = make_tuned(), make_tuned()
    seen = [Seen(), Seen()]
    first = train(whole, points(), tmp_path / "a", points(), [seen[0]], **more)
    with pytest.raises(CallbackError, match="out of paper"):
        train(broken, points(), tmp_path / "b", points(), [seen[1], Fails("on_step", at)], **more)
    broken = make_tuned(seed=5)
    second = train(broken, points(), tmp_path / "b", points(), [seen[1]], **more)
    assert same(weights(whole), weights(broken))
    assert (first.kept, first.ended, first.steps) == (second.kept, second.ended, second.steps)
    assert seen[0].count == seen[1].count == first.steps
    assert [r.epoch for r in seen[0].epochs] == [r.epoch for r in seen[1].epochs]


@pytest.mark.parametrize(
    ("event", "step"),
    [("on_step", 4), ("on_epoch", 3), ("on_epoch", 18), ("on_end", 18)],
)
def test_a_callback_that_raises_leaves_a_checkpoint_and_a_sentence(
    tmp_path, make_tuned, points, event, step
):
    whole, tuned, fails, seen = make_tuned(), make_tuned(), Fails(event, step), Seen()
    train(whole, points(), tmp_path / "whole", points())
    with pytest.raises(CallbackError, match=rf"(?s)Fails.{event}, step {step}.*out of paper.*do:"):
        train(
            tuned,
            points(),
            tmp_path / "run",
            points(),
            [seen, fails],
            checkpoint_every=1000,
        )
    newest = checkpoints.read_newest(tmp_path / "run" / "checkpoints")
    assert newest.state["step"] == step
    assert newest.state["result"] is None
    # The same again, which does not fail a second time, ends as if nothing had been.
    seen.epochs.clear()
    tuned = make_tuned(seed=5)
    train(tuned, points(), tmp_path / "run", points(), [seen, fails], checkpoint_every=1000)
    assert same(weights(whole), weights(tuned))
    texts = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "run")]
    counts = [[json.loads(line)["step"] for line in text.splitlines()] for text in texts]
    assert counts[0] == counts[1]
    # Whoever saw the epoch in which another failed sees it again.
    assert (event, step) != ("on_epoch", 3) or seen.epochs[0].epoch == 1


def test_the_error_of_a_callback_is_the_cause(tmp_path, make_tuned, points):
    with pytest.raises(CallbackError) as caught:
        train(make_tuned(), points(), tmp_path, callbacks=[Fails("on_step", 1)])
    assert isinstance(caught.value.__cause__, ValueError)


def test_what_a_checkpoint_cannot_hold_is_refused_by_name(tmp_path, make_tuned, points):
    class Holds(Callback):
        def state(self):
            return {"file": object()}

    with pytest.raises(CallbackError, match=r"Holds.state"):
        train(make_tuned(), points(), tmp_path, callbacks=[Holds()])


def test_a_run_does_not_go_on_with_another_patience(tmp_path, make_tuned, points):
    with pytest.raises(CallbackError):
        train(make_tuned(), points(), tmp_path, points(), [EarlyStopping(3), Fails("on_step", 2)])
    with pytest.raises(TrainingError, match="callbacks"):
        train(make_tuned(), points(), tmp_path, points(), [EarlyStopping(4)])
    with pytest.raises(TrainingError, match="early_stopping"):
        train(make_tuned(), points(), tmp_path, points(), [EarlyStopping(3)], early_stopping=2)
    # One that only looks on may come and go.
    train(make_tuned(), points(), tmp_path, points(), [Seen(), EarlyStopping(3)])


def test_a_run_of_before_these_settings_is_the_same_run():
    assert not {"early_stopping", "keep_best", "monitor"} & set(FitSettings().identity())
    assert FitSettings(early_stopping=2).identity()["early_stopping"] == 2


@pytest.mark.parametrize("callback", [EarlyStopping(2), BestCheckpoint()])
def test_following_validation_without_any_is_refused(tmp_path, make_tuned, points, callback):
    with pytest.raises(TrainingError, match=type(callback).__name__):
        train(make_tuned(), points(), tmp_path, None, [callback])
    assert not (tmp_path / "checkpoints").exists()


def test_a_method_that_nothing_calls_and_an_object_that_is_no_callback_are_refused(points):
    class Typing(Callback):
        def on_epochs(self, record):
            pass

    for wrong, says in ((Typing(), "on_epochs"), (print, "no callback|class of its own")):
        with pytest.raises(TrainingError, match=says):
            Callbacks([wrong])
    twice = Seen()
    with pytest.raises(TrainingError, match="twice"):
        Callbacks([twice, twice])


def test_a_callback_that_is_given_to_a_second_run_begins_anew(tmp_path, make_tuned, points):
    stopping, seen = EarlyStopping(1), Seen()
    results = [
        train(make_tuned(), points(), tmp_path / name, points(), [stopping, seen], epochs=30)
        for name in "ab"
    ]
    assert results[0].steps == results[1].steps
    assert seen.count == results[1].steps


def test_callbacks_of_a_task_that_is_solved_are_told_once_and_it_is_said(tmp_path):
    import restuning

    digits, seen = restuning.load_data("digits", restuning.load_backbone("restuning-tiny")), Seen()
    few = digits.with_splits(
        train=Subset(digits.train, range(200)), val=Subset(digits.val, range(40)), test=None
    )
    with pytest.warns(RestuningWarning, match="solved in closed form"):
        restuning.train(few, method="ridge", out=tmp_path, callbacks=[seen], store=False)
    assert (len(seen.steps), len(seen.epochs), len(seen.ends)) == (0, 1, 1)
    assert seen.epochs[0].score > 0.5


def test_train_refuses_callbacks_of_several_runs_and_stopping_of_a_choice(tmp_path):
    import restuning

    for method in ("auto", ["linear", "ridge"]):
        with pytest.raises(TrainingError, match="follow one run"):
            restuning.train("digits", method=method, out=tmp_path, callbacks=[Seen()])
    with pytest.raises(TrainingError, match="early-stopping"):
        restuning.train("digits", method="auto", out=tmp_path, early_stopping=3)
    with pytest.raises(TrainingError, match="without validation"):
        restuning.train(
            "digits", method="linear", out=tmp_path, early_stopping=3, final=True, store=False
        )
    assert not list(tmp_path.glob("**/*.task"))


def test_stacked_runs_are_not_stopped_early_without_a_word():
    from restuning.training.parallel_runs import train_in_parallel

    for more in ({"early_stopping": 2}, {"keep_best": True}):
        with pytest.raises(TrainingError, match="apart"):
            train_in_parallel(
                SimpleNamespace(), [SimpleNamespace()], [FitSettings(**more)], None, None
            )


@pytest.mark.parametrize(
    ("metrics", "told"),
    [
        ({}, None),
        (
            {"ended": "it was best", "kept_epoch": 2},
            "Ended after epoch 3: it was best; the weights of epoch 2 are left",
        ),
        ({"ended": "it was best"}, "Ended after epoch 3: it was best; the last weights are left."),
        ({"kept_epoch": 2}, "The weights of epoch 2 are left, the best on validation."),
    ],
)
def test_the_page_of_a_run_says_that_it_ended_early_and_which_weights_it_left(metrics, told):
    notes = _describe_notes(metrics, None, {}, [{"epoch": 1}, {"epoch": 3}])
    assert len(notes) == (told is not None)
    assert told is None or notes[0].startswith(told)
    # A log that is gone.
    if "ended" in metrics:
        (note,) = _describe_notes(metrics, None, {})
        assert note.startswith("Ended before its last epoch: it was best")
