"""What holds of images that lie in files together, whether these are tars or parquet files."""

import os
import pickle

import numpy as np
import pytest
import torch

import restuning
from packed import PACKED
from restuning._errors import DataError
from restuning.backbones.images import read_image
from restuning.data import load_data
from restuning.data.collection import load_collection
from restuning.data.identity import Watch
from restuning.features import StoreOptions, build_store, merge_shares, write_share
from tars import encode

pytestmark = pytest.mark.usefixtures("own_cache")

EACH = 20
"""Samples of a file."""


@pytest.fixture(params=PACKED)
def kind(request):
    if request.param == "parquet":
        pytest.importorskip("pyarrow")
    return PACKED[request.param]


def splits(data):
    return [data.train, data.val, data.test]


@pytest.mark.parametrize(
    "names", ["", "/{}-{{000..002}}.{}", "/{}-*.{}", "/{}-00{{0,1,2}}.{}", "/{}-00{{2,0,1}}.{}"]
)
def test_a_folder_and_patterns_mean_the_same_files(names, kind, tmp_path, tiny):
    kind.write(tmp_path / "w", 3, EACH)
    data = load_data(f"{tmp_path}/w{names.format(kind.first, kind.ending)}", tiny)
    assert data.num_classes == 2
    assert data.name == (kind.first if names else "w")
    assert [len(s) for s in splits(data)] == [42, 6, 12]
    ids = [each for split in splits(data) for each in split.ids]
    assert sorted(ids) == sorted(kind.id(n, EACH) for n in range(3 * EACH))
    for split in splits(data):
        numbers = [kind.number(each, EACH) for each in split.ids]
        assert numbers == sorted(numbers)


def test_images_and_answers_are_those_of_the_files(kind, tmp_path, tiny):
    kind.write(tmp_path / "w", 2, EACH)
    for split in splits(load_data(tmp_path / "w", tiny)):
        for at, each in enumerate(split.ids):
            number = kind.number(each, EACH)
            wanted = tiny.preprocessing.transform("none")(read_image(encode(number)))
            assert torch.equal(split[at][0], wanted) and split[at][1] == number % 2


def test_a_batch_is_the_same_as_its_images_one_by_one(kind, tmp_path, tiny):
    kind.write(tmp_path / "w", 2, EACH)
    data = load_data(tmp_path / "w", tiny, augment="none").train
    data.in_memory = None
    rng = np.random.default_rng(0)
    for at in (range(4), range(4, 8), range(2, 6), rng.permutation(len(data))[:9].tolist(), [3, 3]):
        for (one, y), n in zip(data.__getitems__(list(at)), at, strict=True):
            assert torch.equal(one, data[n][0]) and y == data[n][1]
    again = pickle.loads(pickle.dumps(data))  # noqa: S301
    assert torch.equal(again.__getitems__([5])[0][0], data[5][0])


def test_a_file_that_changes_while_features_are_made_is_noticed(kind, tmp_path, tiny):
    folder = kind.write(tmp_path / "w", 2, EACH)
    data = load_data(folder, tiny)
    watch = Watch(data.train)
    watch.check(0, 4)
    os.utime(folder / f"{kind.first}-000.{kind.ending}", (5e8, 5e8))
    with pytest.raises(DataError, match=rf"{kind.first}-000\.{kind.ending}"):
        watch.check(0, 4)
    watch.check(len(data.train) - 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_that_share_files_write_the_bytes_of_one(workers, kind, tmp_path, tiny):
    folder = kind.write(tmp_path / "w", 3, EACH)
    options = {"progress": False, "batch_size": 4, "shard_bytes": 1, "views": 2}
    build_store(folder, tiny, options=StoreOptions(tmp_path / "one", workers=0, **options))
    for number in (2, 1):
        how = StoreOptions(tmp_path / "many", workers=workers, **options)
        write_share(folder, tiny, f"{number}/2", options=how)
    merge_shares(folder, tmp_path / "many")
    (one,), (many,) = ((tmp_path / place).iterdir() for place in ("one", "many"))
    ours, theirs = ({p.name: p.read_bytes() for p in f.iterdir()} for f in (one, many))
    assert ours == theirs


def test_a_collection_of_them_has_their_ids(kind, tmp_path, tiny):
    folder = kind.write(tmp_path / "w", 2, EACH)
    assert sorted(load_collection(folder, tiny).ids) == sorted(
        kind.id(n, EACH) for n in range(2 * EACH)
    )


def test_a_task_trains_on_them(kind, tmp_path):
    folder = kind.write(tmp_path / "w", 2, EACH)
    run = restuning.train(str(folder), method="ridge", out=tmp_path / "run", store=tmp_path / "s")
    assert run.metrics["test_accuracy"] >= 0
