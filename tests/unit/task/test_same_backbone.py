"""A task opens on the backbone it was trained on, whatever is wrapped around it, and on no other."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from awake import tiny_vit, wake
from restuning import Host, Tuned, WrongBackboneError, load, methods, save
from restuning._errors import RestuningWarning
from restuning._files import SEAL
from restuning.task import Identified
from restuning.task.folder import SHA256

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SMALL = 1e-3
"""Of a change: far below what a change of three tensors out of forty would need to be noticed by chance."""


class Net(nn.Module):
    """Residual blocks with BatchNorm, two buffers and a weight that stands at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.blocks = nn.Sequential(*(Block() for _ in range(3)))
        self.blocks[2].conv.weight = self.blocks[1].conv.weight
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]))
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x):
        x = (x - self.mean.view(1, 3, 1, 1)) * self.scale
        return self.blocks(self.stem(x)).mean((2, 3))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.act = nn.ReLU()

    def forward(self, x):
        return x + self.conv(self.act(self.norm(x)))


def net() -> nn.Module:
    return wake(Net())


def saved(model, folder):
    """A task of `model`, and the folder of it."""
    with Host(model, X[:1]) as host:
        return save(methods.build("linear", host, num_classes=3), host, folder / "t.task")


def opens(path, model, **how):
    with Host(model, X[:1]) as host:
        return load(path, host, **how)


def of(name):
    """Change one tensor a little."""

    def change(model):
        tensor = dict([*model.named_parameters(), *model.named_buffers()])[name]
        with torch.no_grad():
            tensor.view(-1)[0].add_(SMALL)

    return change


def statistics(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.mul_(3)


def counted(model):
    model.blocks[0].norm.num_batches_tracked.add_(1)


def half_of_a_layer(model):
    model.blocks[1].attn.qkv.weight.data[: 3 * 48 // 2] *= 1 + SMALL


def two_rows_exchanged(model):
    weight = model.blocks[1].mlp.fc1.weight.data
    weight[[3, 7]] = weight[[7, 3]]


def merged(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).merge_and_unload()


def in_half(model):
    model.blocks[2].to(torch.bfloat16).to(torch.float32)


def untied(model):
    model.blocks[2].conv.weight = nn.Parameter(model.blocks[2].conv.weight.detach() * (1 + SMALL))


CHANGES = {
    "statistics of BatchNorm": (net, statistics),
    "a count of BatchNorm": (net, counted),
    "a buffer": (net, of("mean")),
    "one bias": (tiny_vit, of("blocks.1.mlp.fc1.bias")),
    "one number of a matrix": (tiny_vit, of("blocks.2.attn.qkv.weight")),
    "half of a layer": (tiny_vit, half_of_a_layer),
    "two rows exchanged": (tiny_vit, two_rows_exchanged),
    "a merged adapter": (tiny_vit, merged),
    "rounded": (tiny_vit, in_half),
    "a shared weight that is shared no more": (net, untied),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_weights_of_one_architecture_are_refused_in_words(name, tmp_path):
    make, change = CHANGES[name]
    path = saved(make(), tmp_path)
    changed = make()
    change(changed)
    with pytest.raises(WrongBackboneError, match="another set of weights") as told:
        opens(path, changed)
    assert "any_backbone" in told.value.fix
    opens(path, changed, any_backbone=True)
    # The three tensors of the fingerprint alone would have passed most of them.
    opens(path, make())


def other_heads(model):
    for block in model.blocks:
        block.attn.num_heads, block.attn.head_dim, block.attn.scale = 2, 24, 24**-0.5


def other_activation(model):
    model.blocks[0].act = nn.GELU()


def other_stride(model):
    model.blocks[1].conv.dilation, model.blocks[1].conv.padding = (2, 2), (2, 2)


def other_eps(model):
    for block in model.blocks:
        block.norm.eps = 0.1


def other_table(model):
    # Files do not keep it.
    model.scale.mul_(2)


COMPUTATIONS = {
    "heads": (tiny_vit, other_heads),
    "activation": (net, other_activation),
    "dilation": (net, other_stride),
    "eps": (net, other_eps),
    "a buffer that files do not keep": (net, other_table),
}


@pytest.mark.parametrize("name", COMPUTATIONS)
def test_equal_weights_that_are_computed_with_otherwise_are_refused(name, tmp_path):
    make, change = COMPUTATIONS[name]
    path = saved(make(), tmp_path)
    changed = make()
    change(changed)
    assert changed.state_dict().keys() == make().state_dict().keys()
    with pytest.raises(WrongBackboneError, match="another computation") as told:
        opens(path, changed)
    assert "%" in told.value.found
    opens(path, changed, any_backbone=True)


def test_rotary_positions_of_another_base_are_refused(tmp_path):
    transformers = pytest.importorskip("transformers")

    def llama(base):
        config = transformers.LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=50,
            rope_parameters={"rope_type": "default", "rope_theta": base},
        )
        return wake(transformers.LlamaModel(config))

    ids = torch.randint(2, 50, (1, 9), generator=torch.Generator().manual_seed(0))
    host = Host(llama(10_000.0), input_ids=ids)
    path = save(methods.build("linear", host, num_classes=3), host, tmp_path / "t.task")
    # Of any length: what is asked does not depend on the example's numbers.
    load(path, Host(llama(10_000.0), input_ids=ids[:, 2:] + 1))
    with pytest.raises(WrongBackboneError, match="another computation"):
        load(path, Host(llama(100.0), input_ids=ids))


def lora(model, **how):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["qkv", "fc1"], init_lora_weights=False)
    return peft.get_peft_model(model, config, **how)


def unloaded(model):
    return lora(model).unload()


def switched_off(model):
    wrapped = lora(model)
    wrapped.base_model.disable_adapter_layers()
    return wrapped


def checkpointed(model):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    return model


def parametrised(model):
    class Same(nn.Module):
        def forward(self, x):
            return x.clone()

    parametrize.register_parametrization(model.blocks[0].attn.qkv, "weight", Same())
    parametrize.register_parametrization(model, "pos_embed", Same())
    return model


def in_the_same_dtype(model):
    return model.to(torch.float64).to(torch.float32)


def compiled_to_nothing(model):
    """Wrapped by torch.compile; what a compiler makes of it is not the point here."""
    return torch.compile(model, backend="eager")


WRAPPERS = [
    unloaded,
    switched_off,
    checkpointed,
    parametrised,
    in_the_same_dtype,
    pytest.param(compiled_to_nothing, marks=pytest.mark.slow, id="compiled_to_nothing"),
    # A minute of the real compiler.
    pytest.param(torch.compile, marks=pytest.mark.longer, id="compile"),
]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda f: f.__name__)
def test_a_wrapper_that_computes_nothing_is_the_same_backbone(wrap, tmp_path):
    path = saved(tiny_vit(), tmp_path)
    with Host(wrap(tiny_vit()), X[:1]) as host, Host(tiny_vit(), X[:1]) as plain:
        assert host.fingerprint() == plain.fingerprint()
        assert host.digest() == plain.digest()
        assert host.identity()["digest"] == plain.identity()["digest"]
        load(path, host)


def test_an_adapter_in_use_is_another_backbone_and_merged_the_same_one(tmp_path):
    with_adapter = lora(tiny_vit()).eval()
    inside = copy.deepcopy(with_adapter).base_model.model
    merged = copy.deepcopy(with_adapter).merge_and_unload()
    with Host(with_adapter, X[:1]) as host:
        path = save(methods.build("linear", host, num_classes=3), host, tmp_path / "t.task")
        load(path, host)
        assert host.fingerprint()["adapters"] == "default at 4.0 on 6 maps"
    with Host(merged, X[:1]) as host:
        assert "adapters" not in host.fingerprint()
        back = save(methods.build("linear", host, num_classes=3), host, tmp_path / "back.task")
    other = copy.deepcopy(with_adapter)
    other.merge_adapter()
    for same in (with_adapter, inside, merged, other):
        opens(path, same)
        opens(back, same)
    with pytest.raises(WrongBackboneError, match="another set of weights"):
        opens(path, tiny_vit())
    for layer in with_adapter.modules():
        if hasattr(layer, "scaling"):
            layer.scaling["default"] *= 2
    with pytest.raises(WrongBackboneError, match="adapters default at 8.0 on 6 maps"):
        opens(path, with_adapter)


def test_adapters_that_cannot_be_merged_are_told_from_the_backbone_without_them(tmp_path):
    peft = pytest.importorskip("peft")
    path = saved(tiny_vit(), tmp_path)
    dora = peft.LoraConfig(r=2, target_modules=["fc1"], use_dora=True, init_lora_weights=False)
    scaled = peft.IA3Config(target_modules=["fc1"], feedforward_modules=[], init_ia3_weights=False)
    for config in (dora, scaled):
        wrapped = peft.get_peft_model(tiny_vit(), config).eval()
        with Host(wrapped, X[:1]) as host:
            own = save(methods.build("linear", host, num_classes=3), host, tmp_path / "own.task")
        opens(own, wrapped)
        for task, model in ((path, wrapped), (own, tiny_vit())):
            with pytest.raises(WrongBackboneError, match="another set of weights"):
                opens(task, model)


def test_a_task_that_knew_its_adapters_apart_still_opens_on_them(tmp_path):
    with_adapter = lora(tiny_vit()).eval()
    with Host(with_adapter, X[:1]) as host:
        path = save(methods.build("linear", host, num_classes=3), host, tmp_path / "t.task")
        description = json.loads((path / "task.json").read_text())
        description["backbone"] |= host.apart()
        description.pop(SEAL)
    (path / "task.json").write_text(json.dumps(description))
    opens(path, with_adapter)
    with pytest.raises(WrongBackboneError):
        opens(path, tiny_vit())


def test_adapters_that_others_put_in_are_part_of_the_backbone_and_stay(tmp_path):
    """Neither trained by a task of ours, nor lost with its host."""
    with_adapter = lora(tiny_vit()).eval()
    before = {n: t.clone() for n, t in with_adapter.state_dict().items()}
    asked = {n: p.requires_grad for n, p in with_adapter.named_parameters()}
    bare = with_adapter(X)
    with Host(with_adapter, X[:1]) as host:
        for name in ("res-tuning", "lora", "full"):
            task = methods.build(name, host, 3)
            Tuned(host, task)(X).square().sum().backward()
            optimiser = torch.optim.SGD(task.parameters(), lr=0.1)
            optimiser.step()
        assert all(p.grad is None for p in with_adapter.parameters())
        # A base inside of an adapter is a linear map like any other.
        assert host.sites.linear["qkv.1"].module.endswith("qkv.base_layer")
    after = with_adapter.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[n], before[n]) for n in before)
    assert {n: p.requires_grad for n, p in with_adapter.named_parameters()} == asked
    assert torch.equal(with_adapter(X), bare)


def test_a_copy_that_is_trained_in_a_module_s_place_is_another_backbone(tmp_path):
    peft = pytest.importorskip("peft")
    path = saved(tiny_vit(), tmp_path)
    config = peft.LoraConfig(r=2, target_modules=["qkv"], modules_to_save=["norm"])
    wrapped = peft.get_peft_model(tiny_vit(), config).eval()
    wrapped.base_model.disable_adapter_layers()
    opens(path, wrapped)
    wrapped.base_model.enable_adapter_layers()
    # A copy that was not trained, and LoRA that starts as no change, compute what the backbone does.
    opens(path, wrapped)
    with torch.no_grad():
        wrapped.base_model.model.norm.modules_to_save["default"].bias += SMALL
    with pytest.raises(WrongBackboneError, match="another set of weights"):
        opens(path, wrapped)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, nn.utils.weight_norm])
def test_a_weight_that_is_computed_from_others_is_the_weight(norm, tmp_path):
    normed = tiny_vit()
    norm(normed.blocks[1].mlp.fc2)
    path = saved(normed, tmp_path)
    if norm is nn.utils.weight_norm:
        nn.utils.remove_weight_norm(normed.blocks[1].mlp.fc2)
    else:
        parametrize.remove_parametrizations(normed.blocks[1].mlp.fc2, "weight")
    opens(path, normed)
    with torch.no_grad():
        normed.blocks[1].mlp.fc2.weight[3, 5] += SMALL
    with pytest.raises(WrongBackboneError, match="another set of weights"):
        opens(path, normed)


@pytest.mark.parametrize("scale", ["weight", "state"])
def test_scales_of_8_bit_weights_count_wherever_they_are_kept(scale, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")

    def packed():
        model = tiny_vit()
        for block in model.blocks:
            layer = bnb.nn.Linear8bitLt(48, 192, has_fp16_weights=False)
            layer.load_state_dict(block.mlp.fc1.state_dict())
            block.mlp.fc1 = layer
        return model.to("cpu")

    path = saved(packed(), tmp_path)
    model = packed()
    if scale == "state":
        # The first forward moves them there.
        opens(path, model)
    place = model.blocks[1].mlp.fc1
    place = place.weight if scale == "weight" else place.state
    place.SCB.mul_(1.5)
    with pytest.raises(WrongBackboneError, match="another set of weights"):
        opens(path, model)


def earlier(path):
    """The folder as the library wrote it before digests."""
    description = json.loads((path / "task.json").read_text())
    del description[SEAL], description[SHA256]
    description["backbone"] = {n: description["backbone"][n] for n in ("name", "fingerprint")}
    (path / "task.json").write_text(json.dumps(description))
    return path


def test_a_task_of_before_opens_and_says_that_three_tensors_were_compared(tmp_path):
    path = earlier(saved(tiny_vit(), tmp_path))
    with pytest.warns(RestuningWarning, match="only three tensors"):
        task = opens(path, tiny_vit())
    with pytest.raises(WrongBackboneError):
        opens(path, tiny_vit(seed=7))
    # Saved again it is of today.
    with Host(tiny_vit(), X[:1]) as host:
        save(task, host, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RestuningWarning)
        opens(path, tiny_vit())


def test_a_task_of_before_on_a_wrapped_backbone_still_opens_on_it(tmp_path):
    wrapped = lora(tiny_vit()).eval()
    host = Host(wrapped, X[:1])
    path = earlier(save(methods.build("linear", host, num_classes=3), host, tmp_path / "t.task"))
    description = json.loads((path / "task.json").read_text())
    description["backbone"]["fingerprint"] = host.earlier_fingerprint()
    assert description["backbone"]["fingerprint"]["class"] == "PeftModel"
    (path / "task.json").write_text(json.dumps(description))
    with pytest.warns(RestuningWarning, match="only three tensors"):
        load(path, host)


def test_the_same_backbone_gives_the_same_answers_after_all_that(tmp_path):
    model = net()
    host = Host(model, X[:1])
    task = methods.build("res-tuning-bypass", host, num_classes=3)
    path = save(task, host, tmp_path / "t.task")
    other = Host(net(), X[:1])
    assert torch.equal(Tuned(other, load(path, other)).eval()(X), Tuned(host, task).eval()(X))


def test_many_tasks_are_opened_on_a_backbone_that_is_read_once(tmp_path, monkeypatch):
    path = saved(net(), tmp_path)
    with Host(net(), X[:1]) as host, Host(wake(net()), X[:1]) as other:
        of("blocks.1.conv.weight")(other.model)
        once, another = Identified(host), Identified(Host(other.model, X[:1]))
        read = []
        monkeypatch.setattr(host, "identity", lambda: read.append(1))
        assert Tuned(host, load(path, once))(X).shape == (2, 3)
        with pytest.raises(WrongBackboneError):
            load(path, another)
        assert not read
