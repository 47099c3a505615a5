"""The example that a forecast runs is of a batch, also where there are fewer inputs than a batch has."""

import pytest
import torch

from restuning.forecast import example_of

SIZES = (1, 3, 64)


def collate(samples):
    longest = max(len(x) for x, _ in samples)
    rows = torch.stack([torch.nn.functional.pad(x, (0, longest - len(x))) for x, _ in samples])
    return {"input_values": rows}, torch.tensor([y for _, y in samples])


@pytest.mark.parametrize("size", SIZES)
def test_an_example_is_as_long_as_the_longest_of_a_batch_or_of_all_there_are(size):
    train = [(torch.ones(n), 0) for n in (2, 5, 3)]
    example = example_of(train, collate, size)
    assert example["input_values"].shape == (1, max((2, 5, 3)[: min(size, 3)]))
