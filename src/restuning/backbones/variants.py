"""Variants of a PyTorch backbone, written after its name: `timm:NAME+int8`, `+nf4`, `+compile`.

A variant is part of the name, so that a store, a task file and `eval` know it without asking.
"""

from __future__ import annotations

from torch import nn

from restuning._errors import BackboneError, require

QUANTIZED = ("int8", "nf4")
"""Of weights alone. With activations in int8, too, PyTorch's kernels give no gradient to their input,
which inline tuners below would lose without a word."""
COMPILE = "compile"
"""Done to the model once its host has hooks on it: a compiled model ignores later ones."""


def split_variants(name: str) -> tuple[str, tuple[str, ...]]:
    """A backbone's name without its variants, and these in the order they are applied."""
    variants: list[str] = []
    # From the right, as names may hold a plus of their own.
    while (parts := name.rpartition("+"))[2] in (*QUANTIZED, COMPILE):
        name = parts[0]
        variants.insert(0, parts[2])
    return name, tuple(variants)


def add_quantization(name: str, quantization: str | None) -> str:
    """A backbone's name with a quantised variant: `timm:NAME` and "int8" to `timm:NAME+int8`.

    Raises:
        BackboneError: No such variant, or the name has one.
    """
    if quantization is None:
        return name
    plain, variants = split_variants(name)
    if quantization not in QUANTIZED or any(v in QUANTIZED for v in variants):
        raise BackboneError(
            "the backbone cannot be quantised so",
            where=name,
            found=quantization,
            fix=f"give one of {', '.join(QUANTIZED)}, once",
        )
    return "+".join([plain, quantization, *variants])


def quantize(model: nn.Module, variants: tuple[str, ...], name: str) -> None:
    """Quantise the linear maps of a model in place.

    Args:
        model: With its weights, in eval mode.
        variants: Of `QUANTIZED`; others are left to whoever makes the host.
        name: For errors.

    Raises:
        BackboneError: It has none.
        MissingExtraError: torchao or bitsandbytes is not installed.
    """
    chosen = [variant for variant in variants if variant in QUANTIZED]
    if chosen and not any(isinstance(m, nn.Linear) for m in model.modules()):
        raise BackboneError(
            "the backbone has no linear maps to quantise",
            where=name,
            fix="leave it out; engines quantise what they have (`restuning engine export --int8`)",
        )
    for variant in chosen:
        (_quantize_int8 if variant == "int8" else _quantize_nf4)(model)


def _quantize_int8(model: nn.Module) -> None:
    """One byte a weight and a scale a row; products in the stream's own precision."""
    ao = require("torchao.quantization", "quantized", "a backbone in int8")
    ao.quantize_(model, ao.Int8WeightOnlyConfig())


def _quantize_nf4(model: nn.Module) -> None:
    """Half a byte a weight, in 16 levels of a normal distribution, and a scale for 64 of them."""
    bnb = require("bitsandbytes", "quantized", "a backbone in nf4")
    for path, module in list(model.named_modules()):
        # Subclasses compute something else than a product.
        if type(module) is not nn.Linear:
            continue
        weight, bias = module.weight, module.bias
        packed = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias is not None,
            compute_dtype=weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        packed.weight = bnb.nn.Params4bit(
            weight.detach(), requires_grad=False, quant_type="nf4", module=packed
        )
        packed.bias = bias
        owner, _, leaf = path.rpartition(".")
        # Packed when it is moved, also to where it is.
        setattr(model.get_submodule(owner), leaf, packed.to(weight.device))


def add_image_size(backbone: str, size: int | None) -> str:
    """Add the size of its images to a backbone's name: `timm:NAME` at 112 is `timm:NAME@112`.

    Args:
        backbone: As `load_backbone` takes it, also with arguments: `timm:NAME:arguments`.
        size: In pixels; None leaves the name as it is.

    Raises:
        BackboneError: It takes none.
    """
    if size is None:
        return backbone
    scheme, _, rest = backbone.partition(":")
    name, colon, arguments = rest.partition(":")
    if scheme != "timm" or "@" in name:
        raise BackboneError(
            "an image size is given to backbones of timm",
            where=backbone,
            fix="leave --image-size out",
        )
    return f"timm:{name}@{size}{colon}{arguments}"
