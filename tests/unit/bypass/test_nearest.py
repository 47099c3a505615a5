"""Nearest neighbours: votes by the formula, rows that are left out with their copies, and whole runs."""

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.data import Subset

import restuning
from awake import tiny_vit
from restuning import Bank, FitSettings, Host, Tuned, fit, load, methods, save, train
from restuning._errors import FormatError, TrainingError, TunerShapeError, UnknownNameError
from restuning.bypass import Nearest
from restuning.bypass.nearest import NEIGHBOURS, TEMPERATURES
from restuning.problems import MultiLabel, Regression, SingleLabel
from restuning.search.update import update
from restuning.sites import Features
from restuning.training.prepare import solve_tuned

WIDTH, CLASSES, ROWS = 6, 3, 40
HALF_TOLERANCE = 5e-3
"""Rows are kept in half precision, and small temperatures magnify what that rounds."""
EXACT = 1e-5
"""The same products in another order."""


def readout(state, pool=None, mask=None):
    return state[:, 0]


def draw_rows(rows=ROWS, seed=0):
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % CLASSES
    centres = torch.randn(CLASSES, WIDTH, generator=draw)
    return centres[labels] + torch.randn(rows, WIDTH, generator=draw), labels


def taps_of(x):
    return Features({"block.1": x[:, None]}, readout)


def solved(x, targets, problem=None):
    network = Nearest("block.1", WIDTH, CLASSES)
    network.problem = problem or SingleLabel()
    return network, network.solve([(taps_of(x), targets)])


def votes(asked, kept, columns, count, temperature):
    """One row at a time, in plain lines."""
    answers, effective = [], []
    for row in F.normalize(asked, dim=-1):
        cosines = F.normalize(kept, dim=-1) @ row
        near = cosines.argsort(descending=True)[:count]
        weights = (cosines[near] / temperature).softmax(0)
        answers.append(weights @ columns[near])
        effective.append(1 / weights.square().sum())
    return torch.stack(answers), torch.stack(effective)[:, None]


def test_answers_are_weighted_votes_of_the_nearest_rows():
    (x, labels), (asked, _) = draw_rows(), draw_rows(5, seed=1)
    network, _ = solved(x, labels)
    count, temperature = int(network.neighbours), float(network.temperature)
    assert count in NEIGHBOURS
    means, effective = votes(asked, x, F.one_hot(labels, CLASSES).float(), count, temperature)
    one_more = torch.bincount(labels).add(0.5) / (ROWS + 1.5)
    wanted = ((effective * means + one_more) / (effective + 1)).log()
    torch.testing.assert_close(
        network(taps_of(asked)), wanted, atol=HALF_TOLERANCE, rtol=HALF_TOLERANCE
    )
    assert torch.allclose(network(taps_of(asked)).exp().sum(1), torch.ones(5))


def test_numbers_are_weighted_means_and_labels_log_odds():
    (x, labels), (asked, _) = draw_rows(), draw_rows(5, seed=1)
    numbers = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(2))
    problem = Regression.of(numbers)
    network, _ = solved(x, numbers, problem)
    chosen = int(network.neighbours), float(network.temperature)
    means, _ = votes(asked, x, problem.standardise(numbers), *chosen)
    answers = network(taps_of(asked))
    torch.testing.assert_close(answers, means, atol=HALF_TOLERANCE, rtol=HALF_TOLERANCE)
    tags = F.one_hot(labels, CLASSES).float()
    tags[:, 2] = 0
    network, _ = solved(x, tags, MultiLabel())
    chances = network(taps_of(asked)).sigmoid()
    assert chances.isfinite().all()
    assert chances[:, 2].max() < 0.01


def test_rows_left_out_are_answered_by_all_others():
    x, labels = draw_rows()
    network, (answers, targets) = solved(x, labels)
    assert torch.equal(targets, labels)
    for row in (0, 7, 39):
        kept = torch.arange(ROWS) != row
        other = Nearest("block.1", WIDTH, CLASSES, rows=ROWS - 1)
        state = network.state_dict()
        for name in ("features", "targets"):
            state[name] = state[name][kept]
        other.load_state_dict(state)
        # What all rows say together is said with the row.
        other._middle = network._middle
        alone = other(taps_of(x[row : row + 1]))
        torch.testing.assert_close(
            answers[row : row + 1], alone, atol=HALF_TOLERANCE, rtol=HALF_TOLERANCE
        )


def test_neighbours_have_the_lowest_loss_of_rows_left_out():
    x, labels = draw_rows()
    network, (answers, _) = solved(x, labels)
    at, found = network._leave_out(None, ROWS)
    best = float(F.cross_entropy(answers, labels))
    for count in (1, 3, 20):
        for temperature in TEMPERATURES:
            near = found[0][:, :count], found[1][:, :count]
            other = F.cross_entropy(network._vote(near, temperature), labels[at])
            assert best <= float(other) + EXACT


def test_a_copy_of_a_row_does_not_answer_for_it():
    """Else on labels that mean nothing each row would find its own answer beside it."""
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(30, WIDTH, generator=draw).repeat(2, 1)
    labels = torch.randint(CLASSES, (30,), generator=draw).repeat(2)
    network = Nearest("block.1", WIDTH, CLASSES)
    network._keep([(taps_of(x), labels)])
    keys = torch.arange(30).repeat(2)
    _, (_, rows) = network._leave_out(keys, 60)
    own = torch.arange(60) % 30
    # Copies come last, where nobody else is left.
    assert (rows[:, :58] % 30 != own[:, None]).all()


def test_copies_take_no_share_of_the_votes_where_few_others_are_left():
    x, labels = draw_rows(6)
    network, _ = solved(x, F.one_hot(labels, CLASSES).float(), MultiLabel())
    network._keep([(taps_of(x), network.targets)])
    keys = torch.tensor([0, 0, 0, 0, 1, 1])
    _, found = network._leave_out(keys, 6)
    answers = network._vote(found, 1.0).sigmoid()
    # Of the first row the last two vote, and nobody else.
    near = found[0][:1, :2], found[1][:1, :2]
    torch.testing.assert_close(answers[:1], network._vote(near, 1.0).sigmoid())
    # Of nothing but copies all rows' frequencies are told.
    _, alone = network._leave_out(torch.zeros(6), 6)
    told = network._vote(alone, 1.0).sigmoid()
    torch.testing.assert_close(told, network._middle().expand(6, -1))


def test_a_row_of_no_number_is_refused_and_not_everybodys_nearest():
    x, labels = draw_rows()
    for wrong in (torch.nan, torch.inf):
        x[7, 2] = wrong
        with pytest.raises(TrainingError, match="row 7"):
            solved(x, labels)


def test_many_rows_are_compared_a_part_at_a_time(monkeypatch):
    (x, labels), (asked, _) = draw_rows(), draw_rows(5, seed=1)
    network, _ = solved(x, labels)
    whole = network(taps_of(asked))
    monkeypatch.setattr("restuning.bypass.nearest.COMPARED", 7)
    monkeypatch.setattr("restuning.bypass.nearest.ASKED", 2)
    torch.testing.assert_close(network(taps_of(asked)), whole, atol=EXACT, rtol=EXACT)
    again, _ = solved(x, labels)
    assert int(again.neighbours) == int(network.neighbours)


def test_what_cannot_be_answered_is_refused():
    x, labels = draw_rows()
    with pytest.raises(TrainingError, match="before there were any"):
        Nearest("block.1", WIDTH, CLASSES)(taps_of(x))
    with pytest.raises(TunerShapeError, match="1 rows"):
        solved(x[:1], labels[:1])
    state = solved(x, labels)[0].state_dict()
    with pytest.raises(RuntimeError, match="a class beyond"):
        Nearest("block.1", WIDTH, 2, rows=ROWS).load_state_dict(state)


@pytest.fixture(scope="module")
def host():
    return Host(tiny_vit(), torch.zeros(1, 3, 32, 32))


def pairs(rows=24):
    images = torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    return [(image, number % CLASSES) for number, image in enumerate(images)]


def test_a_run_keeps_its_rows_and_a_finished_one_is_taken_up(host, tmp_path):
    data, settings = pairs(), FitSettings(epochs=1, batch_size=6)
    made = []
    for _ in range(2):
        task = methods.build("knn", host, num_classes=CLASSES)
        result = fit(
            Tuned(host, task),
            data,
            data[:6],
            settings=settings,
            out=tmp_path / "run",
            progress=False,
        )
        assert result.steps == 0
        made.append(task)
    assert made[0].side.rows == len(data)
    for name, tensor in made[0].state_dict().items():
        assert torch.equal(tensor, made[1].state_dict()[name])
    assert not (tmp_path / "run" / "curves.png").exists()
    save(made[0], host, tmp_path / "x.task", backbone="none")
    again = load(tmp_path / "x.task", host)
    assert again.side.describe_found() == made[0].side.describe_found()
    other = methods.build("linear", host, num_classes=2)
    bank = Bank({"near": again, "other": other})
    images = torch.stack([image for image, _ in data[:5]])
    answers = bank(host.features(images, keep=bank.keep))["near"]
    torch.testing.assert_close(answers, Tuned(host, again)(images), atol=EXACT, rtol=EXACT)


def test_it_reads_the_feature_that_a_linear_probe_reads(host):
    data = pairs()
    for pool in ("cls", "mean"):
        task = methods.build("knn", host, num_classes=CLASSES, pool=pool)
        probe = methods.build("linear", host, num_classes=CLASSES, pool=pool)
        solve_tuned(Tuned(host, task), data)
        probe.head = None
        images = torch.stack([image for image, _ in data])
        wanted = F.normalize(Tuned(host, probe)(images), dim=-1)
        torch.testing.assert_close(
            task.side.features.float(), wanted, atol=HALF_TOLERANCE, rtol=HALF_TOLERANCE
        )


def test_it_takes_no_head_and_no_tokens(host):
    with pytest.raises(UnknownNameError, match="cannot start from a head"):
        methods.build("knn", host, head=torch.nn.Linear(host.dim, CLASSES))
    with pytest.raises(Exception, match="answers once an input"):
        methods.build("knn", host, num_classes=CLASSES, pool="all")


def test_it_trains_from_the_store_of_a_linear_probe_and_is_not_updated(tmp_path):
    lines = []
    data = few_digits()
    for method in ("linear", "knn"):
        run = train(
            data, method=method, epochs=1, out=tmp_path / method, store=tmp_path, log=lines.append
        )
    assert sum("building" in line for line in lines) == 1
    assert any("kept with the task" in line for line in lines)
    assert run.metrics["temperature"] != 1
    with pytest.raises(FormatError, match="only a task that is solved in closed form"):
        update(run.task_folder, data)


def few_digits():
    """A few digits of each split."""
    data = restuning.load_data("digits", restuning.load_backbone("restuning-tiny"))
    few = {name: Subset(getattr(data, name), range(30)) for name in ("train", "val", "test")}
    return copy.copy(data).with_splits(**few)
