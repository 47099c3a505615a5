"""Backbones whose weights are packed (8 and 4 bit) or kept elsewhere, as hosts."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.utils import offload_state_dict
from torch import nn

from awake import tiny_vit, wake
from restuning import (
    Host,
    RestuningError,
    Task,
    Tuned,
    WrongBackboneError,
    export_peft,
    import_peft,
    load,
    merge,
    methods,
    save,
)
from restuning._errors import WrongTaskError
from restuning.backbones import add_quantization, load_backbone
from restuning.backbones.variants import quantize, split_variants
from restuning.host import find_device
from restuning.training import FitSettings, evaluate, fit

transformers = pytest.importorskip("transformers")

SAME = 1e-5
"""One computation in another order."""
ROUNDED = {"int8": 0.05, "nf4": 0.4}
"""Relative error of a last stream after two to three layers of rounded weights; noise gives 1.4."""
EXACT_PREFIX = 1e-4
"""As for the proof of projections."""
FORMS = ["int8", "nf4"]
LIBRARY = {"int8": "torchao", "nf4": "bitsandbytes"}
IDS = torch.randint(1, 50, (3, 7), generator=torch.Generator().manual_seed(1))
X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _llama() -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        attn_implementation="eager",
    )
    return wake(transformers.LlamaModel(config))


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
    )
    return wake(transformers.BertModel(config, add_pooling_layer=False))


MODELS = {
    "vit": (lambda: tiny_vit(embed_dim=64), (X,), {}),
    "llama": (_llama, (), {"input_ids": IDS}),
    "bert": (_bert, (), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}),
}


def _host(name: str, form: str | None = None, model: nn.Module | None = None):
    make, args, kwargs = MODELS[name]
    model = model or make()
    if form is not None:
        pytest.importorskip(LIBRARY[form])
        quantize(model, (form,), name)
    return Host(model, *args, **kwargs), args, kwargs


def _step(host, method, args, kwargs):
    """Logits before, gradients, and logits after one step of a task."""
    torch.manual_seed(0)
    task = methods.build(method, host, num_classes=3, zero=False)
    tuned = Tuned(host, task)
    before = tuned(*args, **kwargs)
    loss = nn.functional.cross_entropy(before.float(), torch.arange(3))
    loss.backward()
    grads = [p.grad.clone() for p in task.parameters()]
    torch.optim.SGD(task.parameters(), lr=0.1).step()
    return task, loss.item(), grads, tuned(*args, **kwargs)


def _unpacked(host, name):
    """A host on a plain model with the numbers that packed weights stand for."""
    make, args, kwargs = MODELS[name]
    plain = make()
    for path, module in host.model.named_modules():
        if isinstance(module, nn.Linear):
            with torch.no_grad():
                made = module.forward(torch.eye(module.in_features))
                bias = 0 if module.bias is None else module.bias
                plain.get_submodule(path).weight.copy_((made - bias).t())
    return Host(plain, *args, **kwargs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", list(MODELS))
def test_sites_of_a_quantised_backbone_are_those_of_the_plain_one(name, form):
    plain, args, kwargs = _host(name)
    packed, _, _ = _host(name, form)
    assert list(packed.sites) == list(plain.sites)
    assert all(s.proof == plain.sites[n].proof for n, s in packed.sites.items())
    ours = packed.features(*args, **kwargs)[plain.sites.taps[-1]]
    theirs = plain.features(*args, **kwargs)[plain.sites.taps[-1]]
    error = float((ours - theirs).norm() / theirs.norm())
    assert 1e-4 < error < ROUNDED[form]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("method", ["res-tuning", "res-tuning-bypass"])
def test_tuners_train_on_a_quantised_backbone(name, form, method, tmp_path):
    host, args, kwargs = _host(name, form)
    frozen = {n: p.detach().clone() for n, p in host.model.named_parameters()}
    task, loss, grads, after = _step(host, method, args, kwargs)
    assert all(g.isfinite().all() for g in grads)
    assert sum(float(g.abs().max()) > 0 for g in grads) > 0.9 * len(grads)
    assert nn.functional.cross_entropy(after.float(), torch.arange(3)) < loss
    for n, p in host.model.named_parameters():
        same = p if p.is_floating_point() and type(p) is nn.Parameter else None
        assert same is None or torch.equal(same, frozen[n])
    save(task, host, tmp_path / "a.task")
    again = load(tmp_path / "a.task", _host(name, form)[0])
    assert torch.allclose(Tuned(host, again)(*args, **kwargs), after, atol=SAME)


@pytest.mark.parametrize("form", FORMS)
def test_a_prefix_borrows_the_maps_of_quantised_layers(form):
    host, args, kwargs = _host("llama", form)
    assert all(s.projections is not None for s in host.sites.pick("mha").values())
    torch.manual_seed(0)
    task = methods.build("prefix", host, num_classes=3)
    out = Tuned(host, task)(*args, **kwargs)
    theirs = Tuned(_unpacked(host, "llama"), task)(*args, **kwargs)
    assert (out - theirs).abs().max() < EXACT_PREFIX * (1 + theirs.abs().max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "targets"), [("llama", "all"), ("vit", "q+v")])
def test_lora_beside_packed_weights_is_lora_beside_the_weights_they_stand_for(
    form, name, targets, tmp_path
):
    host, args, kwargs = _host(name, form)
    assert {s.proof for s in host.sites.linear.values()} == {"shape"}
    plain = _unpacked(host, name)
    torch.manual_seed(0)
    task = methods.build("lora", host, num_classes=3, targets=targets, zero=False)
    answers = [Tuned(each, task)(*args, **kwargs) for each in (host, plain)]
    bare = Tuned(host, Task(head=task.head))(*args, **kwargs)
    assert not torch.allclose(answers[0], bare, atol=1e-2)
    gradients = [torch.autograd.grad(a.square().sum(), task.parameters()) for a in answers]
    for ours, theirs in zip(
        *([a, *g] for a, g in zip(answers, gradients, strict=True)), strict=True
    ):
        assert theirs.abs().max() > 0
        assert (ours - theirs).abs().max() < EXACT_PREFIX * theirs.abs().max()
    save(task, host, tmp_path / "a.task")
    again = load(tmp_path / "a.task", _host(name, form)[0])
    assert torch.equal(Tuned(host, again)(*args, **kwargs), answers[0])
    with pytest.raises(WrongTaskError, match="packed"):
        merge(task, host)


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_of_peft_is_read_on_packed_weights_and_written_from_them(form, tmp_path):
    pytest.importorskip("peft")
    host, args, kwargs = _host("llama", form)
    task = wake(methods.build("lora", host, targets="q+down"))
    export_peft(task, host, tmp_path / "adapter")
    again = import_peft(tmp_path / "adapter", host)
    with torch.no_grad():
        ours, theirs = (Tuned(host, t)(*args, **kwargs)[0] for t in (task, again))
        assert torch.equal(ours, theirs) and not torch.equal(ours, host(*args, **kwargs)[0])


@pytest.mark.parametrize("form", FORMS)
def test_a_fingerprint_tells_quantised_weights_apart(form, tmp_path):
    plain, packed = _host("llama")[0], _host("llama", form)[0]
    assert packed.fingerprint() == _host("llama", form)[0].fingerprint()
    assert packed.digest() == _host("llama", form)[0].digest()
    assert packed.fingerprint()["sites"] == plain.fingerprint()["sites"]
    assert packed.fingerprint()["weights"] != plain.fingerprint()["weights"]
    other = _llama()
    with torch.no_grad():
        other.layers[1].mlp.up_proj.weight.mul_(1.5)  # packed values stay, scales do not
    assert packed.digest() != _host("llama", form, model=other)[0].digest()
    task = methods.build("linear", plain, num_classes=3)
    save(task, plain, tmp_path / "a.task")
    with pytest.raises(WrongBackboneError, match="another set of weights"):
        load(tmp_path / "a.task", packed)


@pytest.mark.parametrize("method", ["full", "bitfit"])
def test_trained_copies_of_packed_or_absent_weights_are_refused(method):
    packed, _, _ = _host("vit", "int8")
    if method == "full":
        with pytest.raises(RestuningError, match="quantised"):
            methods.build(method, packed, num_classes=3)
    model = tiny_vit()
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(RestuningError, match="offloaded"):
        methods.build(method, Host(model, X), num_classes=3)


def test_forms_are_read_from_the_end_of_a_name():
    assert split_variants("timm:x+int8+compile") == ("timm:x", ("int8", "compile"))
    assert split_variants("timm:x:bn_eps=1e+3") == ("timm:x:bn_eps=1e+3", ())
    assert add_quantization("timm:x+compile", "nf4") == "timm:x+nf4+compile"
    assert add_quantization("timm:x", None) == "timm:x"
    for name, form in (("timm:x", "int3"), ("timm:x+int8", "nf4")):
        with pytest.raises(RestuningError, match="int8, nf4"):
            add_quantization(name, form)


@pytest.mark.parametrize("form", FORMS)
def test_a_quantised_backbone_is_loaded_by_its_name(form):
    pytest.importorskip(LIBRARY[form])
    loaded = load_backbone(f"restuning-tiny+{form}")
    assert loaded.name == f"restuning-tiny+{form}"
    assert type(loaded.model.blocks[0].mlp.fc1.weight) is not nn.Parameter
    plain = load_backbone("restuning-tiny")
    x = torch.randn(2, 3, 32, 32)
    assert (loaded.model(x) - plain.model(x)).norm() < ROUNDED[form] * plain.model(x).norm()


def test_a_backbone_without_linear_maps_is_not_quantised():
    with pytest.raises(RestuningError, match="no linear maps"):
        quantize(nn.Sequential(nn.Conv2d(3, 4, 3)), ("int8",), "cnn")


@pytest.mark.slow
@pytest.mark.compile
def test_a_compiled_backbone_gives_the_taps_of_the_plain_one(monkeypatch):
    compiled = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **k: compiled(self, backend="aot_eager", **k)
    )
    host, plain = (
        load_backbone("restuning-tiny+compile").host(),
        load_backbone("restuning-tiny").host(),
    )
    assert host.model._compiled_call_impl is not None
    ours, theirs = host.features(X), plain.features(X)
    assert all(torch.allclose(ours[n], theirs[n], atol=SAME * 10) for n in theirs)
    task = methods.build("res-tuning", plain, num_classes=3, zero=False)
    assert torch.allclose(Tuned(host, task)(X), Tuned(plain, task)(X), atol=SAME * 10)
    assert host.fingerprint() == plain.fingerprint()


def _offloaded(how: str, model: nn.Module, folder) -> nn.Module:
    if how == "cpu":
        cpu_offload(model, execution_device="cpu")
    elif how == "disk":
        disk_offload(model, folder, execution_device="cpu")
    else:
        sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
        large = max(sizes, key=lambda n: sizes[n])
        loose = [n for n, _ in model.named_parameters(recurse=False)]
        kept = {n: p for n, p in model.state_dict().items() if n.startswith(f"{large}.")}
        offload_state_dict(folder, kept)
        places = {**dict.fromkeys([*loose, *sizes], "cpu"), large: "disk"}
        dispatch_model(model, places, main_device="cpu", offload_dir=folder)
    return model


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatched"])
@pytest.mark.parametrize("name", ["vit", "llama"])
@pytest.mark.parametrize("method", ["res-tuning", "res-tuning-bypass", "prefix"])
def test_an_offloaded_backbone_answers_and_trains_as_one_in_memory(how, name, method, tmp_path):
    plain, args, kwargs = _host(name)
    model = _offloaded(how, copy.deepcopy(plain.model.requires_grad_(True)), tmp_path / "weights")
    plain.model.requires_grad_(False)
    host, _, _ = _host(name, model=model)
    assert list(host.sites) == list(plain.sites)
    assert find_device(model) == torch.device("cpu")
    assert host.fingerprint() == plain.fingerprint()
    assert host.digest() == plain.digest()
    task, loss, grads, after = _step(host, method, args, kwargs)
    _, same_loss, same_grads, same_after = _step(plain, method, args, kwargs)
    assert abs(loss - same_loss) < SAME
    assert all(torch.allclose(a, b, atol=SAME) for a, b in zip(grads, same_grads, strict=True))
    assert torch.allclose(after, same_after, atol=SAME)
    save(task, host, tmp_path / "a.task")
    assert torch.allclose(
        Tuned(plain, load(tmp_path / "a.task", plain))(*args, **kwargs), after, atol=SAME
    )


def test_a_model_that_a_device_map_placed_is_the_one_in_memory(tmp_path):
    plain, args, kwargs = _host("llama")
    plain.model.save_pretrained(tmp_path / "model")
    places = {"embed_tokens": "cpu", "layers.0": "cpu", "layers.1": "disk", "norm": "disk"}
    model = transformers.LlamaModel.from_pretrained(
        tmp_path / "model",
        device_map={**places, "rotary_emb": "cpu"},
        offload_folder=tmp_path / "weights",
        attn_implementation="eager",
    )
    assert model.layers[1].mlp.up_proj.weight.is_meta and model.norm.weight.is_meta
    host, _, _ = _host("llama", model=model)
    assert list(host.sites.items()) == list(plain.sites.items())
    assert host.digest() == plain.digest() and host.fingerprint() == plain.fingerprint()
    for method in ("res-tuning", "res-tuning-bypass"):
        task, _, grads, after = _step(host, method, args, kwargs)
        _, _, same_grads, same_after = _step(plain, method, args, kwargs)
        assert all(torch.allclose(a, b, atol=SAME) for a, b in zip(grads, same_grads, strict=True))
        assert torch.allclose(after, same_after, atol=SAME)
        save(task, host, tmp_path / f"{method}.task")
        again = Tuned(plain, load(tmp_path / f"{method}.task", plain))(*args, **kwargs)
        assert torch.allclose(again, after, atol=SAME)


def _neox() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = transformers.GPTNeoXConfig(**sizes, num_hidden_layers=1, vocab_size=50)
    return wake(transformers.GPTNeoXModel(config))


@pytest.mark.parametrize("make", [_neox, lambda: tiny_vit(depth=1)])
def test_offloaded_a_fused_map_has_the_parts_that_it_has_in_memory(make):
    # GPT-NeoX keeps queries, keys and values head by head: no rows of its map are all queries.
    args, kwargs = ((), {"input_ids": IDS}) if make is _neox else ((X,), {})
    model = make()
    offloaded = copy.deepcopy(model)
    cpu_offload(offloaded, execution_device="cpu")
    here, there = (Host(m, *args, **kwargs).sites.linear for m in (model, offloaded))
    assert list(here) == list(there)
    assert ("q.1" in here) == (make is not _neox)


def test_fit_and_evaluate_leave_an_offloaded_backbone_where_it_is(tmp_path):
    model = tiny_vit()
    plain = Host(copy.deepcopy(model), X)
    cpu_offload(model, execution_device="cpu")
    host = Host(model, X)
    data = [(x, i) for i, x in enumerate(X)]
    found = []
    for name, on in (("offloaded", host), ("plain", plain)):
        torch.manual_seed(0)
        task = methods.build("res-tuning-bypass", on, num_classes=3)
        tuned = Tuned(on, task)
        fit(tuned, data, settings=FitSettings(epochs=2, lr=1e-2), out=tmp_path / name)
        found.append((evaluate(tuned, data)["loss"], task.side.gate.detach().clone()))
    assert all(p.is_meta for n, p in model.named_parameters() if n.startswith("blocks"))
    assert abs(found[0][0] - found[1][0]) < SAME
    assert torch.allclose(found[0][1], found[1][1], atol=SAME)
