"""LoRA checkpoints of PEFT as tasks and back, and what of them is refused."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from awake import tiny_vit, wake
from peft_families import FAMILIES, first, host_of, run, with_peft
from restuning import Host, Task, Tuned, export_peft, import_peft, load, methods, save
from restuning._errors import FormatError, UnknownNameError, WrongTaskError
from restuning.task.peft_files import CONFIG, TENSORS

peft = pytest.importorskip("peft")

X = FAMILIES["timm ViT"].inputs()["*"]
TOLERANCE = 1e-5
"""Sums in another order, through networks whose weights are random."""


def saved_by_peft(folder, model, host, targets, **config):
    """A checkpoint as PEFT leaves it, and the model that it was saved from."""
    sites = host.sites.linear.pick(*targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = with_peft(model, sites, init_lora_weights=False, r=4, **config)
        wrapped.save_pretrained(folder)
    return wrapped


@pytest.fixture(scope="module")
def host():
    return Host(tiny_vit(), X[:1])


@pytest.fixture
def folder(tmp_path, host):
    saved_by_peft(tmp_path / "peft", tiny_vit(), host, ["qkv", "down"], lora_alpha=6)
    return tmp_path / "peft"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_answers_the_same_and_goes_back_to_the_same_tensors(name, tmp_path):
    family = FAMILIES[name]
    host = host_of(family, family.make())
    theirs = saved_by_peft(tmp_path / "in", family.make(), host, family.targets, lora_alpha=6)
    task = import_peft(tmp_path / "in", host)
    with torch.no_grad():
        ours, its = (first(run(m, family.inputs())) for m in (Tuned(host, task), theirs))
        torch.testing.assert_close(ours, its, atol=TOLERANCE, rtol=TOLERANCE)
    save(task, host, tmp_path / "t.task")
    export_peft(load(tmp_path / "t.task", host), host, tmp_path / "out")
    before, after = (load_file(tmp_path / f / TENSORS) for f in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(family.make(), tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(first(run(again, family.inputs())), its)


def test_ranks_and_alphas_of_their_own_come_through(tmp_path, host):
    config = {
        "lora_alpha": 6,
        "rank_pattern": {"blocks.1.attn.qkv": 2},
        "alpha_pattern": {
            "^mlp.fc2": 9,
            "locks.0.mlp.fc2": 9,
            "blocks.1.attn.qkv": 5,
            "^blocks.2.mlp.fc2": 3,
            "mlp..c2": 7,
        },
        "use_rslora": True,
        "lora_dropout": 0.1,
    }
    theirs = saved_by_peft(tmp_path / "in", tiny_vit(), host, ["qkv", "down"], **config)
    task = import_peft(tmp_path / "in", host)
    tuners = task.inline_tuners
    assert (tuners["qkv.2"].rank, tuners["qkv.2"].alpha) == (2, 5)
    assert tuners["down.3"].alpha == 3 and tuners["qkv.1"].alpha == 6
    # A dot is any character to PEFT.
    assert tuners["down.1"].alpha == tuners["down.2"].alpha == 7
    assert {(t.rslora, t.dropout) for t in tuners.values()} == {(True, 0.1)}
    with torch.no_grad():
        expected = theirs(X)
        ours = Tuned(host, task).eval()(X)
        torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=TOLERANCE)
        export_peft(task, host, tmp_path / "out")
        again = peft.PeftModel.from_pretrained(tiny_vit(), tmp_path / "out").eval()
        torch.testing.assert_close(again(X), expected)


def test_a_backbone_inside_a_larger_model_is_found_and_written_for_it(tmp_path):
    import transformers

    sizes = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.BertConfig(**sizes, intermediate_size=64)
    whole = wake(transformers.BertForSequenceClassification(config))
    how = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    theirs = peft.get_peft_model(whole, how).eval()
    theirs.save_pretrained(tmp_path / "in")
    words = FAMILIES["BERT"].inputs()
    host = Host(theirs.base_model.model.bert, **words)
    bare = transformers.BertModel(config)
    wrapped = theirs.base_model.model.bert.state_dict()
    bare.load_state_dict(
        {n.replace(".base_layer", ""): t for n, t in wrapped.items() if "lora_" not in n}
    )
    host = Host(bare, **words)
    task = import_peft(tmp_path / "in", host)
    assert list(task.inline_tuners) == ["q.1", "v.1", "q.2", "v.2"]
    assert list(import_peft(tmp_path / "in", host, prefix="bert").inline_tuners) == [*task.sites]
    with torch.no_grad(), host.using(task):
        ours = bare(**words).last_hidden_state
        its = theirs.base_model.model.bert(**words).last_hidden_state
        torch.testing.assert_close(ours, its, atol=TOLERANCE, rtol=TOLERANCE)
    export_peft(task, host, tmp_path / "out", prefix="bert")
    before, after = (load_file(tmp_path / f / TENSORS) for f in ("in", "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    with pytest.raises(UnknownNameError, match="prefix 'other'"):
        import_peft(tmp_path / "in", host, prefix="other")
    told = []
    import_peft(tmp_path / "in", host, tell_prefix=told.append)
    assert told == ["bert"]


def test_an_adapter_of_one_half_of_a_model_is_not_taken_for_that_of_the_other(tmp_path, host):
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.text_model, self.vision_model = tiny_vit(), tiny_vit()

    how = peft.LoraConfig(r=2, target_modules=r"text_model\..*qkv", init_lora_weights=False)
    peft.get_peft_model(Halves(), how).save_pretrained(tmp_path / "in")
    with pytest.raises(UnknownNameError, match="--prefix text_model"):
        import_peft(tmp_path / "in", host)
    told = []
    import_peft(tmp_path / "in", host, prefix="text_model", tell_prefix=told.append)
    assert told == ["text_model"]


def test_a_task_on_a_model_that_peft_wraps_already_is_not_written(tmp_path):
    how = peft.LoraConfig(r=2, target_modules=["qkv"])
    wrapped = peft.get_peft_model(tiny_vit(), how).base_model.model
    inside = Host(wrapped, X[:1])
    with pytest.raises(WrongTaskError, match="merge_and_unload"):
        export_peft(methods.build("lora", inside), inside, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prefix", ["bert.", "../x", "a b", "a..b", "(a|b)"])
def test_a_prefix_is_names_with_dots_between(prefix, host, tmp_path):
    with pytest.raises(UnknownNameError, match="no path of names"):
        export_peft(methods.build("lora", host), host, tmp_path / "out", prefix=prefix)


def test_an_adapter_that_began_from_eva_is_read(folder, host):
    config = json.loads((folder / CONFIG).read_text())
    eva = {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99}}
    (folder / CONFIG).write_text(json.dumps({**config, **eva}))
    assert len(import_peft(folder, host).sites) == 6


def test_half_precision_is_widened_and_can_be_written_again(tmp_path, host, folder):
    halved = {n: t.bfloat16() for n, t in load_file(folder / TENSORS).items()}
    save_file(halved, folder / TENSORS)
    task = import_peft(folder, host)
    assert {p.dtype for p in task.parameters()} == {torch.float32}
    export_peft(task, host, tmp_path / "out", dtype="bf16")
    after = load_file(tmp_path / "out" / TENSORS)
    assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in halved.items())
    with pytest.raises(UnknownNameError, match="precision"):
        export_peft(task, host, tmp_path / "out", dtype="int8")


REFUSED = {
    "dora": ({"use_dora": True}, "use_dora=True"),
    "biases": ({"bias": "lora_only"}, "bias='lora_only'"),
    "a bias of B": ({"lora_bias": True}, "lora_bias=True"),
    "parameters": ({"target_parameters": ["x"]}, "target_parameters"),
    "pissa": ({"init_lora_weights": "pissa"}, "pissa"),
    "a form of tomorrow": ({"use_something_new": {"a": 1}}, "use_something_new"),
    "another kind": ({"peft_type": "IA3"}, "IA3"),
    "an expression": ({"alpha_pattern": {"(a+)+$": 2}}, "not evaluated"),
    "no number": ({"lora_alpha": "8"}, "lora_alpha"),
    "an alpha of nothing": ({"lora_alpha": 0}, "alpha"),
    "another rank": ({"r": 3}, "rank 3, where .* has 4"),
    "ranks that are none": ({"rank_pattern": {"qkv": [4]}}, r"a rank is \[4\]"),
    "no alphas": ({"alpha_pattern": {"x": "y"}}, "an alpha is 'y'"),
    "a dropout of all": ({"lora_dropout": 1.0}, "lora_dropout"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_more_than_lora_is_refused_by_its_name(name, folder, host):
    change, said = REFUSED[name]
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(FormatError, match=said.replace("(", r"\(")):
        import_peft(folder, host)


def test_real_checkpoints_of_other_forms_are_refused(tmp_path, host):
    for number, config in enumerate(({"use_dora": True}, {"bias": "lora_only"})):
        saved_by_peft(tmp_path / str(number), tiny_vit(), host, ["qkv"], **config)
        with pytest.raises(FormatError, match="more than LoRA"):
            import_peft(tmp_path / str(number), host)
    model = peft.get_peft_model(
        tiny_vit(), peft.IA3Config(target_modules=["qkv"], feedforward_modules=[])
    )
    model.save_pretrained(tmp_path / "ia3")
    with pytest.raises(FormatError, match="IA3"):
        import_peft(tmp_path / "ia3", host)


def test_a_module_that_was_trained_whole_is_left_behind_only_by_its_name(tmp_path, host):
    class WithHead(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.classifier = tiny_vit(), nn.Linear(48, 3)

        def forward(self, x):
            return self.classifier(self.body(x))

    config = peft.LoraConfig(
        r=2, target_modules=["qkv"], modules_to_save=["classifier"], init_lora_weights=False
    )
    peft.get_peft_model(WithHead(), config).save_pretrained(tmp_path / "in")
    for left in ([], ["score"]):
        with pytest.raises(FormatError, match="modules_to_save"):
            import_peft(tmp_path / "in", host, leave_out=left)
    task = import_peft(tmp_path / "in", host, leave_out=["classifier"])
    assert list(task.sites) == ["qkv.1", "qkv.2", "qkv.3"]


def test_files_that_do_not_fit_are_refused(folder, host, tmp_path):
    whole = load_file(folder / TENSORS)
    name = next(n for n in whole if "lora_A" in n)
    for change, said in (
        ({name: whole[name][:, :-1].contiguous()}, "beside a map"),
        ({name: whole[name].long()}, "int64"),
        ({name: None}, "half of"),
        ({"base_model.model.blocks.0.attn.qkv.lora_magnitude_vector": torch.ones(3)}, "more than"),
        ({"base_model.model.patch_embed.proj.lora_A.weight": torch.ones(3)}, "half of"),
    ):
        changed = {n: t for n, t in {**whole, **change}.items() if t is not None}
        save_file(changed, folder / TENSORS)
        with pytest.raises(FormatError, match=said):
            import_peft(folder, host)
    moved = {n.replace("blocks", "layers"): t for n, t in whole.items()}
    save_file(moved, folder / TENSORS)
    with pytest.raises(UnknownNameError, match="no linear site"):
        import_peft(folder, host)
    (folder / TENSORS).unlink()
    with pytest.raises(FormatError, match="malformed"):
        import_peft(folder, host)
    (folder / "adapter_model.bin").write_bytes(b"never read")
    with pytest.raises(FormatError, match="can execute"):
        import_peft(folder, host)
    with pytest.raises(FormatError):
        import_peft(tmp_path / "nowhere", host)


def test_what_pefts_form_does_not_have_is_not_written(tmp_path, host):
    out = tmp_path / "out"
    for name, options, said in (
        ("res-tuning", {}, "scaled at mha.1"),
        ("res-tuning-bypass", {}, "a side network"),
        ("bitfit", {}, "trained copies"),
        ("lora", {"targets": "q+v"}, "a part of a fused map"),
        ("lora", {}, "a head"),
        ("linear", {}, "a head"),
    ):
        with pytest.raises(WrongTaskError, match=said):
            export_peft(methods.build(name, host, 3, **options), host, out)
    assert not out.exists()
    export_peft(methods.build("lora", host, 3), host, out, without_head=True)
    several = Task(
        tuners={
            **methods.build("lora", host, targets="qkv", rslora=True).inline_tuners,
            **methods.build("lora", host, targets="down").inline_tuners,
        }
    )
    with pytest.raises(WrongTaskError, match="several scales"):
        export_peft(several, host, out)
    shutil.rmtree(out)


def test_modules_whose_path_ends_alike_are_not_adapted(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.blocks = nn.Module(), tiny_vit().blocks
            self.net.blocks = tiny_vit().blocks

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    tokens = torch.randn(2, 5, 48)
    host = Host(Two().eval(), tokens)
    task = wake(methods.build("lora", host))
    export_peft(task, host, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(Two().eval(), tmp_path / "out")
    adapted = [n for n, m in theirs.named_modules() if hasattr(m, "lora_A")]
    assert sorted(adapted) == [f"base_model.model.blocks.{i}.attn.qkv" for i in range(3)]


def test_hubs_know_what_is_written_by_its_card_and_a_card_that_is_there_stays(tmp_path, host):
    hub = pytest.importorskip("huggingface_hub")
    task = methods.build("lora", host, rank=2)
    for name, base_model in (("named", "google/vit-base"), ("here", "/home/a: b"), ("none", None)):
        folder = export_peft(task, host, tmp_path / name, base_model=base_model)
        card = hub.ModelCard.load(folder / "README.md")
        assert (card.data.library_name, card.data.tags) == ("peft", ["lora"])
        assert card.data.base_model == (base_model if name == "named" else None)
    (folder / "README.md").write_text("mine")
    export_peft(task, host, folder)
    assert (folder / "README.md").read_text() == "mine"
