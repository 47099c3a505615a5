"""Task folders: round trips, refusals, and what damage is answered with."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_hub import at_hub
from torch import nn

from awake import solve_parts, tiny_vit
from restuning import Host, RestuningError, Tuned, WrongBackboneError, load, methods, save
from restuning._errors import FormatError
from restuning._files import seal
from restuning.task import Task, describe, push_to_hub, summarise
from restuning.tuners import ResAdapter

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def host():
    return Host(tiny_vit(), X[:1])


def rewrite(path, **entries):
    """As somebody would who knows how such files are written."""
    description = json.loads((path / "task.json").read_text())
    (path / "task.json").write_text(json.dumps(seal({**description, **entries})))


@pytest.mark.parametrize("name", methods.names())
def test_a_saved_task_gives_the_same_answers(host, name, tmp_path):
    task = methods.build(name, host, num_classes=3)
    task.labels = ["a", "b", "c"]
    solve_parts(task, host)
    again = load(save(task, host, tmp_path / "t.task", backbone="timm:x"), host)
    assert torch.equal(Tuned(host, again)(X), Tuned(host, task)(X))
    assert again.labels == task.labels


def test_other_weights_are_refused_with_both_fingerprints(host, tmp_path):
    save(methods.build("res-tuning", host, num_classes=3), host, tmp_path / "t.task")
    other = Host(tiny_vit(seed=7), X[:1])
    with pytest.raises(WrongBackboneError) as error:
        load(tmp_path / "t.task", other)
    assert host.fingerprint()["weights"] in str(error.value)
    assert other.fingerprint()["weights"] in str(error.value)


def test_another_architecture_is_refused(host, tmp_path):
    save(methods.build("res-tuning", host, num_classes=3), host, tmp_path / "t.task")
    with pytest.raises(WrongBackboneError, match="another backbone"):
        load(tmp_path / "t.task", Host(tiny_vit(depth=2), X[:1]), any_backbone=True)


def shared_inline(host):
    tuner = ResAdapter(host.dim, rank=4, zero=False)
    pick = host.sites.pick("mha", "ffn")
    return Task.inline(pick, lambda site: tuner, nn.Linear(host.dim, 3), pool="cls")


def shared_bypass(host):
    tuner = ResAdapter(host.dim, rank=4, zero=False)
    return Task.bypass(
        host.sites, lambda site: tuner, nn.Linear(host.dim, 3), vertical=lambda site: tuner
    )


@pytest.mark.parametrize("build", [shared_inline, shared_bypass])
def test_a_module_at_two_places_of_a_task_saves_and_loads_as_one_again(host, build, tmp_path):
    task = build(host).eval()
    again = load(save(task, host, tmp_path / "t.task"), host)
    assert torch.equal(Tuned(host, again)(X), Tuned(host, task)(X))
    assert again.trainable_parameters() == task.trainable_parameters()
    # Saved from what was loaded, it is the same file: nothing was written twice.
    files = [save(t, host, tmp_path / n) for t, n in ((again, "a.task"), (task, "b.task"))]
    first, second = ((f / "weights.safetensors").read_bytes() for f in files)
    assert first == second


def test_a_task_that_shares_nothing_says_nothing_of_sharing(host, tmp_path):
    path = save(methods.build("res-tuning", host, num_classes=3), host, tmp_path / "t.task")
    assert "shared" not in json.loads((path / "task.json").read_text())


@pytest.mark.parametrize(
    "shared",
    [
        {"head.weight": "head.bias"},
        {"tuners.nowhere.up.weight": "head.weight"},
        {"head.bias": "nowhere"},
        {"head.bias": 3},
        ["head.bias"],
        7,
    ],
)
def test_sharing_that_does_not_fit_is_refused_in_words(host, shared, tmp_path):
    path = save(methods.build("res-tuning", host, num_classes=3), host, tmp_path / "t.task")
    rewrite(path, shared=shared)
    with pytest.raises(RestuningError, match="weights of a task cannot be read"):
        load(path, host)


def test_a_truncated_weights_file_is_named(host, tmp_path):
    path = save(methods.build("res-tuning", host, num_classes=3), host, tmp_path / "t.task")
    file = path / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(RestuningError, match=r"weights\.safetensors"):
        load(path, host)


NO_TEMPERATURE = (0, 0.0, -1.5, "2.0", "NaN", True, None, [2.0], {"x": 1}, 1e9, 1e-9, 1e308)


@pytest.mark.parametrize("value", NO_TEMPERATURE)
def test_a_temperature_that_is_none_is_refused_in_words(host, tmp_path, value):
    task = methods.build("linear", host, num_classes=3)
    path = save(task, host, tmp_path / "t.task")
    rewrite(path, task={**describe(path)["task"], "temperature": value})
    for read in (lambda: load(path, host), lambda: summarise(path)):
        with pytest.raises(FormatError, match=r"temperature[\s\S]*restore task\.json") as error:
            read()
        assert repr(value) in str(error.value)
    with pytest.raises(FormatError, match="temperature"):
        task.temperature = value
    assert task.temperature == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_temperature_that_is_no_number_is_neither_set_nor_read(host, tmp_path, value):
    task = methods.build("linear", host, num_classes=3)
    path = save(task, host, tmp_path / "t.task")
    with pytest.raises(FormatError, match="temperature"):
        task.temperature = value
    description = json.loads((path / "task.json").read_text())
    description["task"]["temperature"] = value
    (path / "task.json").write_text(json.dumps(description))
    for read in (lambda: load(path, host), lambda: summarise(path)):
        with pytest.raises(FormatError, match=r"task\.json"):
            read()


def test_a_temperature_that_was_edited_is_noticed_by_the_seal(host, tmp_path):
    task = methods.build("linear", host, num_classes=3)
    task.temperature = 2.0
    path = save(task, host, tmp_path / "t.task")
    file = path / "task.json"
    file.write_text(file.read_text().replace('"temperature": 2.0', '"temperature": 2.5'))
    with pytest.raises(FormatError):
        load(path, host)


def test_what_a_task_folder_says_of_itself_names_a_temperature_that_is_not_1(host, tmp_path):
    task = methods.build("linear", host, num_classes=3)
    assert "temperature" not in summarise(save(task, host, tmp_path / "t.task"))
    task.temperature = 2.0
    assert summarise(save(task, host, tmp_path / "t.task"))["temperature"] == 2.0


def test_a_newer_format_is_refused(host, tmp_path):
    path = save(methods.build("linear", host, num_classes=3), host, tmp_path / "t.task")
    rewrite(path, format=99)
    with pytest.raises(RestuningError, match="format 99"):
        load(path, host)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["format", "task", "backbone", "preprocessing", "fingerprint", "x"]),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=60) | JSON.map(lambda v: json.dumps(v).encode()))
def test_any_task_json_is_read_or_refused_in_words(tmp_path, content):
    (tmp_path / "task.json").write_bytes(content)
    try:
        describe(tmp_path)
    except RestuningError:
        pass


def test_a_push_tells_the_name_of_a_weights_file_and_not_its_folders(host, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub", reason="needs the extra hub")
    (tmp_path / "private").mkdir()
    weights = tmp_path / "private" / "vit.safetensors"
    weights.write_bytes(b"weights")
    task = methods.build("linear", host, num_classes=3)
    folder = save(task, host, tmp_path / "t.task", backbone="timm:x", weights=weights)
    before = (folder / "task.json").read_text()
    assert str(tmp_path / "private") in before
    with at_hub(monkeypatch, tmp_path / "cache") as hub:
        push_to_hub(folder, "someone/pets")
        pushed = hub.repositories["someone/pets"].files()
    assert all(str(tmp_path).encode() not in content for content in pushed.values())
    said = json.loads(pushed["task.json"])["backbone"]["weights"]
    assert said == {**json.loads(before)["backbone"]["weights"], "path": "vit.safetensors"}
    assert (folder / "task.json").read_text() == before


def test_the_card_writes_shares_as_percent_and_large_numbers_in_groups(host, tmp_path):
    results = {
        "test accuracy": 14 / 15,
        "balanced accuracy": 1.0,
        "seed": 3,
        "images": 1234567,
        "loss": 0.123456789,
        "val accuracy": None,
        "note": "a trial",
    }
    task = methods.build("linear", host, num_classes=3)
    folder = save(task, host, tmp_path / "t.task", backbone="timm:x", results=results)
    lines = [line for line in (folder / "README.md").read_text().splitlines() if line[:1] == "|"]
    assert lines[2:] == [
        "| test accuracy | 93.3 % |",
        "| balanced accuracy | 100.0 % |",
        "| seed | 3 |",
        "| images | 1,234,567 |",
        "| loss | 0.1235 |",
        "| note | a trial |",
    ]
