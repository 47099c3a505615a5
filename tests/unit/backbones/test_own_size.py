"""Every kind of backbone knows the image size that its weights are for, whatever size it was built with."""

import json

import pytest
from safetensors.torch import save_file

import towers
from restuning import export_engine, load_backbone
from restuning._errors import FormatError
from restuning._files import seal
from restuning.backbones.engines import Description
from restuning.backbones.engines.description import copy_readout

timm = pytest.importorskip("timm")
hf = pytest.importorskip("transformers")

TIMM = 160
"""What timm says of its little test models."""
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}


def saved(name, size, folder):
    """A file of weights of a timm model at a size."""
    model = timm.create_model(name, img_size=size, num_classes=0)
    save_file(model.state_dict(), folder / f"{size}.safetensors")
    return folder / f"{size}.safetensors"


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
@pytest.mark.parametrize("asked", ["", "@96", "@320"])
def test_a_timm_model_keeps_its_own_size_where_it_is_built_with_another(name, asked):
    backbone = load_backbone(f"timm:{name}{asked}", random=True)
    assert backbone.own_size == (TIMM, TIMM)
    assert backbone.preprocessing.size == (int(asked[1:] or TIMM),) * 2


@pytest.mark.parametrize("asked", ["", "@96"])
@pytest.mark.parametrize("trained", [96, 160, 192])
def test_the_positions_of_a_weights_file_know_better_than_timm_s_table(trained, asked, tmp_path):
    file = saved("test_vit", trained, tmp_path)
    backbone = load_backbone(f"timm:test_vit{asked}", weights=file)
    assert backbone.own_size == (trained, trained)
    assert backbone.preprocessing.size == (int(asked[1:] or TIMM),) * 2


def test_a_weights_file_without_positions_leaves_what_timm_says(tmp_path):
    model = timm.create_model("test_resnet", num_classes=0)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    backbone = load_backbone("timm:test_resnet@96", weights=tmp_path / "w.safetensors")
    assert backbone.own_size == (TIMM, TIMM)


def test_a_transformers_folder_without_a_processor_has_the_size_of_its_config(tmp_path):
    hf.ViTModel(hf.ViTConfig(**SMALL, image_size=48, patch_size=16)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="48x48"):
        backbone = load_backbone(f"hf:{tmp_path}")
    assert backbone.own_size == backbone.preprocessing.size == (48, 48)


def test_a_transformers_folder_has_the_size_its_authors_prepare_images_to(tmp_path):
    # As DINOv2's: a table of positions for 518 pixels, and images of 224.
    config = hf.Dinov2Config(**SMALL, image_size=64, patch_size=16)
    hf.Dinov2Model(config).save_pretrained(tmp_path)
    size = {"height": 32, "width": 32}
    hf.BitImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(tmp_path)
    backbone = load_backbone(f"hf:{tmp_path}")
    assert backbone.own_size == backbone.preprocessing.size == (32, 32)


@pytest.mark.filterwarnings("ignore:no image processor")
def test_a_clip_has_its_own_size(tmp_path):
    assert load_backbone(towers.saved(towers.clip(), tmp_path)).own_size == (towers.PIXELS,) * 2


def test_an_open_clip_has_its_own_size(tmp_path):
    pytest.importorskip("open_clip")
    backbone = load_backbone(towers.openclip("ViT", tmp_path))
    assert backbone.own_size == backbone.preprocessing.size == (towers.PIXELS,) * 2


def test_a_torchvision_model_and_the_embedded_one_have_their_own_size():
    assert load_backbone("torchvision:resnet18", random=True).own_size == (224, 224)
    assert load_backbone("restuning-tiny").own_size == (32, 32)


def test_a_variant_of_a_backbone_has_the_same_size():
    assert load_backbone("timm:test_vit@96+compile", random=True).own_size == (TIMM, TIMM)


@pytest.mark.parametrize("drawn", [False, True])
def test_an_engine_has_the_size_of_the_weights_it_was_exported_from(drawn, tmp_path):
    file = tmp_path / "engine.pt2"
    weights = None if drawn else saved("test_vit", TIMM, tmp_path)
    backbone = load_backbone("timm:test_vit@96", weights=weights, random=drawn)
    export_engine(backbone, file, runtime="pt2")
    opened = load_backbone(f"pt2:{file}")
    # Weights that were drawn are for no size.
    assert opened.own_size == (None if drawn else (TIMM, TIMM))
    assert opened.preprocessing.size == (96, 96)


@pytest.fixture(scope="module")
def described():
    """What an engine's file says."""
    host = load_backbone("restuning-tiny").host()
    return Description(
        "restuning-tiny",
        "embedded",
        host.fingerprint(),
        "fp32",
        {"input": ((1, 3, 32, 32), "float32")},
        host.sites,
        "cls",
        *copy_readout(host.model, host.readout_rule),
        None,
        None,
        own_size=(32, 48),
    )


def read_with(described, **values):
    """As another version would have written it."""
    said = {**json.loads(described.to_json()), **values}
    kept = {name: value for name, value in said.items() if value != "left out"}
    return Description.from_json(json.dumps(seal(kept)), "x")


def test_the_size_in_an_engine_s_file_is_read_as_it_was_written(described):
    assert Description.from_json(described.to_json(), "x").own_size == (32, 48)


def test_an_engine_of_before_its_size_was_kept_says_nothing(described):
    assert read_with(described, own_size="left out").own_size is None


@pytest.mark.parametrize("size", [[0, 3], [3], [1.5, 2], "ab", [True, True], [10**9, 1]])
def test_a_size_that_is_none_is_refused(described, size):
    with pytest.raises(FormatError, match="malformed"):
        read_with(described, own_size=size)
