"""What compiles and exports: this file is the support table."""

import pytest
import torch
import torch._dynamo.testing

from awake import tiny_vit
from restuning import Host, Tuned, methods

pytestmark = pytest.mark.compile
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SAME = 1e-5
SLOW = [
    pytest.param(n, marks=pytest.mark.slow)
    for n in ("res-tuning", "prefix", "vpt-shallow", "linear", "full", "bitfit", "lora")
]
NAMES = ["res-tuning-bypass", *SLOW]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.fixture
def host():
    return Host(tiny_vit(), X[:1])


@pytest.mark.parametrize("name", NAMES)
def test_fullgraph_forward_and_backward_equal_eager(host, name):
    tuned = Tuned(host, methods.build(name, host, num_classes=4))
    parameters = list(tuned.task.parameters())
    compiled = torch.compile(tuned, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(X).square().sum(), parameters)
    theirs = torch.autograd.grad(tuned(X).square().sum(), parameters)
    assert all((a - b).abs().max() < SAME * (1 + b.abs().max()) for a, b in zip(ours, theirs))  # noqa: B905


@pytest.mark.parametrize("name", ["res-tuning-bypass", SLOW[0], SLOW[-1]])
def test_twelve_tasks_share_one_graph(host, name):
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def run(tuned, x):
        return tuned(x)

    for _ in range(12):
        tuned = Tuned(host, methods.build(name, host, num_classes=4))
        assert torch.allclose(run(tuned, X), tuned(X), atol=SAME)
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.slow), False])
@pytest.mark.parametrize("name", ["res-tuning-bypass", SLOW[0]])
def test_export_keeps_the_task_as_parameters(host, name, strict):
    tuned = Tuned(host, methods.build(name, host, num_classes=4)).eval()
    program = torch.export.export(tuned, (X,), strict=strict)
    assert torch.allclose(program.module()(X), tuned(X), atol=SAME)
    own = {f"task.{k}" for k in tuned.task.state_dict()}
    assert own <= set(program.state_dict)
