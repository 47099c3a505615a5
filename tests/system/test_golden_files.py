"""Files of formats 1 and 2 that lie in the repository load today and mean what they meant."""

import itertools
import json
import shutil
import warnings

import pytest
import torch
from golden import make
from safetensors.torch import load_file

from restuning import describe, load, save
from restuning._errors import FormatError, RestuningWarning
from restuning._files import SEAL
from restuning.host import compare_answers
from restuning.task.folder import SHA256
from restuning.task.save_and_load import FORMAT

OTHER_KERNELS = 1e-4
"""Another machine and another torch sum fp32 products in another order."""
TELLING = 100 * OTHER_KERNELS
"""Logits of two tasks, two inputs or two classes differ by more, or equality would say nothing."""
UNSEEN = {"side.pool.weigh.bias"}
"""A softmax over tokens does not see what is added to the scores of all of them."""
DIGEST = "0" * 64
LARGEST = 60_000
"""Bytes of a golden folder: it is committed."""


@pytest.fixture(scope="module")
def host():
    return make.host()


@pytest.fixture(params=[*make.FORMAT1, *make.METHODS])
def golden(request):
    return make.HERE / f"{request.param}.task"


@pytest.fixture(params=make.METHODS)
def golden_of_today(request):
    return make.HERE / f"{request.param}.task"


@pytest.fixture
def copy(golden, tmp_path):
    return shutil.copytree(golden, tmp_path / golden.name)


def stored_logits():
    """Those of format 1 were written by the library of its day."""
    answers = {}
    for name in ("logits.json", "logits_format2.json"):
        answers |= json.loads((make.HERE / name).read_text(encoding="utf-8"))
    return {name: torch.tensor(rows) for name, rows in answers.items()}


def test_a_golden_task_loads_and_gives_the_logits_stored_beside_it(golden, host):
    theirs = stored_logits()[golden.stem]
    ours = make.logits(host, load(golden, host))
    torch.testing.assert_close(ours, theirs, atol=OTHER_KERNELS, rtol=OTHER_KERNELS)


def test_the_stored_logits_tell_tasks_inputs_and_classes_apart():
    answers = list(stored_logits().values())
    for one, other in itertools.combinations(answers[-len(make.METHODS) :], 2):
        assert (one - other).abs().max() > TELLING
    for rows in answers:
        assert torch.pdist(rows).min() > TELLING
        assert torch.pdist(rows.T).min() > TELLING


def test_every_tensor_of_a_golden_task_takes_part_in_its_logits(golden, host):
    task = load(golden, host)
    theirs = make.logits(host, task)
    tensors = dict(task.named_parameters()) | dict(task.named_buffers())
    for name in tensors.keys() - UNSEEN:
        parameter = tensors[name]
        with torch.no_grad():
            kept = parameter.clone()
            parameter.add_(make.whole_numbers(tuple(kept.shape), start=7))
            assert (make.logits(host, task) - theirs).abs().max() > OTHER_KERNELS, name
            parameter.copy_(kept)


def test_today_the_library_writes_the_same_file(golden_of_today, host, tmp_path):
    """A change of what is written, without a new format number, would break older libraries."""
    golden = golden_of_today
    again = saved_again(golden, host, tmp_path)
    ours, theirs = (
        json.loads((f / "task.json").read_text(encoding="utf-8")) for f in (again, golden)
    )
    # What an earlier library passes over: it tells files and backbones apart more closely.
    assert ours.pop(SHA256).keys() == {"weights.safetensors"}
    assert len(ours.pop(SEAL)) == len(ours["backbone"].pop("digest")) == len(DIGEST)
    assert ours["backbone"].pop("answers").keys() >= {"stream", "feature"}
    assert ours.pop("library").split()[0] == theirs.pop("library").split()[0]
    assert ours == theirs
    ours, theirs = (load_file(f / "weights.safetensors") for f in (again, golden))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.fixture(params=make.SEALED)
def sealed(request):
    return make.HERE / f"{request.param}.task"


def test_digests_and_answers_of_a_backbone_are_on_all_machines_what_they_were(sealed, host):
    said = describe(sealed)["backbone"]
    ours = host.identity()
    assert said["digest"] == ours["digest"]
    apart, allowed = compare_answers(said["answers"], ours["answers"])
    assert apart <= allowed < 1e-2
    with warnings.catch_warnings():
        warnings.simplefilter("error", RestuningWarning)
        task = load(sealed, host)
    theirs = stored_logits()["format2_bypass"]
    torch.testing.assert_close(make.logits(host, task), theirs, atol=OTHER_KERNELS, rtol=0)


def test_a_sealed_task_of_before_is_written_again_to_the_byte(sealed, tmp_path):
    make.make(tmp_path, make.SEALED)
    # The card beside it is for people, and says more today.
    name = "weights.safetensors"
    assert (tmp_path / sealed.name / name).read_bytes() == (sealed / name).read_bytes()
    ours, theirs = (describe(f / sealed.name) for f in (tmp_path, make.HERE))
    for each in (ours, theirs):
        # Answers are equal to rounding, and the version is today's.
        del each["backbone"]["answers"], each["library"]
    assert ours == theirs


def saved_again(golden, host, folder):
    return save(
        load(golden, host),
        host,
        folder / golden.name,
        backbone="golden",
        preprocessing=make.PREPROCESSING,
    )


@pytest.mark.parametrize("name", make.FORMAT1)
def test_a_task_of_format_1_saved_again_is_one_of_today_with_the_same_answers(name, host, tmp_path):
    golden = make.HERE / f"{name}.task"
    again = saved_again(golden, host, tmp_path)
    written = json.loads((again / "task.json").read_text(encoding="utf-8"))
    assert written["format"] == FORMAT
    assert "bypass" not in written["task"]
    assert not any(n.startswith("bypass.") for n in load_file(again / "weights.safetensors"))
    ours, theirs = (make.logits(host, load(f, host)) for f in (again, golden))
    assert torch.equal(ours, theirs)


def test_the_script_beside_them_makes_them_again(golden_of_today, tmp_path):
    golden = golden_of_today
    make.make(tmp_path)
    name = "weights.safetensors"
    assert (tmp_path / golden.name / name).read_bytes() == (golden / name).read_bytes()


def test_golden_folders_are_small_and_hold_no_pickle(golden):
    files = [p for p in golden.rglob("*") if p.is_file()]
    assert {p.name for p in files} == {"task.json", "weights.safetensors", "README.md"}
    assert sum(p.stat().st_size for p in files) < LARGEST


@pytest.mark.parametrize("newer", [FORMAT + 1, FORMAT + 41])
def test_a_newer_format_is_refused_with_both_numbers(copy, host, newer):
    file = copy / "task.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": newer}))
    for refused in (lambda: describe(copy), lambda: load(copy, host)):
        with pytest.raises(FormatError) as error:
            refused()
        words = error.value.found.replace(",", " ").split()
        assert {str(newer), str(FORMAT)} <= set(words)
        assert str(file) in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_truncated_weights_are_refused(copy, host, share):
    weights = copy / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(FormatError) as error:
        load(copy, host)
    assert str(weights) in str(error.value)


def test_missing_weights_are_refused(copy, host):
    (copy / "weights.safetensors").unlink()
    with pytest.raises(FormatError, match="weights"):
        load(copy, host)
