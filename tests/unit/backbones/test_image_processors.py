"""What a checkpoint says of its images is what they become; what cannot be repeated is refused."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from restuning import Host, load_backbone
from restuning._errors import BackboneError, RestuningWarning
from restuning.backbones import Preprocessing
from restuning.backbones.image_processor import translate

hf = pytest.importorskip("transformers")

SAME_IMAGE = 0.02
"""What is promised of the mean difference, in normalised units."""

SHAPES = [(300, 400), (401, 299), (29, 61), (640, 90), (1100, 900), (224, 224)]
"""Width and height: high, wide, tiny, thin, huge, and just right."""


def picture(width, height, mode="RGB"):
    """Slopes with noise; where the mode has alpha, a transparent corner."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(1).random((height, width, 3)) * 70
    slopes = np.stack([x / width, y / height, (x + y) / (width + height)], -1)
    image = Image.fromarray((slopes * 180 + noise).astype(np.uint8)).convert(mode)
    if "A" in image.getbands():
        alpha = np.where(x + y < (width + height) / 2, 60, 255).astype(np.uint8)
        image.putalpha(Image.fromarray(alpha))
    return image


def difference(processor, preprocessing, image):
    """Mean absolute difference of ours from what the processor itself gives."""
    theirs = processor(images=image, return_tensors="pt")["pixel_values"][0].float()
    ours = preprocessing.image(image)
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().mean())


def read(processor):
    return translate(processor, processor.to_dict(), "a folder")


SMALL_CROP = {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}}
SAME = [
    ("CLIPImageProcessor", SMALL_CROP),
    ("CLIPImageProcessorPil", SMALL_CROP),
    ("BitImageProcessor", SMALL_CROP),
    # Too small to crop from: black borders.
    ("CLIPImageProcessor", {**SMALL_CROP, "size": {"shortest_edge": 40}}),
    ("CLIPImageProcessor", {**SMALL_CROP, "do_resize": False}),
    ("DeiTImageProcessor", {}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}}),
    ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}, "crop_pct": 0.7}),
    ("ConvNextImageProcessor", {}),
    ("LevitImageProcessor", {}),
    ("PoolFormerImageProcessor", {}),
    ("MobileViTImageProcessor", SMALL_CROP),
    ("MobileViTImageProcessor", {**SMALL_CROP, "do_flip_channel_order": False}),
    ("EfficientNetImageProcessor", {"rescale_offset": True, "include_top": False}),
    ("EfficientNetImageProcessorPil", {"do_center_crop": True}),
    ("ViTImageProcessor", {"do_normalize": False}),
    ("ViTImageProcessor", {"rescale_factor": 1 / 127.5, "do_normalize": False}),
    ("ViTImageProcessor", {"resample": 0}),
    ("ViTImageProcessorPil", {"resample": 4}),
    ("SiglipImageProcessor", {"size": {"height": 64, "width": 96}}),
    ("SegformerImageProcessor", {"size": {"height": 64, "width": 64}}),
    ("ChameleonImageProcessor", SMALL_CROP),
]


@pytest.mark.parametrize(("name", "fields"), SAME)
def test_an_image_becomes_what_the_processor_makes_of_it(name, fields):
    processor = getattr(hf, name)(**fields)
    preprocessing = Preprocessing.from_dict(json.loads(json.dumps(read(processor).to_dict())))
    for shape in SHAPES:
        assert difference(processor, preprocessing, picture(*shape)) <= SAME_IMAGE


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P"])
def test_greys_and_transparency_become_what_a_converting_processor_makes_of_them(mode):
    processor = hf.CLIPImageProcessor(**SMALL_CROP)
    for shape in SHAPES[:3]:
        assert difference(processor, read(processor), picture(*shape, mode)) <= SAME_IMAGE


REFUSED = [
    (
        "SamImageProcessor",
        {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}},
        "do_pad",
    ),
    ("GLPNImageProcessor", {}, "size_divisor"),
    ("DetrImageProcessor", {}, "longest_edge"),
    ("DPTImageProcessor", {"keep_aspect_ratio": True}, "keep_aspect_ratio"),
    ("ViTImageProcessor", {"do_resize": False}, "do_resize"),
    ("ViTImageProcessor", {"do_rescale": False}, "do_rescale"),
    ("SiglipImageProcessor", {"do_rescale": False, "do_normalize": False}, "do_rescale"),
    ("CLIPImageProcessor", {"do_center_crop": False}, "do_center_crop"),
    ("SuperPointImageProcessor", {"do_grayscale": True}, "do_grayscale"),
    ("VideoMAEImageProcessor", {}, "(1, 1, 3"),
    ("Siglip2ImageProcessor", {}, "max_num_patches"),
    ("LlavaNextImageProcessor", {}, "do_pad"),
    # It makes smaller without smoothing, which shows only in the pixels.
    ("PPDocLayoutV2ImageProcessor", {"size": {"height": 64, "width": 64}}, "other pixels"),
]


@pytest.mark.parametrize(("name", "fields", "word"), REFUSED)
def test_a_processor_that_cannot_be_repeated_is_refused_and_the_field_named(name, fields, word):
    with pytest.raises(BackboneError) as error:
        read(getattr(hf, name)(**fields))
    assert word in error.value.found


@pytest.mark.slow
def test_every_processor_of_transformers_is_repeated_or_refused():
    mapping = hf.models.auto.image_processing_auto.IMAGE_PROCESSOR_MAPPING_NAMES
    names = {n for v in mapping.values() for n in (v.values() if isinstance(v, dict) else [v])}
    same = 0
    for name in sorted(names):
        try:
            processor = getattr(hf, name)()
        except TypeError:
            continue  # made from a model's settings alone
        try:
            preprocessing = read(processor)
        except BackboneError:
            continue
        same += 1
        for shape in SHAPES:
            error = difference(processor, preprocessing, picture(*shape))
            assert error <= SAME_IMAGE, f"{name} at {shape}: {error:.3f}"
    assert same > 60


def test_a_preprocessing_from_before_these_fields_gives_the_tensors_it_gave():
    old = {"size": [24, 24], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    old |= {"interpolation": "bicubic", "crop": 0.875}
    found = Preprocessing.from_dict(old)
    assert found.to_dict().keys() == old.keys()
    image = picture(60, 41)
    # As it was written down then: the shorter side to 27, and corners rounded.
    resized = image.resize((int(27 * 60 / 41), 27), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 24) / 2), round((27 - 24) / 2)
    pixels = torch.from_numpy(np.array(resized.crop((left, top, left + 24, top + 24))))
    mean, std = torch.tensor(old["mean"]), torch.tensor(old["std"])
    wanted = ((pixels.float() / 255 - mean) / std).permute(2, 0, 1)
    assert torch.equal(found.image(image), wanted)


@pytest.mark.parametrize("policy", ["none", "flip", "timm"])
def test_channels_and_units_are_the_processor_s_under_every_augmentation(policy):
    # Colours are jittered, by both generators.
    random.seed(0)
    torch.manual_seed(0)
    # Blue goes first, and numbers are bytes.
    form = Preprocessing((8, 8), (0.0,) * 3, (1 / 255,) * 3, resize=(12,), bgr=True)
    blue = form.transform(policy)(Image.new("RGB", (40, 30), (0, 0, 200)))
    assert blue[0].mean() > 100
    # Not turned round.
    assert blue[0].mean() > 2 * blue[2].mean()


# ------------------------------------------------------------- image or text

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
}
IMAGE_MODELS = {
    "resnet": lambda: hf.ResNetModel(
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ),
    "regnet": lambda: hf.RegNetModel(
        hf.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8)
    ),
    "swin": lambda: hf.SwinModel(
        hf.SwinConfig(image_size=64, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    ),
    "poolformer": lambda: hf.PoolFormerModel(
        hf.PoolFormerConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])
    ),
}


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_a_model_of_pixels_is_an_image_backbone_of_its_processor_s_size(name, tmp_path):
    IMAGE_MODELS[name]().eval().save_pretrained(tmp_path)
    processor = hf.ConvNextImageProcessor(size={"shortest_edge": 64})
    processor.save_pretrained(tmp_path)
    backbone = load_backbone(f"hf:{tmp_path}")
    assert backbone.example[0].shape == (1, 3, 64, 64)
    assert backbone.preprocessing == read(processor)
    host = backbone.host()
    assert isinstance(host, Host)
    assert len(host.sites)


def test_a_processor_of_another_size_than_the_model_s_is_said_in_words(tmp_path):
    hf.ViTConfig(**TINY, image_size=32, patch_size=16).save_pretrained(tmp_path)
    hf.ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="(?s)64, 64.*image size"):
        load_backbone(f"hf:{tmp_path}", random=True).host()


OTHERS = {
    "vjepa2": lambda: hf.VJEPA2Model(
        hf.VJEPA2Config(
            hidden_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            crop_size=32,
            frames_per_clip=2,
            pred_hidden_size=24,
            pred_num_attention_heads=2,
            pred_num_hidden_layers=1,
        )
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_of_videos_is_refused_by_its_main_input(name, tmp_path):
    model = OTHERS[name]()
    model.config.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=model.main_input_name):
        load_backbone(f"hf:{tmp_path}", random=True)


def test_a_model_of_frames_is_refused_by_its_processor(tmp_path):
    hf.VideoMAEConfig(**TINY, image_size=32, patch_size=16, num_frames=2).save_pretrained(tmp_path)
    hf.VideoMAEImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="no video"):
        load_backbone(f"hf:{tmp_path}", random=True)


def test_without_a_processor_the_size_is_the_config_s_and_what_is_assumed_is_said(tmp_path):
    hf.ViTConfig(**TINY, image_size=32, patch_size=16).save_pretrained(tmp_path)
    with pytest.warns(RestuningWarning, match="32x32 pixels, mean"):
        backbone = load_backbone(f"hf:{tmp_path}", random=True)
    assert backbone.preprocessing == Preprocessing((32, 32))


def test_without_a_processor_and_a_size_nothing_is_assumed(tmp_path):
    hf.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="preprocessor_config"):
        load_backbone(f"hf:{tmp_path}", random=True)


@pytest.mark.parametrize("said", ['{"image_processor_type": "NoSuchProcessor"}', "no json"])
def test_a_processor_that_cannot_be_opened_is_refused_and_not_replaced(said, tmp_path):
    hf.ViTConfig(**TINY, image_size=32, patch_size=16).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(said)
    with pytest.raises(BackboneError):
        load_backbone(f"hf:{tmp_path}", random=True)
