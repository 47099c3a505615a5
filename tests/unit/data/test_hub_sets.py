"""Hugging Face data sets that are not clean, and the forms in which people have them."""

import io

import numpy as np
import pytest
from PIL import Image

from restuning import load_backbone, load_data
from restuning._errors import DataError, RestuningWarning
from restuning.data import DataOptions, load_columns

hf = pytest.importorskip("datasets")
IMAGES = load_backbone("restuning-tiny")


@pytest.fixture(autouse=True)
def _quiet():
    hf.disable_progress_bars()


def picture(shade, size=8):
    return Image.new("RGB", (size, size), (shade % 256, 0, 0))


def png(shade=0):
    stream = io.BytesIO()
    picture(shade).save(stream, "PNG")
    return stream.getvalue()


def rows(count, labels=None, images=None, kind=None):
    """A table of `count` images."""
    kind = kind or hf.ClassLabel(names=["cat", "dog"])
    features = hf.Features({"image": hf.Image(), "label": kind})
    labels = [i % 2 for i in range(count)] if labels is None else labels
    images = [picture(i) for i in range(count)] if images is None else images
    return hf.Dataset.from_dict({"image": images, "label": labels}, features=features)


@pytest.mark.parametrize("word", ["valid", "val", "dev", "Validation"])
@pytest.mark.parametrize("training", ["train", "Training"])
def test_splits_have_any_of_their_usual_names(word, training):
    sets = hf.DatasetDict({training: rows(10), word: rows(6), "testing": rows(4)})
    data = load_data(sets, IMAGES)
    assert (len(data.train), len(data.val), len(data.test)) == (10, 6, 4)


def test_two_names_of_one_split_are_refused():
    sets = hf.DatasetDict({"train": rows(10), "valid": rows(6), "dev": rows(4)})
    with pytest.raises(DataError, match="dev and valid"):
        load_data(sets, IMAGES)


@pytest.mark.parametrize(
    ("labels", "kind", "words"),
    [
        ([0, None, 1, 1], None, "no label[\\s\\S]*rows such as 1"),
        ([0.0, float("nan"), 1.0, 1.0], "float32", "no label"),
        (["a", "", "b", "b"], "string", "no label"),
        ([0.5, 1.7, 0.2, 1.1], "float32", "fractions"),
        ([[0], [0, 1], [1], [1]], ["int64"], "several labels"),
        ([0, 1, -1, 1], "int64", "outside the classes"),
        ([0, 1, 5_000_000_000, 1], "int64", "too large"),
        ([0, 0, 0, 0], "int64", "two classes"),
        (["a", "b", " \t", "a"], "string", "no label"),
        ([b"a", b"b", b"a", b"a"], "binary", "neither numbers nor words"),
        ([1, 2, 1, 1], "timestamp[s]", "neither numbers nor words"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_that_are_no_classes_are_refused_in_words(labels, kind, words, split):
    value = hf.Sequence(hf.Value(kind[0])) if isinstance(kind, list) else kind and hf.Value(kind)
    clean = {
        "string": ["a", "b"],
        "binary": [b"a", b"b"],
        "float32": [0.0, 1.0],
        "['int64']": [[0], [1]],
    }.get(str(kind), [0, 0] if words == "two classes" else [0, 1])
    other = "test" if split == "train" else "train"
    sets = hf.DatasetDict({split: rows(4, labels, kind=value), other: rows(2, clean, kind=value)})
    with pytest.raises(DataError, match=words):
        load_data(sets, IMAGES)


def test_words_and_whole_floats_are_classes():
    words = rows(40, [" dog" if i % 2 else "cat" for i in range(40)], kind=hf.Value("string"))
    assert load_data(words, IMAGES).labels == ["cat", "dog"]
    with pytest.warns(RestuningWarning, match="'dog'.*'dog '"):
        both = rows(40, ["cat", "dog", "dog ", "cat"] * 10, kind=hf.Value("string"))
        assert load_data(both, IMAGES).labels == ["cat", "dog"]
    whole = rows(40, [float(i % 2) for i in range(40)], kind=hf.Value("float32"))
    assert load_data(whole, IMAGES).labels == ["0", "1"]


@pytest.mark.parametrize(
    "bad", [None, {"bytes": b"no image", "path": None}, {"bytes": png()[:40], "path": None}]
)
def test_an_image_that_is_missing_or_damaged_is_refused_or_left_out_and_named(bad):
    images = [bad] + [{"bytes": png(i), "path": None} for i in range(39)]
    sets = hf.DatasetDict({"train": rows(40, images=images), "test": rows(4)})
    with pytest.raises(DataError, match="row"):
        _ = load_data(sets, IMAGES).train[0]
    data = load_data(sets, IMAGES, skip_bad=True)
    assert (len(data.train) + len(data.val or []), data.skipped) == (39, 1)
    assert "row 0" in data.describe()
    assert [data.train[i][0].shape for i in (0, len(data.train) - 1)] == [(3, 32, 32)] * 2


def test_a_folder_of_parquet_files_one_file_and_a_folder_of_images_are_read(tmp_path):
    for split, count in (("train", 10), ("test", 4)):
        (tmp_path / "tables").mkdir(exist_ok=True)
        rows(count).to_parquet(tmp_path / "tables" / f"{split}.parquet")
    data = load_data(f"hf:{tmp_path / 'tables'}", IMAGES)
    assert (len(data.train), len(data.test), data.name) == (10, 4, "tables")
    rows(40).to_parquet(tmp_path / "one.parquet")
    one = load_data(f"hf:{tmp_path / 'one.parquet'}", IMAGES)
    assert (one.name, len(one.train) + len(one.val) + len(one.test)) == ("one", 40)
    for i in range(20):
        folder = tmp_path / "photos" / "train" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / f"{i}.png")
    photos = load_data(f"hf:{tmp_path / 'photos'}", IMAGES)
    assert (photos.labels, len(photos.train)) == (["cat", "dog"], 14)


@pytest.mark.parametrize("content", [b"", b"PAR1 and nothing", None])
def test_a_file_that_is_no_table_is_refused_in_words(content, tmp_path):
    file = tmp_path / "x.parquet"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match="could not be loaded"):
        load_data(f"hf:{file}", IMAGES)


def test_a_table_gives_the_same_samples_as_its_images_do_from_files(tmp_path):
    data = load_data(rows(40), IMAGES)
    x, y = data.train[3]
    file = tmp_path / "a.png"
    file.write_bytes(data.train.table[data.train.rows[3]]["image"]["bytes"])
    assert np.array_equal(x.numpy(), IMAGES.preprocessing.image(Image.open(file)).numpy())
    assert y == data.train.label(3)


def test_a_streamed_set_is_refused_in_words():
    with pytest.raises(DataError, match="streamed|no such data set"):
        load_data(rows(10).to_iterable_dataset(), IMAGES)


def test_a_class_whose_training_images_are_all_corrupt_is_refused():
    images = [{"bytes": b"no image" if i % 2 else png(i), "path": None} for i in range(20)]
    sets = hf.DatasetDict({"train": rows(20, images=images), "test": rows(4)})
    with pytest.raises(DataError, match="all corrupt.*\n.*dog"):
        load_data(sets, IMAGES, skip_bad=True)


@pytest.mark.parametrize("columns", [("coarse_label", "fine_label"), ("coarse_label", "img_id")])
def test_fine_labels_go_before_coarse_ones_and_these_before_none(columns):
    table = rows(40, [i % 4 for i in range(40)], kind=hf.Value("int64"))
    table = table.add_column(columns[1], table["label"]).remove_columns("label")
    table = table.add_column(columns[0], [i % 2 for i in range(40)])
    assert len(load_data(table, IMAGES).labels) == (4 if "fine_label" in columns else 2)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3)])
def test_a_column_of_arrays_keeps_the_bits_of_its_numbers(shape):
    kind = (hf.Array2D if len(shape) == 2 else hf.Array3D)(shape, "uint8")
    features = hf.Features({"image": kind, "label": hf.Value("int64")})
    column = [np.full(shape, 200, np.uint8)] * 8
    table = hf.Dataset.from_dict({"image": column, "label": [0, 1] * 4}, features=features)
    data = load_data(hf.DatasetDict({"train": table, "test": table}), IMAGES)
    wanted = IMAGES.preprocessing.image(Image.new("RGB", (8, 8), (200, 200, 200)))
    assert (data.train[0][0] - wanted).abs().max() == 0


@pytest.mark.parametrize("several", [False, True])
def test_a_data_set_that_is_streamed_is_refused_and_says_what_is_read_in_its_place(several):
    streamed = rows(20).to_iterable_dataset()
    given = hf.IterableDatasetDict({"train": streamed}) if several else streamed
    with pytest.raises(DataError, match=r"streamed[\s\S]*hf://datasets"):
        load_data(given, IMAGES)


@pytest.mark.parametrize(
    "more",
    [{"label": ["kind", "age"]}, {"label": "kind,age"}, {"label": "age", "problem": "regression"}],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_several_columns_are_refused_with_a_way_that_trains_them_from_one_pass(
    tmp_path, more, by_name
):
    kinds = hf.Features(
        {
            "image": hf.Image(),
            "kind": hf.ClassLabel(names=["dog", "cat"]),
            "age": hf.Value("float32"),
        }
    )

    def make(count):
        told = {"kind": [i % 2 for i in range(count)], "age": [i / 3 for i in range(count)]}
        return hf.Dataset.from_dict({"image": [picture(i) for i in range(count)], **told}, kinds)

    sets = hf.DatasetDict({"train": make(20), "test": make(6)})
    sets.save_to_disk(str(tmp_path / "set"))
    with pytest.raises(DataError) as told:
        load_data(f"hf:{tmp_path / 'set'}" if by_name else sets, IMAGES, **more)
    assert "to_parquet" in told.value.fix and "one pass" in told.value.fix
    # What it says is so.
    (tmp_path / "FOLDER").mkdir()
    for split, each in sets.items():
        each.to_parquet(str(tmp_path / "FOLDER" / f"{split}.parquet"))
    columns = load_columns(tmp_path / "FOLDER", IMAGES, DataOptions(label="kind,age"))
    assert {c: data.problem.kind for c, data in columns.items()} == {
        "kind": "single-label",
        "age": "regression",
    }
    assert [len(data.test) for data in columns.values()] == [6, 6]
    assert set(columns["kind"].labels) == {"dog", "cat"}
