"""Backbones by name, from files made here: outputs, weights files, and errors in words."""

import json
import string
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from awake import wake
from restuning import RestuningError, load_backbone
from restuning._errors import BackboneError, FormatError, UnknownNameError
from restuning.backbones import Preprocessing

timm = pytest.importorskip("timm")
hf = pytest.importorskip("transformers")
models = pytest.importorskip("torchvision.models")

SAME_MODEL = 1e-5  # same weights and code; only the order of fp32 sums may differ
SAME_RESAMPLING = 1e-6  # the same antialiased bicubic of the same fp32 table
SAME_PIXELS = 1e-5  # bytes are equal; the two normalise them with different fp32 roundings
IMAGE = {"image_size": 32, "patch_size": 8, "num_channels": 3}
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = list(string.ascii_lowercase)
WORDS = ["an", "example", "of", "a", "text", *LETTERS[1:], *("##" + x for x in LETTERS)]


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def vit(pooled=True):
    config = hf.ViTConfig(**IMAGE, **SIZES)
    return wake(hf.ViTModel(config, add_pooling_layer=pooled))


def dinov2():
    return wake(hf.Dinov2Model(hf.Dinov2Config(**IMAGE, **SIZES)))


def clip_vision():
    return wake(hf.CLIPVisionModel(hf.CLIPVisionConfig(**IMAGE, **SIZES)))


def clip():
    text = {**SIZES, "vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 2}
    config = hf.CLIPConfig(text_config=text, vision_config={**IMAGE, **SIZES}, projection_dim=16)
    return wake(hf.CLIPModel(config))


def bert(folder):
    config = hf.BertConfig(vocab_size=len(SPECIAL + WORDS), max_position_embeddings=64, **SIZES)
    model = wake(hf.BertModel(config))
    model.save_pretrained(folder)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(SPECIAL + WORDS))
    hf.BertTokenizerFast(str(vocabulary)).save_pretrained(folder)
    return model


def parts(output):
    return {
        k: output[k] for k in ("last_hidden_state", "pooler_output") if output.get(k) is not None
    }


def assert_same(found, wanted, tolerance=SAME_MODEL):
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def run(backbone):
    with torch.no_grad():
        return backbone.model(*backbone.example, **backbone.kwargs)


# ---------------------------------------------------------------- transformers


@pytest.mark.parametrize("make", [vit, dinov2, clip_vision, clip])
def test_a_transformers_folder_gives_the_outputs_of_the_model_saved(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    backbone = load_backbone(f"hf:{tmp_path}")
    x = torch.randn(2, 3, *backbone.preprocessing.size)
    with torch.no_grad():
        wanted = getattr(model, "vision_model", model)(x)
        found = backbone.model(x)
    assert backbone.preprocessing.size == (IMAGE["image_size"],) * 2
    assert not backbone.model.training
    assert parts(wanted)
    assert_same(parts(found), parts(wanted))


def test_a_bert_folder_gives_the_outputs_of_the_model_saved(tmp_path):
    model = bert(tmp_path)
    backbone = load_backbone(f"hf:{tmp_path}")
    batch = backbone.tokenizer(
        ["a text", "an example of a zebra"], padding=True, return_tensors="pt"
    )
    assert backbone.preprocessing is None
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        assert_same(parts(backbone.model(**batch)), parts(model(**batch)))
    assert run(backbone)["last_hidden_state"].shape[-1] == SIZES["hidden_size"]


def test_a_folder_of_a_classifier_loads_without_its_head(tmp_path):
    model = wake(hf.ViTForImageClassification(hf.ViTConfig(**IMAGE, **SIZES, num_labels=5)))
    model.save_pretrained(tmp_path)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        found = load_backbone(f"hf:{tmp_path}").model(x)["last_hidden_state"]
        assert_same(found, model.vit(x)["last_hidden_state"])


@pytest.mark.parametrize("make", [vit, dinov2, clip_vision, clip])
def test_random_weights_of_a_folder_follow_the_seed_and_not_the_file(make, tmp_path):
    make().save_pretrained(tmp_path)
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        backbone = load_backbone(f"hf:{tmp_path}", random=True)
        states.append(torch.cat([p.flatten() for p in backbone.model.parameters()]))
    assert backbone.weights == "random"
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
    saved = load_backbone(f"hf:{tmp_path}").model
    assert not torch.equal(states[0], torch.cat([p.flatten() for p in saved.parameters()]))


def test_a_folder_s_image_processor_gives_the_preprocessing(tmp_path):
    vit().save_pretrained(tmp_path)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    hf.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=mean, image_std=std, resample=2
    ).save_pretrained(tmp_path)
    preprocessing = load_backbone(f"hf:{tmp_path}").preprocessing
    assert (preprocessing.mean, preprocessing.std) == (mean, std)
    assert preprocessing.interpolation == "bilinear"


def test_a_folder_without_a_layer_of_its_model_is_refused(tmp_path):
    vit().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if ".1." not in k}, file, {"format": "pt"})
    with pytest.raises(BackboneError):
        load_backbone(f"hf:{tmp_path}")


def test_a_truncated_file_in_a_folder_is_refused_in_words(tmp_path):
    vit().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(BackboneError):
        load_backbone(f"hf:{tmp_path}")


@pytest.mark.parametrize("config", ["{}", '{"model_type": "no_such_model"}', "no json"])
def test_a_folder_with_a_broken_config_is_refused_in_words(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(BackboneError):
        load_backbone(f"hf:{tmp_path}", random=True)


def test_a_weights_file_is_loaded_into_a_transformers_model(tmp_path):
    model = vit()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "moved.safetensors")
    backbone = load_backbone(f"hf:{tmp_path}", weights=tmp_path / "moved.safetensors")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert_same(parts(backbone.model(x)), parts(model(x)))


# ------------------------------------------------------------------------ timm


def saved(name, file, **kwargs):
    """A timm model and its file."""
    model = wake(timm.create_model(name, **kwargs))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
    return model


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
@pytest.mark.parametrize("classes", [0, 7])
def test_a_safetensors_file_fills_a_headless_timm_model(name, classes, tmp_path):
    file = tmp_path / "w.safetensors"
    model = saved(name, file, num_classes=classes)
    backbone = load_backbone(f"timm:{name}", weights=file)
    x = torch.randn(1, 3, *backbone.preprocessing.size)
    with torch.no_grad():
        wanted = model.forward_head(model.forward_features(x), pre_logits=True)
        assert_same(backbone.model(x), wanted)
    assert backbone.weights == str(file)


def test_keys_that_do_not_fit_are_named_by_kind(tmp_path):
    file = tmp_path / "w.safetensors"
    state = {k: v.contiguous() for k, v in timm.create_model("test_vit").state_dict().items()}
    del state["blocks.1.attn.qkv.weight"]
    state["blocks.99.norm1.weight"] = torch.zeros(2)
    state["norm.bias"] = torch.zeros(3)
    save_file(state, file)
    with pytest.raises(BackboneError) as error:
        load_backbone("timm:test_vit", weights=file)
    found = error.value.found
    assert "1 missing: blocks.1.attn.qkv.weight" in found
    assert "1 unexpected: blocks.99.norm1.weight" in found
    assert "1 of another shape: norm.bias (3,)" in found
    assert error.value.where == str(file)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ""])
def test_a_pickle_is_refused_without_being_opened(suffix, tmp_path):
    file = tmp_path / f"w{suffix}"
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), file)
    with pytest.raises(BackboneError, match="safetensors"):
        load_backbone("timm:test_vit", weights=file)


def test_a_pickle_renamed_to_safetensors_is_refused(tmp_path):
    file = tmp_path / "w.safetensors"
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), file)
    with pytest.raises(BackboneError, match="cannot be read"):
        load_backbone("timm:test_vit", weights=file)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_safetensors_file_is_refused(keep, tmp_path):
    file = tmp_path / "w.safetensors"
    saved("test_vit", file, num_classes=0)
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(BackboneError, match="cannot be read"):
        load_backbone("timm:test_vit", weights=file)


def test_a_missing_weights_file_is_named(tmp_path):
    with pytest.raises(BackboneError, match="absent"):
        load_backbone("timm:test_vit", weights=tmp_path / "absent.safetensors")


def augreg(model, blocks=None):
    """The model's weights as Google's JAX code lays them out."""
    heads = model.blocks[0].attn.num_heads
    s = {k: v.numpy() for k, v in model.state_dict().items()}
    width = s["norm.weight"].shape[0]
    t = "Transformer"
    out = {
        "embedding/kernel": s["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": s["patch_embed.proj.bias"],
        "cls": s["cls_token"],
        f"{t}/posembed_input/pos_embedding": s["pos_embed"],
        f"{t}/encoder_norm/scale": s["norm.weight"],
        f"{t}/encoder_norm/bias": s["norm.bias"],
    }
    for i in range(len(model.blocks) if blocks is None else blocks):
        own, theirs = f"blocks.{i}", f"{t}/encoderblock_{i}"
        for norm, at in (("norm1", 0), ("norm2", 2)):
            out[f"{theirs}/LayerNorm_{at}/scale"] = s[f"{own}.{norm}.weight"]
            out[f"{theirs}/LayerNorm_{at}/bias"] = s[f"{own}.{norm}.bias"]
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        weights = np.split(s[f"{own}.attn.qkv.weight"], 3)
        biases = np.split(s[f"{own}.attn.qkv.bias"], 3)
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            out[f"{attention}/{part}/kernel"] = weight.T.reshape(width, heads, -1)
            out[f"{attention}/{part}/bias"] = bias.reshape(heads, -1)
        project = s[f"{own}.attn.proj.weight"].reshape(width, heads, -1)
        out[f"{attention}/out/kernel"] = project.transpose(1, 2, 0)
        out[f"{attention}/out/bias"] = s[f"{own}.attn.proj.bias"]
        for j in range(2):
            dense = f"{theirs}/MlpBlock_3/Dense_{j}"
            out[f"{dense}/kernel"] = s[f"{own}.mlp.fc{j + 1}.weight"].T
            out[f"{dense}/bias"] = s[f"{own}.mlp.fc{j + 1}.bias"]
    return out


def test_an_npz_of_google_s_layout_fills_a_timm_vit(tmp_path):
    model = wake(timm.create_model("test_vit", num_classes=0))
    np.savez(tmp_path / "w.npz", **augreg(model))
    backbone = load_backbone("timm:test_vit", weights=tmp_path / "w.npz")
    for key, value in backbone.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


@pytest.mark.parametrize(
    "spoil",
    ["another layout", "a block less", "a block more", "another width", "a pickle", "truncated"],
)
def test_an_npz_that_does_not_fit_is_refused_in_words(spoil, tmp_path):
    file = tmp_path / "w.npz"
    model = wake(timm.create_model("test_vit", num_classes=0))
    content = augreg(model)
    if spoil == "another layout":
        content = {"x": np.zeros(3)}
    elif spoil == "a block less":
        content = augreg(model, len(model.blocks) - 1)
    elif spoil == "a block more":
        more = {k: v for k, v in content.items() if "encoderblock_0/" in k}
        content |= {k.replace("_0/", f"_{len(model.blocks)}/", 1): v for k, v in more.items()}
    elif spoil == "another width":
        content["Transformer/encoder_norm/scale"] = np.zeros(3, np.float32)
    elif spoil == "a pickle":
        content["embedding/kernel"] = np.array([{"an": "object"}], dtype=object)
    np.savez(file, **content)
    if spoil == "truncated":
        file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(BackboneError, match="w.npz"):
        load_backbone("timm:test_vit", weights=file)


def test_an_npz_for_a_model_that_reads_none_is_refused(tmp_path):
    np.savez(tmp_path / "w.npz", x=np.zeros(3))
    with pytest.raises(BackboneError, match="npz"):
        load_backbone("timm:test_resnet", weights=tmp_path / "w.npz")


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "test_vit4"])
def test_another_image_size_resamples_positions_as_timm_does(name, tmp_path):
    file = tmp_path / "w.safetensors"
    saved(name, file)
    backbone = load_backbone(f"timm:{name}@96", weights=file)
    theirs = timm.create_model(
        name, pretrained=True, num_classes=0, img_size=96, pretrained_cfg_overlay={"file": file}
    ).eval()
    assert backbone.preprocessing.size == (96, 96)
    assert backbone.model.pos_embed.shape == theirs.pos_embed.shape
    assert load_file(file)["pos_embed"].shape != theirs.pos_embed.shape
    assert_same(backbone.model.pos_embed, theirs.pos_embed, SAME_RESAMPLING)
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        assert_same(backbone.model(x), theirs(x))


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_vit_relpos"])
def test_a_model_runs_at_the_size_its_name_asks_for(name):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    backbone = load_backbone(f"timm:{name}@96", random=True)
    assert backbone.example[0].shape == (1, 3, 96, 96)
    assert run(backbone).shape == (1, backbone.model.num_features)


@pytest.mark.parametrize("size", ["abc", "-96", "9.5", " 96", "\u00b2", "0", "97"])
def test_what_is_no_image_size_of_the_model_is_refused(size):
    with pytest.raises(RestuningError):
        load_backbone(f"timm:test_vit@{size}", random=True)


def test_random_timm_weights_follow_the_seed():
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(load_backbone("timm:test_vit", random=True).model.patch_embed.proj.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize(
    ("given", "meant"),
    [("timm:vit_base_patch16_244", "vit_base_patch16_224"), ("torchvision:resnet19", "resnet18")],
)
def test_an_unknown_name_suggests_near_ones(given, meant):
    with pytest.raises(UnknownNameError, match=meant):
        load_backbone(given, random=True)


# ----------------------------------------------------------------- torchvision


@pytest.mark.parametrize(
    ("name", "width"),
    [("resnet18", 512), ("swin_t", 768), ("mobilenet_v2", 1280), ("convnext_tiny", 768)],
)
def test_a_torchvision_model_gives_features_as_wide_as_its_head_takes(name, width):
    headed = models.get_model(name, weights=None)
    assert width == [m for m in headed.modules() if isinstance(m, torch.nn.Linear)][-1].in_features
    backbone = load_backbone(f"torchvision:{name}", random=True)
    assert run(backbone).shape == (1, width)


def test_features_of_a_torchvision_model_are_what_its_linear_head_takes(tmp_path):
    model = wake(models.get_model("convnext_tiny", weights=None))
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone("torchvision:convnext_tiny", weights=tmp_path / "w.safetensors")
    x = torch.randn(1, 3, 64, 64)
    seen = []
    model.classifier[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(x)
        assert_same(backbone.model(x), seen[0])


@pytest.mark.parametrize("name", ["resnet18", "swin_t", "efficientnet_b1"])
def test_the_preprocessing_is_that_of_torchvision_s_default_weights(name):
    found = load_backbone(f"torchvision:{name}", random=True).preprocessing
    wanted = models.get_model_weights(name).DEFAULT.transforms()
    assert found.size == (wanted.crop_size[0],) * 2
    assert found.interpolation == wanted.interpolation.value
    assert found.crop == pytest.approx(wanted.crop_size[0] / wanted.resize_size[0])
    assert (list(found.mean), list(found.std)) == (wanted.mean, wanted.std)


# ---------------------------------------------------------------------- no hub


@pytest.mark.parametrize(
    "name", ["timm:test_vit", "hf:google/vit-base-patch16-224-in21k", "hf:/no/such/folder"]
)
def test_a_hub_that_cannot_be_reached_says_what_to_do_without_one(name, no_hub):
    with pytest.raises(BackboneError, match="--weights"):
        load_backbone(name)


def test_torchvision_s_server_that_cannot_be_reached_says_what_to_do(no_hub, monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    with pytest.raises(BackboneError, match="--weights"):
        load_backbone("torchvision:resnet18")


def test_an_error_without_words_is_still_reported_in_words(monkeypatch):
    def silent(*args, **kwargs):
        raise RuntimeError

    monkeypatch.setattr(timm, "create_model", silent)
    with pytest.raises(BackboneError, match="RuntimeError"):
        load_backbone("timm:test_vit")


# --------------------------------------------------------------- preprocessing

PIXELS = st.integers(1, 90)
NUMBERS = st.floats(0.0625, 1, width=32)
PREPROCESSINGS = st.builds(
    Preprocessing,
    size=st.tuples(PIXELS, PIXELS),
    mean=st.tuples(NUMBERS, NUMBERS, NUMBERS),
    std=st.tuples(NUMBERS, NUMBERS, NUMBERS),
    interpolation=st.sampled_from(["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"]),
    crop=st.floats(0.5, 1),
    squash=st.booleans(),
    resize=st.none() | st.lists(PIXELS, max_size=2).map(tuple),
    bgr=st.booleans(),
)


@settings(max_examples=80, deadline=None)
@given(PREPROCESSINGS, PIXELS, PIXELS, st.sampled_from(["RGB", "L", "RGBA", "P", "CMYK", "1"]))
def test_any_image_becomes_a_finite_tensor_of_the_declared_size(given, width, height, mode):
    tensor = given.image(Image.new(mode, (width, height)))
    assert tensor.shape == (3, *given.size)
    assert tensor.isfinite().all()


@settings(max_examples=80, deadline=None)
@given(PREPROCESSINGS)
def test_a_preprocessing_survives_its_json(given):
    assert Preprocessing.from_dict(json.loads(json.dumps(given.to_dict()))) == given


@pytest.mark.parametrize(
    "change",
    [
        {"size": [32]},
        {"size": None},
        {"mean": ["x"] * 3},
        {"std": 3},
        {"crop": "all"},
        {"interpolation": "no such filter"},
        {"crop": 0},
        {"size": [0, 32]},
        {"std": [0, 1, 1]},
        {"mean": [0.5]},
        {"squash": "yes"},
        {"bgr": 1},
        {"resize": 224},
        {"resize": [0]},
        {"resize": [8, 8, 8]},
        {"resize": ["x"]},
    ],
)
def test_a_malformed_preprocessing_is_refused_when_read(change):
    with pytest.raises(FormatError):
        Preprocessing.from_dict({**Preprocessing((32, 32)).to_dict(), **change})


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("size", "crop"), [(224, 1.0), (224, 0.875), (224, 0.9), (224, 0.95), (160, 0.875), (384, 1.0)]
)
@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (224, 224)])
def test_an_image_is_prepared_as_timm_prepares_it(shape, size, crop, interpolation):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    theirs = timm.data.create_transform(
        (3, size, size),
        is_training=False,
        interpolation=interpolation,
        mean=mean,
        std=std,
        crop_pct=crop,
        crop_mode="center",
    )
    ours = Preprocessing((size, size), mean, std, interpolation, crop)
    torch.testing.assert_close(ours.image(image), theirs(image), atol=SAME_PIXELS, rtol=0)


@pytest.mark.parametrize("mode", ["shortest", "squash"])
@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (224, 224)])
def test_an_image_is_prepared_as_open_clip_prepares_it(shape, mode):
    open_clip = pytest.importorskip("open_clip")
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    said = open_clip.transform.PreprocessCfg(
        size=224, mean=mean, std=std, interpolation="bicubic", resize_mode=mode
    )
    theirs = open_clip.transform.image_transform_v2(said, is_train=False)
    ours = Preprocessing((224, 224), mean, std, squash=mode == "squash")
    torch.testing.assert_close(ours.image(image), theirs(image), atol=SAME_PIXELS, rtol=0)


@pytest.mark.parametrize("policy", ["none", "flip", "timm", "timm:rand-m9-mstd0.5"])
def test_every_augmentation_gives_the_declared_size_from_any_mode(policy):
    preprocessing = Preprocessing((24, 24))
    for mode in ("RGB", "L", "RGBA", "P"):
        tensor = preprocessing.transform(policy)(Image.new(mode, (50, 40)))
        assert tensor.shape == (3, 24, 24)


def test_flip_gives_the_image_and_its_mirror_and_nothing_else():
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    preprocessing = Preprocessing((24, 24))
    plain = preprocessing.image(Image.fromarray(noise))
    flipped = preprocessing.transform("flip")
    seen = [flipped(Image.fromarray(noise)) for _ in range(20)]
    mirrored = [torch.equal(x, plain.flip(-1)) for x in seen]
    assert all(m or torch.equal(x, plain) for x, m in zip(seen, mirrored, strict=True))
    assert any(mirrored)
    assert not all(mirrored)


@pytest.mark.parametrize("policy", ["flips", "nothing", "timm:no-such-policy"])
def test_an_unknown_augmentation_is_refused_in_words(policy):
    with pytest.raises(RestuningError):
        Preprocessing((24, 24)).transform(policy)
