"""A backbone that changes under a live host is noticed at the next forward, or when it is saved."""

import copy
import pickle

import pytest
import torch
from torch import nn

from awake import tiny_vit
from restuning import FitSettings, Host, Tuned, fit, methods, save
from restuning._errors import BackboneChangedError, WrongBackboneError
from restuning.host.snapshot import COLUMNS, Snapshot

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def written(model):
    with torch.no_grad():
        model.blocks[1].mlp.fc1.bias[3] += 1e-3


def loaded(model):
    model.load_state_dict(tiny_vit(seed=5).state_dict())


def one_number_of_a_large_matrix(model):
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[100, 7] *= 1.01


def exchanged(model):
    model.blocks[2].norm2.weight = nn.Parameter(model.blocks[2].norm2.weight.detach() * 2)


def another_module(model):
    model.blocks[1].mlp.act = nn.ReLU()


def wrapped_with_adapters(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["fc1"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model)


def without_a_bias(model):
    model.blocks[0].attn.proj.bias = None


NOTICED_BY_A_FORWARD = [
    written,
    loaded,
    one_number_of_a_large_matrix,
    exchanged,
    another_module,
    wrapped_with_adapters,
    without_a_bias,
]


def behind_torch(model):
    model.blocks[1].mlp.fc1.weight.data.mul_(1 + 1e-3)


def other_storage(model):
    weight = model.blocks[1].mlp.fc1.weight
    weight.data = weight.data.flip(0)


def in_half_precision(model):
    model.to(torch.bfloat16).to(torch.float32)


NOTICED_WHEN_SAVED = [behind_torch, other_storage, in_half_precision]


@pytest.mark.parametrize("change", NOTICED_BY_A_FORWARD, ids=lambda f: f.__name__)
@pytest.mark.parametrize("use", ["features", "inline", "using"])
def test_a_change_is_noticed_at_the_next_forward(change, use):
    host = Host(tiny_vit(), X[:1])
    tuned = Tuned(host, methods.build("res-tuning", host, num_classes=3))
    tuned(X)
    change(host.model)
    with pytest.raises(BackboneChangedError, match="not what it was when its host was built"):
        if use == "features":
            host.features(X)
        elif use == "inline":
            tuned(X)
        else:
            with host.using(tuned.task):
                host.model(X)
    # A host for what it is now works.
    host.release()
    Host(host.model, X[:1]).features(X)


@pytest.mark.parametrize(
    "change", [*NOTICED_BY_A_FORWARD, *NOTICED_WHEN_SAVED], ids=lambda f: f.__name__
)
def test_a_change_is_noticed_by_save_and_by_fit(change, tmp_path):
    host = Host(tiny_vit(), X[:1])
    task = methods.build("linear", host, num_classes=3)
    save(task, host, tmp_path / "before.task")
    change(host.model)
    with pytest.raises(WrongBackboneError, match="not what it was"):
        save(task, host, tmp_path / "after.task")
    assert not (tmp_path / "after.task").exists()
    data = [(x, 0) for x in X]
    with pytest.raises(BackboneChangedError, match="not what it was"):
        fit(Tuned(host, task), data, settings=FitSettings(epochs=1), out=tmp_path / "run")


def test_an_adapter_that_is_switched_merged_or_scaled_is_noticed_at_the_next_forward():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv", "fc1"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_vit(), config).eval()
    model.add_adapter("other", config)

    def scaled():
        model.base_model.model.blocks[0].attn.qkv.scaling["default"] *= 2

    switches = [
        model.base_model.disable_adapter_layers,
        lambda: model.set_adapter("other"),
        model.merge_adapter,
        scaled,
    ]
    for switch in switches:
        with Host(model, X[:1]) as host:
            host.features(X)
            switch()
            with pytest.raises(BackboneChangedError, match="other adapters in use"):
                host.features(X)
        model.base_model.enable_adapter_layers()
        model.unmerge_adapter()
        model.set_adapter("default")
    with Host(model, X[:1]) as host:
        with model.disable_adapter(), pytest.raises(BackboneChangedError):
            host.features(X)
        # Switched on again it is what it was.
        host.features(X)


def test_what_changes_no_number_is_no_change(tmp_path):
    host = Host(tiny_vit(), X[:1])
    before = host.features(X)[host.sites.taps[-1]]
    digest = host.identity()["digest"]
    for change in (
        lambda: host.model.load_state_dict(copy.deepcopy(host.model.state_dict())),
        lambda: host.checkpoint(),
        lambda: host.checkpoint(False),
        lambda: host.model.to(torch.float64).to(torch.float32),
        lambda: Host(host.model, X[:1]).checkpoint(),
        lambda: host.model.requires_grad_(True),
        lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    ):
        change()
        assert torch.equal(host.features(X)[host.sites.taps[-1]], before)
        host.check_unchanged()
    assert host.identity()["digest"] == digest


def test_copies_of_a_host_are_held_to_what_they_were_copied_as():
    host = Host(tiny_vit(), X[:1])
    for twin in (copy.deepcopy(host), pickle.loads(pickle.dumps(host))):  # noqa: S301
        twin.check_unchanged()
        assert torch.equal(twin.features(X)["block.3"], host.features(X)["block.3"])
        written(twin.model)
        with pytest.raises(BackboneChangedError):
            twin.features(X)
    host.features(X)


def test_statistics_that_a_model_keeps_of_its_inputs_are_noticed():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = nn.Conv2d(3, 8, 3), nn.ModuleList(Layer() for _ in range(2))

        def forward(self, x):
            x = self.stem(x)
            for block in self.block:
                x = block(x)
            return x.mean((2, 3))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return x + self.conv(self.norm(x))

    host = Host(Net(), X[:1])
    host.features(X)
    host.model.train()
    with pytest.raises(BackboneChangedError, match="num_batches_tracked"):
        host.features(X)


def test_what_somebody_trains_inside_runs_and_is_not_saved_as_what_it_was(tmp_path):
    host = Host(tiny_vit(), X[:1])
    task = methods.build("linear", host, num_classes=3)
    bias = host.model.blocks[1].mlp.fc1.bias.requires_grad_(True)
    with torch.no_grad():
        bias.add_(1)
    host.features(X)
    host.check_unchanged()
    written_elsewhere = host.model.blocks[0].mlp.fc1.bias
    with pytest.raises(BackboneChangedError, match=r"blocks\.1\.mlp\.fc1\.bias"):
        save(task, host, tmp_path / "t.task")
    with torch.no_grad():
        written_elsewhere.add_(1)
    with pytest.raises(BackboneChangedError, match=r"blocks\.0\.mlp\.fc1\.bias"):
        host.features(X)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.float64])
def test_one_sign_that_is_turned_is_noticed_wherever_it_stands(kind):
    model = nn.Linear(7, 3).to(kind)
    snapshot = Snapshot(model)
    snapshot.take()
    for parameter in model.parameters():
        for number in parameter.data.view(-1):
            number.neg_()
            with pytest.raises(BackboneChangedError, match="other values"):
                snapshot.check_values()
            number.neg_()
    snapshot.check_values()


def conjugated(numbers):
    numbers[1::2].neg_()


def turned_in_pairs(numbers):
    # The upper halves of two words that stand in one column of a sum.
    numbers[[1, 1 + 2 * COLUMNS]] *= -1


def exchanged_with_its_opposite(numbers):
    numbers[[1, 5]] = numbers[[5, 1]]


@pytest.mark.parametrize(
    "change", [conjugated, turned_in_pairs, exchanged_with_its_opposite], ids=lambda f: f.__name__
)
def test_signs_that_are_turned_together_are_noticed(change):
    model = nn.Linear(2 * COLUMNS, 40, bias=False)
    numbers = model.weight.data.view(-1)
    numbers[5], numbers[1] = -0.5, 0.5
    numbers[1 + 2 * COLUMNS] = 0.5
    snapshot = Snapshot(model)
    snapshot.take()
    change(numbers)
    with pytest.raises(BackboneChangedError, match="other values"):
        snapshot.check_values()


def test_a_backbone_with_a_tensor_of_no_numbers_is_watched_as_any_other():
    # As of a sharded tensor, of which a process may hold no rows.
    model = tiny_vit()
    model.register_buffer("nothing", torch.empty(0))
    host = Host(model, X[:1])
    written(model)
    with pytest.raises(BackboneChangedError):
        host.features(X)
