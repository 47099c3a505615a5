"""Vision-language models by name: CLIP and SigLIP of transformers, and those of open_clip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from restuning._errors import BackboneError, UnknownNameError, require, warn
from restuning.backbones.image_processor import read_image_processor
from restuning.backbones.preprocessing import Preprocessing
from restuning.backbones.towers import ImageTower, TextTower, prove
from restuning.backbones.trust import (
    check_config,
    hub_arguments,
    read_config,
    refuse_larger,
    refuse_unsafe,
    walk,
    weights_arguments,
)
from restuning.backbones.weights import load_weights, refuse_missing
from restuning.runtime.hub import first_cached, naming_file

SAFE = "open_clip_model.safetensors"
"""Beside which open_clip keeps a pickle of the same weights."""

OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and deviation of CLIP's training images, for folders without a processor's file."""


def load_clip(name: str, fetch: bool, weights: Path | None) -> dict[str, Any]:
    """`model`, `example`, `preprocessing` and `text` of a `Backbone`, from transformers."""
    hf = require("transformers", "transformers", f"the backbone clip:{name}")
    files = check_config(hf, name, fetch, weights)
    own = hf.AutoConfig.from_pretrained(name, **hub_arguments())
    refuse_larger(lambda: hf.AutoModel.from_config(own), files)
    if fetch:
        said = {"output_loading_info": True, **weights_arguments()}
        model, report = hf.AutoModel.from_pretrained(name, **said)
        refuse_missing(report, name)
    else:
        model = hf.AutoModel.from_config(own)
    if not all(hasattr(model, part) for part in ("vision_model", "text_model", "logit_scale")):
        raise UnknownNameError(
            "not a model of an image and a text tower",
            where=f"clip:{name}",
            found=type(model).__name__,
            fix=f"load it as hf:{name}",
        )
    if weights is not None:
        load_weights(model, weights)
    model.eval()
    config = model.config
    siglip = config.model_type.startswith("siglip")
    tokenizer = hf.AutoTokenizer.from_pretrained(name, **hub_arguments())

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        # SigLIP was trained on texts of full length, whose padding it reads like any token.
        tokens = tokenizer(
            texts,
            padding="max_length" if siglip else True,
            truncation=True,
            max_length=config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        names = ("input_ids",) if siglip else ("input_ids", "attention_mask")
        return {n: tokens[n] for n in names}

    # CLIP projects into a shared space; SigLIP's pooled vectors are in it already.
    image = ImageTower(model.vision_model, getattr(model, "visual_projection", None))
    text = _text(
        model,
        model.text_model,
        tokenize,
        getattr(model, "text_projection", None),
    )
    size = config.vision_config.image_size
    half = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    preprocessing = image_preprocessing(hf, name, size, half if siglip else OPENAI, siglip)
    example = torch.zeros(1, 3, *preprocessing.size)
    prove(
        image,
        text,
        example,
        lambda pixels, tokens: model(pixel_values=pixels, **tokens).logits_per_image,
    )
    return {"model": image, "example": (example,), "preprocessing": preprocessing, "text": text}


def image_preprocessing(
    hf: Any,
    name: str,
    size: int | Sequence[int] | None,
    otherwise: tuple[tuple[float, ...], tuple[float, ...]],
    squash: bool = False,
) -> Preprocessing:
    """What a folder's image processor does; size, mean and deviation as given where it has none.

    Raises:
        BackboneError: The processor does what no `Preprocessing` does; or there is neither a
            processor nor a size.
    """
    found = read_image_processor(hf, name)
    if found is not None:
        return found
    if size is None:
        raise BackboneError(
            "nothing says how large the images of this model are",
            where=name,
            found="no image processor, and no image_size in its config",
            fix="put the model's preprocessor_config.json into its folder",
        )
    size = (size, size) if isinstance(size, int) else (size[0], size[1])
    warn(
        "no image processor says how images are prepared",
        where=name,
        found=f"assumed: {size[0]}x{size[1]} pixels, mean {otherwise[0]}, deviation {otherwise[1]}",
        fix="put the model's preprocessor_config.json into its folder",
    )
    return Preprocessing(size, otherwise[0], otherwise[1], squash=squash)


class _TextSide(nn.Module):
    """The text side of an open_clip model, parts of which are the model's own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model.encode_text(input_ids)


def load_openclip(name: str, fetch: bool, weights: Path | None) -> dict[str, Any]:
    """`model`, `example`, `preprocessing` and `text` of a `Backbone`, from open_clip."""
    clip = require("open_clip", "openclip", f"the backbone openclip:{name}")
    # A folder or a hub's name has its weights with it; a built-in name is told which by a tag.
    elsewhere = name.startswith(("local-dir:", "hf-hub:"))
    base, _, tag = (name, "", "") if elsewhere else name.partition("/")
    if not elsewhere and base not in clip.list_models():
        raise UnknownNameError(
            "open_clip has no such model",
            where=base,
            fix=f"one of: {', '.join(clip.list_models()[:8])} ...; or local-dir:FOLDER",
        )
    if naming_file():
        _refuse_of_a_file(clip, name, base, tag if fetch else "", weights is None and fetch)
    if fetch and not elsewhere and not tag:
        tags = clip.list_pretrained_tags_by_model(base)
        raise BackboneError(
            "which weights of this architecture?",
            where=f"openclip:{base}",
            found=f"{len(tags)} sets: {', '.join(tags[:6])}",
            fix=f"write e.g. openclip:{base}/{tags[0] if tags else 'TAG'}, or give --weights FILE",
        )
    model = clip.create_model(
        base,
        pretrained=tag if tag and fetch else None,
        load_weights=fetch,
        pretrained_text=fetch,
        require_pretrained=fetch,
    )
    if weights is not None:
        load_weights(model, weights)
    model.eval()
    # Fixed length, padded with zeros that the model knows to ignore: there is no mask.
    tokenizer = clip.get_tokenizer(base)
    image = ImageTower(model.visual)
    text = _text(model, _TextSide(model), lambda texts: {"input_ids": tokenizer(texts)})
    said = clip.get_model_preprocess_cfg(model)
    size = said["size"]
    preprocessing = Preprocessing(
        (size, size) if isinstance(size, int) else (size[0], size[1]),
        tuple(said["mean"]),
        tuple(said["std"]),
        said["interpolation"],
        squash=said["resize_mode"] == "squash",
    )
    example = torch.zeros(1, 3, *preprocessing.size)

    def own(pixels: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        a = model.encode_image(pixels, normalize=True)
        b = model.encode_text(tokens["input_ids"], normalize=True)
        return text.scale * a @ b.T + text.bias

    prove(image, text, example, own)
    return {"model": image, "example": (example,), "preprocessing": preprocessing, "text": text}


def _refuse_of_a_file(clip: Any, name: str, base: str, tag: str, fetch: bool) -> None:
    """Refuse what a file may not choose: parts that lie elsewhere, and weights that are pickles.

    Raises:
        BackboneError: It does.
    """
    config: Any = clip.get_model_config(base)
    kind, _, place = name.partition(":")
    if kind == "hf-hub":
        refuse_unsafe("a repository of the hub")
    if kind == "local-dir":
        folder = Path(place)
        config = read_config(folder / "open_clip_config.json", name).get("model_cfg", {})
        if fetch and {file.suffix for file in folder.iterdir()} & {".bin", ".pt", ".pth"}:
            refuse_unsafe("pickles beside its config, which are not opened")
    pointing = ("hf_model_name", "hf_tokenizer_name", "timm_model_pretrained")
    if found := next((f"{k}: {v}" for k, v in walk(config) if k in pointing and v), ""):
        refuse_unsafe(f"its config has {found}")
    if tag:
        said = clip.get_pretrained_cfg(base, tag) or {}
        repository, _, file = said.get("hf_hub", "").rpartition("/")
        # As open_clip looks for them itself, before any pickle.
        safe = {"": SAFE, "open_clip_pytorch_model.bin": SAFE}
        stored = safe.get(file, f"{Path(file).stem}.safetensors")
        if not repository or first_cached(repository, [stored]) is None:
            refuse_unsafe(f"no {stored} of {repository or 'a hub'} was fetched before")


def _text(model: Any, encoder: nn.Module, tokenize: Any, projection: Any = None) -> TextTower:
    scale, bias = model.logit_scale, getattr(model, "logit_bias", None)
    return TextTower(
        encoder,
        tokenize,
        1.0 if scale.is_meta else float(scale.detach().exp()),
        0.0 if bias is None or bias.is_meta else float(bias.detach()),
        projection,
    ).eval()
