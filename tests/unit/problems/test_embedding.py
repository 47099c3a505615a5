"""Embeddings: figures of retrieval, prototypes, and a run whose answers are vectors."""

import json

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

import restuning
from commands import restuning as command
from restuning._errors import DataError, FormatError, TrainingError
from restuning.data import load_columns
from restuning.problems import Embedding
from restuning.problems.answers import VectorAnswer, find_cells
from restuning.problems.meters import read_meters
from restuning.problems.prototypes import find_prototypes
from restuning.problems.retrieval import mean_average_precision, recall_at
from restuning.serve.web.json_answers import prediction_from_json, prediction_to_json
from restuning.training import evaluate_task

EXACT = 1e-12
"""In double precision."""
METRIC_TOLERANCE = 1e-6
"""torchmetrics sums in single precision."""


def draw(rows=30, width=4, classes=3):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (rows,), generator=generator)
    return torch.randn(rows, width, generator=generator) + 0.7 * F.one_hot(labels, width), labels


@pytest.mark.parametrize("queries", [7, 256])
def test_figures_are_those_of_torchmetrics_where_each_query_leaves_itself_out(queries, monkeypatch):
    from torchmetrics.retrieval import RetrievalHitRate, RetrievalMAP

    monkeypatch.setattr("restuning.problems.retrieval.QUERIES", queries)
    vectors, labels = draw()
    # A class of one: nobody answers it.
    labels[4] = 3
    cosines = F.normalize(vectors, dim=1) @ F.normalize(vectors, dim=1).T
    pairs = ~torch.eye(len(labels), dtype=torch.bool)
    given = (
        # torchmetrics takes what is not above zero for not found.
        cosines[pairs] + 2,
        (labels[:, None] == labels)[pairs],
        torch.arange(len(labels))[:, None].expand_as(pairs)[pairs],
    )
    for count in (1, 5):
        meter = RetrievalHitRate(empty_target_action="skip", top_k=count)
        found = recall_at(vectors, labels, count)
        assert found == pytest.approx(
            float(meter(*given[:2], indexes=given[2])), abs=METRIC_TOLERANCE
        )
    meter = RetrievalMAP(empty_target_action="skip")
    wanted = float(meter(*given[:2], indexes=given[2]))
    assert mean_average_precision(vectors, labels) == pytest.approx(wanted, abs=METRIC_TOLERANCE)


def test_of_equally_near_rows_the_first_is_the_nearer():
    """Whatever the number of rows, of which `topk` takes one or another."""
    for count in (5, 40, 600):
        vectors, labels = torch.ones(count, 4), torch.full((count,), 7)
        # Of equal vectors the first row is nearest to all others, and the second to the first.
        labels[:2] = torch.tensor([1, 2])
        labels[-1] = 1
        # Only the last one's nearest, the first row, is of its class; the rest find that or the second one first.
        assert recall_at(vectors, labels, 1) == pytest.approx(1 / (count - 1))


def test_without_two_of_a_class_there_is_no_figure():
    made = Embedding(3, 2)
    vectors, labels = torch.randn(3, 2), torch.arange(3)
    assert made.measure(vectors, labels) is None
    meters = made.metrics(2)
    meters.update(vectors, labels)
    assert set(read_meters(meters).values()) == {None}


@pytest.mark.parametrize(("classes", "dimensions"), [(1, 2), (2, 1), (5, 4), (5, 9)])
def test_prototypes_are_a_regular_simplex_where_there_is_room(classes, dimensions):
    found = find_prototypes(classes, dimensions)
    assert found.shape == (classes, dimensions)
    wanted = torch.full((classes, classes), -1 / max(1, classes - 1), dtype=torch.float64)
    wanted.fill_diagonal_(1)
    torch.testing.assert_close(found @ found.T, wanted, atol=EXACT, rtol=0)


def test_in_few_dimensions_prototypes_are_further_apart_than_drawn_ones():
    found = find_prototypes(100, 16)
    drawn = F.normalize(torch.randn(100, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    nearest = [float((x @ x.T).fill_diagonal_(-1).max()) for x in (found, drawn)]
    assert nearest[0] < nearest[1] - 0.2
    torch.testing.assert_close(found.norm(dim=1), torch.ones(100, dtype=torch.float64))
    # On a circle the best is known: 8 directions, 45 degrees apart; some end 41 apart.
    circle = find_prototypes(8, 2)
    assert float((circle @ circle.T).fill_diagonal_(-1).max()) == pytest.approx(0.5**0.5, abs=0.05)


def test_the_loss_does_not_hang_on_lengths_and_is_least_at_the_prototypes():
    made, labels = Embedding(5, 4), torch.arange(5)
    right = made.columns(labels, 4).float()
    assert float(made.loss(right, labels)) < float(made.loss(right.flip(0), labels))
    long = made.loss(1000 * right, labels)
    torch.testing.assert_close(made.loss(2000 * right, labels), long)
    assert torch.equal(made.from_columns(made.columns(labels, 4)), labels)
    nothing = torch.zeros(5, 4, requires_grad=True)
    made.loss(nothing, labels).backward()
    assert nothing.grad.abs().max() < 1000


def test_what_does_not_fit_is_refused():
    with pytest.raises(FormatError, match="3 outputs"):
        Embedding(5, 4).check_outputs(3)
    with pytest.raises(TrainingError, match="outside the task's classes"):
        Embedding(5, 4).check_targets(torch.tensor([5]), 4)
    backbone = restuning.load_backbone("restuning-tiny")
    with pytest.raises(DataError, match="only an embedding has dimensions"):
        restuning.load_data("digits", backbone, dimensions=4)
    with pytest.raises(DataError, match="no dimensions"):
        restuning.load_data("digits", backbone, problem="embedding", dimensions=0)
    numbers = {"image": [Image.new("RGB", (8, 8))] * 9, "label": [0.5 + n for n in range(9)]}
    assert load_columns(numbers, backbone, restuning.data.DataOptions())
    with pytest.raises(DataError, match="one class an input"):
        restuning.load_data(numbers, backbone, problem="embedding")


def test_a_column_of_a_table_may_be_asked_for_and_is_tested_as_it_was_trained(tmp_path):
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(255, (30, 8, 8, 3), generator=draw, dtype=torch.uint8).numpy()
    table = {"image": list(pixels), "kind": list("abc" * 10), "size": [n / 3 for n in range(30)]}
    how = {"problem": "embedding", "label": ["kind"], "store": tmp_path / "s"}
    run = restuning.train(table, method="ridge", out=tmp_path / "run", **how)["kind"]
    assert run.task.problem == Embedding(3, 3)
    told = evaluate_task(
        restuning.Predictor.load(tmp_path / "run"), table, restuning.data.DataOptions(label="kind")
    )
    assert told["recall_at_1"] == pytest.approx(run.test_score)


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shades"
    generator = torch.Generator().manual_seed(0)
    for split, rows in (("train", 8), ("val", 4), ("test", 4)):
        for name, shade in (("bright", 200), ("dark", 50), ("grey", 120)):
            place = folder / split / name
            place.mkdir(parents=True)
            for row in range(rows):
                pixels = shade + 20 * torch.randn(16, 16, 3, generator=generator)
                Image.fromarray(pixels.clamp(0, 255).byte().numpy()).save(place / f"{row}.png")
    return folder


@pytest.mark.parametrize("method", ["linear", "ridge"])
def test_a_run_answers_with_vectors_and_tells_the_plain_feature_s_figures(method, shades, tmp_path):
    lines = []
    how = {"problem": "embedding", "dimensions": 5, "epochs": 2, "store": tmp_path / "s"}
    run = restuning.train(shades, method=method, out=tmp_path / "run", log=lines.append, **how)
    assert set(run.metrics["test"]) == {"recall_at_1", "recall_at_5", "mean_average_precision"}
    assert run.metric == "recall_at_1"
    # As the vectors that are embedded say it.
    vectors, ids = restuning.embed(shades, options=restuning.features.StoreOptions(tmp_path / "s"))
    test = [n for n, each in enumerate(ids) if each.startswith("test/")]
    labels = torch.tensor([("bright", "dark", "grey").index(ids[n].split("/")[1]) for n in test])
    plain = recall_at(torch.from_numpy(vectors[test]), labels, 1)
    assert run.metrics["test_of_feature"]["recall_at_1"] == pytest.approx(plain)
    assert any("feature as it is: recall at 1" in line for line in lines)
    predictor = restuning.Predictor.load(run.folder)
    answers = predictor(shades / "test")
    found = torch.stack([answer.vector for answer in answers])
    assert found.shape == (12, 5)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(12))
    assert recall_at(found, labels, 1) == pytest.approx(run.test_score)
    assert "print(answer.vector)" in (run.task_folder / "README.md").read_text()
    through_json = prediction_from_json(prediction_to_json(answers[0]["shades"], 1), ())
    assert torch.equal(through_json.vector, answers[0].vector)
    told = evaluate_task(predictor, shades)
    assert told["recall_at_1"] == pytest.approx(run.test_score)


def test_the_command_line_writes_vectors(shades, tmp_path):
    given = ("--problem", "embedding", "--method", "ridge", "--store", tmp_path / "s")
    done = command("train", shades, *given, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metric"] == "recall_at_1"
    image = shades / "test" / "dark" / "0.png"
    done = command("predict", image, "--task", tmp_path / "run", "--json")
    (said,) = json.loads(done.stdout)["predictions"]
    # As many as there are classes.
    assert len(said["vector"]) == 3
    done = command("predict", image, "--task", tmp_path / "run")
    assert "(3 numbers)" in done.stdout


def test_a_file_of_answers_has_all_of_a_vector():
    vector = F.normalize(torch.arange(1.0, 6.0), dim=0)
    cells = find_cells(VectorAnswer(vector))
    assert list(cells) == [f"answer {n}" for n in range(1, 6)]
    assert torch.equal(torch.tensor(list(cells.values())), vector)


def test_a_judge_of_equal_vectors_tells_one_story():
    """All cosines are equal: what is wrong is what the rows name as nearest, and not nothing."""
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    judge = Embedding(4, 4).judge(list("abcd"))
    judge.update(torch.ones(7, 4), labels)
    judged = judge.conclude()
    named = [row["true"] != row["class of nearest"] for row in judged.rows]
    assert judged.wrong == sum(named[:6])
    assert judged.wrong > 0
    shares = judged.breakdown.columns["recall at 1"]
    assert shares[:3] == [1 - sum(named[2 * k : 2 * k + 2]) / 2 for k in range(3)]
    told = {each.row: each.told for each in judged.worst}
    assert all(told[n] == f"near {judged.rows[n]['class of nearest']}" for n in told)


def test_prototypes_that_were_first_asked_for_while_answering_are_trained_with():
    find_prototypes.cache_clear()
    with torch.inference_mode():
        find_prototypes(3, 4)
    logits = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    Embedding(3, 4).loss(logits, torch.tensor([0, 2])).backward()
    assert logits.grad.abs().sum() > 0
