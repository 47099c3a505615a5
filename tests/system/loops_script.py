"""One run of another's loop as a program: `loops_script.py LOOP METHOD FOLDER`; the weights are left for each process."""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, DistributedSampler

sys.path.append(str(Path(__file__).parents[1]))
from awake import wake  # noqa: E402 (what the tests share)
from loops import (  # noqa: E402
    BATCH,
    build,
    copied,
    draw_rows,
    lightning_trainer,
    named,
    trainer,
)
from restuning.integrations.transformers import TaskModel  # noqa: E402

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
RATE = 0.1
LEFT_OVER = 3
"""Rows of a validation that no number of processes divides."""


def main():
    loop, method, folder = sys.argv[1:]
    host, task = build(method)
    if RANK:
        # The first process's task must be brought to all others.
        wake(task, seed=99)
    figures = run_trainer if loop == "trainer" else run_lightning
    told = figures(host, task, folder)
    save_file(copied(task) | told, f"{folder}/{WORLD}-{RANK}.safetensors")


def run_trainer(host, task, folder):
    model = TaskModel(host, task)
    optimiser = torch.optim.SGD(task.parameters(), lr=RATE, momentum=0.9)
    rows = named(draw_rows())
    trained = trainer(
        model,
        folder,
        rows,
        more={
            "optimizers": (optimiser, torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)),
            "compute_metrics": model.compute_metrics,
        },
        per_device_train_batch_size=BATCH // WORLD,
        # Nothing is to be looked for: an unused parameter would end the run.
        ddp_find_unused_parameters=False,
        save_strategy="epoch",
    )
    trained.train()
    told = trained.evaluate(rows[: 2 * BATCH + LEFT_OVER])
    return {"score": torch.tensor(told["eval_accuracy"])}


def run_lightning(host, task, folder):
    from restuning.integrations.lightning import TaskModule

    class Plain(TaskModule):
        def configure_optimizers(self):
            return torch.optim.SGD(self.task.parameters(), lr=RATE, momentum=0.9)

    module = Plain(host, task)
    rows = draw_rows()
    # In turn, where Lightning's own would shuffle them.
    in_turn = DistributedSampler(rows, WORLD, RANK, shuffle=False)
    loader = DataLoader(rows, BATCH // WORLD, sampler=in_turn)
    lightning = lightning_trainer(folder, devices=WORLD, strategy="ddp" if WORLD > 1 else "auto")
    lightning.fit(module, loader)
    (told,) = lightning.validate(module, DataLoader(rows, BATCH // WORLD), verbose=False)
    return {"score": torch.tensor([told["val_accuracy"], told["val_loss"]])}


if __name__ == "__main__":
    main()
