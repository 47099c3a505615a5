"""Text from csv to prediction, through the command line in this process."""

import csv
import json

import pytest
from typer.testing import CliRunner

from commands import restuning
from restuning import load_backbone, methods, save
from restuning._errors import DataError
from restuning.cli.app import app
from restuning.search.forecasts import USUAL_METHODS
from zoo import folders

ROWS = [
    (f"{a} {word} film" + " very" * (i % 4), word)
    for i in range(15)
    for a in ("a", "the")
    for word in ("good", "bad")
]
TAGGED = [
    [("ann", "PER"), ("in", "O"), ("paris", "LOC")],
    [("bob", "PER"), ("and", "O"), ("ann", "PER"), ("in", "O"), ("berlin", "LOC")],
    [("paris", "LOC"), ("and", "O"), ("berlin", "LOC")],
    [("the", "O"), ("film", "O"), ("in", "O"), ("paris", "LOC")],
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return folders.bert(tmp_path_factory.mktemp("models") / "bert")


def run(*args):
    done = CliRunner().invoke(app, [str(a) for a in args])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


@pytest.fixture
def reviews(tmp_path):
    with (tmp_path / "reviews.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("review", "verdict"), *ROWS])
    return tmp_path / "reviews.csv"


COLUMNS = ("--text", "review", "--label", "verdict")


@pytest.mark.parametrize(
    "method", [pytest.param("linear", marks=pytest.mark.slow), "res-tuning", "res-tuning-bypass"]
)
def test_a_csv_is_learned_evaluated_and_predicted(encoder, reviews, tmp_path, method):
    out = tmp_path / "run"
    row = json.loads(
        run(
            "train",
            reviews,
            "--backbone",
            f"hf:{encoder}",
            *COLUMNS,
            "--method",
            method,
            "--epochs",
            12,
            "--batch-size",
            8,
            "--lr",
            "1e-2",
            "--max-tokens",
            6,
            "--pool",
            "mean",
            "--out",
            out,
            "--store",
            tmp_path / "store",
            "--json",
        )
    )
    assert row["test_accuracy"] > 0.9
    task = out / "reviews.task"
    assert json.loads((task / "task.json").read_text())["preprocessing"] == {
        "kind": "text",
        "max_tokens": 6,
    }
    again = json.loads(run("eval", task, reviews, *COLUMNS, "--json"))
    assert again["accuracy"] == row["test_accuracy"]
    lines = run("predict", "a good film", "the bad film very very", "--task", task, "--json")
    found = [json.loads(line) for line in lines.splitlines()]
    assert [f["text"] for f in found] == ["a good film", "the bad film very very"]
    assert [f["predictions"][0]["label"] for f in found] == ["good", "bad"]
    lines = run("predict", reviews, "--text", "review", "--task", task, "--json").splitlines()
    right = [
        json.loads(x)["predictions"][0]["label"] == y for x, (_, y) in zip(lines, ROWS, strict=True)
    ]
    assert sum(right) > 0.9 * len(ROWS)
    (tmp_path / "more.txt").write_text("a bad film\n\nthe good film\n")
    assert len(run("predict", tmp_path / "more.txt", "--task", task, "--json").splitlines()) == 2
    assert "good" in run("predict", "a good film", "--task", task)


def test_a_solved_task_on_texts_is_updated_with_other_texts_and_a_class_of_their_own(
    encoder, reviews, tmp_path
):
    out, command = tmp_path / "run", ("train", reviews, "--backbone", f"hf:{encoder}", *COLUMNS)
    run(*command, "--method", "ridge", "--max-tokens", 6, "--no-cache", "--out", out)
    more = tmp_path / "more.csv"
    lines = [f"in paris {word},place" for word in ("good", "bad", "film", "the", "very")]
    more.write_text("\n".join(["review,verdict", *lines, *lines[:1]]))
    said = json.loads(run("update", out, more, *COLUMNS, "--json"))
    assert said["rows"]["now"] == said["rows"]["before"] + 5
    assert (said["new classes"], said["skipped"]) == (["place"], 1)
    answer = run("predict", "in paris film", "--task", out, "--json")
    labels = {each["label"] for each in json.loads(answer)["predictions"]}
    assert labels <= {"good", "bad", "place"}
    more.write_text("\n".join(["review,verdict", *lines]))
    table = run("update", out, more, *COLUMNS, "--remove")
    assert "classes without examples now: place" in table
    assert "accuracy of rows left out" in table


def test_tagged_words_are_learned_and_predicted_word_by_word(encoder, tmp_path):
    text = "\n\n".join("\n".join(f"{w} {t}" for w, t in s) for s in TAGGED * 8)
    (tmp_path / "names.conll").write_text(text)
    out = tmp_path / "run"
    row = json.loads(
        run(
            "train",
            tmp_path / "names.conll",
            "--backbone",
            f"hf:{encoder}",
            "--method",
            "res-tuning-bypass",
            "--epochs",
            20,
            "--batch-size",
            8,
            "--lr",
            "1e-2",
            "--out",
            out,
            "--json",
        )
    )
    assert row["test_accuracy"] > 0.9
    answer = json.loads(run("predict", "bob in paris", "--task", out / "names.task", "--json"))
    assert answer["words"] == ["bob", "in", "paris"]
    assert [best[0]["label"] for best in answer["predictions"]] == ["PER", "O", "LOC"]
    table = run("predict", "bob in paris", "ann and berlin", "--task", out / "names.task")
    words = [line.split()[:2] for line in table.splitlines() if "%" in line]
    assert words[:3] == [["bob", "PER"], ["in", "O"], ["paris", "LOC"]]
    assert len(words) == 6


def test_a_decoder_without_a_padding_token_learns_from_its_last_token(tmp_path):
    """The last word decides, in texts of several lengths: a pad read in its place would not."""
    reviews = tmp_path / "reviews.csv"
    rows = [
        ("a film" + " very" * (i % 5) + f" {word}", word)
        for i in range(30)
        for word in ("good", "bad")
    ]
    with reviews.open("w", newline="") as stream:
        csv.writer(stream).writerows([("review", "verdict"), *rows])
    decoder = folders.gpt2(tmp_path / "gpt2")
    store = tmp_path / "store"
    row = json.loads(
        run(
            "train",
            reviews,
            "--backbone",
            f"hf:{decoder}",
            *COLUMNS,
            "--method",
            "res-tuning-bypass",
            "--epochs",
            12,
            "--batch-size",
            8,
            "--lr",
            "1e-2",
            "--out",
            tmp_path / "run",
            "--store",
            store,
            "--json",
        )
    )
    assert row["test_accuracy"] > 0.9
    manifest = json.loads(next(store.glob("*/manifest.json")).read_text())
    assert '"tokens": "last"' in json.dumps(manifest)
    empty = json.loads(run("predict", "", "--task", tmp_path / "run" / "reviews.task", "--json"))
    assert empty["predictions"][0]["probability"] > 0


def test_an_encoder_decoder_classifies_with_its_encoder(tmp_path):
    backbone = load_backbone(f"hf:{folders.t5(tmp_path / 't5')}")
    assert type(backbone.model).__name__ == "T5EncoderModel"


def test_the_authors_pooling_is_the_default(tmp_path):
    encoder = folders.bert(tmp_path / "bert")
    assert load_backbone(f"hf:{encoder}").pool is None
    (encoder / "1_Pooling").mkdir()
    said = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    (encoder / "1_Pooling" / "config.json").write_text(json.dumps(said))
    assert load_backbone(f"hf:{encoder}").pool == "mean"


def test_a_text_file_that_is_not_there_is_named(encoder, reviews, tmp_path):
    out = tmp_path / "run"
    run(
        "train",
        reviews,
        "--backbone",
        f"hf:{encoder}",
        *COLUMNS,
        "--method",
        "linear",
        "--epochs",
        1,
        "--out",
        out,
        "--store",
        tmp_path / "store",
        "--json",
    )
    done = CliRunner().invoke(app, ["predict", "absent.csv", "--task", str(out / "reviews.task")])
    assert done.exit_code != 0
    assert "absent.csv" in str(done.exception)


@pytest.fixture
def task(encoder, tmp_path):
    backbone = load_backbone(f"hf:{encoder}")
    host = backbone.host()
    made = methods.build("linear", host, num_classes=2)
    made.labels = ["bad", "good"]
    said = {"kind": "text", "max_tokens": 8}
    return save(made, host, tmp_path / "a.task", backbone=f"hf:{encoder}", preprocessing=said)


def test_a_name_of_a_file_or_folder_is_never_labelled_as_a_text(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "NEW.TXT").write_text("a good film\n")
    (tmp_path / "new.tsv").write_text("text\tx\na bad film\t1\nthe film\t2\n")
    (tmp_path / "new.CSV").write_text("text,x\na bad film,1\n")
    for name, texts in (("NEW.TXT", 1), ("new.tsv", 2), ("new.CSV", 1)):
        assert len(run("predict", name, "--task", task, "--json").splitlines()) == texts
    (tmp_path / "reviews").mkdir()
    (tmp_path / "new.jsonl").write_text("{}")
    for name in ("reviews", "new.jsonl", "reviews/"):
        done = restuning("predict", name, "--task", task, "--json")
        assert (done.returncode, done.stdout) == (1, "")
        assert "not read as texts" in done.stderr


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        (b"a good film\r\nthe\xc2\x85film\n", ["a good film", "the\u0085film"]),
        (b"\xff\xfea\0\n\0b\0", ["a", "b"]),
        (b"caf\xe9 film\n", None),
    ],
)
def test_the_standard_input_is_read_as_a_file_is(given, texts, task):
    done = CliRunner().invoke(app, ["predict", "-", "--task", str(task), "--json"], input=given)
    if texts is None:
        assert isinstance(done.exception, DataError)
        assert "not UTF-8" in str(done.exception)
        return
    found = [json.loads(line)["text"] for line in done.stdout.splitlines()]
    assert found == texts


def test_all_usual_methods_are_forecast_on_a_text_backbone(encoder):
    report = json.loads(run("plan", "--backbone", f"hf:{encoder}", "--images", 50, "--json"))
    assert {row["method"] for row in report["options"]} == set(USUAL_METHODS)
