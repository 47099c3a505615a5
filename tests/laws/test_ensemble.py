"""An ensemble: no network sees its share, what a network says of that share decides what it weighs."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.data import ConcatDataset, TensorDataset

from awake import tiny_vit
from restuning import FitSettings, Host, Tuned, load, methods, save
from restuning._errors import TunerShapeError
from restuning.bypass import Ensemble
from restuning.bypass.ensemble import SHARES
from restuning.bypass.stacking import find_weights
from restuning.training import fit, fit_until
from restuning.training.evaluate import collect_logits
from restuning.training.prepare import conclude_tuned, prepare_tuned

ROWS, CLASSES = 60, 3
SAME_TOLERANCE = 1e-5
"""Products of other batch sizes round elsewhere."""
GRID_TOLERANCE = 1e-4
"""Of a loss, between the minimum that is found and the best of a grid of weights."""
SETTINGS = FitSettings(epochs=2, batch_size=16, lr=5e-3, seed=0, checkpoint_every=1)


class KilledError(Exception):
    """As a run ends that is killed."""


@pytest.fixture(scope="module")
def host():
    return Host(tiny_vit(), torch.zeros(1, 3, 32, 32))


@pytest.fixture(scope="module")
def shades():
    """Three shades of noise: easy to tell apart, and every fifth label is wrong, so that nobody is sure."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(ROWS) % CLASSES
    images = torch.randn(ROWS, 3, 32, 32, generator=draw) / 4 + labels.view(-1, 1, 1, 1) - 1
    labels[::5] = (labels[::5] + 1) % CLASSES
    return TensorDataset(images, labels)


def made(host, seed=0):
    torch.manual_seed(seed)
    return methods.build("ensemble", host, CLASSES)


def heard(side, monkeypatch):
    """By number of a part: the shares of the rows that it was asked about."""
    asked = {number: [] for number in range(len(side.parts))}
    answer = Ensemble._answer

    def listen(self, number, taps, *lent):
        asked[number].append(taps[self.name][:, 0].long())
        return answer(self, number, taps, *lent)

    monkeypatch.setattr(Ensemble, "_answer", listen)
    return asked


def test_while_it_trains_a_network_is_not_shown_its_share_and_together_they_see_every_row(
    host, shades, monkeypatch
):
    task = made(host)
    tuned = Tuned(host, task)
    train, collate = prepare_tuned(tuned, shades)
    asked = heard(task.side, monkeypatch)
    task.train()
    for _ in range(3):
        inputs, _ = collate([train[n] for n in range(ROWS)])
        tuned(**inputs)
    closed, *networks = (torch.cat(each) if each else torch.empty(0) for each in asked.values())
    assert not len(closed)
    assert [len(shares) for shares in networks] == [3 * ROWS // 2] * 2
    for place, shares in enumerate(networks):
        assert set(shares.tolist()) == set(range(SHARES)) - {place}


@pytest.mark.parametrize("networks", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 5, 16, 64])
def test_rows_are_dealt_once_and_never_to_who_may_not_see_them(host, rows, networks):
    closed, network, _ = made(host).side.parts
    width = network.widen(torch.nn.Linear(host.dim, CLASSES)).in_features
    parts = [closed, *(copy.deepcopy(network) for _ in range(networks))]
    side = Ensemble(parts, [None] + [width] * networks, CLASSES)
    generator = torch.Generator().manual_seed(rows)
    missed = 0
    for _ in range(20):
        share = torch.randint(SHARES, (rows,), generator=generator)
        dealt, shown = side._deal(share)
        assert dealt.shape == shown.shape == (networks, -(-rows // networks))
        seen = [dealt[n][shown[n]].tolist() for n in range(networks)]
        for number, own in enumerate(seen):
            assert all(share[row] != number for row in own)
        together = sum(seen, [])
        assert len(set(together)) == len(together)
        missed += rows - len(together)
    # One network alone is never shown its share; of several another one takes nearly all of it.
    assert missed == 0 or networks == 1 or missed < 20 * rows / SHARES / 2


@pytest.mark.parametrize("rows", [1, 3])
def test_of_many_small_batches_every_network_is_dealt_its_part(host, rows):
    """As of a batch in pieces, or over processes."""
    side, draw = made(host).side, torch.Generator().manual_seed(0)
    torch.manual_seed(1)
    seen = [torch.zeros(SHARES, dtype=torch.long) for _ in range(2)]
    for _ in range(600):
        share = torch.randint(SHARES, (rows,), generator=draw)
        for number, (dealt, shown) in enumerate(zip(*side._deal(share), strict=True)):
            seen[number] += share[dealt[shown]].bincount(minlength=SHARES)
    counts = [int(each.sum()) for each in seen]
    assert max(counts) < 1.2 * min(counts)
    for number, each in enumerate(seen):
        assert {n for n, count in enumerate(each.tolist()) if count} == set(range(SHARES)) - {
            number
        }


def test_the_same_input_twice_is_of_one_share(host, shades):
    twice = ConcatDataset([shades, shades])
    side = made(host).side
    train, _ = prepare_tuned(Tuned(host, made(host)), twice)
    share = train.beside[side.name][:, 0]
    assert torch.equal(share[:ROWS], share[ROWS:])


def test_a_run_that_is_ended_early_is_weighed_as_well(host, shades, tmp_path):
    task = made(host)
    before = task.side.weight.clone()
    fit_until(
        lambda history: True, Tuned(host, task), shades, shades, settings=SETTINGS, out=tmp_path
    )
    assert not torch.equal(task.side.weight, before)


def test_its_head_is_not_trained_nor_counted_whether_it_is_built_or_loaded(host, tmp_path):
    task = made(host)
    trained = sum(p.numel() for p in task.side.parameters()) + task.side.solved_parameters
    with torch.no_grad():
        task.side.parts[0].weight.normal_()
    loaded = load(save(task, host, tmp_path / "a.task"), host)
    for each in (task, loaded):
        assert not any(p.requires_grad for p in each.head.parameters())
        assert each.trainable_parameters() == each.tuner_parameters() == trained


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_every_parameter_has_a_gradient_however_small_the_batch(host, shades, rows):
    """Processes that train together wait for all of them."""
    task = made(host)
    tuned = Tuned(host, task)
    train, collate = prepare_tuned(tuned, shades)
    inputs, labels = collate([train[n] for n in range(rows)])
    F.cross_entropy(tuned.train()(**inputs), labels).backward()
    trained = {n: p for n, p in task.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    assert not any(p.requires_grad for p in task.head.parameters())


def test_rows_of_every_share_are_about_as_many(host, shades):
    train, _ = prepare_tuned(Tuned(host, made(host)), shades)
    shares = train.beside[made(host).side.name][:, 0].long()
    assert shares.bincount(minlength=SHARES).tolist() == [ROWS // SHARES] * SHARES


def test_trained_it_weighs_its_parts_and_a_run_that_ended_before_that_goes_on_as_a_whole_one(
    host, shades, tmp_path, monkeypatch
):
    whole, halved = made(host), made(host)
    before = whole.side.weight.clone()
    fit(Tuned(host, whole), shades, shades, settings=SETTINGS, out=tmp_path / "whole")
    assert not torch.equal(whole.side.weight, before)

    def die(*args):
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(Ensemble, "conclude", die)
        fit(Tuned(host, halved), shades, shades, settings=SETTINGS, out=tmp_path / "part")
    again = made(host, seed=1)
    fit(Tuned(host, again), shades, shades, settings=SETTINGS, out=tmp_path / "part")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_with_a_running_mean_the_weights_are_those_of_the_mean(host, shades, tmp_path):
    task = made(host)
    before = task.side.weight.clone()
    tuned = Tuned(host, task)
    fit(tuned, shades, shades, settings=replace(SETTINGS, ema=0.5), out=tmp_path)
    weighed = task.side.weight.clone()
    assert not torch.equal(weighed, before)
    train, collate = prepare_tuned(tuned, shades)
    conclude_tuned(tuned, train, collate)
    torch.testing.assert_close(task.side.weight, weighed, atol=1e-4, rtol=1e-4)


def test_while_it_prepares_rows_are_read_once(host, shades, monkeypatch):
    """Live each reading is a pass of the backbone."""
    seen = []
    forward = Host.features

    def count(self, x, *args, **kwargs):
        seen.append(len(x))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(Host, "features", count)
    prepare_tuned(Tuned(host, made(host)), shades)
    assert sum(seen) == ROWS


def test_labels_that_say_nothing_are_not_learned_by_heart(host, tmp_path):
    """Networks fit them; rows left out tell, and the answer is no surer than it should be."""
    draw = torch.Generator().manual_seed(1)
    rows = TensorDataset(
        torch.randn(48, 3, 32, 32, generator=draw), torch.randint(2, (48,), generator=draw)
    )
    task = made(host)
    settings = FitSettings(epochs=8, batch_size=16, lr=1e-2, seed=0)
    fit(Tuned(host, task), rows, settings=settings, out=tmp_path)
    new = TensorDataset(
        torch.randn(48, 3, 32, 32, generator=draw), torch.randint(2, (48,), generator=draw)
    )
    logits, labels = collect_logits(Tuned(host, task).eval(), new, 16)
    chance = F.cross_entropy(torch.zeros_like(logits), labels)
    # A third class was never seen, so that chance among two is less than among three.
    assert F.cross_entropy(logits, labels) < 1.1 * chance


def test_weights_have_the_lowest_loss_of_a_grid_of_them():
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (300,), generator=draw)
    truth = F.one_hot(labels, 4).float()
    noise = torch.randn(2, 300, 4, generator=draw)
    logits = torch.stack([2 * truth + noise[0], truth + 2 * noise[1]])

    def loss(weights):
        total = torch.einsum("m,mnc->nc", torch.tensor(weights), logits)
        shrink = sum((w - 0.5) ** 2 for w in weights) / 300
        return float(F.cross_entropy(total, labels)) + shrink

    found = find_weights(logits, labels).tolist()
    grid = [(a / 20, b / 20) for a in range(41) for b in range(41)]
    assert loss(found) <= min(map(loss, grid)) + GRID_TOLERANCE
    assert found[0] > found[1] >= 0


def test_a_part_that_says_nothing_weighs_next_to_nothing():
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (300,), generator=draw)
    logits = torch.stack(
        [4 * F.one_hot(labels, 4).float(), 10 * torch.randn(300, 4, generator=draw)]
    )
    right, wrong = find_weights(logits, labels).tolist()
    assert wrong < right / 50


def test_one_row_does_not_decide():
    """Any weight, however large, would fit it better."""
    logits = torch.tensor([[[9.0, 0.0]], [[0.0, 9.0]]])
    assert find_weights(logits, torch.tensor([0])).max() < 2


def test_networks_of_one_form_weigh_alike(host):
    side = made(host).side
    assert side.weight.tolist() == [1 / 2, 1 / 4, 1 / 4]


def test_a_task_of_it_answers_as_its_parts_weighed(host):
    task = made(host)
    side = task.side.eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in (side.parts[0].weight, *(head.weight for head in list(side.heads)[1:])):
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
    taps = host.features(torch.randn(4, 3, 32, 32), keep=task.needs(host.readout_rule))
    parts = torch.stack([side._answer(k, taps, host.readout, None) for k in range(3)])
    torch.testing.assert_close(
        task(taps, host.readout),
        torch.einsum("k,kbc->bc", side.weight, parts),
        atol=SAME_TOLERANCE,
        rtol=SAME_TOLERANCE,
    )


def test_parts_that_do_not_belong_together_are_refused(host):
    closed, one, _ = made(host).side.parts
    width = one.widen(torch.nn.Linear(host.dim, CLASSES)).in_features
    for parts, widths in (
        ([closed], [None]),
        ([closed, one], [None, None]),
        ([one], []),
        ([], []),
    ):
        with pytest.raises(TunerShapeError, match="ensemble"):
            Ensemble(parts, widths, CLASSES)
    with pytest.raises(TunerShapeError, match="prepare one thing"):
        Ensemble([closed, closed, one], [None, None, width], CLASSES)
