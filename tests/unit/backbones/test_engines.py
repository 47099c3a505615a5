"""Engines: files that hold a backbone and its taps, and run without PyTorch's autograd."""

import json
import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from awake import tiny_vit
from restuning import (
    Bank,
    Engine,
    EngineError,
    Host,
    Needs,
    RestuningError,
    Tuned,
    WrongBackboneError,
    export_engine,
    load,
    load_backbone,
    methods,
    save,
)
from restuning._errors import MissingExtraError, RestuningWarning
from restuning._files import seal
from restuning.backbones import Backbone, Preprocessing, open_engine
from restuning.backbones.engines import Description
from restuning.backbones.engines.description import KEY, copy_norm
from restuning.features import Cached

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SAME = 2e-5
"""fp32 kernels that add in another order, on taps of a few units."""
ROUNDED = 0.2
"""Relative error of int8 activations and weights after three random layers; noise alone gives 1.4."""
X = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
RUNTIMES = ["onnx", "openvino", "pt2"]


def _backbone(model: nn.Module) -> Backbone:
    return Backbone("tiny", model, (torch.zeros(1, 3, 32, 32),), {}, Preprocessing((32, 32)))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One backbone as fp32 and int8 ONNX (class tokens, and all) and as a program."""
    folder = tmp_path_factory.mktemp("engines")
    backbone = _backbone(tiny_vit())
    reports = {
        "onnx": export_engine(backbone, folder / "cls.onnx"),
        "int8": export_engine(backbone, folder / "int8.onnx", precision="int8"),
        "all": export_engine(backbone, folder / "all.onnx", tokens="all"),
        "pt2": export_engine(backbone, folder / "cls.pt2", runtime="pt2"),
    }
    return backbone.host(), reports


def _open(made, runtime: str) -> Engine:
    pytest.importorskip({"onnx": "onnxruntime", "pt2": "torch"}.get(runtime, runtime))
    file = made[1]["pt2" if runtime == "pt2" else "onnx"].file
    return open_engine(runtime, file)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_taps_of_an_fp32_engine_are_those_of_pytorch(made, runtime):
    engine, host = _open(made, runtime), made[0]
    ours = host.features(X, keep=Needs(host.sites.taps, "cls"))
    theirs = engine.features(X)
    assert list(theirs) == list(ours)
    for name, tap in ours.items():
        assert (theirs[name] - tap).abs().max() < SAME * (1 + tap.abs().max())


def test_an_int8_engine_rounds_and_its_export_says_how_much(made):
    host, report = made[0], made[1]["int8"]
    engine = open_engine("onnx", report.file)
    ours = host.features(X, keep=Needs(host.sites.taps, "cls"))
    theirs = engine.features(X)
    assert torch.equal(theirs["block.0"], ours["block.0"])  # the patch convolution stays fp32
    error = (theirs["block.3"] - ours["block.3"]).norm() / ours["block.3"].norm()
    assert 1e-4 < error < ROUNDED
    assert 1e-4 < report.relative < ROUNDED
    assert report.bytes < 0.6 * made[1]["onnx"].bytes


def test_what_else_is_in_a_batch_does_not_change_an_int8_answer(made):
    engine = open_engine("onnx", made[1]["int8"].file)
    louder = torch.cat([X[:2], 20 * X[2:]])
    together, alone = engine.features(louder), engine.features(X[:1])
    for name, tap in alone.items():
        assert torch.equal(together[name][:1], tap)


def test_one_token_of_all_tokens_is_that_of_a_file_of_one_token(made):
    whole, single = open_engine("onnx", made[1]["all"].file), _open(made, "onnx")
    narrowed = whole.features(X, keep=Needs(("last",), "cls"))["last"]
    assert narrowed.shape == (5, 1, 48)
    assert (narrowed - single.features(X)["block.3"]).abs().max() < SAME


def test_parts_that_are_made_of_the_tokens_of_a_file_are_given_and_others_refused(made):
    host, engine = made[0], open_engine("onnx", made[1]["onnx"].file)
    of_one_token = ["feature/cls", "block.1/cls", "block.2"]
    ours = engine.features(X, keep=of_one_token)
    theirs = host.features(X, keep=Needs(tuple(of_one_token), "cls"))
    for name in of_one_token:
        assert torch.allclose(ours[name], theirs[name], atol=SAME)
    whole = open_engine("onnx", made[1]["all"].file)
    for of_others in ("feature/mean", "feature/last", "block.1/tokens", "block.1/last"):
        with pytest.raises(EngineError, match=f"{of_others} is made of"):
            engine.features(X, keep=["block.2", of_others])
        assert of_others in whole.features(X, keep=["block.2", of_others])
    # The vector that a backbone makes of its last stream by itself is in no tokens of that.
    with pytest.raises(EngineError, match="--tokens pool"):
        whole.features(X, keep=["feature/own"])


def test_tokens_that_were_not_exported_are_refused_with_the_option_that_exports_them(made):
    with pytest.raises(EngineError, match="--tokens all"):
        _open(made, "onnx").features(X, keep=Needs(("block.1",), "all"))


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("method", ["linear", "res-tuning-bypass", "bypass-horizontal"])
def test_a_task_answers_on_an_engine_as_on_its_backbone(made, runtime, method):
    engine, host = _open(made, runtime), made[0]
    task = methods.build(method, engine, num_classes=4)
    with torch.no_grad():
        for p in task.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours, theirs = Tuned(host, task)(X), Tuned(engine, task)(X)
    assert (ours - theirs).abs().max() < SAME * (1 + ours.abs().max())


def test_gradients_reach_the_task_through_the_readout_on_loan(made):
    engine, host = _open(made, "onnx"), made[0]
    torch.manual_seed(3)
    task = methods.build("res-tuning-bypass", engine, num_classes=4, zero=False)
    grads = [
        torch.autograd.grad(Tuned(on, task)(X).square().sum(), list(task.parameters()))
        for on in (engine, host)
    ]
    for theirs, ours in zip(*grads, strict=True):
        assert (theirs - ours).abs().max() < 1e-3 * (1 + ours.abs().max())
    assert any(g.abs().max() > 1e-3 for g in grads[0])


def test_a_bank_answers_on_the_features_of_an_engine(made):
    engine = _open(made, "onnx")
    tasks = {n: methods.build("res-tuning-bypass", engine, num_classes=3) for n in "abc"}
    bank = Bank(tasks)
    answers = bank(engine.features(X, keep=bank.keep))
    for name, task in tasks.items():
        assert torch.allclose(answers[name], Tuned(engine, task)(X), atol=SAME)


INSIDE = ["res-tuning", "res-tuning-tri", "full", "bitfit", "prefix", "vpt-shallow", "adapter"]


@pytest.mark.parametrize("method", INSIDE)
def test_methods_inside_the_backbone_are_refused_in_words(made, method):
    engine, host = _open(made, "onnx"), made[0]
    with pytest.raises(EngineError, match="res-tuning-bypass"):
        methods.build(method, engine, num_classes=4)
    with pytest.raises(EngineError, match="nothing can be tuned inside an engine"):
        Tuned(engine, methods.build(method, host, num_classes=4))


def test_a_bypass_without_a_head_is_refused_on_an_engine(made):
    engine, host = _open(made, "onnx"), made[0]
    with pytest.raises(EngineError, match="without a head"):
        methods.build("res-tuning-bypass", engine)
    with pytest.raises(EngineError):
        Tuned(engine, methods.build("res-tuning-bypass", host))


def test_a_task_remembers_its_engine_and_is_refused_on_another(made, tmp_path):
    fp32, int8 = _open(made, "onnx"), open_engine("onnx", made[1]["int8"].file)
    task = methods.build("res-tuning-bypass", fp32, num_classes=4)
    save(task, fp32, tmp_path / "a.task", backbone="onnx:cls.onnx")
    again = load(tmp_path / "a.task", fp32)
    assert torch.equal(Tuned(fp32, again)(X), Tuned(fp32, task.eval())(X))
    for other in (int8, made[0], _open(made, "pt2")):
        with pytest.raises(WrongBackboneError, match="another engine of this backbone"):
            load(tmp_path / "a.task", other)
        load(tmp_path / "a.task", other, any_backbone=True)
    with pytest.raises(WrongBackboneError, match="onnx fp32"):
        load(tmp_path / "a.task", int8)
    elsewhere = Host(tiny_vit(embed_dim=32), X[:1])
    with pytest.raises(WrongBackboneError, match="another backbone"):
        load(tmp_path / "a.task", elsewhere, any_backbone=True)


def test_an_engine_answers_from_several_threads(made):
    for runtime in ("onnx", "openvino"):
        engine = _open(made, runtime)
        inputs = [X + i for i in range(8)]
        alone = [engine.features(x)["block.3"] for x in inputs]
        found: dict[int, torch.Tensor] = {}

        def run(i, engine=engine, found=found, inputs=inputs):
            for _ in range(5):
                found[i] = engine.features(inputs[i])["block.3"]

        threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.allclose(found[i], alone[i], atol=SAME) for i in range(8))


LET_GO = """
import signal, sys, threading
import torch
from restuning.backbones import open_engine
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
for runtime, file in zip(sys.argv[1::2], sys.argv[2::2]):
    held = [open_engine(runtime, file)]
    held[0].features(torch.zeros(1, 3, 32, 32))
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    # Onto the signal stack of this thread, which a runtime may have made its own.
    signal.raise_signal(signal.SIGTERM)
    print(runtime, len(told), flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="signal stacks are of POSIX")
def test_a_signal_is_heard_after_an_engine_was_let_go_of_in_another_thread(made):
    # As a server does, which exchanges tasks while it answers; Python's handlers run on the alternate stack.
    files = [w for r in RUNTIMES for w in (r, str(made[1]["pt2" if r == "pt2" else "onnx"].file))]
    pytest.importorskip("openvino")
    done = subprocess.run(
        [sys.executable, "-c", LET_GO, *files], capture_output=True, text=True, env=os.environ
    )
    said = [f"{runtime} {count}" for count, runtime in enumerate(RUNTIMES, 1)]
    assert (done.returncode, done.stdout.splitlines()) == (0, said), done.stderr


def test_inputs_of_another_size_or_name_are_refused(made):
    engine = _open(made, "onnx")
    with pytest.raises(EngineError, match="refused its input"):
        engine.features(torch.zeros(1, 3, 48, 48))
    with pytest.raises(EngineError, match="give input"):
        engine.features(pixels=X)
    with pytest.raises(EngineError, match="give input"):
        engine.features(X, X)


def test_an_engine_is_a_backbone_by_name(made):
    loaded = load_backbone(f"onnx:{made[1]['int8'].file}")
    assert loaded.preprocessing == Preprocessing((32, 32))
    assert loaded.example[0].shape == (1, 3, 32, 32)
    assert "int8" in loaded.weights
    assert loaded.host() is loaded.model
    with pytest.raises(EngineError, match="weights in its file"):
        load_backbone(f"onnx:{made[1]['int8'].file}", random=True)
    with pytest.raises(EngineError, match="an engine already"):
        export_engine(loaded, made[1]["int8"].file)


def test_files_that_are_no_engines_are_refused(made, tmp_path):
    torn, bare, empty = tmp_path / "torn.onnx", tmp_path / "bare.onnx", tmp_path / "empty.onnx"
    whole = made[1]["onnx"].file.read_bytes()
    torn.write_bytes(whole[: len(whole) // 2])
    empty.write_bytes(b"")
    graph = onnx.load_from_string(whole)
    del graph.metadata_props[:]
    onnx.save(graph, bare)
    for runtime in RUNTIMES:
        pytest.importorskip({"onnx": "onnxruntime", "pt2": "torch"}.get(runtime, runtime))
        for file in (torn, empty, bare, tmp_path / "none.onnx"):
            with pytest.raises(RestuningError) as error:
                open_engine(runtime, file)
            assert str(file) in str(error.value)
    with pytest.raises(RestuningError, match="does not say where its taps are"):
        open_engine("onnx", bare)


@pytest.mark.parametrize(
    ("library", "extra"),
    [
        ("onnxruntime", "onnx"),
        ("openvino", "openvino"),
        ("onnx", "onnx"),
        ("onnxscript", "onnx"),
        ("torchao.quantization", "quantized"),
        ("bitsandbytes", "quantized"),
    ],
)
def test_a_missing_extra_prints_the_line_that_installs_it(
    library, extra, made, tmp_path, monkeypatch
):
    file = made[1]["onnx"].file
    uses = {
        "onnxruntime": lambda: open_engine("onnx", file),
        "openvino": lambda: open_engine("openvino", file),
        "onnx": lambda: export_engine(_backbone(tiny_vit()), tmp_path / "x.onnx"),
        "onnxscript": lambda: export_engine(_backbone(tiny_vit()), tmp_path / "x.onnx"),
        "torchao.quantization": lambda: load_backbone("restuning-tiny+int8"),
        "bitsandbytes": lambda: load_backbone("restuning-tiny+nf4"),
    }
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'restuning\[{extra}\]'"):
        uses[library]()
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_where_an_export_fails(tmp_path, tmp_path_factory):
    class Counts(nn.Module):
        """A norm that nothing stands for."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(48))

        def forward(self, x):
            return x.clamp(-1, 1) * self.weight

    model = tiny_vit()
    model.norm = Counts()
    backbone = _backbone(model)
    rule = backbone.host().readout_rule
    if rule.norm:
        with pytest.raises(EngineError, match="final norm"):
            export_engine(backbone, tmp_path / "x.onnx")
    with pytest.raises(EngineError, match="no such engine"):
        export_engine(backbone, tmp_path / "x.onnx", precision="int2")
    with pytest.raises(EngineError, match="cannot be written"):
        # A file stands where its folder would be made.
        in_the_way = tmp_path_factory.mktemp("other") / "file"
        in_the_way.touch()
        export_engine(_backbone(tiny_vit()), in_the_way / "x.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["layer", "rms", "gemma", "maps"])
def test_norms_are_taken_along_exactly(kind):
    class Gemma(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.zeros(dim)), 1e-6

        def forward(self, x):
            scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
            return scaled * (1 + self.weight)

    class Maps(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    kinds = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "gemma": Gemma, "maps": Maps}
    norm = kinds[kind](12)
    nn.init.normal_(norm.weight)
    plain = copy_norm(norm, kind == "maps")
    assert type(plain) is (nn.LayerNorm if kind in ("layer", "maps") else nn.RMSNorm)
    x = torch.randn(2, 5, 5, 12)
    theirs = norm(x.movedim(-1, 1)).movedim(1, -1) if kind == "maps" else norm(x)
    assert torch.allclose(plain(x), theirs, atol=1e-5)


def test_a_norm_that_is_neither_is_not_taken_along():
    norm = nn.BatchNorm2d(12).eval()
    nn.init.normal_(norm.weight)
    assert copy_norm(norm, maps=True) is None


def _text(made) -> str:
    graph = onnx.load(str(made[1]["onnx"].file))
    return next(p.value for p in graph.metadata_props if p.key == KEY)


def test_a_description_survives_being_written(made):
    about = Description.from_json(_text(made), "x")
    again = Description.from_json(about.to_json(), "x")
    assert again.to_json() == about.to_json() == _text(made)
    assert list(again.sites) == [s.name for s in made[0].sites.values() if s.op == "block"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_malformed_description_is_refused_and_never_a_traceback(made, data):
    values = json.loads(_text(made))
    junk = st.none() | st.integers() | st.text(max_size=4) | st.lists(st.integers(), max_size=2)
    key = data.draw(st.sampled_from(sorted(values)))
    if data.draw(st.booleans()):
        del values[key]
    else:
        values[key] = data.draw(junk)
    # As somebody would who changes it on purpose, or as a disk does.
    text = json.dumps(seal(values) if data.draw(st.booleans()) else values)
    if data.draw(st.booleans()):
        text = text[: data.draw(st.integers(0, len(text)))]
    try:
        Description.from_json(text, "x.onnx")
    except RestuningError as error:
        assert "x.onnx" in str(error)


def test_training_from_a_store_of_an_engine_equals_training_on_it(made, tmp_path):
    from torch.utils.data import TensorDataset

    from restuning.features import DataKey, StoredFeatures, build, store_key

    engine = _open(made, "onnx")
    labels = torch.arange(5) % 3
    data = TensorDataset(X, labels)
    key = store_key(
        engine,
        Needs(engine.sites.taps, "cls"),
        (X[:1],),
        DataKey("five", "0", {"train": 5}),
        backbone="onnx:x",
    )
    assert key.backbone["all weights"] == key.backbone["engine"]["file"]
    store = build(engine, key, tmp_path, {("train", 0): data}, progress=False)
    task = methods.build("res-tuning-bypass", engine, num_classes=3)
    taps, _ = StoredFeatures(store, ["train"]).gather(range(5), [0] * 5)
    assert torch.allclose(Cached(engine, task, store)(**taps), Tuned(engine, task)(X), atol=SAME)
    with pytest.raises(RestuningError, match="another backbone"):
        Cached(made[0], task, store)
    with pytest.raises(RestuningError, match="bf16"):
        store_key(
            engine,
            Needs(engine.sites.taps, "cls"),
            (X[:1],),
            DataKey("five", "0", {"train": 5}),
            backbone="onnx:x",
            precision="bf16",
        )


@pytest.mark.parametrize("runtime", ["onnx", "pt2"])
def test_an_engine_says_which_weights_it_was_exported_from(made, runtime, tmp_path):
    engine, host = _open(made, runtime), made[0]
    assert engine.identity()["digest"] == host.identity()["digest"]
    # A task of the network is one of its engine's, if rounding is accepted.
    path = save(methods.build("linear", host, num_classes=3), host, tmp_path / "t.task")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RestuningWarning)
        load(path, engine, any_backbone=True)
    with pytest.raises(WrongBackboneError, match="another engine"):
        load(path, engine)


def test_an_engine_of_before_opens_and_says_that_three_tensors_were_compared(made, tmp_path):
    before, host = _open(made, "onnx"), made[0]
    before._weights = ""
    path = save(methods.build("linear", host, num_classes=3), host, tmp_path / "t.task")
    with pytest.warns(RestuningWarning, match="only three tensors"):
        load(path, before, any_backbone=True)
    # Of one file its own digest says enough.
    own = save(methods.build("linear", before, num_classes=3), before, tmp_path / "own.task")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RestuningWarning)
        load(own, before)
