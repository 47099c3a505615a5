"""One small problem for every training loop: the same backbone, task, rows and order."""

import torch

from awake import tiny_vit, wake
from restuning import Host, methods
from restuning.integrations.transformers import TaskModel

METHODS = ("res-tuning", "res-tuning-bypass", "lora")
"""One that runs inside the backbone, one beside it, and one inside its linear maps."""
CLASSES, BATCH, STEPS = 5, 8, 6
RATES = {"lr": 3e-3, "weight_decay": 1e-2, "lambda_rate": 1.0}


def example():
    return torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)


def build(method="res-tuning", **options):
    """The same host and task each time, with nothing asleep."""
    host = Host(tiny_vit(seed=3), example())
    task = methods.build(method, host, num_classes=CLASSES, **({"rank": 3} | options))
    wake(task, seed=4).train()
    return host, task


def build_model(method="res-tuning", **options):
    return TaskModel(*build(method), **options)


def draw_rows(count=BATCH * STEPS):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return list(zip(images, labels.tolist(), strict=True))


def named(rows):
    """The same as examples that are mappings, which collators of transformers take."""
    return [{"pixel_values": image, "labels": label} for image, label in rows]


def watch_losses(model):
    """The loss of every step that a model trains, as it goes on."""
    losses = []
    model.register_forward_hook(
        lambda module, _, told: losses.append(told["loss"].item()) if module.training else None
    )
    return losses


def copied(module):
    return {n: t.detach().clone() for n, t in module.state_dict().items()}


def trainer(model, folder, rows, *, more=(), **arguments):
    """Trainer with nothing but its loop: no clipping, reports, or order of its own."""
    from transformers import Trainer, TrainingArguments

    usual = {
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "num_train_epochs": 1,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    return Trainer(
        model,
        TrainingArguments(str(folder), **{**usual, **arguments}),
        train_dataset=rows,
        **dict(more),
    )


def lightning_trainer(folder, **arguments):
    """The same of Lightning."""
    from lightning import Trainer

    usual = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
    }
    return Trainer(**{**usual, **arguments})
