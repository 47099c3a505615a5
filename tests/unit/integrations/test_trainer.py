"""`transformers.Trainer` trains a task as it is: columns, evaluation, checkpoints, resuming."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from accelerate.state import AcceleratorState

import restuning
from loops import BATCH, METHODS, build_model, copied, draw_rows, named, trainer
from restuning import methods
from restuning._errors import DivergedError, FormatError, TrainingError
from restuning.integrations.transformers import TaskModel

pytest.importorskip("transformers")

ROUNDING = 1e-5
"""Trainer takes means over batches in fp32, we over all rows."""


@pytest.mark.parametrize("rest", [1, 3, 0])
def test_every_row_of_an_evaluation_is_counted_whatever_the_last_batch(rest, tmp_path):
    model, rows = build_model(), draw_rows(2 * BATCH + rest)
    told = trainer(model, tmp_path, [], more={"compute_metrics": model.compute_metrics})
    answers = told.predict(named(rows))
    model.eval()
    with torch.no_grad():
        logits = model(pixel_values=torch.stack([x for x, _ in rows]))["logits"]
    labels = torch.tensor([y for _, y in rows])
    torch.testing.assert_close(
        torch.as_tensor(answers.predictions), logits, atol=ROUNDING, rtol=ROUNDING
    )
    assert answers.label_ids.tolist() == labels.tolist()
    figures = told.evaluate(named(rows))
    assert figures["eval_loss"] == pytest.approx(
        F.cross_entropy(logits, labels).item(), abs=ROUNDING
    )
    right = (logits.argmax(1) == labels).float().mean().item()
    assert figures["eval_accuracy"] == pytest.approx(right) and "eval_f1_macro" in figures


def test_rows_without_labels_are_answered_and_not_trained_on(tmp_path):
    model, rows = build_model(), [{"pixel_values": x} for x, _ in draw_rows(BATCH + 1)]
    told = trainer(model, tmp_path, rows)
    answers = told.predict(rows)
    assert answers.predictions.shape == (BATCH + 1, 5) and answers.label_ids is None
    assert "eval_loss" not in told.evaluate(rows)
    with pytest.raises(ValueError, match="did not return a loss"):
        told.train()


def test_columns_that_the_backbone_does_not_take_are_dropped_and_those_of_the_collator_kept(
    tmp_path,
):
    rows = [{**row, "id": "x", "x": 1} for row in named(draw_rows(BATCH))]
    model = build_model()
    # With `x` the backbone would be given its images twice.
    trainer(model, tmp_path, rows).train()
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"image": "a.png", "label": 1, "id": "x"}])
    backbone = restuning.load_backbone("restuning-tiny")
    host = backbone.host()
    model = TaskModel(host, methods.build("linear", host, num_classes=2), backbone)
    model.collator()
    loader = trainer(model, tmp_path, table)
    kept = loader._remove_unused_columns(table, "training")
    assert sorted(kept.column_names) == ["image", "label"]


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_goes_on_from_a_checkpoint_ends_with_the_same_bits(method, tmp_path):
    rows = named(draw_rows(4 * BATCH))
    often = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "seed": 3}
    often["train_sampling_strategy"] = "random"
    whole = build_model(method)
    trainer(whole, tmp_path, rows, **often).train()
    checkpoint = tmp_path / "checkpoint-2"
    again = build_model(method)
    torch.nn.init.zeros_(again.task.head.weight)
    trainer(again, tmp_path / "again", rows, **often).train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(a, b) for a, b in zip(*map(_state, (whole, again)), strict=True))
    start = copied(build_model(method).task)
    assert any(not torch.equal(start[n], t) for n, t in copied(again.task).items())
    held = (checkpoint / "model.safetensors").stat().st_size
    assert held < 1.1 * sum(4 * p.numel() for p in whole.parameters()) + 2**14


def _state(model):
    return [tensor for _, tensor in sorted(copied(model.task).items())]


def test_a_checkpoint_of_another_task_is_refused(tmp_path):
    rows = named(draw_rows(BATCH))
    trainer(build_model("lora"), tmp_path, rows, save_strategy="epoch").train()
    with pytest.raises(FormatError, match="another task"):
        trainer(build_model("res-tuning"), tmp_path, rows, save_strategy="epoch").train(
            resume_from_checkpoint=True
        )


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model, rows = build_model(), named(draw_rows(2 * BATCH))
    told = trainer(
        model,
        tmp_path,
        rows,
        more={"eval_dataset": rows, "compute_metrics": model.compute_metrics},
        num_train_epochs=2,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    told.train()
    best = max(line["eval_accuracy"] for line in told.state.log_history if "eval_accuracy" in line)
    assert told.evaluate()["eval_accuracy"] == best


def test_pieces_of_a_step_and_checkpointing_give_the_steps_of_the_whole(tmp_path):
    # The last step of an epoch is smaller, and its pieces are of two sizes.
    rows = named(draw_rows(2 * BATCH + 6))
    plain, pieces = build_model(), build_model()
    trainer(plain, tmp_path, rows, more={"optimizers": _sgd(plain)}).train()
    told = trainer(
        pieces,
        tmp_path,
        rows,
        more={"optimizers": _sgd(pieces)},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
    )
    told.train()
    assert any(type(m).__name__ == "RecomputedBlock" for m in pieces.host.modules())
    torch.testing.assert_close(
        copied(pieces.task), copied(plain.task), atol=ROUNDING, rtol=ROUNDING
    )


def _sgd(model):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimiser, torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)


def test_a_loss_that_is_not_finite_ends_the_training(tmp_path):
    rows = named(draw_rows(BATCH))
    rows[3]["pixel_values"] = torch.full((3, 32, 32), torch.nan)
    with pytest.raises(DivergedError, match="nan"):
        trainer(build_model(), tmp_path, rows).train()


def test_a_label_out_of_range_ends_the_training(tmp_path):
    rows = named(draw_rows(BATCH))
    rows[3]["labels"] = 5
    with pytest.raises(TrainingError, match="outside the task's classes"):
        trainer(build_model(), tmp_path, rows).train()


@pytest.fixture
def one_precision():
    """Accelerate has one for a whole process: it is given up, so that what comes after has its own."""
    yield
    AcceleratorState._reset_state(True)


def test_half_precision_of_trainer_trains_the_same_task(tmp_path, one_precision):
    model = build_model()
    start = copied(model.task)
    trainer(model, tmp_path, named(draw_rows(2 * BATCH)), bf16=True).train()
    after = copied(model.task)
    assert all(t.dtype == torch.float32 for t in after.values())
    assert all(not torch.equal(start[n], t) for n, t in after.items())
