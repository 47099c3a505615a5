"""`--config FILE`: options from a file, the command line over them, and nothing executed."""

import json
import os

import pytest
from typer.testing import CliRunner

from restuning._errors import FormatError
from restuning.cli.app import app, load_command


def parsed(command, *arguments):
    made = load_command(command)
    return made.make_context(command, list(map(str, arguments))).params


@pytest.fixture
def write(tmp_path):
    def written(text, name="options.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return written


def test_keys_are_the_names_of_options(write):
    file = write(
        "data: photos/\nepochs: 7\nlearning-rate: 1e-3\nbatch_size: 8\nfinal: true\n"
        "precision: no\nmethod: res-tuning[mha=prompt]\ntrack: [tensorboard]\nzero-shot: a {}\n"
    )
    found = parsed("train", "--config", file)
    expected = {
        "data": "photos/",
        "epochs": 7,
        "lr": 1e-3,
        "batch_size": 8,
        "final": True,
        "precision": "no",
        "method": ["res-tuning[mha=prompt]"],
    }
    assert {name: found[name] for name in expected} == expected
    assert list(found["track"]) == ["tensorboard"]
    assert list(found["zero_shot"]) == ["a {}"]


def test_the_command_line_wins_wherever_it_names_the_file(write):
    file = write("epochs: 7\nseed: 3\n")
    for line in (["--config", file, "--epochs", 2], ["--epochs", 2, "--config", file]):
        found = parsed("train", "digits", *line)
        assert (found["epochs"], found["seed"]) == (2, 3)


def test_what_is_empty_is_not_said(write):
    found = parsed("train", "digits", "--config", write("rank:\nclip: null\nema: ~\n"))
    assert found["rank"] is found["clip"] is found["ema"] is None


@pytest.mark.parametrize("command", ["sweep", "plan"])
def test_other_commands_take_a_file_too(command, write):
    file = write('{"epochs": 4, "grid": "lr=1e-3"}' if command == "sweep" else '{"epochs": 4}')
    more = ["digits"] if command == "sweep" else []
    assert parsed(command, *more, "--config", file)["epochs"] == 4


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochz: 3", ["epochz", "did you mean epochs"]),
        ("config: other.yaml", ["config"]),
        ("epochs: many", ["epochs", "integer"]),
        ("epochs: 2.5", ["epochs", "integer"]),
        ("epochs: [1, 2]", ["epochs", "a list"]),
        ("epochs: {a: 1}", ["epochs", "keys and values"]),
        ("track: [[a]]", ["track", "list of lists"]),
        ("- epochs", ["a list"]),
        ("epochs: [", ["cannot be read"]),
        ("", ["keys and values"]),
    ],
)
def test_what_does_not_fit_is_refused_with_file_key_and_reason(write, text, words):
    file = write(text)
    with pytest.raises(FormatError) as refused:
        parsed("train", "digits", "--config", file)
    assert all(word in str(refused.value) for word in [file.name, *words])


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n"
    for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (LAUGHS, "options.yaml"),
        ("track: &a [*a]", "options.yaml"),
        ("track: " + "[" * 5000, "options.yaml"),
        ("a: 1\n" * 100_000, "options.yaml"),
        ('{"track": ' + "[" * 5000, "options.json"),
        ('{"epochs": 3, "epochs": 4}', "options.json"),
        ('{"lr": NaN}', "options.json"),
        ("epochs: 1\x00", "options.yaml"),
    ],
)
def test_a_file_that_would_take_a_machine_down_is_refused_in_words(write, text, name):
    with pytest.raises(FormatError, match=name):
        parsed("train", "digits", "--config", write(text, name))


@pytest.mark.skipif(os.name == "nt", reason="pipes have no names there")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "options.yaml")
    with pytest.raises(FormatError, match="pipe"):
        parsed("train", "digits", "--config", tmp_path / "options.yaml")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FormatError, match="cannot be read"):
        parsed("train", "digits", "--config", tmp_path / "none.json")


@pytest.mark.parametrize(
    "tag", ["python/object/apply:os.system", "python/object/apply:pathlib.Path.touch"]
)
def test_a_file_executes_nothing(write, tmp_path, tag):
    mark = tmp_path / "executed"
    file = write(f'precision: !!{tag} ["touch {mark}"]\n')
    with pytest.raises(FormatError):
        parsed("train", "digits", "--config", file)
    assert not mark.exists()


def test_the_settings_of_a_run_make_the_same_run(tmp_path):
    first = [
        "train",
        "digits",
        "--method",
        "linear",
        "--epochs",
        "1",
        "--seed",
        "5",
        "--lr",
        "0.02",
    ]
    again = ["train", "--config", str(tmp_path / "a" / "settings.json")]
    for line, out in ((first, "a"), (again, "b")):
        done = CliRunner().invoke(app, [*line, "--out", str(tmp_path / out)])
        assert done.exit_code == 0, (done.output, done.exception)
    weights = [tmp_path / out / "digits.task" / "weights.safetensors" for out in "ab"]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    settings = [json.loads((tmp_path / out / "settings.json").read_text()) for out in "ab"]
    assert settings[0] == settings[1]
