import pytest
import torch
from torch import nn
from torch.utils.data import Dataset


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Task(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.gate = nn.Linear(6, 3), nn.Parameter(torch.ones(3))
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        return self.head(self.drop(x)) * self.gate


class Tuned(nn.Module):
    def __init__(self):
        super().__init__()
        self.host, self.task = nn.Identity(), Task()

    def forward(self, x, scale=None):
        x = self.host(x)
        return self.task(x if scale is None else x * scale[:, None])


class Points(Dataset):
    def __init__(self, count=20, named=False):
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(count, 6, generator=generator)
        self.y = self.x[:, :3].argmax(1) if count else torch.zeros(0, dtype=torch.long)
        self.named, self.broken, self.seen = named, None, []

    @property
    def identity(self):
        """Else it would be read to be known, and `seen` tells what training reads."""
        return f"points {self.x[:, 0].tolist()} {self.named}"

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        self.seen.append(index)
        if self.broken is not None:
            self.broken(len(self.seen))
        x = self.x[index] + 0.05 * torch.randn(6)
        return ({"x": x, "scale": torch.tensor(1.0)} if self.named else x), int(self.y[index])


@pytest.fixture
def make_tuned():
    def make(seed=0):
        torch.manual_seed(seed)
        return Tuned()

    return make


@pytest.fixture
def points():
    return Points
