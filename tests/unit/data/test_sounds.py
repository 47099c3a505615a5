"""Sounds as data: folders, tables, what they are known by, what is refused and what is said."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import restuning
import sounds
from restuning._errors import DataError, RestuningWarning
from restuning.data import DataOptions, load_data
from restuning.data.collection import load_collection
from restuning.data.labelled import load_labelled


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    where = tmp_path_factory.mktemp("models")
    return {
        name: restuning.load_backbone(f"hf:{sounds.save(name, where / name)}", random=True)
        for name in ("ast", "wav2vec2")
    }


@pytest.fixture
def heard(backbones):
    return backbones["wav2vec2"]


def test_a_folder_of_class_folders_is_split_as_one_of_images(tmp_path, heard):
    data = load_data(sounds.folder(tmp_path / "pitch"), heard)
    assert (len(data.train), len(data.val), len(data.test)) == (16, 2, 6)
    assert (data.labels, data.kind, data.name) == (["high", "low"], "audio", "pitch")
    inputs, labels = data.collate([data.train[0], data.train[1]])
    assert set(inputs) == {"input_values", "attention_mask"}
    assert inputs["input_values"].shape == inputs["attention_mask"].shape
    assert labels.tolist() == [data.train.label(0), data.train.label(1)]
    assert data.notes["preprocessing"]["kind"] == "audio"


def test_folders_of_splits_keep_them(tmp_path, heard):
    for split in ("train", "val", "test"):
        sounds.folder(tmp_path / split, each=3)
    data = load_data(tmp_path, heard)
    assert (len(data.train), len(data.val), len(data.test)) == (6, 6, 6)
    both = load_data(tmp_path, heard, final=True)
    assert (len(both.train), both.val) == (12, None)


def test_sounds_are_known_by_their_contents_and_by_how_much_is_read(tmp_path, heard):
    first = load_data(sounds.folder(tmp_path / "a"), heard)
    other = load_data(sounds.folder(tmp_path / "b"), heard)
    assert first.contents() == other.contents()
    sounds.write(tmp_path / "b/low/00.wav", sounds.tone(310))
    assert first.contents() != other.contents()
    shorter = load_data(tmp_path / "a", heard, seconds=0.2)
    assert shorter.contents() == first.contents()
    assert shorter.notes != first.notes


def test_what_is_not_read_of_a_sound_is_said(tmp_path, heard):
    sounds.folder(tmp_path / "a", each=4)
    with pytest.warns(RestuningWarning, match=r"(?s)0\.3 seconds.*8 of 8 are longer.*--seconds"):
        data = load_data(tmp_path / "a", heard, seconds=0.3)
    assert data.train[0][0].shape == (round(0.3 * sounds.RATE),)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_data(tmp_path / "a", heard)


def test_a_backbone_of_one_length_says_so(tmp_path, backbones):
    sounds.folder(tmp_path / "a", each=2, seconds=2.0)
    with pytest.warns(RestuningWarning, match="(?s)0.96 seconds.*cut them into pieces"):
        data = load_data(tmp_path / "a", backbones["ast"])
    assert data.train[0][0].shape == (48, 16)
    with pytest.raises(DataError, match="one length only"):
        load_data(tmp_path / "a", backbones["ast"], seconds=1.0)
    with pytest.raises(DataError, match="only sounds have seconds"):
        load_data("digits", restuning.load_backbone("restuning-tiny"), seconds=1.0)


def picture(file):
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32)).save(file)


def test_images_and_sounds_in_one_folder_are_refused_by_name(tmp_path, heard):
    sounds.folder(tmp_path, each=3)
    picture(tmp_path / "low/cover.png")
    with pytest.raises(DataError, match=r"(?s)images and sounds.*cover\.png.*takes sounds"):
        load_data(tmp_path, heard)
    with pytest.raises(DataError, match=r"(?s)images and sounds.*\.wav.*takes images"):
        picture(tmp_path / "high/other.png")
        load_data(tmp_path, restuning.load_backbone("restuning-tiny", random=True))


def test_folders_without_sounds_are_refused_in_words(tmp_path, heard):
    with pytest.raises(DataError, match="folder of sounds needs a folder for each class"):
        sounds.write(tmp_path / "a/low/x.wav", sounds.tone(300))
        load_data(tmp_path / "a", heard)
    for name in ("low", "high"):
        (tmp_path / "b" / name).mkdir(parents=True)
    with pytest.raises(DataError, match=r"(?s)class folders without sounds.*\.wav"):
        load_data(tmp_path / "b", heard)
    with pytest.raises(DataError, match="a backbone of sounds needs sounds"):
        load_data("digits", heard)


def test_corrupt_sounds_are_an_error_or_left_out_by_name(tmp_path, heard):
    sounds.folder(tmp_path / "a")
    (tmp_path / "a/low/03.wav").write_bytes(b"no sound")
    data = load_data(tmp_path / "a", heard)
    with pytest.raises(DataError, match=r"03\.wav"):
        [data.train[n] for n in range(len(data.train))]
        [data.test[n] for n in range(len(data.test))]
        [data.val[n] for n in range(len(data.val))]
    left = load_data(tmp_path / "a", heard, skip_bad=True)
    assert left.skipped == 1
    assert "low/03.wav" in left.describe()


def test_a_sound_outside_of_classes_and_other_files_are_counted(tmp_path, heard):
    sounds.folder(tmp_path / "a")
    sounds.write(tmp_path / "a/loose.wav", sounds.tone(300))
    (tmp_path / "a/low/notes.txt").write_text("no sound")
    told = load_data(tmp_path / "a", heard).describe()
    assert "1 sound in no class folder (loose.wav)" in told
    assert "1 file that is no sound (low/notes.txt)" in told


def table(where, rows=40):
    lines = ["sound,pitch,hertz"]
    for n in range(rows):
        hertz = 200 + 40 * n
        sounds.write(where / f"clips/{n}.wav", sounds.tone(hertz, 0.3))
        lines.append(f"clips/{n}.wav,{'low' if hertz < 900 else 'high'},{hertz}")
    (where / "table.csv").write_text("\n".join(lines))
    return where / "table.csv"


def test_a_table_names_its_sounds_in_a_column_and_asks_for_any_answer(tmp_path, heard):
    file = table(tmp_path)
    columns = restuning.data.load_columns(
        file, heard, DataOptions(audio="sound", label=["pitch", "hertz"])
    )
    assert {name: data.problem.kind for name, data in columns.items()} == {
        "pitch": "single-label",
        "hertz": "regression",
    }
    assert all(data.kind == "audio" for data in columns.values())
    (prepared, target) = columns["hertz"].train[0]
    inputs, targets = columns["hertz"].collate([columns["hertz"].train[n] for n in range(3)])
    assert prepared.dim() == 1
    assert targets.shape == (3, 1)
    assert len(inputs["input_values"]) == 3
    unasked = load_data(file, heard, label="pitch")
    assert unasked.labels == columns["pitch"].labels
    with pytest.raises(DataError, match=r"(?s)--image sound.*--audio"):
        load_data(file, heard, image="sound", label="pitch")
    with pytest.raises(DataError, match=r"(?s)--audio sound.*takes images"):
        tiny = restuning.load_backbone("restuning-tiny", random=True)
        load_data(file, tiny, audio="sound", label="pitch")


def test_a_table_in_memory_holds_samples_bytes_or_paths(tmp_path, heard):
    waves = [sounds.tone(200 + 60 * n, 0.3) for n in range(20)]
    answers = ["low" if n < 10 else "high" for n in range(20)]
    files = [sounds.write(tmp_path / f"{n}.wav", w, subtype="FLOAT") for n, w in enumerate(waves)]
    ways = [
        [(wave, sounds.RATE) for wave in waves],
        [{"array": wave, "sampling_rate": sounds.RATE} for wave in waves],
        [{"bytes": file.read_bytes(), "path": None} for file in files],
        list(map(str, files)),
    ]
    read = [
        load_data({"audio": cells, "label": answers}, heard, audio="audio").train[3][0]
        for cells in ways
    ]
    assert all(torch.equal(each, read[0]) for each in read)
    hf = pytest.importorskip("datasets")
    stored = [ways[2], [{"bytes": None, "path": each} for each in ways[3]]]
    for cells in stored:
        table = hf.Dataset.from_dict({"heard": cells, "label": [int(n >= 10) for n in range(20)]})
        kinds = {"heard": hf.Audio(), "label": hf.ClassLabel(names=["low", "high"])}
        # By its type, whatever it is called; nothing is decoded before it is asked for.
        data = load_data(table.cast(hf.Features(kinds)), heard)
        assert data.labels == ["low", "high"] and torch.equal(data.train[3][0], read[0])


def test_a_sound_of_a_table_stays_in_its_folder_and_must_be_there(tmp_path, heard):
    file = table(tmp_path)
    rows = file.read_text().replace("clips/3.wav", "../3.wav")
    file.write_text(rows)
    with pytest.raises(DataError, match="a sound of a table lies outside"):
        load_data(file, heard, label="pitch")
    file.write_text(rows.replace("../3.wav", "clips/none.wav"))
    with pytest.raises(DataError, match="a sound of a table is not there"):
        load_data(file, heard, label="pitch")


def test_a_folder_is_a_collection_and_one_class_is_enough_for_an_update(tmp_path, heard):
    sounds.folder(tmp_path / "a", each=3)
    found = load_collection(tmp_path / "a/low", heard)
    assert found.ids == ["00.wav", "01.wav", "02.wav"]
    assert found.data.kind == "audio"
    for file in (tmp_path / "a/high").iterdir():
        file.unlink()
    (tmp_path / "a/high").rmdir()
    given = load_labelled(str(tmp_path / "a"), heard)
    assert given.names == ["low"]
    assert len(given.examples) == 3
    assert given.collate([given.examples[0]])[0]["input_values"].shape[0] == 1


def test_sounds_are_not_augmented(tmp_path, heard):
    sounds.folder(tmp_path, each=3)
    with pytest.raises(restuning._errors.UnknownNameError, match="not augmented"):
        load_data(tmp_path, heard, augment="flip")


def test_a_silent_sound_is_a_sound(backbones):
    for backbone in backbones.values():
        audio = backbone.preprocessing
        made = audio.prepare(audio.read((np.zeros(4000, np.float32), sounds.RATE)))
        assert torch.isfinite(made).all()


def test_what_is_kept_of_other_seconds_is_another_preprocessing(heard):
    longer = replace(heard, preprocessing=heard.preprocessing.with_seconds(20.0))
    assert longer.preprocessing != heard.preprocessing
