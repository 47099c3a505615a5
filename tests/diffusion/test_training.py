"""Training tasks of denoisers: to the end, whatever interrupts it, one or several at once."""

import json
import sys

import pytest
import torch
from PIL import Image

from commands import restuning
from diffusion.small import sampled, stable_diffusion, unet
from restuning import Callback, EarlyStopping, Host, load, load_backbone, methods
from restuning._errors import DivergedError, RestuningWarning, TrainingError, UnknownNameError
from restuning.diffusion import (
    DenoiserSettings,
    DenoiserTraining,
    EncodedPairs,
    Objective,
    PipelineRequest,
    Samples,
    linear_alphas,
    train_denoiser,
    tune_pipeline,
)

pytest.importorskip("diffusers")


ADAM = 5e-3
"""Adam divides a gradient by its own size, so rounding decides where it is nearly zero; twelve steps
at 1e-2 move a weight by a tenth."""


def data(count=6):
    draw = torch.Generator().manual_seed(5)
    mean = torch.randn(count, 4, 8, 8, generator=draw)
    texts = {"encoder_hidden_states": torch.randn(3, 5, 8, generator=draw)}
    return EncodedPairs(
        mean,
        torch.full_like(mean, 0.1),
        texts,
        torch.arange(count) % 3,
        {"encoder_hidden_states": torch.zeros(1, 5, 8)},
        tuple("abc" * (count // 3)),
        "test",
    )


def host():
    case = unet()
    return Host(case.model, *case.args, **case.kwargs)


def fresh(host, seed=0, method="res-tuning-bypass"):
    torch.manual_seed(seed)
    return methods.build(method, host, rank=4)


def settings(**more):
    return DenoiserSettings(
        **{"steps": 12, "batch_size": 4, "lr": 1e-2, "checkpoint_every": 4, **more}
    )


def trained(out, tasks, host, resume=True, draw=None, callbacks=(), **more):
    objective = Objective("epsilon", linear_alphas(), min_snr=5.0)
    how = {"draw": draw, "callbacks": callbacks}
    return train_denoiser(
        DenoiserTraining(host, tasks, data(), objective, settings(**more), out, **how),
        resume=resume,
    )


@pytest.mark.parametrize("method", ["res-tuning-bypass", "res-tuning[mha=adapter,ffn=adapter]"])
def test_a_run_that_was_stopped_ends_with_the_same_weights_bit_for_bit(tmp_path, method):
    backbone = host()
    whole, broken = fresh(backbone, method=method), fresh(backbone, method=method)
    trained(tmp_path / "whole", {"a": whole}, backbone, ema=0.9)

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "broken", {"a": broken}, backbone, ema=0.9, sample_every=7, draw=stop)
    assert list((tmp_path / "broken" / "checkpoints").iterdir())
    again = fresh(backbone, seed=9, method=method)
    result = trained(tmp_path / "broken", {"a": again}, backbone, ema=0.9)
    assert result["steps"] == 12
    for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    lines = [
        json.loads(x)["step"] for x in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()
    ]
    assert lines == [10]
    # A finished run returns its result, and the folder's task is the trained one.
    other = fresh(backbone, seed=3, method=method)
    assert trained(tmp_path / "broken", {"a": other}, backbone, ema=0.9) == result
    stored = load(tmp_path / "broken" / "a.task", backbone)
    assert all(
        torch.equal(a, b) for a, b in zip(stored.parameters(), whole.parameters(), strict=True)
    )


def test_bypasses_that_train_together_end_where_each_would_alone(tmp_path):
    backbone = host()
    pair = {"a": fresh(backbone, 1), "b": fresh(backbone, 2)}
    both = trained(tmp_path / "both", pair, backbone)
    for name, seed in (("a", 1), ("b", 2)):
        alone = fresh(backbone, seed)
        result = trained(tmp_path / name, {name: alone}, backbone)
        assert result["loss"][name] == pytest.approx(both["loss"][name], rel=1e-4)
        for one, other in zip(pair[name].parameters(), alone.parameters(), strict=True):
            assert (one - other).abs().max() < ADAM


def test_a_step_of_k_bypasses_costs_one_backbone_forward(tmp_path):
    backbone = host()
    calls = []
    handle = backbone.model.mid_block.register_forward_hook(lambda *_: calls.append(1))
    trained(tmp_path, {n: fresh(backbone, i) for i, n in enumerate("abc")}, backbone, steps=3)
    handle.remove()
    assert len(calls) == 3
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())


def test_training_lowers_the_error_on_its_data_and_accumulation_changes_little(tmp_path):
    backbone = host()
    tasks = [fresh(backbone), fresh(backbone)]
    first = trained(
        tmp_path / "a", {"a": tasks[0]}, backbone, steps=120, batch_size=6, caption_drop=0.0
    )
    line = json.loads((tmp_path / "a" / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"]["a"] < 0.9 * line["loss"]["a"]
    trained(tmp_path / "b", {"a": tasks[0]}, backbone, steps=2, resume=False)
    with pytest.raises(TrainingError, match="other settings"):
        trained(tmp_path / "b", {"a": tasks[1]}, backbone, steps=3)
    one, two = fresh(backbone), fresh(backbone)
    trained(tmp_path / "c", {"a": one}, backbone, steps=2)
    trained(tmp_path / "d", {"a": two}, backbone, steps=2, accumulate=2)
    assert all(
        torch.allclose(a, b, atol=1e-4)
        for a, b in zip(one.parameters(), two.parameters(), strict=True)
    )


def test_several_inline_tasks_and_a_loss_that_is_not_finite_are_refused(tmp_path):
    backbone = host()
    inline = {n: fresh(backbone, method="res-tuning[mha=adapter,ffn=adapter]") for n in "ab"}
    with pytest.raises(TrainingError, match="bypass"):
        trained(tmp_path, inline, backbone)
    with pytest.raises(DivergedError, match="finite"):
        trained(tmp_path, {"a": fresh(backbone)}, backbone, lr=1e30, steps=12, clip=None)


def test_a_side_network_that_has_to_see_the_data_first_is_refused_in_words(tmp_path, monkeypatch):
    backbone = host()
    task = fresh(backbone)
    network = type(task.side)
    monkeypatch.setattr(network, "prepare", lambda self, rows: {"sum": sum(t for t, _ in rows)})
    with pytest.raises(TrainingError, match="prepared from the data") as error:
        trained(tmp_path / "reads", {"a": task}, backbone)
    assert error.value.where == network.__name__
    # One that reads nothing, but wants something handed in beside the rows.
    monkeypatch.setattr(network, "prepare", lambda self, rows: {"sum": torch.zeros(6, 1)})
    monkeypatch.setattr(network, "prepared_taps", {"sum": (1,)})
    with pytest.raises(TrainingError, match="sum of every row"):
        trained(tmp_path / "returns", {"a": task}, backbone)


def test_a_side_network_that_prepares_itself_without_rows_is_prepared(tmp_path, monkeypatch):
    backbone = host()
    task = fresh(backbone)

    def prepare(self, rows):
        self.prepared = True
        return {}

    monkeypatch.setattr(type(task.side), "prepare", prepare)
    trained(tmp_path, {"a": task}, backbone, steps=1)
    assert task.side.prepared


@pytest.mark.parametrize("value", [{"steps": 0}, {"lr": -1.0}, {"caption_drop": 1.0}, {"ema": 1.5}])
def test_settings_out_of_range_are_refused(value):
    with pytest.raises(TrainingError, match=next(iter(value))):
        DenoiserSettings(**value)


def test_the_command_trains_a_pipeline_and_leaves_a_task_that_runs_in_diffusers(tmp_path):
    from diffusion.test_pairs import folder

    (tmp_path / "words").mkdir()
    pipeline = stable_diffusion(tmp_path / "words")
    pipeline.save_pretrained(tmp_path / "sd")
    (tmp_path / "images").mkdir()
    folder(tmp_path / "images")
    words = (
        "train-image-generation",
        "images",
        "--pipeline",
        "sd",
        "--out",
        "run",
        "--steps",
        4,
        "--batch-size",
        2,
        "--rank",
        4,
        "--sample-every",
        2,
        "--sample-steps",
        2,
        "--ema",
        0.9,
        "--json",
    )
    done = restuning(*words, cwd=tmp_path, COLUMNS="200")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["steps"] == 4 and row["parameters"] > 0
    assert {p.name for p in (tmp_path / "run" / "samples").iterdir()} == {
        "step-000002.png",
        "step-000004.png",
    }
    assert (tmp_path / "run" / "style-000002.task" / "task.json").is_file()
    backbone = load_backbone(f"diffusers:{tmp_path / 'sd'}")
    assert "stage.1" in Host(backbone.model, *backbone.example, **backbone.kwargs).sites
    example = unet()
    host = Host(pipeline.unet, *example.args, **example.kwargs)
    task = load(tmp_path / "run" / "style.task", host)
    before = sampled(pipeline, "shade 0")
    with host.using(task):
        assert not torch.equal(sampled(pipeline, "shade 0"), before)
    again = restuning(*words, cwd=tmp_path, COLUMNS="200")
    assert json.loads(again.stdout) == row


def test_a_pipeline_is_tuned_by_one_call_which_draws_every_prompt_at_the_end(tmp_path):
    from diffusion.test_pairs import folder

    (tmp_path / "words").mkdir()
    stable_diffusion(tmp_path / "words").save_pretrained(tmp_path / "sd")
    (tmp_path / "images").mkdir()
    folder(tmp_path / "images")
    prompts = tuple(f"shade {number}" for number in range(5))
    request = PipelineRequest(
        tmp_path / "images",
        str(tmp_path / "sd"),
        rank=4,
        settings=DenoiserSettings(steps=1, batch_size=2),
        samples=Samples(prompts, steps=1),
    )
    lines = []
    tuned = tune_pipeline(request, out=tmp_path / "run", name="shades", log=lines.append)
    assert tuned.metrics["parameters"] == tuned.task.tuner_parameters() > 0
    assert (tuned.task_folder / "task.json").is_file()
    (grid,) = (tuned.folder / "samples").iterdir()
    width, height = Image.open(grid).size
    assert round(width / height * 2) == len(prompts)
    assert [line.partition(":")[0] for line in lines][1:] == ["res-tuning-bypass"]


def test_a_wrong_method_is_refused_before_the_pipeline_is_opened(tmp_path):
    with pytest.raises(UnknownNameError, match="res-tuning-bypass"):
        tune_pipeline(PipelineRequest("nowhere", "nothing", "res-tuning-bypas"), out=tmp_path)


def test_the_command_refuses_what_is_not_there_without_a_traceback(tmp_path, monkeypatch, capsys):
    from diffusion.test_pairs import folder
    from restuning.cli import main

    (tmp_path / "images").mkdir()
    folder(tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    for data in ("nowhere", "images"):
        words = ["train-image-generation", data, "--pipeline", "nothing", "--out", "x"]
        monkeypatch.setattr(sys, "argv", ["restuning", *words])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert stopped.value.code == 1
        assert "do:" in capsys.readouterr().err


def test_callbacks_and_trackers_are_told_of_the_losses_and_pictures_of_a_denoiser(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Steps(Callback):
        def __init__(self):
            self.told, self.ends = [], 0

        def on_step(self, record):
            self.told.append((record.step, record.loss))

        def on_end(self, record):
            self.ends += 1

    def draw(step):
        file = tmp_path / f"{step}.png"
        Image.new("RGB", (8, 8)).save(file)
        return file

    backbone, steps = host(), Steps()
    result = trained(
        tmp_path,
        {"style": fresh(backbone)},
        backbone,
        draw=draw,
        callbacks=[steps],
        track="tensorboard",
    )
    assert [step for step, _ in steps.told] == list(range(1, 13))
    assert steps.told[-1][1] == pytest.approx(result["loss"]["style"])
    assert steps.ends == 1
    events = EventAccumulator(str(tmp_path / "restuning"))
    events.Reload()
    assert [e.step for e in events.Scalars("train/loss/style")] == [10]
    assert events.Tags()["images"] == ["samples"]


def test_what_a_denoiser_cannot_tell_a_callback_is_said(tmp_path):
    class Epochs(Callback):
        def on_epoch(self, record):
            raise AssertionError

    backbone = host()
    with pytest.raises(TrainingError, match="EarlyStopping"):
        trained(tmp_path, {"a": fresh(backbone)}, backbone, callbacks=[EarlyStopping(1)])
    with pytest.warns(RestuningWarning, match="never called"):
        trained(tmp_path, {"a": fresh(backbone)}, backbone, callbacks=[Epochs()], steps=1)
