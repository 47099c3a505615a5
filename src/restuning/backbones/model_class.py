"""Which class of transformers loads a model, and what that class takes: an image, a text or a sound."""

from __future__ import annotations

from typing import Any

from restuning._errors import BackboneError

_TAKES = {
    "pixel_values": "image",
    "input_ids": "text",
    "input_values": "audio",
    "input_features": "audio",
}
"""What a model takes, by the name of its main input."""

_OTHERS = {
    "audio_mel": "sound",
    "audio_values": "sound",
    "pixel_values_videos": "videos",
    "past_values": "series of numbers",
    "flattened_patches": "patches of documents",
}


_UNMASKED = {"vit_mae": "ViTConfig"}
"""Models that hide most patches at random, also in eval mode, and shuffle the others; and the config of
the model of the same weights that sees all of them, in their order."""


def choose_class(hf: Any, config: Any, name: str) -> tuple[Any, Any, str]:
    """The class that loads a model without its head, that class's config, and "image", "text" or "audio".

    Told by the name of the main input of the class (`main_input_name`), since configs of image
    models need not have an `image_size` and those of others may. Of a model of an image and a text
    tower (CLIP) it is the image tower; of an encoder-decoder for texts the encoder; of ViTMAE the
    plain ViT of its weights.

    Raises:
        BackboneError: It takes none of these.
    """
    if config.model_type in _UNMASKED:
        plain = getattr(hf, _UNMASKED[config.model_type])
        said = {
            k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")
        }
        config = plain.from_dict(said)
    if type(config) in hf.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING:
        config = getattr(config, "vision_config", config)
    if type(config) in hf.MODEL_MAPPING:
        cls = hf.MODEL_MAPPING[type(config)]
        # A few have two (Funnel, with a decoder and without): the first is the whole.
        cls = cls[0] if isinstance(cls, (tuple, list)) else cls
    else:
        # The image tower of a model of two has a class, and mostly no place in the mapping.
        cls = getattr(hf, type(config).__name__.removesuffix("Config") + "Model", None)
    if cls is None:
        raise BackboneError(
            "transformers has no class for this model without its head",
            where=f"hf:{name}",
            found=f"model type {config.model_type}",
            fix="build it yourself and give it to Host(model, example)",
        )
    main = getattr(cls, "main_input_name", None)
    takes = _TAKES.get(main, "") if isinstance(main, str) else ""
    if not takes:
        other = _OTHERS.get(main, "") if isinstance(main, str) else ""
        raise BackboneError(
            "a backbone takes an image, a text or a sound",
            where=f"hf:{name}",
            found=f"{cls.__name__}, whose main input is {main}" + (f": {other}" if other else ""),
            fix="use a model of images (pixel_values), of texts (input_ids) or of sounds (input_values, "
            "input_features)",
        )
    encodes = config.is_encoder_decoder and type(config) in hf.MODEL_FOR_TEXT_ENCODING_MAPPING
    if takes == "text" and encodes:
        # A text is classified by the encoder alone; to generate, give Host the whole model.
        cls = hf.MODEL_FOR_TEXT_ENCODING_MAPPING[type(config)]
    return cls, config, takes
