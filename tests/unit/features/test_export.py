"""A store as Parquet holds its ids, labels and taps, and says what it is."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from commands import restuning as command
from restuning._errors import MissingExtraError, StoreError
from restuning.features import StoreOptions, build_store, export_store

parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pets"
    for split, count in (("train", 6), ("val", 2)):
        for number in range(count):
            file = folder / split / ("cat", "dog")[number % 2] / f"{number}.bmp"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (10 * number, 3 * count, 80)).save(file)
    return folder


@pytest.fixture(scope="module")
def store(pets, tmp_path_factory):
    root = tmp_path_factory.mktemp("stores")
    how = StoreOptions(root, dtype="fp16", views=2, progress=False)
    return build_store(pets, tokens="all", options=how).store


def test_a_table_holds_what_the_store_holds(pets, store, tmp_path):
    facts = export_store(pets, tmp_path / "out", root=store.path.parent)
    assert facts["rows"] == {"train": 12, "val": 2}
    table = parquet.read_table(tmp_path / "out" / "train.parquet")
    assert table.column_names == ["id", "label", "view", *store.key.columns]
    assert table["id"].to_pylist()[:3] == [f"train/cat/{n}.bmp" for n in (0, 2, 4)]
    assert table["view"].to_pylist() == ["plain"] * 6 + ["flip"] * 6
    assert table["label"].to_pylist() == 2 * store.labels("train").tolist()
    for number in (0, 1):
        taps = store.taps(store.rows("train", number, range(6)))
        for name, tap in taps.items():
            field = table.schema.field(name)
            column = np.stack(table[name].to_numpy()[6 * number : 6 * number + 6])
            assert column.dtype == np.float16
            shape = json.loads(field.metadata[b"shape"])
            assert torch.equal(torch.from_numpy(column).float().view(6, *shape), tap)
    known = json.loads(table.schema.metadata[b"restuning"])
    assert known == {"key": store.key.to_dict(), "classes": ["cat", "dog"]}
    with pytest.raises(StoreError, match="there already"):
        export_store(pets, tmp_path / "out", root=store.path.parent)


def test_of_a_store_by_its_folder_ids_are_rows_and_of_other_images_none_are_told(
    pets, store, tmp_path
):
    done = command("cache", "export", store.path, "--to", "parquet", "--json", cwd=tmp_path)
    facts = json.loads(done.stdout)
    assert facts["ids"] == "rows of splits"
    file = tmp_path / facts["path"] / "val.parquet"
    assert parquet.read_table(file)["id"].to_pylist() == ["val/0", "val/1"]
    other = tmp_path / "pets"
    for name in ("cat", "dog"):
        (other / name).mkdir(parents=True)
        for number in range(9):
            Image.new("RGB", (8, 8), (number,) * 3).save(other / name / f"{number}.bmp")
    with pytest.raises(StoreError, match="of other images"):
        export_store(other, tmp_path / "x", root=store.path.parent)
    with pytest.raises(StoreError, match="no such form"):
        export_store(store.path, to="csv")


def test_where_a_store_holds_no_labels_none_are_told(tmp_path):
    # Several labels an image: they stay beside the store.
    lines = ["image,label"]
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number,) * 3).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png,{('a', 'b', 'a;b')[number % 3]}")
    (tmp_path / "tags.csv").write_text("\n".join(lines) + "\n")
    root = tmp_path / "stores"
    done = command("cache", tmp_path / "tags.csv", "--problem", "multi-label", "--store", root)
    assert done.returncode == 0, done.stderr
    export_store("tags", tmp_path / "out", root=root)
    table = parquet.read_table(tmp_path / "out" / "train.parquet")
    assert table["label"].null_count == table.num_rows > 0


def test_without_pyarrow_the_line_that_installs_it_is_told(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'restuning\[parquet\]'"):
        export_store(store.path)


@pytest.mark.parametrize("how", [{"to": "arrow"}, {"out": "whole.arrow"}])
def test_arrow_holds_the_table_that_parquet_holds(how, pets, store, tmp_path, monkeypatch):
    from pyarrow import ipc

    monkeypatch.chdir(tmp_path)
    export_store(pets, "plain", root=store.path.parent)
    folder = export_store(pets, root=store.path.parent, **how)["path"]
    assert folder.endswith(".arrow")
    for split in ("train", "val"):
        ours = ipc.open_file(tmp_path / folder / f"{split}.arrow").read_all()
        theirs = parquet.read_table(tmp_path / "plain" / f"{split}.parquet")
        assert ours.equals(theirs) and ours.schema.metadata[b"restuning"]
