"""What is answered is the first of the most probable, also where others are as probable."""

import pytest
import torch

from restuning.problems import MultiLabel, SingleLabel, TagsAnswer

LABELS = [f"label {n}" for n in range(40)]


def of_equals(seed, kind):
    """Logits of which several are the largest, in words or once they are probabilities."""
    draw = torch.Generator().manual_seed(seed)
    if kind == "coarse":
        # As of a backbone in half precision.
        return torch.randn(40, generator=draw).mul(4).round() / 4
    if kind == "saturated":
        # Their sigmoids are all 1 in single precision.
        return 20 + torch.rand(40, generator=draw)
    # Apart by less than probabilities in single precision can tell.
    return 1e-9 * torch.rand(40, generator=draw)


@pytest.mark.parametrize("problem", [SingleLabel(), MultiLabel()], ids=lambda p: p.kind)
@pytest.mark.parametrize("kind", ["coarse", "saturated", "near"])
def test_the_answer_is_the_first_of_the_most_probable(problem, kind):
    for seed in range(20):
        logits = of_equals(seed, kind)
        said = problem.answer(problem.values(logits), logits, LABELS)
        answered = (
            [tag.label for tag in said.tags] if isinstance(said, TagsAnswer) else [said.label]
        )
        for count in (1, 3, 40, 50):
            told = said.top(count)
            assert [c.label for c in told][: len(answered)] == answered[:count]
            assert len(told) == len({c.label for c in told}) == min(count, 40)
            chances = [c.probability for c in told]
            assert chances == sorted(chances, reverse=True)
            assert all(c.probability == said.probabilities[LABELS.index(c.label)] for c in told)
        # Of those that are not answered the first of equals first.
        others = [LABELS.index(c.label) for c in said.top(40) if c.label not in answered]
        wanted = said.probabilities.argsort(descending=True, stable=True).tolist()
        assert others == [n for n in wanted if LABELS[n] not in answered]
