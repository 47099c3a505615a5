"""An ensemble that answers at every place: one pass, and weights by images that a part was not shown alone."""

import pytest
import torch
from torch.utils.data import TensorDataset

from awake import tiny_vit, wake
from restuning import FitSettings, Host, Tuned, fit, load, methods, save
from restuning._errors import NoSitesError, TrainingError
from restuning.bypass import GridRidge, ensemble
from restuning.bypass.ensemble import SHARES
from restuning.problems import UNLABELLED, Segmentation
from restuning.training.fit import refuse_in_several
from restuning.training.prepare import conclude_tuned, prepare_tuned

IMAGES, SIDE, CLASSES = 18, 32, 3
SAME_TOLERANCE = 1e-4
"""Products of other batch sizes round elsewhere, and logits are tens."""


@pytest.fixture(scope="module")
def host():
    return Host(tiny_vit(), torch.zeros(1, 3, SIDE, SIDE))


@pytest.fixture(scope="module")
def scenes():
    """Patches whose shade says their class, with noise."""
    draw = torch.Generator().manual_seed(0)
    classes = torch.randint(CLASSES, (IMAGES, 4, 4), generator=draw)
    masks = classes.repeat_interleave(8, 1).repeat_interleave(8, 2)
    images = masks[:, None].float().expand(-1, 3, -1, -1) - 1
    images = images + torch.randn(IMAGES, 3, SIDE, SIDE, generator=draw) / 2
    masks[:, 30:] = UNLABELLED
    return TensorDataset(images, masks.to(torch.uint8))


def made(host, seed=0):
    torch.manual_seed(seed)
    task = methods.build("ensemble", host, CLASSES, pool="grid")
    task.problem = Segmentation()
    return task


def test_its_parts_answer_on_one_grid_and_it_is_saved_and_loaded(host, scenes, tmp_path):
    task = made(host)
    tuned = Tuned(host, task)
    fit(tuned, scenes, settings=FitSettings(epochs=1, batch_size=6, lr=5e-3), out=tmp_path / "run")
    images, masks = scenes.tensors
    logits = tuned.eval()(images)
    # Patches of 8 pixels, each in 4 by 4 parts.
    assert logits.shape == (IMAGES, 16, 16, CLASSES)
    assert Segmentation().measure(logits, masks) > 0.6
    closed, *networks = task.side.parts
    assert isinstance(closed, GridRidge)
    assert [network.pool.factor for network in networks] == [4, 4]
    again = load(save(task, host, tmp_path / "a.task"), host)
    torch.testing.assert_close(Tuned(host, again).eval()(images), logits)


def test_weights_are_found_on_answers_of_parts_to_images_that_they_have_not_seen(
    host, scenes, monkeypatch
):
    task = made(host)
    tuned = Tuned(host, task)
    train, collate = prepare_tuned(tuned, scenes)
    side, taken = task.side, []
    generator = torch.Generator().manual_seed(3)
    for head in list(side.heads)[1:]:
        head.weight.data.copy_(torch.randn(head.weight.shape, generator=generator))

    def look(logits, labels, problem, weights):
        taken.append((logits, labels))
        return torch.tensor([0.7, 0.3])

    monkeypatch.setattr(ensemble, "find_weights", look)
    conclude_tuned(tuned, train, collate)
    ((logits, labels),) = taken
    assert side.weight.tolist() == pytest.approx([0.7, 0.15, 0.15])
    # A third of the images, for two networks of six shares.
    share = train.beside[side.name][:, 0].long()
    held = torch.cat([(share == place).nonzero()[:, 0] for place in range(2)])
    assert len(held) == IMAGES // SHARES * 2
    images, masks = (each[held] for each in scenes.tensors)
    taps = host.features(images, keep=task.needs(host.readout_rule))
    closed, *networks = side.parts
    of_closed = train.beside[closed.name][held]
    wanted = [closed({**taps, closed.name: of_closed})]
    shown = torch.stack([side._answer(k, taps, host.readout, "grid") for k in (1, 2)])
    # Each network was asked about the share that it was not shown.
    wanted.append(torch.stack([shown[int(share[row]), n] for n, row in enumerate(held)]))
    chosen = [Segmentation().choices(each, masks) for each in wanted]
    count = len(labels)
    assert count == len(chosen[0][1]) // -(-len(chosen[0][1]) // (256 * len(held)))
    torch.testing.assert_close(
        logits, torch.stack([each[0] for each in chosen]), rtol=SAME_TOLERANCE, atol=SAME_TOLERANCE
    )
    assert torch.equal(labels, chosen[0][1])


def test_what_is_answered_to_a_left_out_image_hangs_on_no_mask_of_its_share(host, scenes):
    """Even though one of other masks teaches the whole something else."""
    images, masks = scenes.tensors
    found = []
    for spoiled in (False, True):
        task = made(host)
        closed = task.side.parts[0]
        own = torch.arange(IMAGES) % 3 == 1
        given = masks.clone()
        if spoiled:
            given[own] = torch.where(given[own] == UNLABELLED, UNLABELLED, (given[own] + 1) % 3)
        taps = host.features(images, keep=closed.needs("grid"))
        beside = closed.prepare([(taps, given)])
        assert beside[closed.name][:, 0].tolist() == [n % 3 for n in range(IMAGES)]
        rows = {name: tap[own] for name, tap in taps.items()}
        asked = closed({**rows, closed.name: beside[closed.name][own]}), closed(rows)
        found.append([Segmentation().draw(each, masks[own]) for each in asked])
    (left, whole), (left_spoiled, whole_spoiled) = found
    assert not torch.equal(whole, whole_spoiled)
    assert float((left == left_spoiled).float().mean()) > 0.9


def test_what_was_not_prepared_is_not_answered_as_if_it_had_been_left_out(host, scenes):
    closed = made(host).side.parts[0]
    taps = host.features(scenes.tensors[0][:2], keep=closed.needs("grid"))
    with pytest.raises(TrainingError, match="nothing was solved without them"):
        closed({**taps, closed.name: torch.zeros(2, 1)})


def test_maps_are_refused_in_words():
    from test_grid_ridge import Convolutions

    host = Host(wake(Convolutions()), torch.zeros(1, 3, 64, 64))
    with pytest.raises(NoSitesError, match="(?s)streams of tokens.*ensemble.*ridge, linear"):
        methods.build("ensemble", host, num_classes=CLASSES, pool="grid")


@pytest.mark.parametrize("pool", ["grid", "cls"])
def test_several_processes_which_would_train_another_one_are_refused(
    host, scenes, tmp_path, monkeypatch, pool
):
    task = methods.build("ensemble", host, CLASSES, pool=pool)
    # `restuning.training.fit` is the function.
    monkeypatch.setitem(refuse_in_several.__globals__, "count_processes", lambda: 2)
    with pytest.raises(TrainingError, match="deals the rows of a batch") as told:
        fit(Tuned(host, task), scenes, settings=FitSettings(epochs=1), out=tmp_path / "run")
    assert "restuning cache" in told.value.fix and "2 processes" in told.value.found
    assert not (tmp_path / "run").exists()
    # What deals nothing is not.
    refuse_in_several(methods.build("ridge", host, CLASSES, pool=pool))
