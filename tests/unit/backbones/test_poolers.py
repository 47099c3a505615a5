"""A checkpoint that brings no pooler gives the same backbone whenever it is loaded."""

import pytest
import torch

from restuning import Host, NoSitesError, Tuned, load, load_backbone, methods, save
from zoo import folders

hf = pytest.importorskip("transformers")
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
TEXT = {"vocab_size": 1000, "max_position_embeddings": 40, **SMALL}
IMAGE = {"image_size": 32, "patch_size": 8, **SMALL}
WITHOUT = {
    "masked words": lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT)),
    "a classifier of texts": lambda: hf.RobertaForSequenceClassification(
        hf.RobertaConfig(**TEXT, pad_token_id=0)
    ),
    "a classifier of images": lambda: hf.ViTForImageClassification(hf.ViTConfig(**IMAGE)),
    "masked patches": lambda: hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**IMAGE)),
}


@pytest.mark.parametrize("kind", WITHOUT)
@pytest.mark.parametrize("from_file", [False, True])
def test_a_task_opens_on_a_backbone_whose_checkpoint_brings_no_pooler(kind, from_file, tmp_path):
    folder = tmp_path / "model"
    if "word" in kind or "text" in kind:
        folders.bert(folder)
    WITHOUT[kind]().save_pretrained(folder)
    weights = folder / "model.safetensors" if from_file else None
    digests = []
    for seed in range(2):
        torch.manual_seed(seed)
        backbone = load_backbone(f"hf:{folder}", weights=weights)
        host = backbone.host()
        assert not [n for n, _ in backbone.model.named_parameters() if "pooler" in n]
        digests.append(host.fingerprint()["weights"])
        if seed == 0:
            task = methods.build("linear", host, num_classes=2)
            save(task, host, tmp_path / "a.task", backbone=backbone.name)
    assert digests[0] == digests[1]
    load(tmp_path / "a.task", host)


def test_a_pooler_that_a_checkpoint_brings_stays(tmp_path):
    backbone = load_backbone(f"hf:{folders.bert(tmp_path / 'bert')}")
    assert backbone.model.pooler is not None


@pytest.mark.parametrize("side", [64, 96])
def test_maps_that_nothing_is_made_of_are_averaged_over_their_places(side):
    """The grid of 64 pixels is as wide as its first stage has channels."""
    config = hf.PoolFormerConfig(hidden_sizes=[8, 16, 16, 24], depths=[1, 1, 1, 1])
    model, images = hf.PoolFormerModel(config), torch.randn(2, 3, side, side)
    host = Host(model, images[:1])
    assert host.dim == 24
    wanted = model(images).last_hidden_state.mean((2, 3))
    task = methods.build("linear", host, num_classes=3)
    torch.testing.assert_close(Tuned(host, task)(images), task.head(wanted))


def test_streams_with_positions_before_inputs_are_refused():
    model = hf.XLNetModel(
        hf.XLNetConfig(vocab_size=20, d_model=32, n_layer=2, n_head=2, d_inner=64)
    )
    with pytest.raises(NoSitesError, match="positions before inputs"):
        Host(model, input_ids=torch.zeros(1, 6, dtype=torch.long))
