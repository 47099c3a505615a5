"""Parquet files with images in their rows: read a row group at a time, ordered by name and row, errors by file and row."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from parquets import parts, rows, write
from restuning._errors import DataError
from restuning.backbones.images import read_image
from restuning.data import DataOptions, load_data
from restuning.data.parquet import HELD
from restuning.data.parquet_images import KEPT
from restuning.data.tables import load_columns
from restuning.data.targets import list_targets
from tars import encode, samples, write_tar

pyarrow = pytest.importorskip("pyarrow")


@pytest.fixture(autouse=True)
def kept(own_cache):
    return own_cache / KEPT


def splits(data):
    return [each for each in (data.train, data.val, data.test) if each is not None]


# What a name means.


def test_names_of_files_say_their_splits_as_hugging_face_writes_them(tmp_path, tiny):
    for n in range(2):
        write(tmp_path / "data" / f"train-0000{n}-of-00002.parquet", rows(range(n * 9, n * 9 + 9)))
    write(tmp_path / "data" / "validation-00000-of-00001.parquet", rows(range(20, 24)))
    write(tmp_path / "data" / "test-00000-of-00001.parquet", rows(range(30, 36)))
    assert [len(s) for s in splits(load_data(tmp_path / "data", tiny))] == [18, 4, 6]


def test_files_by_split_are_taken_whatever_lies_beside(tmp_path, tiny):
    for split, count in (("train", 8), ("test", 4), ("notes", 3)):
        write(tmp_path / "w" / f"{split}.parquet", rows(range(count)))
    data = load_data(tmp_path / "w", tiny)
    assert [len(s) for s in splits(data)] == [8, 4] and data.test.ids == [
        f"test#{n}" for n in range(4)
    ]


def test_notes_beside_images_and_tars_are_not_taken_for_data(tmp_path, tiny):
    for number in range(12):
        file = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(number))
    write_tar(tmp_path / "shots" / "000.tar", samples(range(20)))
    for name in ("photos", "shots"):
        write(tmp_path / name / "000.parquet", {"note": ["x"]})
    assert load_data(tmp_path / "photos", tiny).labels == ["a", "b"]
    assert load_data(tmp_path / "shots", tiny).train.ids[0].startswith("000/")


# What a row is.


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("group", [1, 7, 1000])
def test_images_and_answers_are_those_of_the_rows(nested, group, tmp_path, tiny):
    write(tmp_path / "one.parquet", rows(range(30), nested=nested), group)
    data = load_data(tmp_path / "one.parquet", tiny)
    for split in splits(data):
        for at, each in enumerate(split.ids):
            number = int(each.partition("#")[2])
            wanted = tiny.preprocessing.transform("none")(read_image(encode(number)))
            assert torch.equal(split[at][0], wanted) and split[at][1] == number % 2


def test_images_are_known_as_those_of_a_frame_and_of_hub_tables(tmp_path, tiny):
    file = write(tmp_path / "one.parquet", rows(range(30)))
    here = load_data(file, tiny)
    held = load_data(rows(range(30), nested=False), tiny)
    assert here.contents() == held.contents()
    pytest.importorskip("datasets")
    hub = load_data(f"hf:{file}", tiny)
    known = [
        {
            *s.train.sample_digests().inputs,
            *s.val.sample_digests().inputs,
            *s.test.sample_digests().inputs,
        }
        for s in (here, hub)
    ]
    assert known[0] == known[1]


def test_columns_of_answers_of_several_kinds_are_tasks_on_the_same_rows(tmp_path, tiny):
    parts(tmp_path / "w", 2, 20)
    found = load_columns(tmp_path / "w", tiny, DataOptions(label="label,n"))
    assert found["n"].problem.kind == "regression" and found["label"].num_classes == 2
    assert found["n"].train.ids == found["label"].train.ids
    numbers = [20 * int(i[5:8]) + int(i.partition("#")[2]) for i in found["n"].train.ids]
    assert [int(y) for y in list_targets(found["n"].train)] == numbers


def test_a_column_of_masks_stands_beside_images_in_rows(tmp_path, tiny):
    columns = rows(range(20), nested=False)
    stream = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 2).save(stream, "PNG")
    file = write(tmp_path / "one.parquet", {**columns, "mask": [stream.getvalue()] * 20})
    data = load_data(file, tiny, label="mask", image="image", classes=["a", "b"])
    assert data.problem.kind == "segmentation"
    image, target = data.test[0]
    assert image.shape[1:] == target.shape and set(target.unique().tolist()) == {0, 1}


# What the schema says.


def test_the_only_column_of_bytes_is_the_images_whatever_it_is_called(tmp_path, tiny):
    columns = rows(range(20))
    columns["photo"] = columns.pop("image")
    file = write(tmp_path / "one.parquet", {**columns, "file_name": ["?"] * 20})
    assert len(load_data(file, tiny).train) == 14
    columns["other"] = columns["photo"]
    file = write(tmp_path / "two.parquet", columns)
    with pytest.raises(DataError, match="which column"):
        load_data(file, tiny)
    assert len(load_data(file, tiny, image="other").train) == 14


FEATURES = {"image": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": ["owl", "ant"]}}


def _with_numbers(numbers, column="kind"):
    columns = rows(range(len(numbers)))
    return {"image": columns["image"], column: numbers}


def test_classes_are_named_as_hugging_face_says_in_the_schema(tmp_path, tiny):
    file = write(
        tmp_path / "one.parquet", _with_numbers([n % 2 for n in range(20)]), features=FEATURES
    )
    data = load_data(file, tiny)
    assert data.labels == ["owl", "ant"] and data.problem.kind == "single-label"
    for split in splits(data):
        for at, each in enumerate(split.ids):
            assert data.labels[split[at][1]] == ("owl", "ant")[int(each.partition("#")[2]) % 2]
    assert load_data(file, tiny, label="kind", problem="regression").problem.kind == "regression"


@pytest.mark.parametrize(
    ("number", "what"), [(-1, "no class"), (2, "none of those"), (None, "no class")]
)
def test_a_number_that_is_no_class_is_told_with_file_and_row(number, what, tmp_path, tiny):
    numbers = [n % 2 for n in range(20)]
    numbers[13] = number
    file = write(tmp_path / "one.parquet", _with_numbers(numbers), features=FEATURES)
    with pytest.raises(DataError, match=rf"{what}[\s\S]*one\.parquet, row 13"):
        load_data(file, tiny)


@pytest.mark.parametrize(
    "said",
    [
        "[]",
        "{",
        '{"info": []}',
        '{"info": {"features": {"kind": {"_type": "ClassLabel", "names": 3}}}}',
    ],
)
def test_a_schema_that_says_nothing_of_classes_is_passed_over(said, tmp_path, tiny):
    table = pyarrow.table({**rows(range(20)), "kind": [0, 1] * 10}).replace_schema_metadata(
        {"huggingface": said}
    )
    from pyarrow import parquet

    parquet.write_table(table, tmp_path / "one.parquet")
    assert load_data(tmp_path / "one.parquet", tiny).labels == ["cat", "dog"]


# What is malformed.


@pytest.mark.parametrize("cell", [None, {"bytes": None, "path": "/etc/passwd"}])
def test_a_row_without_an_image_is_told_with_file_and_row_or_left_out(cell, tmp_path, tiny):
    parts(tmp_path / "w", 2, 20)
    columns = rows(range(20, 40))
    columns["image"][9] = cell
    write(tmp_path / "w" / "part-001.parquet", columns)
    with pytest.raises(DataError, match=r"holds no image[\s\S]*part-001\.parquet, row 9"):
        load_data(tmp_path / "w", tiny)
    data = load_data(tmp_path / "w", tiny, skip_bad=True)
    assert data.left_out == {"corrupt": ["part-001#9"]} and sum(map(len, splits(data))) == 39


def test_a_damaged_image_is_told_with_file_and_row_or_left_out(tmp_path, tiny):
    columns = rows(range(20), nested=False)
    columns["image"][5] = b"\x89PNG no image"
    file = write(tmp_path / "one.parquet", columns)
    data = load_data(file, tiny)
    with pytest.raises(DataError, match=r"one\.parquet, row 5"):
        [split[n] for split in splits(data) for n in range(len(split))]
    assert load_data(file, tiny, skip_bad=True).left_out == {"corrupt": ["one#5"]}


@pytest.mark.parametrize("left", [0.99, 0.5, 0.0])
def test_a_file_that_was_cut_off_is_told(left, tmp_path, tiny):
    parts(tmp_path / "w", 2, 20)
    file = tmp_path / "w" / "part-001.parquet"
    file.write_bytes(file.read_bytes()[: int(left * file.stat().st_size)])
    with pytest.raises(DataError, match=r"part-001\.parquet"):
        load_data(tmp_path / "w", tiny)


@pytest.mark.parametrize("place", range(4, 1500, 93))
def test_damaged_bytes_are_told_or_give_another_data_set(place, tmp_path, tiny):
    file = write(tmp_path / "one.parquet", rows(range(20)))
    before, content = load_data(file, tiny).contents(), bytearray(file.read_bytes())
    content[place] ^= 0xFF
    file.write_bytes(content)
    try:
        assert load_data(file, tiny).contents() != before
    except DataError as error:
        assert "one.parquet" in str(error)


def test_files_of_other_columns_are_told(tmp_path, tiny):
    parts(tmp_path / "w", 1, 20)
    write(tmp_path / "w" / "part-001.parquet", {"image": rows(range(4))["image"]})
    with pytest.raises(DataError, match=r"lacks a column[\s\S]*part-001"):
        load_data(tmp_path / "w", tiny)
    write(tmp_path / "w" / "part-001.parquet", rows(range(4), nested=False))
    with pytest.raises(DataError, match=r"another type[\s\S]*part-001"):
        load_data(tmp_path / "w", tiny)


def test_a_row_group_that_is_too_large_is_refused_and_says_how_to_write_it(
    tmp_path, tiny, monkeypatch
):
    file = write(tmp_path / "one.parquet", rows(range(20)), group=20)
    monkeypatch.setattr("restuning.data.parquet.LARGEST_GROUP", 1000)
    with pytest.raises(DataError, match=r"too large[\s\S]*row_group_size"):
        load_data(file, tiny)


# What is kept, in memory and beside stores.


def test_a_process_holds_few_row_groups_whatever_the_size_of_the_files(tmp_path, tiny, monkeypatch):
    parts(tmp_path / "w", 3, 20)
    monkeypatch.setattr("restuning.data.parquet.HELD", 1)
    data = load_data(tmp_path / "w", tiny).train
    data.in_memory = None
    for start in range(0, len(data), 4):
        data.__getitems__(list(range(start, min(start + 4, len(data)))))
        assert len(data.cells._groups._held) <= 2
    assert HELD > 1


def test_a_pass_in_order_reads_each_row_group_once(tmp_path, tiny, monkeypatch):
    parts(tmp_path / "w", 3, 20)
    data = load_data(tmp_path / "w", tiny).train
    data.in_memory = None
    asked = []
    real = type(data.cells._groups)._read
    monkeypatch.setattr(
        type(data.cells._groups), "_read", lambda self, *at: asked.append(at) or real(self, *at)
    )
    for start in range(0, len(data), 4):
        data.__getitems__(list(range(start, min(start + 4, len(data)))))
    assert len(asked) == len(set(asked)) == 9


def test_what_was_found_is_kept_and_made_again_where_it_is_damaged(
    tmp_path, tiny, kept, monkeypatch
):
    parts(tmp_path / "w", 2, 20)
    monkeypatch.setattr("restuning._files.SETTLED", -1.0)
    before = load_data(tmp_path / "w", tiny).contents()
    assert len(list(kept.iterdir())) == 2
    with monkeypatch.context() as without:
        without.setattr("restuning.data.parquet_images.ImageCells._digest", None)
        assert load_data(tmp_path / "w", tiny).contents() == before
    for damage in (b"", b"{}", b"\xff"):
        for each in kept.iterdir():
            each.write_bytes(damage)
        assert load_data(tmp_path / "w", tiny).contents() == before


# What is made of them.
