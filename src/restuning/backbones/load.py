"""Backbones by name: embedded, of timm, transformers, torchvision, open_clip."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

from restuning._errors import BackboneError, EngineError, UnknownNameError, require
from restuning.backbones.audio_preprocessing import read_feature_extractor
from restuning.backbones.backbone import Backbone, refuse_for_loaded
from restuning.backbones.diffusion import load_text_to_image
from restuning.backbones.engines.open import OPENERS, open_described
from restuning.backbones.model_class import choose_class
from restuning.backbones.pairs import image_preprocessing, load_clip, load_openclip
from restuning.backbones.preprocessing import Preprocessing
from restuning.backbones.text import load_text_parts
from restuning.backbones.trust import (
    check_config,
    explain_hub_errors,
    hub_arguments,
    opening,
    refuse_larger,
    refuse_unsafe,
    weights_arguments,
)
from restuning.backbones.variants import COMPILE, quantize, split_variants
from restuning.backbones.weights import (
    find_trained_size,
    load_weights,
    refuse_missing,
    take_out_poolers,
)
from restuning.runtime.hub import (
    first_cached,
    hub_answers,
    is_offline,
    named_in,
    naming_file,
    offline,
)

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
_NOT_OF_AN_ARCHITECTURE = frozenset(
    # These choose what is fetched or opened, which a name out of a stranger's task file must not.
    ("pretrained", "num_classes", "img_size", "checkpoint_path", "cache_dir")
    + ("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict")
)
SIZE_DIGITS = 5
"""An image size with more is a mistake, and would ask for as many positions."""

PAIRS = {"clip": load_clip, "openclip": load_openclip}


def load_backbone(
    name: str, *, weights: str | Path | None = None, random: bool = False
) -> Backbone:
    """Load a backbone by name.

    No code that lies with a model is run, whoever names it. What a file names (`named_in`) fetches
    nothing and opens no pickle; `docs/security.md` has the table. Where a hub does not answer within
    3 seconds, what was fetched before is used.

    Args:
        name: See `SCHEMES`.
        weights: A safetensors file (or npz for timm's ViTs), for machines without a hub.
        random: Random weights from torch's current seed.

    Raises:
        UnknownNameError: No such backbone.
        BackboneError: Weights are missing, mismatched or cannot be fetched, or a file names what is
            opened only if the user does.
        EngineError: An engine's file cannot be opened.
        MissingExtraError: The library that has it is not installed.
    """
    if weights is not None and not Path(weights).is_file():
        raise BackboneError("no such weights file", where=str(weights), fix="give its path")
    file = None if weights is None else Path(weights)
    plain, variants = split_variants(name)
    scheme, _, rest = plain.partition(":")
    with opening(name):
        if scheme in OPENERS and rest:
            return _load_engine(name, scheme, rest, file is None and not random, variants)
        with nullcontext() if _may_fetch(scheme, rest, file, random) else offline():
            backbone = _load_network(name, plain, file, random)
        if file is not None and backbone.text is None:
            load_weights(backbone.model, file)
            # The file knows better than a table of timm, which is of the weights that timm has.
            trained_size = find_trained_size(backbone.model, file)
            backbone = replace(backbone, own_size=trained_size or backbone.own_size)
    source = str(weights) if weights else "random" if random else backbone.weights
    # bitsandbytes fetches kernels where it can, which a file must not ask for.
    with offline() if naming_file() else nullcontext():
        quantize(backbone.model.eval(), variants, name)
    return replace(
        backbone,
        name=name,
        weights=source,
        compiled=COMPILE in variants,
        weights_file=file,
    )


def take_backbone(
    given: str | Backbone, *, weights: str | Path | None = None, random: bool | None = False
) -> Backbone:
    """A backbone by name (`load_backbone`), or one that is loaded, as it is.

    Raises:
        BackboneError: It is loaded, and `weights` or `random` say how it should be.
        RestuningError: As `load_backbone`.
    """
    if isinstance(given, Backbone):
        refuse_for_loaded(given, weights=weights, random=random)
        return given
    return load_backbone(given, weights=weights, random=bool(random))


def _load_network(name: str, plain: str, weights: Path | None, random: bool) -> Backbone:
    """A PyTorch network, with its own weights unless others are given or none are wanted."""
    loaders: dict[str, Callable[[str, bool, Path | None], Backbone]] = {
        "timm": _load_timm,
        "hf": _load_hf,
        "torchvision": _load_torchvision,
        "diffusers": _load_diffusers,
    }
    fetch = weights is None and not random
    scheme, _, rest = plain.partition(":")
    if plain == "restuning-tiny":
        return _load_tiny(fetch)
    if scheme in loaders and rest:
        return loaders[scheme](rest, fetch, weights)
    if scheme in PAIRS and rest:
        with explain_hub_errors(rest):
            # Weights belong to both towers, so they are loaded before these are told apart.
            return _at_own_size(Backbone("", **PAIRS[scheme](rest, fetch, weights)))
    raise UnknownNameError(
        "no such backbone",
        where=name,
        fix="; ".join(f"{k} ({v})" for k, v in SCHEMES.items()),
    )


def _may_fetch(scheme: str, rest: str, weights: Path | None, random: bool) -> bool:
    """Whether anything may come from a network: the user names it, it is no folder, and a hub answers."""
    if naming_file() or Path(rest.removeprefix("local-dir:")).is_dir():
        return False
    if scheme in ("hf", "clip", "openclip", "diffusers"):
        return hub_answers()
    # These know their architectures, and ask for weights alone.
    return scheme == "timm" and weights is None and not random and hub_answers()


def with_text_tower(name: str) -> str:
    """The name under which a backbone is loaded with its text tower: `hf:NAME` is `clip:NAME`."""
    scheme, _, rest = name.partition(":")
    return f"clip:{rest}" if scheme == "hf" else name


def _load_engine(
    name: str, runtime: str, file: str, fetch: bool, variants: tuple[str, ...]
) -> Backbone:
    if variants:
        raise EngineError(
            "an engine is what it was exported as",
            where=name,
            found=f"+{'+'.join(variants)}",
            fix="leave it out; `restuning engine export --int8` quantises",
        )
    if not fetch:
        raise EngineError(
            "an engine has its weights in its file",
            where=name,
            found="--weights, --random, or a command that draws weights",
            fix="leave them out, or name the PyTorch backbone",
        )
    engine, about = open_described(runtime, file)
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
            own_size=about.own_size,
        )
    # A tokenizer is not part of the file; it comes from where the network came from.
    source = about.backbone.removeprefix("hf:")
    hf = require("transformers", "transformers", f"the tokenizer of {name}")
    try:
        # The engine's file names it, which fetches nothing.
        with named_in(file), opening(about.backbone), offline(), explain_hub_errors(source):
            tokenizer = load_text_parts(hf, source)["tokenizer"]
    except BackboneError as error:
        raise BackboneError(
            "the tokenizer of an engine is not here, and a file fetches nothing",
            where=name,
            found=error.found,
            fix=f"fetch it once, by name: restuning info {about.backbone}",
        ) from None
    return Backbone(name, engine, (), example, None, tokenizer, weights, about.pool)


def _load_tiny(fetch: bool) -> Backbone:
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
    example = torch.zeros(1, 3, *preprocessing.size)
    return _at_own_size(Backbone("", model, (example,), {}, preprocessing, weights="embedded"))


def _at_own_size(backbone: Backbone) -> Backbone:
    """A backbone of which no other size can be asked: what its authors prepare images to is its own.

    And not `image_size` of a config, which is how many positions there are: of DINOv2 518 pixels, where
    images are prepared to 224.
    """
    prepared = backbone.preprocessing
    sized = isinstance(prepared, Preprocessing)
    return replace(backbone, own_size=prepared.size) if sized else backbone


def _load_timm(name: str, fetch: bool, weights: Path | None) -> Backbone:
    import timm
    from timm.data import resolve_model_data_config

    # NAME@SIZE:key=value,key=value
    name, _, after_colon = name.partition(":")
    name, _, size = name.partition("@")
    arguments = _parse_arguments(after_colon, name)
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3)
        raise UnknownNameError(
            "timm has no such model", where=name, fix=f"did you mean {', '.join(near)}?"
        )
    digits = size.isascii() and size.isdigit() and len(size) <= SIZE_DIGITS
    if size and not (digits and int(size)):
        raise UnknownNameError(
            "not an image size",
            where=f"{name}@{size}",
            fix="write the pixels of a side, e.g. @160: images are made square",
        )
    pixels = int(size) if size else None
    with explain_hub_errors(name):
        files = [weights] if weights else _cached_of_timm(timm, name) if fetch else []
        if size or arguments:
            refuse_larger(lambda: _create_timm_model(timm, name, False, pixels, arguments), files)
        model = _create_timm_model(timm, name, fetch, pixels, arguments)
    # Mean, deviation and crop that the weights were trained with.
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
    # What timm says of its weights, before another size was asked for.
    own_size = tuple(data["input_size"][1:])
    return Backbone("", model, (torch.zeros(1, *shape),), {}, preprocessing, own_size=own_size)


def _cached_of_timm(timm: Any, name: str) -> list[Path]:
    """The safetensors of a timm name that a file gives; none where the user does.

    Raises:
        BackboneError: A file gives it, and they were not fetched before.
    """
    if not naming_file():
        return []
    said = timm.get_pretrained_cfg(name, allow_unregistered=True)
    repository, _, revision = (getattr(said, "hf_hub_id", None) or "").partition("@")
    stored = getattr(said, "hf_hub_filename", None) or "pytorch_model.bin"
    # As timm looks for them itself, before any pickle.
    safe = {"pytorch_model.bin": "model.safetensors"}
    safe |= {"open_clip_pytorch_model.bin": "open_clip_model.safetensors"}
    wanted = safe.get(stored, f"{Path(stored).stem}.safetensors")
    cached = first_cached(repository, [wanted], revision or None) if repository else None
    if cached is None:
        refuse_unsafe(f"no {wanted} of {repository or 'a hub'} was fetched before")
    return [] if cached is None else [cached]


def _create_timm_model(
    timm: Any, name: str, fetch: bool, size: int | None, arguments: dict[str, Any]
) -> nn.Module:
    """Convolutional networks take any size; those with position embeddings must be told it."""
    arguments = {"pretrained": fetch, "num_classes": 0, **arguments}
    if size is not None:
        # Only a trial tells whether an architecture takes `img_size`.
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


def _parse_arguments(text: str, name: str) -> dict[str, Any]:
    """`pad_type=same,bn_eps=1e-3` as keyword arguments; what reads as JSON is not a string."""
    arguments: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key.isidentifier() or key in _NOT_OF_AN_ARCHITECTURE:
            raise UnknownNameError(
                "not an argument of a timm architecture",
                where=f"{name}:{text}",
                found=part,
                fix="write name=value, e.g. pad_type=same,bn_eps=1e-3; a size as NAME@160",
            )
        try:
            arguments[key] = json.loads(value)
        except ValueError:
            arguments[key] = value
    return arguments


def _load_hf(name: str, fetch: bool, weights: Path | None) -> Backbone:
    hf = require("transformers", "transformers", f"the backbone hf:{name}")
    with explain_hub_errors(name):
        files = check_config(hf, name, fetch, weights)
        config = hf.AutoConfig.from_pretrained(name, **hub_arguments())
        cls, config, takes = choose_class(hf, config, name)

        def build() -> nn.Module:
            return getattr(cls, "_from_config", cls)(config)

        refuse_larger(build, files)
        if fetch:
            model, report = cls.from_pretrained(
                name, config=config, output_loading_info=True, **weights_arguments()
            )
            refuse_missing(report, name)
            take_out_poolers(model, report)
        else:
            model = build()
        if takes == "text":
            return Backbone("", model, (), **load_text_parts(hf, name, model))
        if takes == "audio":
            audio = read_feature_extractor(hf, name, config)
            # Of speech recognition (Whisper) what hears; what writes is of no use to a sound's answer.
            whole: Any = model
            model = whole.get_encoder() if config.is_encoder_decoder else whole
            return Backbone("", model, (), audio.example(), audio)
    half = (0.5, 0.5, 0.5)
    preprocessing = image_preprocessing(hf, name, getattr(config, "image_size", None), (half, half))
    example = torch.zeros(1, 3, *preprocessing.size)
    return _at_own_size(Backbone("", model, (example,), {}, preprocessing))


def _load_diffusers(name: str, fetch: bool, weights: Path | None) -> Backbone:
    if not fetch:
        raise BackboneError(
            "a pipeline is loaded with its own weights",
            where=f"diffusers:{name}",
            fix="give a folder that pipeline.save_pretrained wrote, without --random and --weights",
        )
    parts = load_text_to_image(name)
    example, named = parts.example
    return Backbone("", parts.denoiser, example, dict(named))


def _load_torchvision(name: str, fetch: bool, weights: Path | None) -> Backbone:
    models = require("torchvision.models", "transformers", f"the backbone torchvision:{name}")
    if name not in models.list_models(module=models):
        near = get_close_matches(name, models.list_models(module=models), n=3)
        raise UnknownNameError(
            "torchvision has no such model", where=name, fix=f"did you mean {', '.join(near)}?"
        )
    with explain_hub_errors(name):
        if fetch:
            _fetch_torchvision(models.get_model_weights(name).DEFAULT)
        model = models.get_model(name, weights="DEFAULT" if fetch else None)
    # torchvision names a classifier differently in every family.
    for head in ("heads", "head", "classifier", "fc"):
        if isinstance(getattr(model, head, None), nn.Module):
            _remove_last_linear(model, head)
            break
    # The default weights say how images are prepared, also where they are not fetched.
    transform: Any = models.get_model_weights(name).DEFAULT.transforms()
    crop = getattr(transform, "crop_size", [224])[0]
    preprocessing = Preprocessing(
        (crop, crop),
        tuple(transform.mean),
        tuple(transform.std),
        transform.interpolation.value,
        crop / getattr(transform, "resize_size", [crop])[0],
    )
    example = torch.zeros(1, 3, crop, crop)
    return _at_own_size(Backbone("", model, (example,), {}, preprocessing))


def _fetch_torchvision(weights: Any) -> None:
    """Have the weights of a torchvision model in its cache, and see that they are tensors and no more.

    torchvision has pickles only, which it reads without a check; this one reads no other than tensors.

    Raises:
        BackboneError: They are not there, and a file named them, or their server does not answer.
    """
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(weights.url).path).name)
    if not file.is_file():
        refuse_unsafe(f"{file.name} was not fetched before")
        if is_offline() or not hub_answers(weights.url):
            raise OSError(
                f"{urlsplit(weights.url).hostname} does not answer, and no {file} is there"
            )
    torch.hub.load_state_dict_from_url(weights.url, check_hash=True, weights_only=True)


def _remove_last_linear(model: nn.Module, head: str) -> None:
    """Norms and hidden layers of a torchvision head belong to the feature; its last map does not."""
    classifier = getattr(model, head)
    if isinstance(classifier, nn.Sequential):
        # SqueezeNet's classifier is a convolution.
        last = max(i for i, m in enumerate(classifier) if isinstance(m, (nn.Linear, nn.Conv2d)))
        classifier[last] = nn.Identity()
    else:
        setattr(model, head, nn.Identity())
