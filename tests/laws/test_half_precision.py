"""A backbone in bf16 or fp16 is tuned as the same numbers in fp32 are, to rounding, by every method."""

import copy

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

import restuning
from restuning import FitSettings, Host, Tuned, evaluate, fit, load, methods, save
from restuning._errors import RestuningError

hf = pytest.importorskip("transformers")

ROUNDING = {torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest error of logits, relative to their size: a few layers that round to 2^-9 and 2^-12."""

SAME_DIRECTION = 0.97
"""Least cosine of a gradient with that in single precision; what is wrong points elsewhere."""

HALF = [torch.bfloat16, torch.float16]

SOLVED = ("ridge", "ensemble", "knn")
"""They answer nothing before they have seen data."""


def vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=0).eval(), {"x": torch.randn(4, 3, 64, 64)}


def resnet():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=0).eval(), {"x": torch.randn(4, 3, 64, 64)}


def qwen():
    """Grouped queries, norms on queries and keys, rotary positions."""
    torch.manual_seed(0)
    config = hf.Qwen3Config(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        head_dim=16,
        initializer_range=0.3,
    )
    ids = torch.randint(2, 50, (4, 7))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    return hf.Qwen3Model(config).eval(), {"input_ids": ids, "attention_mask": mask}


MODELS = {"vit": vit, "resnet": resnet, "qwen": qwen}


@pytest.fixture(scope="module")
def hosts():
    """By model and precision, all of one model with the same numbers: those that bf16 holds."""
    made = {}
    for name, make in MODELS.items():
        model, batch = make()
        model = model.bfloat16().float()
        example = {k: v[:1] for k, v in batch.items()}
        for kind in (torch.float32, *HALF):
            made[name, kind] = Host(copy.deepcopy(model).to(kind), **example), batch
    return made


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", HALF)
def test_what_is_found_and_proved_is_what_is_found_in_single_precision(name, kind, hosts):
    whole, half = (hosts[name, k][0] for k in (torch.float32, kind))
    assert half.sites.rows() == whole.sites.rows()
    assert [s.projections for s in half.sites.values()] == [
        s.projections for s in whole.sites.values()
    ]
    assert half.readout_rule == whole.readout_rule


def build(host, method):
    torch.manual_seed(1)
    task = methods.build(method, host, num_classes=3)
    with torch.no_grad():
        for parameter in task.parameters():
            # From zero starts nothing could be told.
            if not task.weights:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return Tuned(host, task)


def run(host, batch, method):
    """Logits and gradients of one step."""
    tuned = build(host, method)
    logits = tuned(**batch)
    torch.nn.functional.cross_entropy(logits.float(), torch.arange(4) % 3).backward()
    grads = [p.grad for p in tuned.task.parameters() if p.grad is not None]
    return logits.detach(), torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("method", [m for m in methods.names() if m not in SOLVED])
@pytest.mark.parametrize("name", MODELS)
def test_every_method_answers_and_learns_as_in_single_precision(name, method, hosts):
    host, batch = hosts[name, torch.float32]
    try:
        wanted, direction = run(host, batch, method)
    except RestuningError as error:
        # What single precision cannot do, half cannot, in the same words.
        for kind in HALF:
            with pytest.raises(type(error)):
                run(hosts[name, kind][0], batch, method)
        return
    for kind in HALF:
        half, _ = hosts[name, kind]
        before = half.digest()
        logits, gradient = run(half, batch, method)
        assert logits.dtype == gradient.dtype == torch.float32
        error = (logits - wanted).abs().max() / wanted.abs().max()
        assert error <= ROUNDING[kind], (kind, float(error))
        cosine = torch.nn.functional.cosine_similarity(gradient, direction, dim=0)
        assert cosine >= SAME_DIRECTION, (kind, float(cosine))
        assert half.digest() == before


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("full", torch.bfloat16),
        ("res-tuning-bypass", torch.float16),
        pytest.param("prefix", torch.float16, marks=pytest.mark.slow),
        pytest.param("ridge", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("ensemble", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("linear", torch.float16, marks=pytest.mark.slow),
    ],
)
def test_fit_evaluate_save_and_load_under_autocast(method, kind, hosts, tmp_path):
    host, _ = hosts["vit", kind]
    data = TensorDataset(torch.randn(6, 3, 64, 64), torch.arange(6) % 2)
    tuned = Tuned(host, methods.build(method, host, num_classes=2))
    settings = FitSettings(epochs=1, precision="bf16", batch_size=3)
    fit(tuned, data, settings=settings, out=tmp_path / "run")
    assert 0 <= evaluate(tuned, data)["accuracy"] <= 1
    save(tuned.task, host, tmp_path / "a.task")
    again = Tuned(host, load(tmp_path / "a.task", host)).eval()
    with torch.no_grad():
        assert torch.equal(again(data.tensors[0]), tuned.eval()(data.tensors[0]))


def test_a_mean_over_many_large_tokens_stays_finite_in_fp16():
    from restuning.sites import average_tokens

    state = torch.full((1, 300, 2), 1000.0, dtype=torch.float16)
    mask = torch.ones(1, 300, dtype=torch.bool)
    assert torch.equal(average_tokens(state, mask), torch.full((1, 2), 1000.0).half())


class Gated(nn.Module):
    """A block whose branches pass gates that are no modules, made of a condition."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.gates = nn.Linear(4, 32)

    def forward(self, x, condition):
        first, second = self.gates(condition).unsqueeze(1).chunk(2, -1)
        y = self.norm1(x)
        x = x + first * self.attn(y, y, y)[0]
        return x + second * self.mlp(self.norm2(x))


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Gated() for _ in range(2))

    def forward(self, x, condition):
        for block in self.blocks:
            x = block(x, condition)
        return x.mean(1)


@pytest.mark.parametrize("kind", HALF)
def test_a_gate_is_proved_in_half_precision_as_in_single(kind):
    torch.manual_seed(0)
    model = Conditioned().eval().bfloat16().float()
    x, condition = torch.randn(1, 12, 16), torch.randn(1, 4).bfloat16().float()
    whole = Host(copy.deepcopy(model), x, condition)
    half = Host(copy.deepcopy(model).to(kind), x, condition.to(kind))
    assert half.sites.rows() == whole.sites.rows()
    assert [s.op for s in half.sites.values() if s.gated] == ["mha", "ffn"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mixing-bypass", "adapter"])
def test_a_folder_in_bf16_is_trained_from_stored_features_and_answers(method, tmp_path):
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.ViTConfig(**size, intermediate_size=48, image_size=32, patch_size=8)
    hf.ViTModel(config).bfloat16().save_pretrained(tmp_path / "vit")
    sides = {"height": 32, "width": 32}
    hf.ViTImageProcessor(size=sides).save_pretrained(tmp_path / "vit")
    for label, grey in (("dark", 30), ("light", 220)):
        (tmp_path / "data" / label).mkdir(parents=True)
        for i in range(8):
            image = Image.new("RGB", (40, 50), (grey + i, grey, grey))
            image.save(tmp_path / "data" / label / f"{i}.png")
    run = restuning.train(
        str(tmp_path / "data"),
        backbone=f"hf:{tmp_path / 'vit'}",
        method=method,
        epochs=1,
        store=str(tmp_path / "store"),
        out=str(tmp_path / "run"),
    )
    predictor = restuning.Predictor.load(run.folder, backbone=f"hf:{tmp_path / 'vit'}")
    assert predictor([str(tmp_path / "data/dark/0.png")])[0].label in ("dark", "light")
