"""A small run as a program: `training_script.py OUT [setting=value ...]`.

TRAINING_SLEEP slows every example down, so that a signal falls inside the run. The final weights
go to OUT/weights.safetensors.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset

from restuning.training import FitSettings, fit
from restuning.training.randomness import Portions

SLEEP = float(os.environ.get("TRAINING_SLEEP", "0"))


class Task(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(6, 8), nn.Linear(8, 3)
        self.gate = nn.Parameter(torch.ones(3))
        self.drop = nn.Dropout(0.0 if os.environ.get("TRAINING_NO_DROPOUT") else 0.3)

    def forward(self, x):
        return self.up(self.drop(torch.tanh(self.down(x)))) * self.gate


class Tuned(nn.Module):
    def __init__(self):
        super().__init__()
        self.host, self.task = nn.Linear(6, 6).requires_grad_(False), Task()

    def forward(self, x):
        return self.task(self.host(x))


class Noisy(Dataset):
    """Separable points; every look at one adds noise, as augmentation does."""

    def __init__(self, count, noise):
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(count, 6, generator=generator)
        self.y = self.x[:, :3].argmax(1)
        self.noise, self.held = noise, None

    def __len__(self):
        return len(self.y)

    def hold(self, indices):
        """As a store that is larger than memory does, which this one plays where a run goes through portions."""
        self.held = set(indices.tolist())

    def __getitem__(self, index):
        assert self.held is None or index in self.held
        time.sleep(SLEEP)
        return self.x[index] + self.noise * torch.randn(6), int(self.y[index])


def main():
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    given = dict(pair.split("=") for pair in sys.argv[2:])
    settings = {k: json.loads(v) for k, v in given.items()}
    noise = settings.pop("noise", 0.1)
    if portions := settings.pop("portions", None):
        # Those of the training data, which alone are asked for them.
        Portions.of = lambda *_: Portions(*portions)
    torch.manual_seed(3)
    tuned = Tuned()
    fit(
        tuned,
        Noisy(45, noise),
        Noisy(20, 0.0),
        settings=FitSettings(**settings),
        out=out,
        progress=False,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        save_file(tuned.task.state_dict(), out / "weights.safetensors")


if __name__ == "__main__":
    main()
