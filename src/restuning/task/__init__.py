"""What one downstream problem owns, alone and many together."""

from restuning.task.bank import Bank as Bank
from restuning.task.blend import Blend as Blend
from restuning.task.blend import Guided as Guided
from restuning.task.blend import PerRow as PerRow
from restuning.task.multi_task import MultiTask as MultiTask
from restuning.task.save_and_load import describe as describe
from restuning.task.save_and_load import load as load
from restuning.task.save_and_load import push_to_hub as push_to_hub
from restuning.task.save_and_load import save as save
from restuning.task.task import Task as Task
from restuning.task.tuned import INPUT as INPUT
from restuning.task.tuned import Tuned as Tuned
from restuning.task.tuned import prepared_example as prepared_example
