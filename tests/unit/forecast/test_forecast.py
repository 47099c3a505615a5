"""What is foretold from shapes is what happens with numbers."""

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from store_script import Noise, host_and_key
from torch import nn
from torch.autograd.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from awake import tiny_bert, tiny_vit
from restuning import Host, Needs, Tuned, forecast, methods
from restuning._errors import ForecastError, ProjectionsError
from restuning.features import build, view_of
from restuning.forecast import FinishedRun, StepForecast, forecast_run
from restuning.forecast.ledger import Ledger
from restuning.forecast.methods import checkpointed
from restuning.forecast.step import SCRATCH

BATCH = 6
CLASSES = 5
ALLOCATED_TOLERANCE = 0.05
"""Kernels take a little scratch memory of their own, which shapes do not show."""
NPY_HEADER = 128
LABEL_BYTES = 8
IMAGE = (1, 3, 32, 32)


def small_swin():
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(2, 4),
        num_classes=0,
    ).eval()


def world(kind):
    """A host on a small network, and one input."""
    if kind == "bert":
        ids = torch.arange(12).unsqueeze(0)
        # One token is padding: transformers drops a mask that masks nothing, by its values.
        example = {"input_ids": ids, "attention_mask": (ids < 11).long()}
        return Host(tiny_bert(), **example), example
    model = small_swin() if kind == "swin" else tiny_vit()
    return Host(model, torch.randn(IMAGE)), (torch.randn(IMAGE),)


def wide(example, size):
    if isinstance(example, dict):
        return {k: v.repeat(size, 1) for k, v in example.items()}
    return tuple(v.repeat(size, *[1] * (v.dim() - 1)) for v in example)


def tuned(kind, method):
    host, example = world(kind)
    task = methods.build(method, host, num_classes=CLASSES)
    return Tuned(host, task).train(), example, [p for p in task.parameters() if p.requires_grad]


def loss_of(module, inputs):
    return F.cross_entropy(
        forecast.call_module(module, inputs), torch.zeros(BATCH, dtype=torch.long)
    )


def counted(module, run):
    """Bytes that autograd holds after a forward, counted on real tensors."""
    weights = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    seen = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            seen.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    alive = {s.data_ptr(): s.nbytes() for ref in seen if (s := ref()) is not None}
    del loss
    return sum(alive.values())


def allocated_peak(run):
    """Most bytes that torch's CPU allocator handed out at once during a call, above its start."""
    gc.collect()
    with profile(profile_memory=True) as seen:
        run()
    events = [e for e in seen.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


CASES = [
    ("vit", "linear"),
    ("vit", "full"),
    ("vit", "res-tuning"),
    ("vit", "res-tuning-bypass"),
    ("vit", "vpt-deep"),
    ("swin", "res-tuning"),
    ("swin", "res-tuning-bypass"),
    ("bert", "res-tuning"),
    ("bert", "res-tuning-bypass"),
]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_saved_bytes_are_those_of_a_real_step_to_the_byte(kind, method):
    module, example, trained = tuned(kind, method)
    told = forecast.forecast_step(module, example, BATCH, trained=trained)
    found = counted(module, lambda: loss_of(module, wide(example, BATCH)))
    assert told.saved_bytes == found > 0


def step_peak(module, example, trained):
    """Of a real step, not the first, which makes the moments."""
    optimiser = torch.optim.AdamW(trained, lr=1e-3)
    inputs = wide(example, BATCH)

    def step():
        loss_of(module, inputs).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    step()
    return allocated_peak(step)


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_the_peak_is_that_of_the_allocator_in_a_real_step(kind, method):
    module, example, trained = tuned(kind, method)
    told = forecast.forecast_step(module, example, BATCH, trained=trained)
    found = step_peak(module, example, trained)
    assert told.peak_bytes == pytest.approx(found, rel=ALLOCATED_TOLERANCE)


@pytest.mark.parametrize("method", ["full", "res-tuning"])
def test_the_peak_under_checkpointing_is_that_of_the_allocator_in_a_real_step(method):
    module, example, trained = tuned("vit", method)
    with checkpointed(module.host, True):
        told = forecast.forecast_step(module, example, BATCH, trained=trained)
        found = step_peak(module, example, trained)
    assert told.peak_bytes == pytest.approx(found, rel=ALLOCATED_TOLERANCE)


def test_the_peak_of_a_chain_is_the_one_worked_out_by_hand():
    b, d, e, c = 1000, 8, 16, 4
    chain = nn.Sequential(nn.Linear(d, e, bias=False), nn.ReLU(), nn.Linear(e, c, bias=False))
    told = forecast.forecast_step(chain, torch.randn(1, d), b, loss=lambda y: y.sum())
    hidden, number = 4 * b * e, 4
    # In backward of the ReLU: its saved output, the gradient that comes and the one that goes. The
    # loss and the last weight's gradient are there as well; the sum's own gradient is a number.
    assert told.peak_bytes == 3 * hidden + 4 * e * c + 2 * number
    # Linear maps save what they read; x is counted as saved though it was there before.
    assert told.saved_bytes == hidden + 4 * b * d
    assert told.input_bytes == 4 * b * d
    assert told.weights_bytes == 4 * (d * e + e * c)
    assert told.optimiser_bytes == 2 * told.weights_bytes


@pytest.mark.parametrize("method", ["full", "res-tuning", "res-tuning-bypass"])
def test_flops_are_those_that_torch_counts_on_real_tensors(method):
    module, example, trained = tuned("vit", method)
    told = forecast.forecast_step(module, example, BATCH, trained=trained)
    with FlopCounterMode(display=False) as counter:
        loss_of(module, wide(example, BATCH)).backward()
    assert told.cost.flops == counter.get_total_flops() > 0


def test_a_step_costs_no_memory_and_leaves_the_module_alone():
    module, example, trained = tuned("vit", "res-tuning")
    before = {n: p.clone() for n, p in module.named_parameters()}
    wanted = allocated_peak(lambda: forecast.forecast_step(module, example, 10**6, trained=trained))
    assert wanted < 2**20
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())
    assert module(*example).shape == (1, CLASSES)


def test_scratch_is_by_thread_and_never_more_than_the_operands():
    small = forecast.forecast_forward(nn.Linear(4, 4, bias=False), torch.zeros(1, 4), 2)
    large = forecast.forecast_forward(nn.Linear(4096, 64), torch.zeros(1, 4096), 4096)
    threads = torch.get_num_threads()
    assert small.scratch_bytes == threads * 4 * (2 * 4 + 4 * 4)
    assert large.scratch_bytes == threads * SCRATCH
    assert large.total_bytes - large.peak_bytes > large.scratch_bytes


def test_views_are_free_and_what_is_let_go_is_subtracted():
    with Ledger() as ledger:
        x = torch.ones(100)
        view = x[10:20].view(2, 5)
        assert ledger.live == 400
        y = x + 1
        assert (ledger.live, ledger.peak, ledger.calls) == (800, 800, 2)
        del x
        assert ledger.live == 800
        del view
        assert ledger.live == 400
        del y
    assert (ledger.live, ledger.peak) == (0, 800)


def test_checkpointing_and_pieces_save_memory_and_cost_time():
    host, example = world("vit")
    task = methods.build("res-tuning", host, num_classes=CLASSES)
    plain = forecast.forecast_task(host, task, example, 64)
    again = forecast.forecast_task(host, task, example, 64, form="checkpointing")
    parts = forecast.forecast_task(host, task, example, 64, pieces=4)
    assert again.saved_bytes < plain.saved_bytes / 5
    assert again.peak_bytes < 0.7 * plain.peak_bytes
    assert again.cost.flops > plain.cost.flops
    assert parts.cost.flops == plain.cost.flops
    assert plain.peak_bytes / 5 < parts.peak_bytes < plain.peak_bytes / 3
    assert type(host.model.get_submodule("blocks.0")).__name__ == "Block"


@pytest.mark.parametrize(
    "name",
    [
        "restuning-tiny",
        "timm:vit_tiny_patch16_224",
        "timm:mixer_s32_224",
        "timm:resnet10t",
        "timm:mobilenetv2_035",
        "timm:convnext_atto",
        "torchvision:squeezenet1_1",
    ],
)
def test_a_host_without_weights_finds_what_one_with_weights_finds(name):
    _, bare = forecast.load_shapes(name)
    _, drawn = forecast.load_drawn(name)
    assert all(p.is_meta for p in bare.model.parameters())
    assert bare.readout_rule == drawn.readout_rule
    assert bare.sites.rows() == [row | {"projections": False} for row in drawn.sites.rows()]


@pytest.mark.slow
def test_a_convolutional_network_without_weights_is_forecast_as_with_them():
    backbone, bare = forecast.load_shapes("timm:mobilenetv2_035@64")
    _, drawn = forecast.load_drawn("timm:mobilenetv2_035@64")
    for method in ("linear", "res-tuning", "res-tuning-bypass"):
        task = methods.build(method, bare, num_classes=CLASSES)
        told = forecast.forecast_task(bare, task, backbone.example, 3)
        assert told == forecast.forecast_task(drawn, task, backbone.example, 3)
        assert told.peak_bytes > 0


def test_a_vision_language_model_without_weights_has_the_sites_of_one_with_weights(tmp_path):
    pytest.importorskip("transformers")
    import towers

    name = towers.saved(towers.clip(), tmp_path / "clip")
    _, bare = forecast.load_shapes(name)
    _, drawn = forecast.load_drawn(name)
    assert bare.readout_rule == drawn.readout_rule
    assert bare.readout_rule.project == "projection"
    assert bare.sites.rows() == [row | {"projections": False} for row in drawn.sites.rows()]


def test_a_language_model_without_weights_has_the_sites_of_one_with_weights():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=64,
        use_cache=False,
    )
    ids = torch.arange(8).unsqueeze(0)
    drawn = Host(transformers.LlamaModel(config).eval(), input_ids=ids)
    with torch.device("meta"):
        model = transformers.LlamaModel(config).eval()
    with forecast.AbsentWeights():
        bare = Host(model, input_ids=ids)
    assert bare.readout_rule == drawn.readout_rule
    assert bare.sites.rows() == [row | {"projections": False} for row in drawn.sites.rows()]
    task = methods.build("res-tuning", bare, num_classes=CLASSES)
    told = forecast.forecast_task(bare, task, {"input_ids": ids}, 3)
    found = forecast.forecast_task(drawn, task, {"input_ids": ids}, 3)
    assert told == found


def test_tuners_that_borrow_maps_are_refused_where_there_are_no_weights():
    backbone, bare = forecast.load_shapes("restuning-tiny")
    task = methods.build("vpt-deep", bare, num_classes=CLASSES)
    assert bare.lacks_projections(task.inline_tuners) == list(task.inline_tuners)
    with pytest.raises(ProjectionsError):
        forecast.forecast_task(bare, task, backbone.example, 2)
    _, drawn = forecast.load_drawn("restuning-tiny")
    assert drawn.lacks_projections(task.inline_tuners) == []


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("tokens", ["cls", "all"])
def test_the_size_of_a_store_is_that_of_a_real_one(tmp_path, dtype, tokens):
    splits = {"train": 20, "val": 6}
    host, key = host_and_key(dtype, splits=splits, tokens=tokens)
    parts = {("train", 0): view_of("plain", Noise(20), Noise(20)), ("val", 0): Noise(6)}
    store = build(host, key, tmp_path, parts, batch_size=8, progress=False)
    taps = forecast.tap_shapes(host, Needs(host.sites.taps, tokens), (torch.zeros(IMAGE),))
    told = forecast.store_bytes(taps, 26, dtype)
    files = len(list(store.path.glob("*.npy")))
    assert store.bytes == told + files * NPY_HEADER + 26 * LABEL_BYTES


@pytest.mark.parametrize(
    ("method", "forms"),
    [
        ("ridge", {"cached", "live"}),
        ("mixing-bypass", {"cached", "live"}),
        ("linear", {"cached", "live"}),
        ("res-tuning", {"live", "checkpointing"}),
        ("full", {"live", "checkpointing"}),
    ],
)
def test_forms_are_those_in_which_a_method_can_be_trained(method, forms):
    host = forecast.load_shapes("restuning-tiny")[1]
    assert set(forecast.forms(methods.build(method, host, num_classes=3))) == forms


def test_training_from_a_store_is_forecast_as_it_runs():
    host, example = world("vit")
    task = methods.build("res-tuning-bypass", host, num_classes=CLASSES)
    told = forecast.forecast_task(host, task, example, BATCH, form="cached")
    module = forecast.OnTaps(host, task)
    taps = dict(host.features(*wide(example, BATCH), keep=task.needs(host.readout_rule)))
    assert told.saved_bytes == counted(module, lambda: loss_of(module, taps))
    assert told.input_bytes == sum(t.untyped_storage().nbytes() for t in taps.values())


def synthetic(fixed, slope, batch):
    cost = forecast.Cost(0, 0, 0)
    return StepForecast(batch, fixed, 0, 0, 0, 0, slope * batch, 0, cost)


@given(st.integers(0, 10**6), st.integers(1, 10**5), st.integers(1, 10**8))
def test_the_largest_batch_fits_and_the_next_does_not(fixed, slope, budget):
    assume(budget < fixed + 60000 * slope)
    best = forecast.largest_batch(lambda b: synthetic(fixed, slope, b), budget)
    assert best == max(0, (budget - fixed) // slope)


@given(st.integers(1, 10**8), st.integers(1, 500))
def test_memory_that_grows_in_steps_is_never_exceeded(budget, block):
    def told(batch):
        return replace(synthetic(1000, 0, batch), peak_bytes=-(-batch // block) * block * 100)

    best = forecast.largest_batch(told, budget)
    assert told(max(best, 1)).total_bytes <= budget or best == 0 and told(1).total_bytes > budget


def option(method, form, largest):
    return forecast.Option(method, form, "", synthetic(0, 1, 64), 1.0, largest_batch=largest)


def test_what_is_recommended_fits_the_budget():
    options = [
        option("linear", "cached", 900),
        option("res-tuning-bypass", "cached", 500),
        option("res-tuning", "live", 8),
        option("res-tuning", "checkpointing", 40),
        option("full", "live", 0),
    ]
    found = forecast.recommend(options, 64)
    assert (found.option.method, found.option.form, found.batch) == ("res-tuning", "live", 8)
    assert "--accumulate 8" in found.why
    options[2] = option("res-tuning", "live", 4)
    found = forecast.recommend(options, 64)
    assert (found.option.method, found.option.form, found.batch) == (
        "res-tuning",
        "checkpointing",
        40,
    )
    assert "2 pieces of 32" in found.why
    none = [option("res-tuning", "live", 0), option("linear", "cached", 3)]
    found = forecast.recommend(none, 64)
    assert (found.option.method, found.batch) == ("linear", 3)
    assert forecast.recommend([option("linear", "live", 0)], 64) is None


@given(st.text())
def test_what_is_no_amount_of_memory_is_refused_in_words(text):
    try:
        assert forecast.parse_bytes(text) >= 1
    except ForecastError as error:
        assert "8GB" in str(error)


@given(st.integers(1, 10**6), st.sampled_from(["", "K", "M", "G", "T"]), st.sampled_from(["", "i"]))
def test_amounts_of_memory_are_read_in_both_systems(count, unit, binary):
    power = " KMGT".index(unit or " ")
    binary = binary if unit else ""
    wanted = count * (1024 if binary else 1000) ** power
    for text in (f"{count}{unit}{binary}B", f" {count} {unit}{binary} ", f"{count}{unit}{binary}b"):
        assert forecast.parse_bytes(text) == wanted


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "0.1", "1e3", "8 GB RAM", "nan", "١GB"])
def test_amounts_that_mean_nothing_are_refused(text):
    with pytest.raises(ForecastError):
        forecast.parse_bytes(text)


def test_a_grid_costs_its_forwards_once_and_its_steps_by_arm():
    rates = forecast.BankRates(forward_seconds=0.1, step_seconds=0.02, eval_seconds=0.001, arms=15)
    single = forecast.BankRates(0.1, 0.005, 0.0002, 1)
    splits = {"train": 800, "val": 200, "test": 1000}
    told = forecast.forecast_grid(
        rates, splits, tasks=19, arms=30, epochs=10, batch=100, finals=2, single=single
    )
    assert told.features == pytest.approx(19 * 2000 * 0.1)
    assert told.search == pytest.approx(19 * 2 * (80 * 0.02 + 10 * 200 * 0.001))
    assert told.final == pytest.approx(19 * 2 * (100 * 0.005 + 1000 * 0.0002))
    assert told.seconds == pytest.approx(told.features + told.search + told.final)
    assert json.loads(json.dumps(told.to_dict()))["tasks"] == 19


class Unfollowable(nn.Module):
    """Its forward depends on values."""

    def __init__(self):
        super().__init__()
        self.task = nn.Linear(4, 2)

    def forward(self, x):
        return self.task(x) if x.sum().item() > 0 else x


def test_a_run_that_cannot_be_forecast_says_why():
    data = [(torch.ones(4), 0)] * 8
    found = forecast_run(FinishedRun(Unfollowable(), data, None, None, 4, 1, 1, "no", False))
    assert list(found) == ["not_made"]
    assert "DataDependent" in found["not_made"]
