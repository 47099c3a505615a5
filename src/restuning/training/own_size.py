"""What it costs a detached method that its backbone runs at a smaller image size than its own."""

from __future__ import annotations

from restuning.backbones import Backbone, Preprocessing

MEASURED = {112: 38.5, 224: 60.7}
"""Test accuracy in per cent of linear probing on cifar100, by pixels, with a ViT-Ti whose own size is the last.
The commands stand in `docs/images.md`, their results in `recipes/shared_tasks/own_size`."""


def note_smaller_size(backbone: Backbone, *, detached: bool) -> str:
    """A sentence where a backbone runs at a smaller image size than its own and a method cannot repair that.

    Methods inside the backbone train what the size has changed; those beside it read what it gives. Of
    larger sizes nothing was measured, and nothing is said.

    Args:
        backbone: As it is about to be trained beside.
        detached: Whether any method of those to be trained is beside it (`methods.runs_inside`).

    Returns:
        "" where there is nothing to say, or nothing is known.
    """
    own, prepared = backbone.own_size, backbone.preprocessing
    if own is None or not isinstance(prepared, Preprocessing):
        return ""
    # Weights that were drawn are for no size.
    if not detached or backbone.weights == "random":
        return ""
    size = prepared.size
    if size[0] >= own[0] and size[1] >= own[1]:
        return ""
    figures = ", ".join(f"{accuracy} % at {pixels} px" for pixels, accuracy in MEASURED.items())
    asked = "@" in backbone.name
    return (
        f"image size {size_in_words(size)}, the backbone's own is {size_in_words(own)}: methods beside "
        f"the backbone cannot repair that (linear probing on cifar100 with ViT-Ti: {figures}); "
        + ("leave --image-size or @PIXELS out" if asked else "run it at its own size")
    )


def size_in_words(size: tuple[int, int]) -> str:
    """Height and width as `224 px`, or `224x160 px`."""
    height, width = size
    return f"{height} px" if height == width else f"{height}x{width} px"
