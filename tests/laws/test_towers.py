"""Vision-language models: the zero-shot start, tuners in both towers, fused attention."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from awake import wake
from restuning import Bank, Host, Tuned, load, load_backbone, methods, save
from restuning._errors import BackboneError, DataError, TunerShapeError
from restuning.backbones import ImageTower, TextTower

hf = pytest.importorskip("transformers")
import towers  # noqa: E402 (needs transformers)

NAMES = ["cat", "dog", "red_panda"]
WORDS = ["cat", "dog", "red panda"]
TEMPLATE = "a photo of the {}."
ZERO_SHOT_TOLERANCE = 1e-5
"""Relative to the logit scale: unit vectors in fp32, multiplied in another order."""
FUSED_TOLERANCE = 1e-5
"""Relative to the largest output: the fused kernel rounds in another order than plain softmax."""
PADDED_TOLERANCE = 1e-5
"""Relative: other batch shapes, other kernels."""

PAIRS = ["clip", "siglip", *towers.OPEN_VISION]
BY_CLASS_TOKEN = {"clip", "ViT", "timm"}


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A name for `load_backbone` by kind, each folder made once."""
    folder: Path = tmp_path_factory.mktemp("pairs")
    made: dict[str, str] = {}

    def name(kind: str) -> str:
        if kind not in made:
            if kind in towers.OPEN_VISION:
                pytest.importorskip("open_clip", reason="needs restuning[openclip]")
                made[kind] = towers.openclip(kind, folder / kind.replace(" ", "-"))
            else:
                model = {"clip": towers.clip, "siglip": towers.siglip}[kind]()
                made[kind] = towers.saved(model, folder / kind)
        return made[kind]

    return name


def images(count: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, towers.PIXELS, towers.PIXELS, generator=generator)


def own_logits(name: str, pixels: Tensor, texts: list[str]) -> Tensor:
    """What the library of the model answers, without any code of ours."""
    scheme, _, folder = name.partition(":")
    with torch.no_grad():
        if scheme == "openclip":
            import open_clip

            model = open_clip.create_model(folder).eval()
            return model.get_logits(pixels, open_clip.get_tokenizer(folder)(texts))[0]
        model = hf.AutoModel.from_pretrained(folder).eval()
        tokens = hf.AutoTokenizer.from_pretrained(folder)(
            texts, padding="max_length", max_length=towers.LENGTH, return_tensors="pt"
        )
        if isinstance(model, hf.SiglipModel):
            return model(input_ids=tokens["input_ids"], pixel_values=pixels).logits_per_image
        mask = tokens["attention_mask"]
        return model(
            input_ids=tokens["input_ids"], attention_mask=mask, pixel_values=pixels
        ).logits_per_image


def shaken(task: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in task.named_parameters():
            if not name.startswith("head"):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return task


@pytest.mark.parametrize("kind", PAIRS)
def test_the_head_starts_at_the_models_own_zero_shot_logits(named, kind):
    backbone = load_backbone(named(kind))
    host = Host(backbone.model, *backbone.example)
    head = backbone.text.head(NAMES, TEMPLATE)
    theirs = own_logits(named(kind), images(), [TEMPLATE.replace("{}", w) for w in WORDS])
    assert theirs.std() > 1e-3, "all classes alike would prove nothing"
    for method in ("linear", "res-tuning", "res-tuning-bypass", "bypass-vertical", "ridge"):
        task = methods.build(method, host, len(NAMES), head=head)
        ours = Tuned(host, task).eval()(images())
        error = (ours - theirs).abs().max() / backbone.text.scale
        assert error <= ZERO_SHOT_TOLERANCE, f"{method} differs by {error}"


def test_templates_are_averaged_as_open_clip_averages_them(named):
    open_clip = pytest.importorskip("open_clip")
    templates = [TEMPLATE, "a big {} in a street.", "{}"]
    name = named("ViT").partition(":")[2]
    model = open_clip.create_model(name).eval()
    with torch.no_grad():
        theirs = open_clip.build_zero_shot_classifier(
            model, open_clip.get_tokenizer(name), WORDS, templates
        )
    text = load_backbone(named("ViT")).text
    ours = text.head(NAMES, templates).weight / text.scale
    torch.testing.assert_close(ours.T, theirs, atol=ZERO_SHOT_TOLERANCE, rtol=0)


def test_many_texts_are_embedded_in_pieces_alike(named, monkeypatch):
    text = load_backbone(named("clip")).text
    whole = text.head(NAMES, [TEMPLATE, "a {}"]).weight
    monkeypatch.setattr("restuning.backbones.towers.AT_ONCE", 2)
    torch.testing.assert_close(
        text.head(NAMES, [TEMPLATE, "a {}"]).weight,
        whole,
        atol=PADDED_TOLERANCE * text.scale,
        rtol=0,
    )


@pytest.mark.parametrize("kind", PAIRS)
def test_sites_of_both_towers_are_found_and_proved(named, kind):
    backbone = load_backbone(named(kind))
    image = Host(backbone.model, *backbone.example)
    text = Host(backbone.text, **backbone.text.tokenize(["a photo of a cat."]))
    for host in (image, text):
        assert {s.proof for s in host.sites.values()} == {"residual"}
        assert host.readout_rule.unit
        assert host.readout_rule.proof == "exact"
    assert (image.readout_rule.pool == "cls") == (kind in BY_CLASS_TOKEN)
    assert len(text.sites.pick("mha")) == 2
    assert all(s.projections is not None for s in text.sites.pick("mha").values())
    if kind != "ResNet":
        assert all(s.projections is not None for s in image.sites.pick("mha").values())


@pytest.mark.parametrize("method", ["res-tuning", "res-tuning-bypass", "prefix"])
@pytest.mark.parametrize("kind", ["clip", "siglip", "ViT"])
def test_tuners_in_both_towers_learn_from_a_contrastive_loss(named, kind, method):
    backbone = load_backbone(named(kind))
    tokens = backbone.text.tokenize(["a cat", "a big red truck", "a dog in the street"])
    towers_of = [
        Tuned(host := Host(tower, *args, **kwargs), methods.build(method, host))
        for tower, args, kwargs in (
            (backbone.model, backbone.example, {}),
            (backbone.text, (), {k: v[:1] for k, v in tokens.items()}),
        )
    ]
    image, text = (shaken_ for t in towers_of if (shaken_ := t) is not None and shaken(t.task))
    a, b = image(images()), text(**tokens)
    assert torch.allclose(a.norm(dim=-1), torch.ones(3), atol=1e-5)
    assert torch.allclose(b.norm(dim=-1), torch.ones(3), atol=1e-5)
    logits, pairs = backbone.text.scale * a @ b.T, torch.arange(3)
    (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)).backward()
    for tuned in (image, text):
        grads = [p.grad for p in tuned.task.parameters()]
        assert all(g is not None and bool(g.any()) for g in grads)
        assert all(p.grad is None for p in tuned.host.model.parameters())


def test_both_tasks_are_in_use_inside_the_whole_model_at_once():
    clip = towers.clip()
    tokens = towers.tokenizer()(["a cat", "a big red truck"], padding=True, return_tensors="pt")
    inputs = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
    bare = clip(pixel_values=images(2), **inputs).logits_per_image
    image = Host(clip.vision_model, images(1))
    text = Host(clip.text_model, **{k: v[:1] for k, v in inputs.items()})
    a = shaken(methods.build("res-tuning", image), 1)
    b = shaken(methods.build("res-tuning[mha=prefix]", text), 2)
    with image.using(a), text.using(b), torch.no_grad():
        tuned = clip(pixel_values=images(2), **inputs).logits_per_image
    with torch.no_grad():
        left = Tuned(image, a)(images(2)).pooler_output
        right = Tuned(text, b)(**inputs).pooler_output
        left = F.normalize(clip.visual_projection(left), dim=-1)
        right = F.normalize(clip.text_projection(right), dim=-1)
    assert not torch.allclose(tuned, bare, atol=1e-2)
    torch.testing.assert_close(tuned, clip.logit_scale.exp() * left @ right.T, atol=1e-4, rtol=1e-5)
    assert torch.equal(clip(pixel_values=images(2), **inputs).logits_per_image, bare)


def test_padded_texts_answer_as_each_alone_with_tuners(named):
    backbone = load_backbone(named("clip"))
    text = Host(backbone.text, **backbone.text.tokenize(["a cat"]))
    texts = ["a cat", "a big red truck in the street", "dog"]
    for method in ("res-tuning", "res-tuning-bypass", "prefix"):
        for classes in (None, 3):
            tuned = Tuned(text, shaken(methods.build(method, text, classes))).eval()
            together = tuned(**backbone.text.tokenize(texts))
            alone = torch.cat([tuned(**backbone.text.tokenize([t])) for t in texts])
            torch.testing.assert_close(together, alone, atol=PADDED_TOLERANCE, rtol=1e-4)


@pytest.mark.parametrize("kind", PAIRS)
def test_a_trained_tower_task_is_saved_loaded_and_banked(named, kind, tmp_path):
    backbone = load_backbone(named(kind))
    host = Host(backbone.model, *backbone.example)
    head = backbone.text.head(NAMES, TEMPLATE)
    start = Tuned(host, methods.build("res-tuning-bypass", host, head=head)).eval()(images())
    task = shaken(methods.build("res-tuning-bypass", host, head=head))
    logits = Tuned(host, task).eval()(images())
    assert not torch.allclose(logits, start, atol=1e-2)
    save(task, host, tmp_path / "x.task")
    again = load(tmp_path / "x.task", host)
    assert torch.equal(Tuned(host, again).eval()(images()), logits)
    bank = Bank({"a": task, "b": methods.build("res-tuning-bypass", host, head=head)})
    answers = bank(host.features(images(), keep=bank.keep))
    torch.testing.assert_close(answers["a"], logits, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(answers["b"], start, atol=1e-4, rtol=1e-5)


def test_a_head_given_to_two_tasks_is_copied(named):
    backbone = load_backbone(named("clip"))
    host = Host(backbone.model, *backbone.example)
    head = backbone.text.head(NAMES)
    first, second = (methods.build("linear", host, head=head) for _ in range(2))
    with torch.no_grad():
        first.head.weight.zero_()
    assert second.head.weight.any()
    assert head.weight.any()


def test_a_network_that_is_no_tower_keeps_its_readout():
    config = hf.CLIPVisionConfig(**towers.VISION, projection_dim=24)
    model = wake(hf.CLIPVisionModelWithProjection(config))
    plain = Host(model, images(1)).readout_rule
    assert (plain.pool, plain.project, plain.unit, plain.dim) == ("cls", "", False, 48)
    tower = Host(ImageTower(model.vision_model, model.visual_projection), images(1)).readout_rule
    assert (tower.pool, tower.project, tower.unit, tower.dim) == ("cls", "projection", True, 24)


def test_every_token_is_projected_for_a_dense_answer(named):
    backbone = load_backbone(named("clip"))
    host = Host(backbone.model, *backbone.example)
    task = methods.build("linear", host, head=backbone.text.head(NAMES), pool="all")
    dense = Tuned(host, task).eval()(images())
    assert dense.shape == (3, 17, 3)
    pooled = Tuned(host, methods.build("linear", host, head=backbone.text.head(NAMES))).eval()
    torch.testing.assert_close(dense[:, 0], pooled(images()), atol=1e-4, rtol=1e-5)


# Fused attention: nn.MultiheadAttention takes one kernel for everything in eval mode and without
# gradient, and calls none of its submodules.


class Encoder(nn.Module):
    """torch's own encoder layers, which have a fused path of their own."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            48, 4, 96, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).mean(1)


def fused_calls(monkeypatch) -> list[str]:
    """Names of the fused kernels that ran."""
    calls: list[str] = []
    for name in ("_native_multi_head_attention", "_transformer_encoder_layer_fwd"):
        kernel = getattr(torch, name)

        def counted(*args, name=name, kernel=kernel, **kwargs):
            calls.append(name)
            return kernel(*args, **kwargs)

        monkeypatch.setattr(torch, name, counted)
    return calls


@pytest.mark.parametrize(
    "method",
    [
        "res-tuning",
        "res-tuning[mha=prefix]",
        "res-tuning[mha=prompt,ffn=adapter]",
        "prefix",
        "vpt-deep",
        "res-tuning-bypass",
    ],
)
@pytest.mark.parametrize("kind", ["open_clip", "torch"])
def test_tuners_act_alike_beside_fused_and_plain_attention(named, monkeypatch, kind, method):
    if kind == "open_clip":
        model, x = load_backbone(named("ViT")).model, images()
    else:
        model = wake(Encoder())
        x = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(0))
    bare = copy.deepcopy(model.requires_grad_(False))
    host = Host(model, x[:1])
    # A prompt of vpt starts at random anyway.
    start = {} if method == "vpt-deep" else {"zero": False}
    task = shaken(methods.build(method, host, 4, **start))
    tuned = Tuned(host, task)
    calls = fused_calls(monkeypatch)
    with torch.no_grad():
        fused = tuned.eval()(x)
        if kind == "open_clip":
            assert calls, "the fused kernel did not run, and the test would prove nothing"
        calls.clear()
        model.train()  # the user's own object; both have no dropout, and now plain attention
        plain = tuned(x)
        assert not calls
        model.eval()
    with_gradient = tuned(x).detach()
    size = float(plain.abs().max())
    assert float((fused - plain).abs().max()) <= FUSED_TOLERANCE * size
    assert float((with_gradient - plain).abs().max()) <= FUSED_TOLERANCE * size
    untuned = Tuned(host, methods.build("linear", host, head=task.head)).eval()(x).detach()
    assert float((fused - untuned).abs().max()) > 1e-2 * size
    assert torch.equal(model(x), bare(x))


# What a user gets wrong.


@pytest.mark.parametrize("template", ["no place", "{} and {}", ""])
def test_a_template_without_one_place_is_refused(named, template):
    with pytest.raises(DataError, match="one place for the class name"):
        load_backbone(named("clip")).text.head(NAMES, template)


def test_no_names_are_refused(named):
    with pytest.raises(DataError, match="0 names"):
        load_backbone(named("clip")).text.head([])


def test_a_head_of_another_width_or_other_classes_is_refused(named):
    backbone = load_backbone(named("clip"))
    host = Host(backbone.model, *backbone.example)
    with pytest.raises(TunerShapeError, match="the head does not fit"):
        methods.build("linear", host, head=nn.Linear(48, 3))
    with pytest.raises(TunerShapeError, match="the head does not fit"):
        methods.build("linear", host, 4, head=backbone.text.head(NAMES))


def test_towers_that_do_not_make_up_the_models_logits_are_refused(named):
    from restuning.backbones.towers import prove

    backbone = load_backbone(named("clip"))
    wrong = TextTower(
        backbone.text.model,
        backbone.text.tokenize,
        backbone.text.scale,
        projection=nn.Linear(40, 24, bias=False),
    )
    whole = hf.AutoModel.from_pretrained(named("clip").partition(":")[2]).eval()

    def own(pixels: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        return whole(pixel_values=pixels, **tokens).logits_per_image

    prove(backbone.model, backbone.text, images(1), own)
    with pytest.raises(BackboneError, match="do not make up its logits"):
        prove(backbone.model, wrong, images(1), own)


def test_a_tower_that_pools_nothing_is_refused():
    with pytest.raises(BackboneError, match="returns no vector"):
        ImageTower(nn.Conv2d(3, 4, 3))(images(1))
