"""Backbones by name: embedded, of timm, transformers, torchvision, open_clip."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from restuning._errors import BackboneError, EngineError, UnknownNameError, require
from restuning.backbones.backbone import Backbone
from restuning.backbones.diffusion import load_text_to_image
from restuning.backbones.engines.open import OPENERS, opened
from restuning.backbones.forms import COMPILE, apply, split
from restuning.backbones.pairs import clip_parts, image_preprocessing, openclip_parts
from restuning.backbones.preprocessing import Preprocessing
from restuning.backbones.text import text_parts
from restuning.backbones.weights import load_weights, refuse_missing

_TINY = Path(__file__).parent / "tiny"
SCHEMES = {
    "restuning-tiny": "embedded, 32 px, no download",
    "timm:NAME": "e.g. timm:vit_base_patch16_224.orig_in21k; NAME@160 runs it at 160 px, "
    "NAME:pad_type=same,bn_eps=1e-3 gives timm arguments",
    "hf:NAME": "e.g. hf:google/vit-base-patch16-224-in21k, or a folder",
    "torchvision:NAME": "e.g. torchvision:vit_b_16",
    "clip:NAME": "the image tower of a CLIP or SigLIP of transformers, and its text tower beside "
    "it, e.g. clip:openai/clip-vit-base-patch32, or a folder",
    "openclip:NAME/TAG": "the same of open_clip, e.g. openclip:ViT-B-32/laion2b_s34b_b79k, or "
    "openclip:local-dir:FOLDER",
    "onnx:FILE, openvino:FILE, pt2:FILE": "an engine that `restuning engine export` wrote",
    "NAME+int8, NAME+nf4, NAME+compile": "a PyTorch backbone quantised, or compiled",
    "diffusers:NAME": "the denoiser of a text-to-image pipeline, a folder or a hub name",
}
PAIRS = {"clip": clip_parts, "openclip": openclip_parts}


def load_backbone(
    name: str, *, weights: str | Path | None = None, random: bool = False
) -> Backbone:
    """Load a backbone by name.

    Args:
        name: See `SCHEMES`.
        weights: A safetensors file (or npz for timm's ViTs), for machines without a hub.
        random: Random weights from torch's current seed.

    Raises:
        UnknownNameError: No such backbone.
        BackboneError: Weights are missing, mismatched or cannot be fetched.
        EngineError: An engine's file cannot be opened.
        MissingExtraError: The library that has it is not installed.
    """
    loaders: dict[str, Callable[[str, bool], Backbone]] = {
        "timm": _timm,
        "hf": _hf,
        "torchvision": _torchvision,
        "diffusers": _diffusers,
    }
    if weights is not None and not Path(weights).is_file():
        raise BackboneError("no such weights file", where=str(weights), fix="give its path")
    fetch = weights is None and not random
    plain, forms = split(name)
    scheme, _, rest = plain.partition(":")
    if scheme in OPENERS and rest:
        return _engine(name, scheme, rest, fetch, forms)
    if plain == "restuning-tiny":
        backbone = _tiny(fetch)
    elif scheme in loaders and rest:
        backbone = loaders[scheme](rest, fetch)
    elif scheme in PAIRS and rest:
        with _reaching_hub(rest):
            # Weights belong to both towers, so they are loaded before these are told apart.
            parts = PAIRS[scheme](rest, fetch, None if weights is None else Path(weights))
        backbone = Backbone("", **parts)
    else:
        raise UnknownNameError(
            "no such backbone",
            where=name,
            fix="; ".join(f"{k} ({v})" for k, v in SCHEMES.items()),
        )
    if weights is not None and backbone.text is None:
        load_weights(backbone.model, Path(weights))
    source = str(weights) if weights else "random" if random else backbone.weights
    apply(backbone.model.eval(), forms, name)
    return replace(backbone, name=name, weights=source, compiled=COMPILE in forms)


def with_text_tower(name: str) -> str:
    """The name under which a backbone is loaded with its text tower: `hf:NAME` is `clip:NAME`."""
    scheme, _, rest = name.partition(":")
    return f"clip:{rest}" if scheme == "hf" else name


def _engine(name: str, runtime: str, file: str, fetch: bool, forms: tuple[str, ...]) -> Backbone:
    if forms:
        raise EngineError(
            "an engine is what it was exported as",
            where=name,
            found=f"+{'+'.join(forms)}",
            fix="leave it out; `restuning engine export --int8` quantises",
        )
    if not fetch:
        raise EngineError(
            "an engine has its weights in its file",
            where=name,
            found="--weights, --random, or a command that draws weights",
            fix="leave them out, or name the PyTorch backbone",
        )
    engine, about = opened(runtime, file)
    example = about.example()
    weights = f"{about.weights} of {about.backbone}, {about.precision} in {runtime}"
    if about.preprocessing is not None:
        return Backbone(
            name,
            engine,
            tuple(example.values()),
            {},
            Preprocessing.from_dict(about.preprocessing),
            weights=weights,
        )
    source = about.backbone.removeprefix("hf:")
    hf = require("transformers", "transformers", f"the tokenizer of {name}")
    with _reaching_hub(source):
        tokenizer = text_parts(hf, source)["tokenizer"]
    return Backbone(name, engine, (), example, None, tokenizer, weights, about.pool)


def _tiny(fetch: bool) -> Backbone:
    from timm.models.vision_transformer import VisionTransformer

    config = json.loads((_TINY / "config.json").read_text(encoding="utf-8"))
    model = VisionTransformer(**config["arguments"])
    if fetch:
        load_weights(model, _TINY / "restuning-tiny.safetensors")
    values = config["preprocessing"]
    preprocessing = Preprocessing(
        tuple(values["input_size"][1:]),
        tuple(values["mean"]),
        tuple(values["std"]),
        values.get("interpolation", "bicubic"),
        values.get("crop", 1.0),
    )
    return Backbone(
        "", model, (torch.zeros(1, 3, *preprocessing.size),), {}, preprocessing, weights="embedded"
    )


def _timm(name: str, fetch: bool) -> Backbone:
    import timm
    from timm.data import resolve_model_data_config

    name, _, given = name.partition(":")
    name, _, size = name.partition("@")
    arguments = _arguments(given, name)
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3)
        raise UnknownNameError(
            "timm has no such model", where=name, fix=f"did you mean {', '.join(near)}?"
        )
    if size and not size.isdigit():
        raise UnknownNameError(
            "not an image size", where=f"{name}@{size}", fix="write pixels, e.g. @160"
        )
    with _reaching_hub(name):
        model = _timm_model(timm, name, fetch, int(size) if size else None, arguments)
    data = resolve_model_data_config(model)
    embed = getattr(model, "patch_embed", None)
    patch = getattr(embed, "patch_size", None)
    if size and patch and int(size) % patch[0] and not getattr(embed, "dynamic_img_pad", False):
        raise UnknownNameError(
            "not an image size of this model",
            where=f"{name}@{size}",
            found=f"patches of {patch[0]} pixels",
            fix=f"give a multiple of {patch[0]}",
        )
    shape = (3, int(size), int(size)) if size else data["input_size"]
    preprocessing = Preprocessing(
        shape[1:], data["mean"], data["std"], data["interpolation"], data["crop_pct"]
    )
    return Backbone("", model, (torch.zeros(1, *shape),), {}, preprocessing)


def _timm_model(
    timm: Any, name: str, fetch: bool, size: int | None, arguments: dict[str, Any]
) -> nn.Module:
    """Convolutional networks take any size; those with position embeddings must be told it."""
    arguments = {"pretrained": fetch, "num_classes": 0, **arguments}
    if size is not None:
        try:
            return timm.create_model(name, img_size=size, **arguments)
        except TypeError:
            pass
    try:
        return timm.create_model(name, **arguments)
    except TypeError as error:
        raise UnknownNameError(
            "timm's architecture takes no such argument",
            where=name,
            found=str(error)[:200],
            fix="give those of its class, e.g. timm:mobilenetv2_035:pad_type=same,bn_eps=1e-3",
        ) from None


def _arguments(given: str, name: str) -> dict[str, Any]:
    """`pad_type=same,bn_eps=1e-3` as keyword arguments; what reads as JSON is not a string."""
    arguments: dict[str, Any] = {}
    for part in filter(None, given.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier() or key in ("pretrained", "num_classes", "img_size"):
            raise UnknownNameError(
                "not an argument of a timm architecture",
                where=f"{name}:{given}",
                found=part,
                fix="write name=value, e.g. pad_type=same,bn_eps=1e-3; a size as NAME@160",
            )
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value
    return arguments


def _hf(name: str, fetch: bool) -> Backbone:
    hf = require("transformers", "transformers", f"the backbone hf:{name}")
    with _reaching_hub(name):
        config = hf.AutoConfig.from_pretrained(name)
        config = getattr(config, "vision_config", config)
        kind = {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel"}
        cls = getattr(hf, kind.get(config.model_type, "AutoModel"))
        texts = not hasattr(config, "image_size")
        if (
            texts
            and config.is_encoder_decoder
            and type(config) in hf.MODEL_FOR_TEXT_ENCODING_MAPPING
        ):
            # A text is classified by the encoder alone; to generate, give Host the whole model.
            cls = hf.AutoModelForTextEncoding
        if fetch:
            model, report = cls.from_pretrained(name, output_loading_info=True)
            refuse_missing(report, name)
        else:
            model = getattr(cls, "from_config", cls)(config)
        if texts:
            return Backbone("", model, (), **text_parts(hf, name))
    half = (0.5, 0.5, 0.5)
    preprocessing = image_preprocessing(hf, name, config.image_size, (half, half))
    example = torch.zeros(1, 3, *preprocessing.size)
    return Backbone("", model, (example,), {}, preprocessing)


def _diffusers(name: str, fetch: bool) -> Backbone:
    if not fetch:
        raise BackboneError(
            "a pipeline is loaded with its own weights",
            where=f"diffusers:{name}",
            fix="give a folder that pipeline.save_pretrained wrote, without --random and --weights",
        )
    parts = load_text_to_image(name)
    example, named = parts.example
    return Backbone("", parts.denoiser, example, dict(named))


def _torchvision(name: str, fetch: bool) -> Backbone:
    models = require("torchvision.models", "transformers", f"the backbone torchvision:{name}")
    if name not in models.list_models(module=models):
        near = get_close_matches(name, models.list_models(module=models), n=3)
        raise UnknownNameError(
            "torchvision has no such model", where=name, fix=f"did you mean {', '.join(near)}?"
        )
    with _reaching_hub(name):
        model = models.get_model(name, weights="DEFAULT" if fetch else None)
    for head in ("heads", "head", "classifier", "fc"):
        if isinstance(getattr(model, head, None), nn.Module):
            _without_last_map(model, head)
            break
    wanted: Any = models.get_model_weights(name).DEFAULT.transforms()
    crop = getattr(wanted, "crop_size", [224])[0]
    preprocessing = Preprocessing(
        (crop, crop),
        tuple(wanted.mean),
        tuple(wanted.std),
        wanted.interpolation.value,
        crop / getattr(wanted, "resize_size", [crop])[0],
    )
    return Backbone("", model, (torch.zeros(1, 3, crop, crop),), {}, preprocessing)


def _without_last_map(model: nn.Module, head: str) -> None:
    """Norms and hidden layers of a torchvision head belong to the feature; its last map does not."""
    found = getattr(model, head)
    if isinstance(found, nn.Sequential):
        last = max(i for i, m in enumerate(found) if isinstance(m, (nn.Linear, nn.Conv2d)))
        found[last] = nn.Identity()
    else:
        setattr(model, head, nn.Identity())


class _reaching_hub:  # noqa: N801
    """Turns whatever a hub client raises into one error that says what to do without a hub."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, (OSError, RuntimeError, ValueError, KeyError, SafetensorError)):
            words = (str(error).strip().splitlines() or ["no more is known"])[0]
            raise BackboneError(
                "a backbone could not be loaded",
                where=self.name,
                found=f"{type(error).__name__}: {words[:200]}",
                fix="without a hub give --weights FILE (safetensors), a local folder, or --random",
            ) from None
