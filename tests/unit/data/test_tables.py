"""Tables: columns of answers of any kind, and what is wrong with a cell, by file and row."""

import shutil
from decimal import Decimal

import numpy as np
import pytest
import scenes
import torch

from restuning import Predictor, evaluate_task, load_backbone, load_data, methods, save
from restuning._errors import DataError
from restuning._files import write_text
from restuning.data import load_columns
from restuning.data.data import DataOptions
from restuning.data.identity import identify
from restuning.data.targets import for_store, list_targets, stack_targets
from restuning.problems import MultiLabel, Regression, SingleLabel
from restuning.training.run import Source
from zoo import folders

ROWS = 24


@pytest.fixture(scope="module")
def tiny():
    return load_backbone("restuning-tiny")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return scenes.write_table(tmp_path_factory.mktemp("scenes"), ROWS, size=24)


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    return load_backbone(f"hf:{folders.bert(tmp_path_factory.mktemp('language'))}")


def columns(name, backbone, label="ground,shapes,count", **options):
    return load_columns(name, backbone, DataOptions(label=label, **options))


def written(table, cells, column="answer"):
    """The table's images with other answers."""
    lines = table.read_text().splitlines()
    paths = [line.split(",")[0] for line in lines[1 : 1 + len(cells)]]
    file = table.with_name("other.csv")
    rows = [f'{path},"{cell}"' for path, cell in zip(paths, cells, strict=True)]
    write_text(file, "\n".join([f"path,{column}", *rows]) + "\n")
    return file


def test_each_column_is_a_data_set_of_its_kind_on_the_same_inputs(table, tiny):
    found = columns(table, tiny)
    assert [type(data.problem) for data in found.values()] == [SingleLabel, MultiLabel, Regression]
    inputs = {identify(data.train).inputs for data in found.values()}
    assert len(inputs) == 1
    assert len({identify(data.train).labels for data in found.values()}) == 3
    assert len({for_store(data).identity for data in found.values()}) == 1
    sizes = {(len(d.train), len(d.val), len(d.test)) for d in found.values()}
    assert sizes == {(17, 2, 5)}
    assert found["count"].labels == ["count"]
    assert found["count"].num_classes == 1
    assert found["shapes"].num_classes == len(found["shapes"].labels)
    assert "1 number (count)" in found["count"].describe()
    assert "assumed" in found["count"].assumed


def test_one_column_alone_has_the_split_that_it_has_among_others(table, tiny):
    together = columns(table, tiny)["ground"]
    alone = load_data(table, tiny, label="ground")
    for split in ("train", "val", "test"):
        ours, theirs = getattr(together, split), getattr(alone, split)
        assert identify(ours) == identify(theirs)
    with pytest.raises(DataError, match="several columns"):
        load_data(table, tiny, label="ground,count")


def test_targets_are_what_the_cells_say(table, tiny):
    found = columns(table, tiny)
    rows = {line.split(",")[0]: line.split(",")[1:] for line in table.read_text().splitlines()[1:]}
    for place, (path, target) in enumerate(found["count"].train.samples):
        ground, shapes, count = rows[str(path.relative_to(table.parent))]
        assert target.tolist() == [float(count)]
        image, same = found["count"].train[place]
        assert image.shape[0] == 3
        assert torch.equal(same, target)
        tags = found["shapes"].train.samples[place][1]
        names = found["shapes"].labels
        there = {names[k] for k in tags.nonzero().flatten().tolist()}
        assert there == {tag for tag in shapes.split("|") if tag}
        assert found["ground"].labels[found["ground"].train.label(place)] == ground
    assert stack_targets(found["shapes"].val).shape == (2, len(names))
    assert len(list_targets(found["ground"].test)) == 5


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1.5", "2", "-3e2", ".5"] * 3, "regression"),
        (["0", "1", "1", "0"] * 3, "single-label"),
        (["a|b", "a", "", "b"] * 3, "multi-label"),
        (["a;b", "a", "c", "b"] * 3, "multi-label"),
        (["cat", "dog", "12", "cat"] * 3, "single-label"),
    ],
)
def test_the_problem_is_found_from_the_cells_and_named(table, tiny, cells, kind):
    data = load_data(written(table, cells), tiny, image="path", label="answer")
    assert data.problem.kind == kind
    assert f"{kind}, assumed of" in data.assumed


def test_a_problem_that_is_named_is_taken(table, tiny):
    file = written(table, ["1", "2", "3"] * 4)
    data = load_data(file, tiny, label="answer", problem="single-label")
    assert data.labels == ["1", "2", "3"]
    assert not data.assumed
    data = load_data(file, tiny, label="answer", problem="answer=multi-label")
    assert data.problem == MultiLabel()
    with pytest.raises(DataError, match="no such problem"):
        load_data(file, tiny, label="answer", problem="ranking")
    with pytest.raises(DataError, match="no answer"):
        load_data(file, tiny, label="answer", problem="other=regression")


@pytest.mark.parametrize(
    ("cell", "kind", "what"),
    [
        ("many", "regression", "a number of a table is none"),
        ("", "regression", "no number"),
        ("nan", "regression", "a number of a table is none"),
        ("1e999", "regression", "not finite"),
        ("1,5", "regression", "a number of a table is none"),
        ("", "single-label", "no class"),
    ],
)
def test_a_cell_that_is_no_answer_is_refused_with_its_file_and_row(table, tiny, cell, kind, what):
    file = written(table, ["1", "2", "3", cell] + ["1", "2"] * 4)
    with pytest.raises(DataError, match=what) as told:
        load_data(file, tiny, label="answer", problem=kind)
    assert str(told.value.where) == f"{file}, line 5, column answer"


def test_numbers_with_a_comma_are_read_where_semicolons_separate_cells(table, tiny):
    paths = [line.split(",")[0] for line in table.read_text().splitlines()[1:13]]
    file = table.with_name("excel.csv")
    rows = [f"{path};{n},5" for n, path in enumerate(paths)]
    write_text(file, "\n".join(["path;answer", *rows]) + "\n")
    data = load_data(file, tiny, label="answer")
    assert {y.item() % 1 for y in list_targets(data.train)} == {0.5}


def answers(cells, backbone, problem=None):
    """Data of images of noise with these answers, one after the other until there are enough."""
    images = np.random.default_rng(0).integers(0, 255, (ROWS, 8, 8, 3), dtype=np.uint8)
    if isinstance(cells, list):
        cells = (cells * ROWS)[:ROWS]
    return columns({"image": images, "y": cells}, backbone, "y", problem=problem)["y"]


def test_what_pandas_and_numpy_call_missing_is_no_class_and_no_label(tiny):
    pandas = pytest.importorskip("pandas")
    words = pandas.DataFrame({"y": pandas.array(["cat", "dog", None], dtype="string")})["y"]
    for empty in (
        words.tolist()[2],
        pandas.NaT,
        np.float32("nan"),
        Decimal("nan"),
        torch.tensor(np.nan),
    ):
        with pytest.raises(DataError, match="no class: row 2"):
            answers(["cat", "dog", empty], tiny, "single-label")
        with pytest.raises(DataError, match="is no label: row 2"):
            answers(["cat", "dog", empty], tiny, "multi-label")
        with pytest.raises(DataError, match="no label: row 2"):
            answers([["cat"], ["dog"], ["dog", empty]], tiny)
        with pytest.raises(DataError, match=r"no number|not finite"):
            answers([1.5, 2.5, empty], tiny, "regression")


def test_lists_of_ones_are_a_table_of_labels_and_other_numbers_are_none(tiny):
    ones = [[0, 1, 0], [1, 1, 0], [0, 0, 1]]
    for given in (ones, list(map(np.array, ones)), list(map(torch.tensor, ones))):
        data = answers(given, tiny)
        assert data.labels == ["0", "1", "2"]
        assert {tuple(y.int().tolist()) for y in list_targets(data.train)} == set(map(tuple, ones))
    with pytest.raises(DataError, match="numbers or labels"):
        answers([[12, 30], [14, 7]], tiny)
    assert answers([[12, 30], [14, 7]], tiny, "regression").num_classes == 2
    assert answers([[12, 30], [14, 7]], tiny, "multi-label").labels == ["7", "12", "14", "30"]
    for wrong in ([12, 30], [0.1, 0.9]):
        with pytest.raises(DataError, match="of 0 and 1: row 0"):
            answers(np.array([wrong] * ROWS), tiny, "multi-label")
    with pytest.raises(DataError, match="no label: row 0"):
        answers([[0.1, 0.9], [0.5, 0.5]], tiny, "multi-label")


def test_numbers_of_any_type_are_numbers_and_one_word_among_them_is_refused(tiny):
    for given in ([torch.tensor(1.5), torch.tensor(2.5)], [Decimal("1.5"), Decimal("2.5")]):
        data = answers(given, tiny)
        assert data.problem.kind == "regression"
        assert {y.item() for y in list_targets(data.train)} == {1.5, 2.5}
    with pytest.raises(DataError, match="one is none: row 3 of the table"):
        answers([*map(str, range(3)), "N/A", *map(str, range(20))], tiny)
    assert answers(["1", "0", "1.0", "0.0"], tiny).labels == ["0", "1"]


def test_numbers_that_float32_does_not_hold_are_refused(tiny):
    with pytest.raises(DataError, match="too close together"):
        answers([1700000000000 + 1000 * k for k in range(ROWS)], tiny)
    with pytest.raises(DataError, match="beyond float32: row 1"):
        answers([1.0, 1e39], tiny)
    assert answers([1e6 + k for k in range(ROWS)], tiny).problem.kind == "regression"
    assert answers([0.1], tiny).problem.deviation == (1.0,)


def test_a_table_beside_class_folders_is_taken_where_it_is_asked_for(table, tiny, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for n in range(6):
            shutil.copy(table.parent / "images" / f"{n:04}.png", tmp_path / name)
    lines = [f"{y}/{n:04}.png,{n}.5" for y in ("cat", "dog") for n in range(6)]
    file = tmp_path / "train.csv"
    write_text(file, "\n".join(["path,age", *lines]) + "\n")
    with pytest.raises(DataError, match="a table and class folders"):
        load_data(tmp_path, tiny)
    for asked in ({"label": "age"}, {"label": "age", "image": "path"}):
        assert load_data(tmp_path, tiny, **asked).problem.kind == "regression"
    pandas = pytest.importorskip("pandas")
    pandas.read_csv(file).to_parquet(tmp_path / "train.parquet")
    file.unlink()
    assert load_data(tmp_path, tiny).labels == ["cat", "dog"]


def test_a_text_task_of_a_plain_csv_is_not_tested_as_a_table(language, tmp_path):
    file = tmp_path / "reviews.csv"
    rows = [f"{word} film,{word}" for word in ["good", "bad"] * 10]
    write_text(file, "\n".join(["text,verdict", *rows]) + "\n")
    data, host = load_data(file, language, label="verdict"), language.host()
    task = methods.build("linear", host, num_classes=2)
    task.labels = data.labels
    said = data.notes["preprocessing"]
    name = f"hf:{language.name.removeprefix('hf:')}"
    path = save(task, host, tmp_path / "x.task", backbone=name, preprocessing=said)
    predictor = Predictor.load(path, backbone=language)
    for asked in ({"label": "verdict", "problem": "single-label"}, {"label": ["verdict"]}):
        with pytest.raises(DataError, match="one class a row"):
            evaluate_task(predictor, file, DataOptions(**asked))
    assert evaluate_task(predictor, file, DataOptions(label="verdict"))["count"] == len(data.test)


def test_options_that_would_change_nothing_are_refused(table, tiny):
    for said in ("count=regression,multi-label", "count=regression,count=single-label"):
        with pytest.raises(DataError, match="for no column, or twice"):
            columns(table, tiny, "ground,count", problem=said)
    with pytest.raises(DataError, match="named twice"):
        columns(table, tiny, "ground,ground")
    with pytest.raises(DataError, match="only a table"):
        load_data("digits", tiny, label=["a", "b"])
    loaded = load_data(table, tiny, label="ground")
    for option in ({"problem": "regression"}, {"image": "path"}, {"label": "count"}):
        with pytest.raises(DataError, match="taken as they are"):
            Source(loaded, **option).load(tiny)


def test_a_column_that_is_there_twice_and_texts_for_images_are_refused(tiny, table, tmp_path):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame([["a.png", 1, 2]] * 3, columns=["path", "y", "y"])
    with pytest.raises(DataError, match="a column twice"):
        columns(frame, tiny, "y")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "twice.parquet"
    parquet.write_table(pyarrow.table([["a.png"], [1], [2]], names=["path", "y", "y"]), file)
    with pytest.raises(DataError, match="a column twice"):
        columns(file, tiny, "y")
    write_text(tmp_path / "texts.csv", f"text,y\n{'word ' * 1000},1\n")
    for data in (tmp_path / "texts.csv", {"text": ["word " * 1000], "y": [1]}):
        with pytest.raises(DataError, match="not there"):
            columns(data, tiny, "y", image="text")


def test_images_that_are_not_there_or_outside_of_the_folder_are_refused(table, tiny):
    file = table.with_name("lost.csv")
    write_text(file, "path,answer\nimages/none.png,1.5\n")
    with pytest.raises(DataError, match="not there: .*lost.csv, line 2"):
        load_data(file, tiny, label="answer")
    (file.parent / "circle").symlink_to(file.parent / "circle")
    for name in ("../../secret.png", "circle", "circle/a.png"):
        write_text(file, f"path,answer\n{name},1.5\n")
        with pytest.raises(DataError, match="outside of its folder"):
            load_data(file, tiny, label="answer")
    write_text(file, "path,answer\n,1.5\n")
    with pytest.raises(DataError, match="names no image"):
        load_data(file, tiny, label="answer")


def test_columns_that_are_not_there_are_named(table, tiny):
    with pytest.raises(DataError, match="lacks a column") as told:
        columns(table, tiny, "ground,age")
    assert "'age'" in told.value.found
    with pytest.raises(DataError, match="input and answer"):
        columns(table, tiny, "path,ground", image="path")
    with pytest.raises(DataError, match="which column"):
        columns({"photo": [1], "y": [2]}, tiny, "y")
    with pytest.raises(DataError, match="only a table"):
        load_data("digits", tiny, image="path")


def test_corrupt_images_are_left_out_of_all_columns(table, tiny):
    broken = table.parent / "images" / "broken.png"
    broken.write_bytes(b"no image")
    file = table.with_name("broken.csv")
    write_text(file, table.read_text() + "images/broken.png,sand,circle,3\n")
    found = columns(file, tiny, skip_bad=True)
    assert all(data.skipped == 1 for data in found.values())


def test_a_frame_columns_and_dictionaries_are_read_as_a_file_is(table, tiny):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_csv(table, keep_default_na=False)
    frame["path"] = [str(table.parent / path) for path in frame["path"]]
    by_column = {name: frame[name].tolist() for name in frame.columns}
    by_row = [dict(row) for _, row in frame.iterrows()]
    wanted = columns(table, tiny)
    for given in (frame, by_column, by_row):
        found = columns(given, tiny)
        for name, data in wanted.items():
            assert identify(found[name].train) == identify(data.train)
            assert found[name].labels == data.labels
    del by_row[3]["count"]
    with pytest.raises(DataError, match="example 3"):
        columns(by_row, tiny)


def test_arrays_of_images_and_of_answers_are_columns(tiny):
    images = np.random.default_rng(0).integers(0, 255, (20, 24, 24, 3), dtype=np.uint8)
    numbers = np.linspace(0, 1, 20)
    ones = np.eye(4, dtype=np.int64)[np.arange(20) % 4]
    given = {"image": images, "angle": numbers, "tags": ones, "two": np.stack([numbers] * 2, 1)}
    found = columns(given, tiny, "angle,tags,two")
    assert [data.problem.kind for data in found.values()] == [
        "regression",
        "multi-label",
        "regression",
    ]
    assert found["tags"].labels == ["0", "1", "2", "3"]
    assert found["two"].labels == ["two 0", "two 1"]
    assert len(found["two"].problem.mean) == 2
    words = {"image": images, "y": [[], *[["a"], ["b", "a"]] * 9, []]}
    assert columns(words, tiny, "y")["y"].labels == ["a", "b"]
    with pytest.raises(DataError, match="not finite: row 0 of the table"):
        columns({"image": images, "y": np.full(20, np.nan)}, tiny, "y")
    with pytest.raises(DataError, match="other lengths"):
        columns({"image": images, "y": numbers[:3]}, tiny, "y")


def test_parquet_keeps_numbers_and_lists(table, tiny):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    paths = [f"images/{n:04}.png" for n in range(ROWS)]
    tags = [["a"] if n % 2 else ["a", "b"] for n in range(ROWS)]
    numbers = [float(n) for n in range(ROWS)]
    file = table.with_name("table.parquet")
    made = pyarrow.table({"path": paths, "tags": tags, "age": numbers})
    parquet.write_table(made, file)
    found = columns(file, tiny, ["tags", "age"])
    assert found["tags"].labels == ["a", "b"]
    assert found["age"].problem.kind == "regression"
    lost = [None, *numbers[1:]]
    parquet.write_table(made.set_column(2, "age", pyarrow.array(lost)), file)
    with pytest.raises(DataError, match="no number: .*table.parquet, row 0"):
        columns(file, tiny, ["age"])


def test_files_for_each_split_keep_theirs_and_bring_no_new_class(table, tiny):
    lines = table.read_text().splitlines()
    head, rows = lines[0], [line.replace("images/", "") for line in lines[1:]]
    for split, part in (("train", rows[:16]), ("val", rows[16:20]), ("test", rows[20:])):
        write_text(table.parent / "images" / f"{split}.csv", "\n".join([head, *part]) + "\n")
    found = columns(table.parent / "images", tiny, "count")["count"]
    assert (len(found.train), len(found.val), len(found.test)) == (16, 4, 4)
    write_text(table.parent / "images" / "test.csv", f"{head}\n0000.png,snow,circle,3\n")
    with pytest.raises(DataError, match="training does not have"):
        columns(table.parent / "images", tiny, "ground")


def test_texts_have_columns_as_well(language, tmp_path):
    file = tmp_path / "reviews.csv"
    rows = [f'"{word} film",{word},{n}.5,a|b' for n, word in enumerate(["good", "bad"] * 10)]
    write_text(file, "\n".join(["text,verdict,stars,tags", *rows]) + "\n")
    found = columns(file, language, "verdict,stars,tags")
    assert [data.problem.kind for data in found.values()] == [
        "single-label",
        "regression",
        "multi-label",
    ]
    inputs, targets = found["stars"].collate([found["stars"].train[n] for n in range(3)])
    assert targets.shape == (3, 1)
    assert inputs["input_ids"].shape[0] == 3
    assert len({for_store(data).identity for data in found.values()}) == 1
    assert found["verdict"].notes["preprocessing"]["table"] is True
    # A csv of one class a row is read as ever.
    assert "table" not in load_data(file, language, label="verdict").notes["preprocessing"]
