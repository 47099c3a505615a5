"""The two towers of a vision-language model: inputs to vectors of unit length in a shared space."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from restuning._errors import BackboneError, DataError
from restuning.sites import read_vector

TEMPLATE = "a photo of a {}."
"""The prompt of the CLIP paper (Radford et al. 2021, section 3.1.4) for any data set."""

AT_ONCE = 256
"""Texts of one forward: ImageNet's 1000 classes with 80 templates do not fit in memory at once."""

SAME_LOGITS = 1e-4
"""Largest error of the towers' logit against the model's own, relative to its scale: both round
products of unit vectors, and open_clip computes in another order."""


class ImageTower(nn.Module):
    r"""`images -> P v / |P v|`: a vision network's vector v, projected, at unit length, `b d`.

    Args:
        model: Returns a vector, or an output that holds one (`pooler_output` first).
        projection: P, the map into the space that the towers share; None where the model has it
            inside, or none.
    """

    def __init__(self, model: nn.Module, projection: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        self.projection = projection

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Images `b 3 h w` to `b d`."""
        return _project_to_unit_length(self.model(pixel_values), self.projection)


class TextTower(nn.Module):
    r"""`texts -> P v / |P v|`: a text network's vector v, projected, at unit length, `b d`.

    Args:
        model: Called with what `tokenize` gives, by keyword.
        tokenize: Texts to `input_ids` (and `attention_mask`), padded as the model was trained.
        scale: What multiplies a cosine: the model's logit = scale * cosine + bias.
        bias: See `scale`; 0 but in SigLIP.
        projection: As for `ImageTower`.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenize: Callable[[list[str]], dict[str, Tensor]],
        scale: float,
        bias: float = 0.0,
        projection: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model, self.projection = model, projection
        self.tokenize, self.scale, self.bias = tokenize, scale, bias

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Tokens `b n` to `b d`."""
        more = {} if attention_mask is None else {"attention_mask": attention_mask}
        return _project_to_unit_length(self.model(input_ids=input_ids, **more), self.projection)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Texts to their vectors, `b d`, without gradient."""
        device = next(self.parameters()).device
        vectors = []
        for start in range(0, len(texts), AT_ONCE):
            tokens = self.tokenize(list(texts[start : start + AT_ONCE]))
            vectors.append(self(**{k: v.to(device) for k, v in tokens.items()}))
        return torch.cat(vectors)

    def head(self, names: Sequence[str], templates: str | Sequence[str] = TEMPLATE) -> nn.Linear:
        r"""The classifier that a model is without training: `W_c = scale * m_c / |m_c|`.

        m_c is the mean over templates of the class texts' unit vectors; on the image tower's
        feature the logits are the model's own, `scale * cosine + bias`.

        Args:
            names: Of the classes; "_" reads as a space.
            templates: One or more, each with one `{}` where the name goes.

        Raises:
            DataError: There is no name, or a template has no place for one.

        Cost: one text forward a class and template.
        """
        templates = [templates] if isinstance(templates, str) else list(templates)
        if not names or not templates:
            raise DataError(
                "a head of texts needs class names and a template",
                found=f"{len(names)} names and {len(templates)} templates",
            )
        for template in templates:
            if template.count("{}") != 1:
                raise DataError(
                    "a template needs one place for the class name",
                    where=repr(template),
                    found=f"{template.count('{}')} times {{}}",
                    fix=f"write e.g. {TEMPLATE!r}",
                )
        words = [name.replace("_", " ").strip() for name in names]
        texts = [t.replace("{}", word) for word in words for t in templates]
        means = self.embed(texts).unflatten(0, (len(words), -1)).mean(1)
        # A mean of unit vectors is shorter than they are; CLIP's own code normalises it again.
        weight = self.scale * F.normalize(means, dim=-1)
        head = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.fill_(self.bias)
        return head


def _project_to_unit_length(output: object, projection: nn.Module | None) -> Tensor:
    vector = read_vector(output)
    if vector is None:
        raise BackboneError(
            "a tower returns no vector",
            found=type(output).__name__,
            fix="give a network that pools: one vector an input",
        )
    return F.normalize(vector if projection is None else projection(vector), dim=-1)


@torch.no_grad()
def prove(image: ImageTower, text: TextTower, pixels: Tensor, own: Callable[..., Tensor]) -> None:
    """The towers give the model's own logit of one image and one text.

    Args:
        image, text: The towers, in eval mode.
        pixels: One image.
        own: `(pixels, tokens) -> logits per image`, the whole model's.

    Raises:
        BackboneError: They do not.
    """
    if any(p.is_meta for p in (*image.parameters(), *text.parameters())):
        return  # shapes without weights: nothing can be proved, and nothing is answered
    tokens = text.tokenize([TEMPLATE.replace("{}", "cat")])
    theirs = own(pixels, tokens)
    ours = text.scale * image(pixels) @ text(**tokens).T + text.bias
    error = float((ours - theirs).abs().max())
    if not error <= SAME_LOGITS * max(1.0, abs(text.scale)):
        raise BackboneError(
            "the two towers of this model do not make up its logits",
            found=f"{float(ours):.4f} instead of {float(theirs):.4f}",
            fix="build ImageTower and TextTower of its parts by hand",
        )
