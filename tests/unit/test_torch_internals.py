"""What we use of torch without a promise: a test a function, to fail where a new torch changed it."""

import ast
import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

import restuning
from restuning import _torch

SOURCE = Path(restuning.__file__).parent


def test_a_copied_module_shares_its_tensors_but_for_those_that_are_replaced():
    module, other = nn.BatchNorm1d(2).eval(), torch.full((2,), 3.0)
    module.register_forward_hook(lambda module, args, output: output + 1)
    before = dict(vars(module))
    shell = nn.BatchNorm1d.__new__(nn.BatchNorm1d)
    _torch.copy_module(module, shell, {}, {id(module.weight): other}, lambda value: value)
    assert shell.weight is other and shell.bias is module.bias
    assert shell.running_var is module.running_var
    assert all(vars(module)[name] is value for name, value in before.items())
    x = torch.randn(3, 2)
    assert torch.allclose(shell(x), (module(x) - 1) * 3 + 1)
    assert _torch.without_compiler(torch.compile(module)) is module


def test_a_bare_copy_has_no_hooks_and_other_tensors():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval()
    module[0].register_forward_pre_hook(lambda m, a, k: 1 / 0, with_kwargs=True)
    module.register_forward_hook(lambda m, a, out: 1 / 0)
    bare = _torch.copy_bare(module, lambda t: t.double() if t.is_floating_point() else t)
    assert bare(torch.ones(1, 2, dtype=torch.double)).dtype == torch.double
    bare[0].register_forward_pre_hook(lambda m, a, k: None, with_kwargs=True)
    assert module[0].weight.dtype == torch.float
    assert len(module[0]._forward_pre_hooks) == len(module[0]._forward_pre_hooks_with_kwargs) == 1


def test_a_vmap_opened_and_closed_by_hand_is_a_vmap():
    x = torch.arange(6.0).reshape(3, 2)
    inside, level = _torch.open_vmap(x)
    assert inside.shape == (2,)
    total = _torch.gather_vmap(inside.sum() * 2, level, 3)
    _torch.close_vmap()
    assert torch.equal(total, torch.vmap(lambda row: row.sum() * 2)(x))
    assert not _torch.is_transformed()


def test_a_transform_of_functions_is_seen_from_inside():
    seen = []
    torch.vmap(lambda x: (seen.append(_torch.is_transformed()), x)[1])(torch.zeros(2))
    assert seen == [True] and not _torch.is_transformed()


def test_a_backward_pass_is_seen_from_inside():
    seen = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: seen.append(_torch.is_in_backward()))
    y.sum().backward()
    assert seen == [True] and not _torch.is_in_backward()


def test_a_storage_has_one_key_also_without_contents():
    with _torch.FakeTensorMode():
        x, other = torch.empty(4), torch.empty(4)
    assert _torch.storage_key(x.untyped_storage()) == _torch.storage_key(x[1:].untyped_storage())
    assert _torch.storage_key(x.untyped_storage()) != _torch.storage_key(other.untyped_storage())


class Halves(torch.Tensor):
    """A tensor of two, as quantised weights are."""

    @staticmethod
    def __new__(cls, low, high):
        return torch.Tensor._make_wrapper_subclass(cls, (low.numel() + high.numel(),))

    def __init__(self, low, high):
        self.low, self.high = low, high

    def __tensor_flatten__(self):
        return ["low", "high"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, meta, size, stride):
        return cls(inner["low"], inner["high"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(str(func))


def test_a_composed_tensor_is_told_from_a_plain_one_and_taken_apart():
    low, high = torch.zeros(2), torch.ones(3)
    composed = Halves(low, high)
    assert _torch.is_composed(composed)
    assert not _torch.is_composed(low) and not _torch.is_composed(nn.Parameter(low))
    parts = _torch.inner_tensors(composed)
    assert parts["low"] is low and parts["high"] is high and len(parts) == 2


def test_a_checkpoint_wrapper_hides_its_prefix_from_the_state_but_not_from_the_parameters():
    inner = nn.Linear(2, 2)
    wrapper = _torch.CheckpointWrapper(inner)
    assert _torch.wrapped_module(wrapper) is inner
    assert list(wrapper.state_dict()) == ["weight", "bias"]
    names = {name for name, _ in nn.Sequential(wrapper).named_parameters()}
    assert names == {f"0.{_torch.CHECKPOINT_PREFIX}{name}" for name in ("weight", "bias")}


def test_chosen_hooks_are_removed_also_from_a_copy_and_others_stay():
    def ours(module, args, kwargs):
        raise AssertionError("removed hooks must not run")

    def theirs(module, args, output):
        return output + 1

    module = nn.Identity()
    module.register_forward_pre_hook(ours, with_kwargs=True)
    module.register_forward_hook(theirs)
    for each in (copy.deepcopy(module), module):
        _torch.remove_hooks(each, lambda hook: hook is ours)
        assert each(torch.zeros(())) == 1


def test_nested_values_are_listed_and_mapped_in_order():
    nested = {"a": [1, (2, 3)], "b": 4}
    assert _torch.tree_leaves(nested) == [1, 2, 3, 4]
    assert _torch.tree_map(lambda n: -n, nested) == {"a": [-1, (-2, -3)], "b": -4}


class Calls(_torch.TorchDispatchMode):
    """Keeps every dispatched call."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_dispatched_calls_say_their_operation_their_name_and_whether_they_write():
    x = torch.ones(2, 2)
    with Calls() as calls:
        x @ x
        x.add_(1)
    product, addition = calls.seen
    assert _torch.operation_of(product) in flop_registry
    assert _torch.operation_name(product) == "aten::mm"
    assert _torch.operation_name(addition) == "aten::add_"
    assert _torch.writes_in_place(addition) and not _torch.writes_in_place(product)


def test_the_fused_attention_is_what_multihead_attention_runs():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.zeros(1, 3, 8)
    with torch.no_grad(), Calls() as calls:
        attention(x, x, x, need_weights=False)
    assert _torch.FUSED_ATTENTION in {_torch.operation_of(call) for call in calls.seen}


def test_the_switch_of_gradients_is_known_to_a_mode_of_functions():
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(_torch.is_gradient_switch(func))
            return func(*args, **(kwargs or {}))

    with Mode(), torch.no_grad():
        pass
    assert any(seen)
    assert not _torch.is_gradient_switch(torch.add)


def test_a_sharded_tensor_is_known_and_gathered_whole():
    dist = pytest.importorskip("torch.distributed")
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    whole = torch.arange(6.0).reshape(3, 2)
    assert not _torch.is_sharded(whole)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        parts = distribute_tensor(whole, mesh, [Shard(0)])
        assert _torch.is_sharded(parts)
        assert torch.equal(_torch.gather_shards(parts), whole)
        assert torch.equal(_torch.local_part(parts), whole)
        assert torch.equal(_torch.read_whole(parts), whole) and _torch.read_whole(whole) is whole
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        fully_shard(model[0], mesh=mesh)
        assert _torch.sharded_modules(model) == [model[0]]
        assert _torch.names_of_sharded(model) == ["0.weight", "0.bias"]
        bare = _torch.copy_bare(model[0], _torch.read_whole)
        x = torch.randn(3, 2)
        assert torch.equal(bare(x), model[0](x)) and bare.weight is not model[0].weight
    finally:
        dist.destroy_process_group()


def test_buffers_that_files_keep_are_told_from_those_that_they_do_not():
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("made", torch.zeros(1), persistent=False)
    assert _torch.kept_buffers(module) == {"kept"} == set(module.state_dict())


def test_registers_of_a_module_are_its_own_and_not_copies():
    module = nn.Sequential(nn.BatchNorm1d(2))
    parameters, buffers, children = _torch.own_registers(module[0])
    module[0].weight = other = nn.Parameter(torch.ones(2))
    assert parameters["weight"] is other
    assert buffers.keys() == {"running_mean", "running_var", "num_batches_tracked"}
    assert not children and _torch.own_registers(module)[2]["0"] is module[0]


def test_writes_in_place_are_counted_where_torch_counts_them():
    weight = nn.Parameter(torch.zeros(2))
    before = _torch.version_of(weight)
    with torch.no_grad():
        weight.add_(1)
    assert _torch.counts_versions(weight) and _torch.version_of(weight) == before + 1
    with torch.inference_mode():
        assert not _torch.counts_versions(torch.zeros(2))
    assert not _torch.counts_versions(torch.zeros(2, device="meta"))


def test_a_tensor_without_numbers_is_told_from_one_with():
    with _torch.FakeTensorMode():
        assert not _torch.has_values(torch.zeros(2))
    assert _torch.has_values(torch.zeros(2))
    assert not _torch.has_values(torch.zeros(2, device="meta"))


@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
    ],
)
def test_a_weight_that_is_computed_before_it_is_used_is_read_as_the_forward_uses_it(norm):
    torch.manual_seed(0)
    layer = norm(nn.Linear(3, 4)).eval()
    x = torch.randn(2, 3)
    y = layer(x)
    ((name, (value, parts)),) = _torch.computed_from_others(layer).items()
    assert name == "weight"
    assert torch.allclose(y, nn.functional.linear(x, value(), layer.bias), atol=1e-6)
    # What it is made of is no weight of its own.
    assert not set(dict(layer.named_parameters(recurse=False))) - {"bias", *parts}
    assert torch.equal(value(), value())


OF_OTHERS = {"_replace", "_asdict", "_exit", "_hf_hook", "_reset_state", "_shared_state"}
"""Public names of Python's that begin with a line, and private ones of Accelerate's."""


def own_names(trees):
    """Private names that are not torch's: those that the package itself defines, and a few more."""
    names = set(OF_OTHERS)
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
    return names


def private(name):
    return name.startswith("_") and not name.startswith("__")


def test_nobody_else_touches_a_private_name_of_torch():
    trees = {p: ast.parse(p.read_text()) for p in SOURCE.rglob("*.py") if p.name != "_torch.py"}
    ours, found = own_names(trees.values()), []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
                words = [*node.module.split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                words = [
                    w for a in node.names if a.name.startswith("torch.") for w in a.name.split(".")
                ]
            elif isinstance(node, ast.Attribute) and node.attr not in ours:
                words = [node.attr]
            else:
                continue
            found += [f"{path.relative_to(SOURCE)}:{node.lineno} {w}" for w in words if private(w)]
    assert not found, "make it a function of restuning/_torch.py, with a reason and a test: " + str(
        found
    )
