"""Tasks in the training loops of others: `transformers.Trainer`, Lightning, Accelerate.

Names are imported when they are first used: Lightning is an extra, and the model for Trainer does without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from restuning.integrations.collator import Collator as Collator
    from restuning.integrations.lightning import TaskModule as TaskModule
    from restuning.integrations.task_model import TaskModel as TaskModel

_HOMES = {"Collator": "collator", "TaskModel": "task_model", "TaskModule": "lightning"}

__all__ = [*_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a name from its file, once."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
