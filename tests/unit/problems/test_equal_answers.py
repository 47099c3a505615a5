"""Two answers are equal only if they say the same."""

import pytest
import torch

from restuning.problems import Depth, Embedding, MultiLabel, Regression, Segmentation, SingleLabel

PROBLEMS = [
    (SingleLabel(), (), 3),
    (MultiLabel(), (), 3),
    (Regression([0.0], [1.0]), (), 1),
    (Embedding(3, 3), (), 3),
    (Segmentation(), (2, 2), 3),
    (Depth(1.0, 1.0), (2, 2), 1),
]


@pytest.mark.parametrize(("problem", "places", "outputs"), PROBLEMS, ids=lambda p: f"{p}"[:12])
def test_answers_that_say_other_things_are_not_equal(problem, places, outputs):
    drawn = torch.Generator().manual_seed(0)
    labels = ["ant", "bee", "cat"][:outputs]
    said = []
    for _ in range(2):
        logits = torch.randn(*places, outputs, generator=drawn)
        answer = problem.answer(problem.values(logits), logits, labels)
        said.append(problem.on_image(answer, (8, 8), (0, 0, 8, 8)))
    first, second = said
    assert first == first
    assert first != second
