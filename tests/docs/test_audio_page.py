"""The commands and the Python of docs/audio.md do what it says, on a small model and drawn tones."""

import json
import re
import shlex
from pathlib import Path

import pytest

import sounds
from commands import restuning

PAGE = Path(__file__).parents[2] / "docs" / "audio.md"
MODELS = {
    "hf:MIT/ast-finetuned-audioset-10-10-0.4593": "ast",
    "hf:facebook/wav2vec2-large-xlsr-53": "wav2vec2",
    "hf:openai/whisper-tiny": "whisper",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the data that the page names, and small models in the place of those of a hub."""
    where = tmp_path_factory.mktemp("page")
    sounds.folder(where / "sounds")
    sounds.folder(where / "new", each=2)
    rows = ["path,species,seconds"]
    for n in range(24):
        species, seconds = ("owl", "wren")[n % 2], 0.2 + 0.02 * n
        pitch = 300 if species == "owl" else 1500
        sounds.write(where / f"calls/{n}.wav", sounds.tone(pitch + 10 * n, seconds))
        rows.append(f"calls/{n}.wav,{species},{seconds:.2f}")
    (where / "calls.csv").write_text("\n".join(rows))
    for name in MODELS.values():
        sounds.save(name, where / "models" / name)
    return where


def here(text, place):
    for name, model in MODELS.items():
        text = text.replace(name, f"hf:{place / 'models' / model}")
    return text


def test_the_session_of_the_page_runs_and_finds_what_was_drawn(place):
    (session,) = re.findall(r"```\n(restuning train sounds.*?)```", PAGE.read_text(), re.S)
    printed = []
    for line in here(session, place).splitlines():
        program, *arguments = shlex.split(line)
        assert program == "restuning"
        done = restuning(*arguments, cwd=place)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        printed.append(done.stdout)
    answers = printed[2].splitlines()
    assert all(("low" in each.split()[0]) == (each.split()[1] == "low") for each in answers[1:5])
    assert (place / "runs/calls/species.task").is_dir()
    assert (place / "runs/calls/seconds.task").is_dir()
    assert (place / "sounds.npy").exists()


def test_the_python_of_the_page_runs(place, monkeypatch):
    monkeypatch.chdir(place)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names: dict = {}
    exec(compile(here(code, place), "audio.md", "exec"), names)  # noqa: S102
    assert [each.label for each in names["answers"]] == ["high", "low"]
    assert names["predictor"].cut == []


def test_a_sound_asks_for_the_sounds_nearest_to_it_and_auto_chooses(place):
    told = ("--backbone", f"hf:{place / 'models/wav2vec2'}", "--store", place / "store")
    found = restuning(
        "search", "sounds", "sounds/low/01.wav", *told, "--out", "found.html", "--json", cwd=place
    )
    assert found.returncode == 0, found.stderr
    assert '"low/01.wav"' in found.stdout
    assert "low/01.wav" in (place / "found.html").read_text()
    planned = restuning("plan", "--data", "sounds", *told[:2], "--json", cwd=place)
    assert planned.returncode == 0, planned.stderr
    chosen = ("--method", "auto", "--minutes", "0.2", "--epochs", "2", "--out", "runs/chosen")
    done = restuning("train", "sounds", *told, *chosen, cwd=place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (place / "runs/chosen/sounds.task").is_dir()


def test_figures_of_the_page_are_those_of_the_recipe_that_is_committed():
    found = json.loads((PAGE.parents[1] / "recipes" / "sounds.json").read_text())
    assert found["weights"] == "random" and "say nothing about" in PAGE.read_text()
    for name, result in found["results"].items():
        backbone, method = name.split(", ")
        told = [
            f"{row.get('test_accuracy', row.get('test_r2')):.2f}"
            for row in result["columns"].values()
        ]
        line = f"| {backbone} | `{method}` | {' | '.join(told)} | {result['seconds']:.0f} s |"
        assert line in PAGE.read_text().splitlines()
