"""Collections: which inputs a folder, a file or a table stands for, and what they are called."""

import numpy as np
import pytest
from PIL import Image

from restuning import embed, load_backbone, retrieve
from restuning._errors import DataError
from restuning.data import DataOptions
from restuning.data.collection import load_collection
from restuning.features import StoreOptions


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("restuning-tiny")


def draw(file, shade=0):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade, 90, 90)).save(file)


def test_class_folders_are_the_data_set_that_training_reads(backbone, tmp_path):
    for number in range(20):
        draw(tmp_path / "pets" / ("cat", "dog")[number % 2] / f"{number}.png", number)
    found = load_collection(tmp_path / "pets", backbone)
    assert found.splits == ["train", "val", "test"]
    assert len(found.ids) == 20
    assert found.ids[0] == "cat/0.png" or found.ids[0].startswith("cat/")
    # With a picture in no class it is all images of a folder, in the order of their names.
    draw(tmp_path / "pets" / "loose.png")
    found = load_collection(tmp_path / "pets", backbone)
    assert found.splits == ["train"]
    assert len(found.ids) == 21
    assert found.ids == sorted(found.ids)


def test_one_image_is_a_collection_and_so_are_albums_and_tables(backbone, tmp_path):
    for number in range(10):
        draw(tmp_path / "album" / f"{number}.png", number)
    one = load_collection(tmp_path / "album" / "3.png", backbone)
    assert one.ids == ["3.png"]
    lines = [f"album/{n}.png,{'ab'[n % 2]}" for n in range(10)]
    (tmp_path / "table.csv").write_text("\n".join(["path,kind", *lines]))
    found = load_collection(
        tmp_path / "table.csv", backbone, DataOptions(image="path", label="kind")
    )
    assert sorted(found.ids) == [f"album/{n}.png" for n in range(10)]
    assert load_collection("digits", backbone).ids[-1].startswith("test/")
    columns = {"image": np.zeros((9, 8, 8, 3), "uint8"), "label": list("abcabcabc")}
    assert len(load_collection(columns, backbone).ids) == 9


def test_files_of_texts_are_their_rows(language, tmp_path):
    (tmp_path / "x.txt").write_text("a cat\n\na dog\n")
    found = load_collection(tmp_path / "x.txt", language)
    # As an editor numbers them, so that an id leads back to its line.
    assert (found.ids, found.texts) == (["1", "3"], ["a cat", "a dog"])
    # Without a column of answers, which nobody asks for.
    (tmp_path / "x.csv").write_text("review\ngood\nbad\n")
    found = load_collection(tmp_path / "x.csv", language, DataOptions(text="review"))
    assert found.texts == ["good", "bad"]
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(DataError, match="without texts"):
        load_collection(tmp_path / "none.txt", language)


def test_texts_are_embedded_and_found_by_words(language, tmp_path):
    (tmp_path / "x.txt").write_text("a film\nfine fine fine fine\nthe plot\n")
    how = {"options": StoreOptions(tmp_path / "s", progress=False)}
    vectors, ids = embed(tmp_path / "x.txt", language, **how)
    assert vectors.shape[0] == len(ids) == 3
    found = retrieve(tmp_path / "x.txt", "the plot", language, **how)
    assert (found[0].id, found[0].text) == ("3", "the plot")
    assert found[0].score == pytest.approx(1.0, abs=1e-4)
    draw(tmp_path / "x.png")
    with pytest.raises(DataError, match="reads texts"):
        retrieve(tmp_path / "x.txt", tmp_path / "x.png", language, **how)
