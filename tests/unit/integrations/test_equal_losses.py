"""The plain loop, Accelerate, `fit`, Trainer and Lightning make the same steps of one task."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from accelerate import Accelerator
from torch.utils.data import DataLoader

from loops import (
    BATCH,
    METHODS,
    RATES,
    STEPS,
    build,
    copied,
    draw_rows,
    lightning_trainer,
    named,
    trainer,
    watch_losses,
)
from restuning import FitSettings, Tuned, fit
from restuning.integrations.transformers import TaskModel
from restuning.training.optimiser import build_optimiser, learning_rate, set_rates
from restuning.training.randomness import Order

pytest.importorskip("transformers")
pytest.importorskip("lightning")

ROUNDING = 1e-5
"""fp32: means are taken of sums in other orders, and six steps carry it on."""
EPOCHS = 2
SETTINGS = FitSettings(epochs=EPOCHS, batch_size=BATCH, seed=1, **RATES)


def in_order(rows):
    """The rows as `fit` takes them, epoch after epoch."""
    order = Order(len(rows), BATCH, EPOCHS, SETTINGS.seed)
    assert order.total == STEPS
    return [rows[index] for step in range(order.total) for index in order.batch(step)]


def plainly(method, rows, folder):
    host, task = build(method)
    tuned, losses = Tuned(host, task), []
    optimiser = build_optimiser(task, **RATES)
    for step, (x, y) in enumerate(DataLoader(rows, BATCH)):
        set_rates(
            optimiser.param_groups,
            learning_rate(step, total=STEPS, warmup=1, peak=RATES["lr"]),
        )
        loss = F.cross_entropy(tuned(x), y)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses, task


def with_accelerate(method, rows, folder):
    model = TaskModel(*build(method))
    losses = watch_losses(model)
    accelerator = Accelerator(cpu=True)
    prepared, loader, *both = accelerator.prepare(
        model, DataLoader(named(rows), BATCH), *model.optimizers(STEPS, **RATES)
    )
    for batch in loader:
        accelerator.backward(prepared(**batch)["loss"])
        for each in both:
            each.step()
        both[0].zero_grad()
    return losses, model.task


def with_trainer(method, rows, folder):
    model = TaskModel(*build(method))
    losses = watch_losses(model)
    trainer(
        model, folder, named(rows), more={"optimizers": model.optimizers(STEPS, **RATES)}
    ).train()
    return losses, model.task


def with_lightning(method, rows, folder):
    from restuning.integrations.lightning import TaskModule

    module = TaskModule(*build(method), **RATES)
    losses = watch_losses(module.model)
    lightning_trainer(folder).fit(module, DataLoader(rows, BATCH))
    return losses, module.task


@pytest.mark.parametrize("method", METHODS)
def test_losses_of_every_step_are_equal_in_all_loops(method, tmp_path):
    rows = draw_rows(BATCH * STEPS // EPOCHS)
    wanted, trained = plainly(method, in_order(rows), tmp_path)
    before = copied(build(method)[1])
    moved = [(tensor - before[name]).abs().max() for name, tensor in copied(trained).items()]
    assert len(wanted) == STEPS and min(moved) > 100 * ROUNDING
    for loop in (with_accelerate, with_trainer, with_lightning):
        losses, task = loop(method, in_order(rows), tmp_path)
        assert losses == pytest.approx(wanted, abs=ROUNDING), loop.__name__
        torch.testing.assert_close(copied(task), copied(trained), atol=ROUNDING, rtol=ROUNDING)
    # `fit` tells means of epochs alone; its weights say that its steps were these.
    host, task = build(method)
    told = fit(Tuned(host, task), rows, settings=SETTINGS, out=tmp_path / "fit", progress=False)
    torch.testing.assert_close(copied(task), copied(trained), atol=ROUNDING, rtol=ROUNDING)
    epochs = torch.tensor(wanted).view(EPOCHS, -1).mean(1).tolist()
    assert [line["loss"] for line in told.history] == pytest.approx(epochs, abs=ROUNDING)
