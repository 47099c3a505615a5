"""Trackers are told of a run by its name, in groups, and are told of the same run when it goes on."""

import json
import math
from dataclasses import replace

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from restuning._errors import CallbackError, MissingExtraError, RestuningWarning, TrainingError
from restuning.cli.common import Track
from restuning.training import Callback, FitSettings, fit
from restuning.training.trackers import TRACKERS, group_figures

SMALL = {"epochs": 3, "batch_size": 8, "lr": 0.05, "checkpoint_every": 2}
EPOCHS = [3, 6, 9]
"""Steps of the reviews: 20 points in batches of 8."""


class Mine(GeneralTracker):
    """A tracker that writes down what it is told."""

    name = "mine"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, broken=""):
        super().__init__()
        self.broken, self.config, self.logged, self.images = broken, [], [], []
        self.finished = 0

    @property
    def tracker(self):
        return self.logged

    def _fail(self, where):
        if self.broken == where:
            raise ConnectionError("no network")

    def store_init_configuration(self, values):
        self._fail("config")
        self.config.append(values)

    def log(self, values, step=None, **more):
        self._fail("log")
        self.logged.append((step, values))

    def log_images(self, values, step=None, **more):
        self.images.append((step, values))

    def finish(self):
        self.finished += 1


class StopsAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, record):
        if record.step == self.step:
            raise ValueError("stop here")


def train(tuned, data, out, track, val=None, **more):
    settings = FitSettings(**{**SMALL, "track": track})
    return fit(tuned, data, val, settings=settings, out=out, progress=False, **more)


def interrupted(make_tuned, points, out, track):
    """A run that ends within its second epoch, and then goes on."""
    with pytest.raises(CallbackError):
        train(make_tuned(), points(), out, track, points(), callbacks=[StopsAt(5)])
    return train(make_tuned(), points(), out, track, points())


def test_an_object_is_told_figures_in_groups_the_settings_and_the_curves(
    tmp_path, make_tuned, points
):
    mine = Mine()
    result = train(
        make_tuned(), points(), tmp_path / "pets", [mine], points(), about={"method": "linear"}
    )
    told = [(step, values) for step, values in mine.logged if "validation/loss" in values]
    assert [step for step, _ in told] == EPOCHS
    for (_, values), entry in zip(told, result.history, strict=True):
        assert values["validation/accuracy"] == entry["val_accuracy"]
        assert values["train/epoch_loss"] == entry["loss"]
        assert values["train/lr"] == entry["lr"]
    assert any("train/loss" in values for _, values in mine.logged)
    assert {name.partition("/")[0] for _, values in mine.logged for name in values} == {
        "train",
        "validation",
    }
    (config,) = mine.config
    assert (config["epochs"], config["method"]) == (3, "linear")
    assert config["folder"].endswith("pets")
    ((step, pictures),) = mine.images
    assert step == EPOCHS[-1]
    assert pictures["curves"][0].shape[-1] == 3
    assert mine.finished == 1


def test_a_run_with_trackers_is_the_run_without(tmp_path, make_tuned, points):
    one, two = make_tuned(), make_tuned()
    train(one, points(), tmp_path / "a", [Mine()], points())
    train(two, points(), tmp_path / "b", (), points())
    pairs = zip(one.task.parameters(), two.task.parameters(), strict=True)
    assert all((a == b).all() for a, b in pairs)


def test_a_tracker_that_fails_is_left_out_with_a_warning(tmp_path, make_tuned, points):
    broken, whole = Mine("log"), Mine()
    broken.name = "broken"
    with pytest.warns(RestuningWarning, match=r"(?s)broken.*no network.*log\.jsonl") as caught:
        result = train(make_tuned(), points(), tmp_path, [broken, whole], points())
    assert len(caught) == 1
    assert result.steps == EPOCHS[-1]
    assert whole.logged


def test_a_tracker_that_does_not_start_is_told_before_the_first_step(tmp_path, make_tuned, points):
    with pytest.raises(TrainingError, match=r"(?s)did not start.*mine.*no network"):
        train(make_tuned(), points(), tmp_path, [Mine("config")])
    # Nothing is in the way of the same without it.
    assert train(make_tuned(), points(), tmp_path, ()).steps == EPOCHS[-1]


def test_settings_are_told_once_and_again_to_a_tracker_that_is_new(tmp_path, make_tuned, points):
    mine = Mine()
    interrupted(make_tuned, points, tmp_path, [mine])
    assert len(mine.config) == 1
    late = Mine()
    with pytest.raises(CallbackError):
        train(make_tuned(), points(), tmp_path / "b", (), points(), callbacks=[StopsAt(5)])
    train(make_tuned(), points(), tmp_path / "b", [late], points())
    assert len(late.config) == 1
    assert [s for s, v in late.logged if "validation/loss" in v] == EPOCHS[1:]


@pytest.mark.parametrize("track", ["nothing", "all", 3, [None], ["tensorboard", "tensorboard"]])
def test_what_is_no_tracker_is_refused(track):
    with pytest.raises(TrainingError, match=r"track"):
        FitSettings(track=track)


def test_an_unknown_name_is_answered_with_all_that_are_known():
    with pytest.raises(TrainingError) as caught:
        FitSettings(track="neptune")
    assert all(name in str(caught.value) for name in TRACKERS)


def test_every_tracker_of_accelerate_is_known_and_in_the_help():
    # Some came later than the oldest Accelerate that is allowed.
    assert set(LOGGER_TYPE_TO_CLASS) <= set(TRACKERS)
    (told,) = [each.help for each in Track.__metadata__]
    assert all(name in told for name in TRACKERS)


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_says_what_to_install(
    tmp_path, make_tuned, points, monkeypatch, name
):
    gone = replace(TRACKERS[name], module="no_such_module")
    monkeypatch.setitem(TRACKERS, name, gone)
    with pytest.raises(MissingExtraError) as caught:
        train(make_tuned(), points(), tmp_path, name)
    assert f"pip install {gone.package}" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_tracker_that_accelerate_would_leave_out_without_a_word_is_refused(
    tmp_path, make_tuned, points, monkeypatch
):
    # The module is there, and Accelerate does not take its version.
    monkeypatch.setitem(TRACKERS, "aim", replace(TRACKERS["aim"], module="json"))
    with pytest.raises(MissingExtraError, match="pip install -U accelerate"):
        train(make_tuned(), points(), tmp_path, "aim")


def test_objects_do_not_enter_files_and_names_do():
    settings = FitSettings(track=["tensorboard", Mine()])
    assert json.loads(json.dumps(settings.to_dict()))["track"] == ["tensorboard"]


def test_groups_have_the_names_of_tasks_and_no_value_that_is_no_number():
    line = {"step": 4, "loss": {"style": 0.5, "other": 0.25}, "lr": 1e-3, "note": "x", "on": True}
    assert group_figures(line, review=False) == {
        "train/loss/style": 0.5,
        "train/loss/other": 0.25,
        "train/lr": 1e-3,
    }
    review = {"epoch": 1, "loss": 0.5, "r2": None, "val_loss": 0.75, "val_r2": None}
    assert group_figures(review, review=True) == {
        "train/epoch": 1,
        "train/epoch_loss": 0.5,
        "validation/loss": 0.75,
    }


def test_tensorboard_shows_a_run_that_was_interrupted_as_one(tmp_path, make_tuned, points):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = interrupted(make_tuned, points, tmp_path, "tensorboard")
    events = EventAccumulator(str(tmp_path / "restuning"))
    events.Reload()
    tags = events.Tags()
    assert tags["images"] == ["curves"]
    found = events.Scalars("validation/accuracy")
    assert [each.step for each in found] == EPOCHS
    for each, entry in zip(found, result.history, strict=True):
        assert math.isclose(each.value, entry["val_accuracy"], rel_tol=1e-6)


def test_mlflow_continues_the_run_of_its_folder(tmp_path, make_tuned, points, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    try:
        result = interrupted(make_tuned, points, tmp_path / "pets", "mlflow")
        client = mlflow.MlflowClient()
        (experiment,) = mlflow.search_experiments(filter_string="name = 'restuning'")
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.info.run_name == "pets"
        assert run.info.status == "FINISHED"
        assert run.data.params["epochs"] == "3"
        found = client.get_metric_history(run.info.run_id, "validation/accuracy")
        assert [each.step for each in found] == EPOCHS
        assert [each.value for each in found] == [e["val_accuracy"] for e in result.history]
        assert "curves.png" in [each.path for each in client.list_artifacts(run.info.run_id)]
    finally:
        mlflow.set_tracking_uri(before)


def test_wandb_continues_the_run_of_its_folder(tmp_path, make_tuned, points, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    opened, init = [], wandb.init

    def watched(**how):
        opened.append(how)
        return init(**how)

    monkeypatch.setattr(wandb, "init", watched)
    interrupted(make_tuned, points, tmp_path / "pets", "wandb")
    assert [how["name"] for how in opened] == ["pets", "pets"]
    assert opened[0]["id"] == opened[1]["id"]
    assert list((tmp_path / "pets").rglob("*.wandb"))
