"""What is told of a run's memory is the run's, also of the first one of a process."""

import os
import subprocess
import sys

import pytest

from restuning.training.memory import STATUS

MOST = 4
"""MiB of a first step of some kilobytes: pages of the allocator. The code that it loads is more than that."""

FIRST = """
import torch
from restuning.training.memory import PeakMemory
torch.set_num_threads(1)
layer = torch.nn.Linear(64, 10)
optimiser = torch.optim.AdamW(layer.parameters())
memory = PeakMemory("cpu")
loss = torch.nn.functional.cross_entropy(layer(torch.randn(16, 64)), torch.zeros(16, dtype=torch.long))
loss.backward()
optimiser.step()
print(memory.read() / 2**20)
"""


@pytest.mark.skipif(not STATUS.exists(), reason="a peak that can be set back, of Linux")
def test_the_first_run_of_a_process_is_not_told_what_libraries_take():
    done = subprocess.run(
        [sys.executable, "-c", FIRST], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < MOST
