"""What a result tells beside accuracy: sizes, counted memory, data, stores."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from restuning.backbones import Backbone
from restuning.bench.measure import count_bytes
from restuning.bypass import SideNetwork
from restuning.data import Data
from restuning.features.stored import Stored
from restuning.forecast import forecast_step, forecast_task
from restuning.host import Host
from restuning.task import Task, save
from restuning.training import FitSettings


def count_parameters(task: Any, backbone: nn.Module) -> dict[str, int]:
    """Trained or solved in closed form, of them without the head, and of the backbone."""
    if getattr(task, "solved", False):
        # Its head passes on what is solved, and is not trained.
        solved = task.trainable_parameters()
        return {"trained": solved, "without_head": solved, "backbone": _count(backbone)}
    trained = sum(p.numel() for p in task.parameters() if p.requires_grad)
    # What is solved lies in buffers, which `parameters` does not give.
    trained += sum(m.solved_parameters for m in task.modules() if isinstance(m, SideNetwork))
    of_head = sum(p.numel() for p in task.head.parameters() if p.requires_grad)
    return {
        "trained": trained,
        "without_head": trained - of_head,
        "backbone": _count(backbone),
    }


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def describe_data(data: Data) -> dict[str, Any]:
    """The data's name, digest, number of classes and sizes of splits."""
    splits = {"train": data.train, "val": data.val, "test": data.test}
    sizes = {name: 0 if split is None else len(split) for name, split in splits.items()}
    return {"name": data.name, "identity": data.identity, "classes": data.num_classes, **sizes}


def describe_store(stored: Stored | None) -> dict[str, Any] | None:
    """Describe the store of features that a run was trained from; None for training on images."""
    if stored is None:
        return None
    key = stored.store.key
    return {
        # What was read: a store may hold more, for other columns.
        "tokens": stored.store.form.partition("/")[0],
        "taps": len(stored.store.columns),
        "dtype": key.dtype,
        "precision": key.precision,
        "bytes": stored.store.bytes,
        "digest": key.digest[:16],
    }


def count_memory(
    host: Host, example: Any, live: nn.Module, settings: FitSettings, precision: str, cached: bool
) -> dict[str, Any]:
    """Bytes of a training step above weights, moments and batch, counted from shapes.

    Args:
        host: The backbone.
        example: One image.
        live: The method on images.
        settings: Of training.
        precision: Of training on images.
        cached: Whether it was trained from stored features.
    """
    task: Any = live.task
    trained = [p for p in task.parameters() if p.requires_grad]
    more: dict[str, Any] = {"device": example.device.type}
    try:
        step = forecast_step(
            live.train(), example, settings.batch_size, trained=trained, precision=precision, **more
        )
        # Trained live: what it is fed are images.
        fed = step
        if cached:
            fed = forecast_task(
                host,
                task,
                # Shapes are traced without weights, wherever the model lies.
                example.cpu(),
                settings.batch_size,
                form="cached",
                precision=settings.precision,
                **more,
            )
    except Exception as error:  # noqa: BLE001 (a stranger's code may do what shapes cannot follow)
        return {"not_counted": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    finally:
        live.eval()
    return {
        "step_bytes": fed.above_bytes,
        "live_step_bytes": step.above_bytes,
        "optimiser_bytes": step.optimiser_bytes,
        "measure": "counted above weights, moments and batch",
    }


def count_saved_bytes(
    task: nn.Module, host: Host, backbone: Backbone, folder: Path, accuracy: float, keep: bool
) -> int:
    """Bytes of what a user would keep of the task; the folder stays where `keep` is set.

    A task is saved as `restuning train` saves it; of a rival that is none, its trained tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(task, Task):
        preprocessing = backbone.preprocessing
        save(
            task,
            host,
            folder,
            backbone=backbone.name,
            preprocessing=preprocessing.to_dict() if preprocessing else None,
            results={"test accuracy": accuracy},
        )
    else:
        trained = {n: p.detach().cpu().contiguous() for n, p in task.named_parameters()}
        save_file(trained, folder / "weights.safetensors")
    size = count_bytes(folder)
    # Written in any case: the size that is told is that of real files.
    if not keep:
        shutil.rmtree(folder)
    return size
