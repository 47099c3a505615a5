"""Lightning trains a task: metrics of its problem, checkpoints of the task alone, resuming."""

import pytest
import torch
from torch.utils.data import DataLoader

import restuning
from awake import tiny_vit, wake
from loops import (
    BATCH,
    CLASSES,
    METHODS,
    build,
    copied,
    draw_rows,
    example,
    lightning_trainer,
)
from restuning import Host, evaluate, methods
from restuning._errors import DivergedError, FormatError, TrainingError, WrongBackboneError
from restuning.problems import MultiLabel, Regression

pytest.importorskip("lightning")

from restuning.integrations.lightning import TaskModule  # noqa: E402 (needs lightning)

ROUNDING = 1e-5
"""fp32: means of batches and of all rows."""


def figures_of(module, rows, folder):
    (told,) = lightning_trainer(folder).validate(module, DataLoader(rows, BATCH), verbose=False)
    return told


@pytest.mark.parametrize("rest", [0, 1, 3])
def test_validation_counts_every_row_as_evaluate_does(rest, tmp_path):
    module, rows = TaskModule(*build()), draw_rows(2 * BATCH + rest)
    told = figures_of(module, rows, tmp_path)
    wanted = evaluate(module.model.tuned, rows)
    assert told["val_loss"] == pytest.approx(wanted["loss"], abs=ROUNDING)
    assert told["val_accuracy"] == pytest.approx(wanted["accuracy"])
    assert 0 <= told["val_f1_macro"] <= 1


@pytest.mark.parametrize(
    ("problem", "outputs", "metrics"),
    [
        (MultiLabel(), 3, {"mean_average_precision", "f1_macro", "accuracy"}),
        (Regression([0.0, 1.0], [1.0, 2.0]), 2, {"r2", "mae", "rmse"}),
    ],
)
def test_validation_tells_the_metrics_of_the_problem(problem, outputs, metrics, tmp_path):
    host = Host(tiny_vit(seed=3), example())
    task = wake(methods.build("res-tuning-bypass", host, num_classes=outputs, rank=3))
    task.problem = problem
    rows = [(x, torch.tensor([float(y + k > 3) for k in range(outputs)])) for x, y in draw_rows(12)]
    told = figures_of(TaskModule(host, task), rows, tmp_path)
    assert {name.removeprefix("val_") for name in told} == metrics | {"loss"}
    wanted = evaluate(restuning.Tuned(host, task), rows)
    assert told[f"val_{problem.metric}"] == pytest.approx(wanted[problem.metric], abs=ROUNDING)


def test_a_batch_may_be_a_pair_or_named_and_predictions_are_probabilities(tmp_path):
    module, rows = TaskModule(*build()), draw_rows(BATCH + 1)
    trainer = lightning_trainer(tmp_path)
    (pairs,) = trainer.test(module, DataLoader(rows, BATCH), verbose=False)
    mappings = [{"pixel_values": x, "labels": y} for x, y in rows]
    (names,) = trainer.test(module, DataLoader(mappings, BATCH), verbose=False)
    assert pairs == names and "test_accuracy" in names
    chances = torch.cat(trainer.predict(module, DataLoader([x for x, _ in rows], BATCH)))
    logits = module.model.tuned(torch.stack([x for x, _ in rows]))
    torch.testing.assert_close(chances, logits.softmax(-1), atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_goes_on_from_a_checkpoint_of_the_task_ends_with_the_same_bits(method, tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    loader = DataLoader(draw_rows(2 * BATCH), BATCH)
    keep = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    whole = TaskModule(*build(method))
    lightning_trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[keep]).fit(
        whole, loader, loader
    )
    again = TaskModule(*build(method))
    torch.nn.init.zeros_(again.task.head.weight)
    lightning_trainer(tmp_path, max_epochs=2).fit(
        again, loader, loader, ckpt_path=str(tmp_path / "epoch=0.ckpt")
    )
    mine, others = copied(whole.task), copied(again.task)
    assert all(torch.equal(mine[n], others[n]) for n in mine)
    held = torch.load(tmp_path / "epoch=0.ckpt", weights_only=False)["state_dict"]
    assert set(held) == {f"model.task.{n}" for n in mine} | {"model.backbone"}
    assert sum(t.numel() for t in held.values()) == sum(t.numel() for t in mine.values()) + 8


def test_a_checkpoint_opens_with_its_settings_on_the_same_backbone_alone(tmp_path):
    module = TaskModule(*build(), lr=7e-3)
    trainer = lightning_trainer(tmp_path)
    trainer.fit(module, DataLoader(draw_rows(BATCH), BATCH))
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    host, task = build()
    wake(task, seed=9)
    again = TaskModule.load_from_checkpoint(tmp_path / "x.ckpt", host=host, task=task)
    assert again.lr == 7e-3
    assert all(torch.equal(module.task.state_dict()[n], t) for n, t in copied(again.task).items())
    with pytest.raises(FormatError, match="another task"):
        host, task = build("lora")
        TaskModule.load_from_checkpoint(tmp_path / "x.ckpt", host=host, task=task)
    other = Host(tiny_vit(seed=8), example())
    task = methods.build("res-tuning", other, num_classes=CLASSES, rank=3)
    with pytest.raises(WrongBackboneError, match="another backbone"):
        TaskModule.load_from_checkpoint(tmp_path / "x.ckpt", host=other, task=task)


def test_what_cannot_be_trained_on_is_refused(tmp_path):
    rows = draw_rows(BATCH)
    with pytest.raises(TrainingError, match="no labels"):
        lightning_trainer(tmp_path).fit(
            TaskModule(*build()), DataLoader([x for x, _ in rows], BATCH)
        )
    with pytest.raises(TrainingError, match="no labels"):
        figures_of(TaskModule(*build()), [x for x, _ in rows], tmp_path)
    with pytest.raises(TrainingError, match="outside the task's classes"):
        lightning_trainer(tmp_path).fit(
            TaskModule(*build()), DataLoader([(x, y + 5) for x, y in rows], BATCH)
        )
    with pytest.raises(DivergedError, match="nan"):
        lightning_trainer(tmp_path).fit(
            TaskModule(*build()), DataLoader([(x * torch.nan, y) for x, y in rows], BATCH)
        )
    with pytest.raises(TrainingError, match="lr"):
        TaskModule(*build(), lr=-1)
    with pytest.raises(TrainingError, match="max_steps"):
        lightning_trainer(tmp_path, max_epochs=-1).fit(
            TaskModule(*build()), DataLoader(rows, BATCH)
        )


def test_the_task_of_a_module_is_saved_for_a_predictor(tmp_path):
    backbone = restuning.load_backbone("restuning-tiny")
    host = backbone.host()
    task = methods.build("res-tuning-bypass", host, num_classes=2)
    task.labels = ["dark", "light"]
    module = TaskModule(host, task, backbone)
    collate = module.model.collator()
    pictures = [torch.full((3, 32, 32), float(k % 2)) for k in range(8)]
    rows = [(x, k % 2) for k, x in enumerate(pictures)]
    lightning_trainer(tmp_path, max_epochs=6).fit(module, DataLoader(rows, 4, collate_fn=collate))
    answers = restuning.Predictor.load(module.save(tmp_path / "light.task"))(pictures[:2])
    assert [answer.label for answer in answers] == ["dark", "light"]
