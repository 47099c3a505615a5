"""Hugging Face data sets as tables, those that are not clean, and the forms in which people have them."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

import restuning
from commands import restuning as run_command
from restuning import Predictor, evaluate_task, load_backbone, load_data
from restuning._errors import DataError, RestuningWarning, UnknownNameError
from restuning._files import read_json
from restuning.data import DataOptions, load_columns
from restuning.data.collection import load_collection
from restuning.data.hub_sets import name_on_hub
from restuning.data.targets import list_targets

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
        ([0, None, 1, 1], None, "no class[\\s\\S]*{split}, row 1, column label"),
        ([0, 1, -1, 1], None, "no class[\\s\\S]*{split}, row 2, column label"),
        ([0, 1, -1, 1], "int64", "no class[\\s\\S]*{split}, row 2, column label"),
        ([0.0, float("nan"), 1.0, 1.0], "float32", "not finite[\\s\\S]*{split}, row 1"),
        (["a", "", "b", "b"], "string", "no class"),
        ([[0, 1], [0, 2], [1, 1], [1, 0]], ["int64"], "may be numbers or labels"),
        ([0, 0, 0, 0], "int64", "two classes"),
        (["a", "b", " \t", "a"], "string", "no class"),
        ([b"a", b"b", b"a", b"a"], "binary", "names of their classes"),
        ([1, 2, 1, 1], "timestamp[s]", "neither a word nor a number"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_that_are_no_classes_are_refused_in_words(labels, kind, words, split):
    value = hf.Sequence(hf.Value(kind[0])) if isinstance(kind, list) else kind and hf.Value(kind)
    clean = {
        "string": ["a", "b"],
        "binary": [b"a", b"b"],
        "float32": [0.0, 1.0],
        "['int64']": [[0, 3], [1, 3]],
    }.get(str(kind), [0, 0] if words == "two classes" else [0, 1])
    other = "test" if split == "train" else "train"
    sets = hf.DatasetDict({split: rows(4, labels, kind=value), other: rows(2, clean, kind=value)})
    with pytest.raises(DataError, match=words.format(split=split)):
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
    file.write_bytes(data.train.cells[data.train.rows[3]])
    assert np.array_equal(x.numpy(), IMAGES.preprocessing.image(Image.open(file)).numpy())
    assert y == data.train.label(3)


def test_a_streamed_set_is_refused_in_words():
    with pytest.raises(DataError, match="streamed|no such data set"):
        load_data(rows(10).to_iterable_dataset(), IMAGES)


def test_a_class_whose_training_images_are_all_corrupt_is_refused():
    images = [{"bytes": b"no image" if i % 2 else png(i), "path": None} for i in range(20)]
    sets = hf.DatasetDict({"train": rows(20, images=images), "test": rows(4)})
    with pytest.raises(DataError, match="two classes"):
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


# Columns of answers.

NAMES = ["owl", "ant", "elk"]
TAGS = ["round", "blue", "old"]
KINDS = {
    "kind": "single-label",
    "age": "regression",
    "tags": "multi-label",
    "marks": "multi-label",
    "mask": "segmentation",
    "far": "depth",
}


def several(count, seed=0):
    """Images with columns of every kind; `kind` and `marks` say their classes' names."""
    rng = np.random.default_rng(seed)
    masks = [rng.integers(0, 2, (8, 8), dtype=np.uint8) for _ in range(count)]
    columns = {
        "image": [picture(40 * i) for i in range(count)],
        "kind": [i % 2 for i in range(count)],
        "age": [i / 3 for i in range(count)],
        "tags": [[t for n, t in enumerate(TAGS) if (i >> n) % 2] for i in range(count)],
        "marks": [[n for n in range(3) if (i >> n) % 2] for i in range(count)],
        "mask": list(map(Image.fromarray, masks)),
        "far": [1.0 + mask for mask in masks],
    }
    classes = hf.ClassLabel(names=NAMES)
    features = hf.Features(
        {
            "image": hf.Image(),
            "kind": classes,
            "age": hf.Value("float32"),
            "tags": hf.Sequence(hf.Value("string")),
            "marks": hf.Sequence(classes),
            "mask": hf.Image(),
            "far": hf.Array2D((8, 8), "float32"),
        }
    )
    return hf.Dataset.from_dict(columns, features=features)


@pytest.fixture(scope="module")
def sets():
    return hf.DatasetDict({"train": several(20), "validation": several(4, 1), "test": several(6)})


@pytest.fixture(scope="module")
def saved(sets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pets"
    sets.save_to_disk(str(folder))
    return folder


@pytest.mark.filterwarnings("ignore:.*classes without a training example")
def test_columns_of_every_kind_are_trained_from_one_pass_and_asked_of(sets, saved, tmp_path):
    backbone, forwards = load_backbone("restuning-tiny"), []
    handle = backbone.model.register_forward_hook(lambda _, args, __: forwards.append(len(args[0])))
    asked = ["kind", "age", "marks", "mask"]
    # Alone a column would not know that the masks are an answer.
    found = restuning.train(
        sets.rename_column("image", "photo"),
        backbone=backbone,
        method="ridge",
        label=asked,
        classes=["no", "yes"],
        out=tmp_path / "run",
        store=tmp_path / "stores",
        report=False,
    )
    handle.remove()
    # Before and after the pass single examples, by which sites and rounding are proved.
    begin = forwards.index(20)
    assert sum(size for size in forwards[begin:] if size > 1) == 30
    told = read_json(tmp_path / "run" / "metrics.json")["columns"]
    assert {column: each["problem"] for column, each in told.items()} == {
        column: KINDS[column] for column in asked
    }
    assert found["kind"].task.labels == NAMES and found["marks"].task.labels == NAMES
    predictor = Predictor.load(tmp_path / "run")
    (answer,) = predictor(picture(3))
    assert predictor.forwards == 1 and answer["kind"].label in NAMES
    assert answer["mask"].mask.shape == (8, 8)
    # By name it is the same data: its classes, its rows, and the figures of its test split.
    for column in ("kind", "marks"):
        task = Predictor.load(tmp_path / "run" / f"{column}.task")
        judged = evaluate_task(task, f"hf:{saved}", options=DataOptions(label=column))
        metric = found[column].metric
        assert judged[metric] == pytest.approx(told[column]["test"][metric], abs=1e-6)


def test_a_saved_set_is_trained_at_the_command_line_and_is_the_data_of_its_parquet_files(
    sets, saved, tmp_path
):
    asked = ("--label", "kind,age", "--method", "ridge", "--no-report", "--out", tmp_path / "run")
    done = run_command("train", f"hf:{saved}", *asked, "--store", tmp_path / "stores")
    assert done.returncode == 0, done.stderr
    told = read_json(tmp_path / "run" / "metrics.json")["columns"]
    assert [each["problem"] for each in told.values()] == ["single-label", "regression"]
    (tmp_path / "parquet").mkdir()
    for split, each in sets.items():
        each.to_parquet(str(tmp_path / "parquet" / f"{split}.parquet"))
    for label in ("kind", "age", "tags", "marks"):
        names = (f"hf:{saved}", tmp_path / "parquet")
        one, other = (load_data(name, IMAGES, label=label) for name in names)
        assert one.identity == other.identity and one.labels == other.labels


def test_classes_keep_their_names_and_order_and_numbers_alone_are_classes_where_they_always_are(
    sets,
):
    with pytest.warns(RestuningWarning, match="without a training example[\\s\\S]*elk"):
        data = load_data(sets.remove_columns("marks"), IMAGES)
    # The only column that names classes of which each image has one; nobody named a column.
    assert data.labels == NAMES and list_targets(data.test) == [0, 1, 0, 1, 0, 1]
    assert data.assumed == ""
    plain = rows(40, [i % 3 for i in range(40)], kind=hf.Value("int64"))
    kind = load_data(plain, IMAGES)
    assert (
        kind.labels == ["0", "1", "2"] and "single-label, assumed of whole numbers" in kind.assumed
    )
    years = load_data(plain.rename_column("label", "years"), IMAGES, label="years")
    assert years.problem.kind == "regression"
    assert load_data(plain, IMAGES, problem="regression").problem.kind == "regression"
    # Names that are numbers are names.
    digits = rows(40, kind=hf.ClassLabel(names=["7", "3"]))
    assert load_data(digits, IMAGES).labels == ["7", "3"]
    asked = load_data(digits, IMAGES, problem="regression").train
    assert {float(y) for y in list_targets(asked)} == {0.0, 1.0}


def test_rows_are_drawn_once_for_all_columns_and_as_of_any_table(saved):
    whole = several(40)
    columns = load_columns(whole, IMAGES, DataOptions(label="age,tags"))
    sizes = {(len(d.train), len(d.val), len(d.test)) for d in columns.values()}
    assert sizes == {(28, 4, 8)}
    assert columns["age"].test.rows == columns["tags"].test.rows
    assert columns["age"].train.cells is columns["tags"].train.cells
    sets = hf.DatasetDict({"train": whole, "validation": several(5)})
    part = load_data(sets, IMAGES, label="age")
    assert [len(s) for s in (part.train, part.val, part.test)] == [32, 5, 8]
    assert load_collection(whole, IMAGES, DataOptions(label="age,tags")).ids[0] == "train/0"


def test_cells_of_every_kind_are_those_of_the_rows_and_pictures_stay_encoded(sets):
    asked = DataOptions(label=",".join(KINDS), classes=["no", "yes"])
    columns = load_columns(sets, IMAGES, asked)
    assert {column: data.problem.kind for column, data in columns.items()} == KINDS
    row = sets["test"][5]
    ends = {column: data.test[5][1] for column, data in columns.items()}
    assert ends["kind"] == row["kind"] and float(ends["age"]) == pytest.approx(row["age"])
    assert [columns["tags"].labels[n] for n in ends["tags"].nonzero()[:, 0]] == sorted(
        row["tags"], key=lambda y: (len(y), y)
    )
    assert ends["marks"].nonzero()[:, 0].tolist() == row["marks"]
    assert np.array_equal(np.asarray(columns["mask"].test.target(5)), np.asarray(row["mask"]))
    assert np.array_equal(np.asarray(columns["far"].test.target(5)), np.asarray(row["far"]))
    assert isinstance(columns["kind"].train.cells[0], bytes)
    cells = {column: list(sets["test"][column]) for column in row}
    kinds = hf.Features({**sets["test"].features, "mask": hf.Array2D((8, 8), "uint8")})
    arrays = hf.Dataset.from_dict({**cells, "mask": list(map(np.asarray, cells["mask"]))}, kinds)
    drawn = load_data(arrays, IMAGES, label="mask", classes=["no", "yes"])
    assert drawn.problem.kind == "segmentation" and drawn.train.target(0).size == (8, 8)
    cells["mask"][5] = picture(0, 9).convert("L")
    fars = list(map(np.asarray, cells["far"]))
    # As pictures, arrays of 16 bits and of floats are kept in TIFF.
    for kind in (np.uint16, np.float32):
        told = {"image": cells["image"], "far": [far.astype(kind) for far in fars]}
        pictures = hf.Features({"image": hf.Image(), "far": hf.Image()})
        drawn = hf.Dataset.from_dict(told, features=pictures)
        data = load_data(drawn, IMAGES, label="far", problem="depth")
        assert np.array_equal(np.asarray(data.train.target(0)), fars[data.train.images.rows[0]])
    wrong = hf.Dataset.from_dict(cells, features=sets["test"].features)
    with pytest.raises(DataError, match="another size[\\s\\S]*test, row 5, column mask"):
        load_columns(hf.DatasetDict({**sets, "test": wrong}), IMAGES, asked)


def test_splits_of_other_columns_or_classes_and_columns_that_are_not_there_are_refused():
    def refuse(words, test, **options):
        sets = hf.DatasetDict({"train": several(20), "test": test})
        with pytest.raises(DataError, match=words):
            load_columns(sets, IMAGES, DataOptions(**options))

    refuse("lacks a column[\\s\\S]*test", several(4).remove_columns("age"), label="age,kind")
    other = several(4).cast_column("kind", hf.ClassLabel(names=["ant", "owl", "elk"]))
    refuse("other classes[\\s\\S]*column kind", other, label="kind,age")
    refuse("lacks a column[\\s\\S]*'size'", several(4), label="age,size")
    refuse("names of their classes", several(4), label="mask")
    refuse("input and answer", several(4), label="mask", image="mask")
    unusual = several(20).rename_column("image", "photo")
    with pytest.raises(DataError, match="which column[\\s\\S]*--image"):
        load_data(unusual, IMAGES, label="age")
    assert len(load_data(unusual, IMAGES, label="age", image="photo").train) == 14


def test_texts_of_a_set_have_columns_as_well(tmp_path, language):
    texts = {"review": [f"a good film {i}" for i in range(20)], "stars": [i / 4 for i in range(20)]}
    hf.Dataset.from_dict({**texts, "kind": ["yes", "no"] * 10}).save_to_disk(str(tmp_path / "r"))
    asked = DataOptions(text="review", label="stars,kind")
    found = load_columns(f"hf:{tmp_path / 'r'}", language, asked)
    assert [d.problem.kind for d in found.values()] == ["regression", "single-label"]
    assert found["kind"].test[0][0].startswith("a good film")
    with pytest.raises(DataError, match="a cell of texts is none"):
        load_data(hf.Dataset.from_dict({**texts, "text": [1] * 20}), language, label="stars")


# Arguments of `load_dataset`.


def _fill(folder):
    """The same 20 images as class folders, with metadata, in a tar, and named by a csv."""
    for name in ("photos/cat", "photos/dog", "told", "tables"):
        (folder / name).mkdir(parents=True)
    told = [{"file_name": f"{i}.png", "kind": NAMES[i % 2], "age": i / 3} for i in range(20)]
    (folder / "told" / "metadata.jsonl").write_text("\n".join(map(json.dumps, told)))
    lines = []
    with tarfile.open(folder / "shots.tar", "w") as tar:
        for i in range(20):
            for place in (f"photos/{('cat', 'dog')[i % 2]}", "told"):
                (folder / place / f"{i}.png").write_bytes(png(i))
            for name, content in ((f"{i:02d}.png", png(i)), (f"{i:02d}.cls", str(i % 3).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            lines.append(f"{folder / 'told' / f'{i}.png'},{NAMES[i % 2]},{i / 3}")
    (folder / "tables" / "notes.csv").write_text("\n".join(["path,kind,age", *lines]))
    rows(20).to_parquet(str(folder / "one.parquet"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    _fill(folder)
    return folder


@pytest.mark.parametrize(
    ("builder", "argument", "place", "label", "kinds", "classes"),
    [
        ("imagefolder", "data_dir", "photos", "label", ["single-label"], ["cat", "dog"]),
        ("imagefolder", "data_dir", "told", "kind,age", ["single-label", "regression"], None),
        ("parquet", "data_files", "one.parquet", "label", ["single-label"], ["cat", "dog"]),
        ("csv", "data_files", "tables/notes.csv", "age,kind", ["regression", "single-label"], None),
        ("webdataset", "data_files", "shots.tar", "label", ["single-label"], ["0", "1", "2"]),
    ],
)
def test_kinds_of_files_are_read_as_objects_and_by_name_alike(
    files, tmp_path, builder, argument, place, label, kinds, classes
):
    given = hf.load_dataset(builder, **{argument: str(files / place)}, cache_dir=str(tmp_path))
    asked = DataOptions(label=label)
    ours = load_columns(given, IMAGES, asked)
    named = load_columns(f"hf:{builder}?{argument}={files / place}", IMAGES, asked)
    assert [data.problem.kind for data in ours.values()] == kinds
    for column, data in ours.items():
        assert (len(data.train), len(data.val), len(data.test)) == (14, 2, 4)
        assert data.identity == named[column].identity
        assert named[column].name == (files / place).stem
        assert classes is None or data.labels == classes


def test_arguments_reach_load_dataset_and_others_are_refused(files, saved, monkeypatch):
    asked = []

    def load(*given, **told):
        asked.append((given, told))
        return rows(20)

    monkeypatch.setattr(hf, "load_dataset", load)
    more = "name=fine&revision=v1.0&data_files=a%26b.parquet&data_files=c.parquet&split=train+test"
    data = load_data(f"hf:user/pets?{more}", IMAGES)
    assert asked == [
        (
            ("user/pets",),
            {
                "name": "fine",
                "revision": "v1.0",
                "data_files": ["a&b.parquet", "c.parquet"],
                "split": "train+test",
            },
        )
    ]
    assert data.name == "pets" and name_on_hub(f"hf:user/pets?{more}") == "hf:user/pets"
    assert name_on_hub("hf:csv?data_files=x.csv") is None and name_on_hub("digits") is None
    for name, words in {
        "hf:user/pets?trust_remote_code=True": "not known",
        "hf:user/pets?name=": "no value",
        "hf:user/pets?name=a&name=b": "twice",
        "hf:pandas?data_files=x.pkl": "may run code",
        "hf:csv": "no files",
        "hf:csv?data_files=x.csv&revision=v1": "in files here",
        f"hf:{saved}?name=fine": "in files here",
        f"hf:{files / 'one.parquet'}?data_dir=x": "in files here",
        f"hf:{files / 'photos'}?revision=v1": "in files here",
    }.items():
        with pytest.raises(DataError, match=words):
            load_data(name, IMAGES)
    assert len(asked) == 1
    with pytest.raises(UnknownNameError):
        load_data("hf:", IMAGES)


def test_a_configuration_a_folder_and_a_split_of_what_is_on_disk_are_chosen_by_name(
    sets, saved, tmp_path
):
    for name, count in (("small", 20), ("large", 40)):
        (tmp_path / "set" / name).mkdir(parents=True)
        rows(count).to_parquet(str(tmp_path / "set" / name / "train.parquet"))
    told = [f"- config_name: {n}\n  data_files: {n}/*.parquet\n" for n in ("small", "large")]
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{''.join(told)}---\n")
    for asked in ("name=large", "data_dir=large"):
        assert len(load_data(f"hf:{tmp_path / 'set'}?{asked}", IMAGES).train) == 28
    part = load_data(f"hf:{tmp_path / 'set'}?name=small&split=train[:50%]", IMAGES)
    assert (len(part.train), len(part.test), part.name) == (7, 2, "set")
    with pytest.raises(DataError, match="could not be loaded"):
        load_data(f"hf:{tmp_path / 'set'}?name=other", IMAGES)
    asked = DataOptions(label="age")
    one = load_columns(f"hf:{saved}?split=train", IMAGES, asked)["age"]
    assert len(one.train) + len(one.val) + len(one.test) == len(sets["train"])
    with pytest.raises(DataError, match="could not be loaded"):
        load_columns(f"hf:{saved}?split=other", IMAGES, asked)


@pytest.mark.parametrize("column", ["Image", "string"])
def test_a_data_set_of_a_hub_names_no_files_of_this_machine(column, tmp_path, tiny, monkeypatch):
    cache, away = tmp_path / "cache", tmp_path / "away"
    monkeypatch.setattr(hf.config, "HF_CACHE_HOME", cache)
    for folder in (cache, away):
        folder.mkdir()
        for n in range(10):
            Image.new("RGB", (32, 32), (20 * n, 9, 9)).save(folder / f"{n}.png")

    def make(folder):
        paths = [str(folder / f"{n}.png") for n in range(10)]
        kind = hf.Image() if column == "Image" else hf.Value("string")
        features = hf.Features({"image": kind, "label": hf.ClassLabel(names=["a", "b"])})
        labels = [n % 2 for n in range(10)]
        return hf.Dataset.from_dict({"image": paths, "label": labels}, features=features)

    monkeypatch.setattr(hf, "load_dataset", lambda *names, **how: make(away))
    with pytest.raises(DataError, match="names a file of this machine|names an image by a path"):
        load_data("hf:somebody/pets", tiny).contents()
    # Whoever gives an object has chosen what is in it.
    assert load_data(make(away), tiny).contents()["train"]["inputs"]
    if column == "Image":
        monkeypatch.setattr(hf, "load_dataset", lambda *names, **how: make(cache))
        assert load_data("hf:somebody/pets", tiny).contents()["train"]["inputs"]
