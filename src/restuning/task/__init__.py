"""What one downstream problem owns, alone and many together.

Several tasks on one backbone, by what is wanted:

| class | answers | backbone forwards |
|---|---|---|
| `Tuned(host, task)` | one task, on every input | one |
| `Bank(tasks)` | many tasks that leave the backbone alone, on features that are there | none |
| `MultiTask(host, tasks)` | many tasks of any kind, on inputs: a bank, and the others one by one | one, and one for each inline task |
| `Blend((task, weight), ...)` | one answer: the tasks' changes, mixed by weight | one |
| `PerRow([task, None, ...])` | one task for each row of the batch | one |
| `average(tasks)` | one task: the mean of the answers of several beside the backbone | one |
| `Guided(task, scale)` | one answer: a bypass led away from the bare backbone | one |

`Blend`, `PerRow` and `Guided` stand where a task stands in `host.using(...)`, inside the backbone's own forward
(sampling, generation); the first three give `{name: logits}` or logits of heads.
"""

from restuning.task.average import average as average
from restuning.task.average import reason_not_averaged as reason_not_averaged
from restuning.task.bank import Bank as Bank
from restuning.task.blend import Blend as Blend
from restuning.task.blend import Guided as Guided
from restuning.task.blend import PerRow as PerRow
from restuning.task.folder import DESCRIPTION as DESCRIPTION
from restuning.task.folder import SHA256 as SHA256
from restuning.task.folder import WEIGHTS as WEIGHTS
from restuning.task.hub import HubTask as HubTask
from restuning.task.hub import Listed as Listed
from restuning.task.hub import find_origin as find_origin
from restuning.task.hub import list_hub as list_hub
from restuning.task.lora import lora_beside as lora_beside
from restuning.task.lora import merge as merge
from restuning.task.multi_task import MultiTask as MultiTask
from restuning.task.peft_files import export_peft as export_peft
from restuning.task.peft_files import import_peft as import_peft
from restuning.task.push import Pushed as Pushed
from restuning.task.push import push_to_hub as push_to_hub
from restuning.task.same_backbone import Identified as Identified
from restuning.task.save_and_load import WeightsFile as WeightsFile
from restuning.task.save_and_load import check_savable as check_savable
from restuning.task.save_and_load import describe as describe
from restuning.task.save_and_load import find_shared as find_shared
from restuning.task.save_and_load import find_task as find_task
from restuning.task.save_and_load import load as load
from restuning.task.save_and_load import save as save
from restuning.task.save_and_load import summarise as summarise
from restuning.task.task import Task as Task
from restuning.task.tuned import INPUT as INPUT
from restuning.task.tuned import Tuned as Tuned
from restuning.task.tuned import prepare_example as prepare_example
