"""Suites: their sizes are the published ones, and the checker says what is missing."""

import shutil

import pytest

from commands import restuning
from restuning import RestuningError
from restuning.bench import find_tasks
from restuning.bench.studies.check import check_suite
from restuning.bench.suites import SUITES


def test_vtab_has_nineteen_tasks_of_three_groups_and_its_published_test_images():
    suite = SUITES["vtab-1k"]
    groups = [m.group for m in suite.values()]
    assert [groups.count(g) for g in ("natural", "specialized", "structured")] == [7, 4, 8]
    # The authors' timing script counts 387,905 test images; the sizes that VTAB prints add to one less.
    assert sum(m.test for m in suite.values()) == 387_904
    assert sum(m.classes * 768 + m.classes for m in suite.values()) / 19 == pytest.approx(
        38_045, abs=1
    )


def test_a_suite_is_found_below_the_folder_of_the_environment(suite, tmp_path, monkeypatch):
    shutil.copytree(suite / "shades", tmp_path / "vtab-1k" / "cifar")
    (tmp_path / "vtab-1k/cifar/task.json").unlink()
    monkeypatch.setenv("RESTUNING_DATA", str(tmp_path))
    assert [(t.name, t.group) for t in find_tasks("vtab-1k")] == [("cifar", "natural")]
    with pytest.raises(RestuningError, match="no such folder of tasks"):
        find_tasks("fgvc")


def test_cifar100_comes_from_torchvision():
    assert [t.source for t in find_tasks("cifar100")] == ["torchvision:CIFAR100"]


def test_a_whole_folder_of_tasks_has_no_problems_and_a_digest_of_its_own(suite):
    checked = check_suite("shared", suite)
    assert [c.problems for c in checked] == [(), ()]
    assert len({c.digest for c in checked}) == 2 and all(len(c.digest) == 16 for c in checked)


def test_everything_that_is_missing_is_named(suite, tmp_path):
    shutil.copytree(suite / "shades", tmp_path / "cifar")
    (tmp_path / "cifar/val200.txt").unlink()
    (tmp_path / "cifar/images/test-3.png").unlink()
    (tmp_path / "cifar/train800.txt").write_text("images/train800-0.png 100\nnonsense\n")
    before = {c.task: c for c in check_suite("vtab-1k", tmp_path)}
    told = "; ".join(before["cifar"].problems)
    for words in (
        "val200.txt is missing",
        "1 of 12 images are missing, first images/test-3.png",
        "malformed",
        "12 test images, published are 10000",
        "2 of 100 classes",
    ):
        assert words in told
    assert before["dtd"].problems == ("no such folder",) and len(before) == 19


def test_class_folders_are_checked_too(tmp_path):
    for split, count in (("train", 3), ("val", 1), ("test", 2)):
        for name in ("one", "two"):
            (tmp_path / "cub" / split / name).mkdir(parents=True)
            for n in range(count):
                (tmp_path / "cub" / split / name / f"{n}.jpg").write_bytes(b"x")
    (cub, *others) = check_suite("fgvc", tmp_path)
    assert cub.sizes == {"train": 6, "val": 2, "test": 4}
    assert "4 test images, published are 5794" in cub.problems
    assert {o.problems for o in others} == {("no such folder",)}


@pytest.mark.parametrize(("name", "where"), [("vtab", "."), ("vtab-1k", "nowhere")])
def test_an_unknown_suite_or_folder_is_refused(tmp_path, name, where):
    with pytest.raises(RestuningError, match="no suite|no such folder"):
        check_suite(name, tmp_path / where)


@pytest.mark.parametrize(
    ("suite", "said"),
    [
        ("vtab1k", "did you mean vtab-1k"),
        ("nosuch", "no such suite"),
        ("torchvision:NoSuch", "no such data set"),
        ("no/such/folder", "no such folder"),
        ("digit", "did you mean digits"),
        ("torchvision:", "no such suite"),
    ],
)
def test_an_unknown_suite_is_refused_before_a_folder_is_made(suite, said, tmp_path):
    done = restuning("bench", "run", suite, "--out", "grid", "--seeds", 1, cwd=tmp_path)
    assert done.returncode == 1
    assert said in done.stderr
    assert not list(tmp_path.iterdir())
