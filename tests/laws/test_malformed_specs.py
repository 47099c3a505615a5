"""Whatever stands in a spec, for every row of every table it is built from: built, or refused in words."""

import copy
import json

import pytest
import torch
from test_side_networks import SAMPLES as NETWORKS
from test_tuners import SAMPLES as TUNERS

from awake import tiny_vit
from restuning import Host, RestuningError, Task, Tuner, load, methods, save
from restuning._files import seal
from restuning.bypass import from_spec as side_from_spec
from restuning.bypass import kinds as side_kinds
from restuning.tuners import from_spec as tuner_from_spec
from restuning.tuners import kinds as tuner_kinds

JUNK = (None, True, -1, 0, 2**40, 2**63, 1.5, "x", "", [], [None], [2**40], {}, {"kind": "sum"})


def deep(value, levels=3000):
    for _ in range(levels):
        value = {"kind": "scaled", "tuner": value, "form": "none"}
    return value


def changes(spec, path=()):
    """Copies of a spec with one value replaced by junk, or left out, at every depth."""
    # Of a list the first: the others are alike.
    items = spec.items() if isinstance(spec, dict) else list(enumerate(spec))[:1]
    for key, value in list(items):
        place = (*path, key)
        if isinstance(value, dict | list):
            yield from changes(value, place)
        for junk in JUNK:
            yield place, junk
        if isinstance(spec, dict):
            yield place, "left out"


def changed(spec, place, junk):
    copied = copy.deepcopy(spec)
    inside = copied
    for key in place[:-1]:
        inside = inside[key]
    if junk == "left out":
        del inside[place[-1]]
    else:
        inside[place[-1]] = junk
    return copied


def assert_built_or_refused(build, spec):
    built = 0
    for place, junk in changes(spec):
        try:
            # Of any size: without contents nothing is allocated.
            with torch.device("meta"):
                build(changed(spec, place, junk))
            built += 1
        except RestuningError as error:
            assert str(error)
    return built


@pytest.mark.parametrize("kind", sorted(tuner_kinds()))
def test_the_spec_of_a_tuner(kind):
    if kind == "stem_prompt":
        spec = {"kind": kind, "dim": 16, "length": 3}
    else:
        spec = json.loads(json.dumps(TUNERS[kind]().spec()))
    assert isinstance(tuner_from_spec(spec), Tuner)
    assert_built_or_refused(tuner_from_spec, spec)


@pytest.mark.parametrize("kind", sorted(side_kinds()))
def test_the_spec_of_a_side_network(kind):
    spec = json.loads(json.dumps(NETWORKS[kind][0]().spec()))
    assert_built_or_refused(side_from_spec, spec)


@pytest.fixture(scope="module")
def host():
    return Host(tiny_vit(), torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("method", ["res-tuning", "bitfit", "linear", "mixing-bypass"])
def test_the_spec_of_a_task(host, method):
    task = methods.build(method, host, num_classes=3)
    task.labels = ["a", "b", "c"]
    spec = json.loads(json.dumps(task.spec()))
    # One of each is enough of those that repeat; side networks have a law of their own.
    for part in ("tuners", "weights"):
        spec[part] = dict(list(spec[part].items())[:1])
    if spec["side"]:
        spec["side"] = NETWORKS["ridge"][0]().spec()
    assert_built_or_refused(Task.from_spec, spec)


@pytest.mark.parametrize("spec", [deep({"kind": "res_adapter", "dim": 4}), deep(3), [], 7, None])
def test_a_spec_that_is_nested_too_deep_or_none_at_all(spec):
    for build in (tuner_from_spec, side_from_spec):
        with pytest.raises(RestuningError):
            build(spec)
    with pytest.raises(RestuningError):
        Task.from_spec({"tuners": {"mha.1": spec}})


def spoil(folder, **task):
    description = json.loads((folder / "task.json").read_text())
    description["task"] |= task
    (folder / "task.json").write_text(json.dumps(seal(description)))


HUGE = 10**9
BAD = {
    "classes": {"head": [48, 10**6]},
    "width": {"head": [HUGE, 3]},
    "rank": {"tuners": {"mha.1": {"kind": "res_adapter", "dim": 48, "rank": HUGE}}},
    "kernel": {"tuners": {"mha.1": {"kind": "conv_adapter", "dim": 48, "kernel": HUGE + 1}}},
    "length": {"tuners": {"mha.1": {"kind": "res_prefix", "dim": 48, "length": HUGE}}},
    "thousands": {
        "tuners": {f"mha.{n}": {"kind": "res_adapter", "dim": 2**16} for n in range(5000)}
    },
    "copies": {"weights": {"blocks.0.attn.qkv.weight": [HUGE, HUGE]}},
    "ridge": {"side": {"kind": "ridge", "taps": ["block.1"], "dims": [48], "classes": HUGE}},
    "a name twice": {"tuners": {n: {"kind": "res_adapter", "dim": 48} for n in ("a.b", "a_b")}},
}


@pytest.mark.parametrize("what", BAD)
def test_sizes_are_compared_with_the_weights_before_anything_is_allocated(
    host, tmp_path, what, monkeypatch
):
    folder = save(methods.build("linear", host, num_classes=3), host, tmp_path / "x.task")
    spoil(folder, **BAD[what])
    made = []
    real = torch.nn.init.xavier_uniform_

    def drawn(tensor, *more):
        made.append(tensor.device.type)
        return real(tensor, *more)

    monkeypatch.setattr(torch.nn.init, "xavier_uniform_", drawn)
    with pytest.raises(RestuningError):
        load(folder, host)
    assert set(made) <= {"meta"}
