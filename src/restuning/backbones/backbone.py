"""A backbone with what is needed to feed it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from restuning._errors import BackboneError
from restuning.backbones.inputs import AnyPreprocessing
from restuning.backbones.towers import TextTower
from restuning.host import Extractor, Host


@dataclass(frozen=True)
class Backbone:
    """A backbone with what is needed to feed it.

    Attributes:
        name: The name it was loaded by.
        model: Headless, in eval mode; or an engine.
        example: One input, batch 1.
        kwargs: The example's keyword inputs (text models).
        preprocessing: For images or sounds, else None.
        tokenizer: For text, else None.
        weights: "embedded", "pretrained", "random" or a file.
        weights_file: The file, where the user gave one.
        pool: How its authors make one vector of a text ("mean", "cls", "last"), where they say so
            (sentence-transformers); None leaves it to the readout that was found.
        text: The text tower of a vision-language model, else None.
        compiled: Whether a host compiles it (`torch.compile`), at the first forward of each kind.
        own_size: Height and width in pixels that its weights are for, whatever size it was built
            with: what it runs at where no other is asked for. None where nothing says it, and of texts.
    """

    name: str
    model: nn.Module
    example: tuple[Tensor, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    preprocessing: AnyPreprocessing | None = None
    tokenizer: Any = None
    weights: str = "pretrained"
    pool: str | None = None
    text: TextTower | None = None
    compiled: bool = False
    weights_file: Path | None = None
    own_size: tuple[int, int] | None = None

    def host(self) -> Extractor:
        """The engine, or a new host on the network.

        Raises:
            BackboneError: The network does not take the example: it wants another size, or more.
        """
        # An engine has its taps in its file; there is nothing to hook.
        if isinstance(self.model, Extractor):
            return self.model
        try:
            host = Host(self.model, *self.example, **self.kwargs)
        except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
            shapes = [tuple(t.shape) for t in self.example] or list(self.kwargs)
            raise BackboneError(
                "a backbone does not take its own example",
                where=self.name,
                found=f"{shapes}: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
                fix="compare the image size of its preprocessor_config.json with its config.json; a model "
                "that needs more than an image or a text is given to Host(model, ...) by hand",
            ) from error
        if self.compiled:
            # In place, and with the host's hooks there: a compiled model ignores later ones.
            self.model.compile()
        return host

    def summarise(self) -> dict[str, Any]:
        """What the backbone is and what was found in it, as plain values: what `restuning info` shows.

        Cost: as `host`.
        """
        host = self.host()
        rule = host.readout_rule
        return {
            "class": type(self.model).__name__,
            "weights": self.weights,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "layers": host.sites.layers,
            "sites": host.sites.summarise(),
            "readout": f"{rule.pool}, norm {rule.norm or 'none'}, width {rule.dim} ({rule.proof})",
            "preprocessing": self.preprocessing.to_dict() if self.preprocessing else "text",
            "fingerprint": host.fingerprint(),
        }


def refuse_for_loaded(backbone: Backbone, **options: Any) -> None:
    """Refuse options that say how a backbone is loaded, where one is given that is.

    Args:
        backbone: That is loaded.
        options: By name; None and False say nothing.

    Raises:
        BackboneError: One of them was given.
    """
    given = [name for name, value in options.items() if value not in (None, False)]
    if given:
        raise BackboneError(
            "a backbone that is loaded already is taken as it is",
            where=", ".join(given),
            found=f"{backbone.name}, weights {backbone.weights}",
            fix=f"leave {' and '.join(given)} out, or give the backbone's name to have it loaded so",
        )
