"""A task as a model that `transformers.Trainer` trains as it is.

`TaskModel` has all that Trainer asks of a model and nothing of transformers itself, so that importing this
needs no extra.
"""

from restuning.integrations.collator import Collator as Collator
from restuning.integrations.task_model import TaskModel as TaskModel
