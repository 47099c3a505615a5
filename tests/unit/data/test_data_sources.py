"""Data sets from every source, written here as their libraries write them; errors in words."""

import csv
import io
import re
import struct

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from restuning import RestuningError, load_data
from restuning._errors import DataError, UnknownNameError
from restuning.backbones import Backbone, Preprocessing
from restuning.data import read_image, read_list

hf = pytest.importorskip("datasets")
pytest.importorskip("transformers")
sets = pytest.importorskip("torchvision.datasets")

SIZE = 16
JPEG = 12  # grey levels: what quality 95 without chroma subsampling loses on smooth colours
RNG = np.random.default_rng(0)
IMAGES = Backbone("images", nn.Identity(), (), {}, Preprocessing((SIZE, SIZE)))
ANY = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def noise(height=20, width=30):
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def grey(level):
    """An image that tells which one it is."""
    return Image.new("RGB", (SIZE, SIZE), (level,) * 3)


def levels(split):
    return [round((split[i][0].mean().item() + 1) / 2 * 255) for i in range(len(split))]


def classes(split):
    return [int(split[i][1]) for i in range(len(split))]


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise().save(path)


# ------------------------------------------------------------- hf: data sets


def hub(rows, names=("cat", "dog"), image="image", label="label"):
    """Rows of (level, label)."""
    kind = hf.ClassLabel(names=list(names)) if names else hf.Value("int64")
    return hf.Dataset.from_dict(
        {image: [grey(x) for x, _ in rows], label: [y for _, y in rows]},
        features=hf.Features({image: hf.Image(), label: kind}),
    )


def test_a_saved_data_set_with_splits_keeps_them_and_its_class_names(tmp_path):
    parts = {
        "train": [(10, 0), (20, 1), (30, 1)],
        "validation": [(40, 1), (50, 0)],
        "test": [(60, 1)],
    }
    hf.DatasetDict({k: hub(v) for k, v in parts.items()}).save_to_disk(tmp_path)
    data = load_data(f"hf:{tmp_path}", IMAGES)
    assert data.labels == ["cat", "dog"]
    for split, rows in zip((data.train, data.val, data.test), parts.values(), strict=True):
        assert list(zip(levels(split), classes(split), strict=True)) == rows
    final = load_data(f"hf:{tmp_path}", IMAGES, final=True)
    assert levels(final.train) == [10, 20, 30, 40, 50]
    assert final.val is None


def test_a_saved_data_set_without_splits_is_divided_once_and_for_all(tmp_path):
    rows = [(x, x % 2) for x in range(0, 200, 5)]
    hub(rows).save_to_disk(tmp_path)
    data = load_data(f"hf:{tmp_path}", IMAGES)
    seen = [x for s in (data.train, data.val, data.test) for x in levels(s)]
    assert sorted(seen) == [x for x, _ in rows]
    assert all(set(classes(s)) == {0, 1} for s in (data.train, data.val, data.test))
    assert data.identity == load_data(f"hf:{tmp_path}", IMAGES).identity


@pytest.mark.parametrize(("image", "label"), [("img", "fine_label"), ("image", "labels")])
def test_columns_under_their_other_common_names_are_found(image, label, tmp_path):
    hub([(x, x % 2) for x in range(20)], image=image, label=label).save_to_disk(tmp_path)
    assert load_data(f"hf:{tmp_path}", IMAGES).labels == ["cat", "dog"]


def test_labels_without_names_are_named_by_their_numbers(tmp_path):
    hub([(x, x % 3) for x in range(30)], names=()).save_to_disk(tmp_path)
    assert load_data(f"hf:{tmp_path}", IMAGES).labels == ["0", "1", "2"]


@pytest.mark.parametrize("columns", [{"image": "picture"}, {"label": "kind"}])
def test_columns_are_found_by_their_types_and_missing_ones_refused_with_those_there_are(
    columns, tmp_path
):
    hub([(x, x % 2) for x in range(20)], **columns).save_to_disk(tmp_path)
    assert load_data(f"hf:{tmp_path}", IMAGES).labels == ["cat", "dog"]
    with pytest.raises(DataError, match="|".join(columns.values())):
        load_data(f"hf:{tmp_path}", IMAGES, label="no-such-column")


def test_splits_without_a_train_split_are_refused_in_words(tmp_path):
    hf.DatasetDict({"test": hub([(0, 0), (1, 1)])}).save_to_disk(tmp_path)
    with pytest.raises(DataError, match="test"):
        load_data(f"hf:{tmp_path}", IMAGES)


def test_a_validation_split_that_is_not_brought_is_none(tmp_path):
    rows = [(x, x % 2) for x in range(20)]
    hf.DatasetDict({"train": hub(rows), "test": hub(rows)}).save_to_disk(tmp_path)
    data = load_data(f"hf:{tmp_path}", IMAGES)
    assert data.val is None
    assert " 0 val" not in data.describe()


def test_a_validation_split_that_is_brought_is_kept_where_test_is_not(tmp_path):
    train, val = [(x, x % 2) for x in range(40)], [(x, x % 2) for x in range(100, 120)]
    hf.DatasetDict({"train": hub(train), "validation": hub(val)}).save_to_disk(tmp_path)
    data = load_data(f"hf:{tmp_path}", IMAGES)
    assert levels(data.val) == [x for x, _ in val]


def test_labels_that_are_words_are_refused_or_become_classes(tmp_path):
    rows = {"image": [grey(x) for x in range(20)], "label": ["cat", "dog"] * 10}
    features = hf.Features({"image": hf.Image(), "label": hf.Value("string")})
    hf.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path)
    try:
        assert load_data(f"hf:{tmp_path}", IMAGES).labels == ["cat", "dog"]
    except DataError as error:
        assert "label" in str(error)


def test_a_test_split_without_labels_is_refused(tmp_path):
    train = [(x, x % 2) for x in range(20)]
    parts = {"train": hub(train), "test": hub([(1, -1), (2, -1)])}
    hf.DatasetDict(parts).save_to_disk(tmp_path)
    with pytest.raises(DataError):
        load_data(f"hf:{tmp_path}", IMAGES)


def test_a_folder_that_is_no_saved_data_set_and_an_unreachable_name_are_refused(tmp_path):
    for name in (tmp_path, "no-such-owner/no-such-set"):
        with pytest.raises(DataError, match="Hugging Face"):
            load_data(f"hf:{name}", IMAGES)


# ----------------------------------------------------- torchvision: data sets


def mnist(root, train, test):
    """The idx files of MNIST, from rows of (level, label)."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for word, rows in (("train", train), ("t10k", test)):
        pixels = b"".join(bytes([x]) * 28 * 28 for x, _ in rows)
        header = struct.pack(">4i", 0x803, len(rows), 28, 28)
        (folder / f"{word}-images-idx3-ubyte").write_bytes(header + pixels)
        labels = struct.pack(">2i", 0x801, len(rows)) + bytes(y for _, y in rows)
        (folder / f"{word}-labels-idx1-ubyte").write_bytes(labels)


def test_mnist_s_own_files_are_read_by_name(tmp_path):
    train, test = [(x, x % 10) for x in range(200)], [(x, x % 10) for x in range(200, 230)]
    mnist(tmp_path, train, test)
    data = load_data("torchvision:MNIST", IMAGES, root=tmp_path)
    assert data.labels == list(sets.MNIST.classes)
    assert list(zip(levels(data.test), classes(data.test), strict=True)) == test
    assert sorted(levels(data.train) + levels(data.val)) == [x for x, _ in train]
    assert set(classes(data.val)) == set(range(10))
    final = load_data("torchvision:MNIST", IMAGES, root=tmp_path, final=True)
    assert sorted(levels(final.train)) == [x for x, _ in train]


def test_a_data_set_that_is_asked_for_by_split_is_read_by_name(tmp_path):
    for split in ("train", "valid", "test"):
        for name in ("negative", "positive"):
            for i in range(10):
                picture(tmp_path / "rendered-sst2" / split / name / f"{i}.png")
    data = load_data("torchvision:RenderedSST2", IMAGES, root=tmp_path)
    assert data.labels == ["negative", "positive"]
    assert len(data.test) == 20
    assert data.train[0][0].shape == (3, SIZE, SIZE)


@pytest.mark.parametrize("name", ["MNIST", "CIFAR100", "SVHN", "RenderedSST2"])
def test_an_absent_torchvision_data_set_says_the_line_that_downloads_it(name, tmp_path):
    line = re.escape(f"torchvision.datasets.{name}({str(tmp_path)!r}, download=True)")
    with pytest.raises(DataError, match=line):
        load_data(f"torchvision:{name}", IMAGES, root=tmp_path)


@pytest.mark.parametrize("name", ["NoSuchSet", "EuroSAT", "FakeData", "vision", "__name__"])
def test_what_has_no_train_and_test_in_torchvision_is_refused_in_words(name, tmp_path):
    with pytest.raises(RestuningError):
        load_data(f"torchvision:{name}", IMAGES, root=tmp_path)


# ------------------------------------------------------------------------ csv


def table(path, rows, columns=("text", "label"), encoding="utf-8"):
    with path.open("w", encoding=encoding, newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return path


ROWS = [("good film" + " very" * (i % 4), "pos") for i in range(20)]
ROWS += [("bad film" + " very" * (i % 3), "neg") for i in range(20)]


def test_a_single_csv_is_split_within_each_class(language, tmp_path):
    data = load_data(str(table(tmp_path / "reviews.csv", ROWS)), language)
    assert (data.name, data.kind, data.labels) == ("reviews", "text", ["neg", "pos"])
    parts = (data.train, data.val, data.test)
    assert sorted((t, data.labels[y]) for s in parts for t, y in s) == sorted(ROWS)
    assert all({y for _, y in s} == {0, 1} for s in parts)


def test_a_folder_of_csvs_keeps_its_splits(language, tmp_path):
    for word, rows in (("train", ROWS), ("val", ROWS[:3]), ("test", ROWS[-4:])):
        table(tmp_path / f"{word}.csv", rows)
    data = load_data(str(tmp_path), language)
    assert [(t, data.labels[y]) for t, y in data.val] == ROWS[:3]
    assert [(t, data.labels[y]) for t, y in data.test] == ROWS[-4:]


def test_final_trains_on_train_and_val_of_a_csv_too(language, tmp_path):
    for word, rows in (("train", ROWS), ("val", ROWS[:3]), ("test", ROWS[-4:])):
        table(tmp_path / f"{word}.csv", rows)
    data = load_data(str(tmp_path), language, final=True)
    assert data.val is None
    assert len(data.train) == len(ROWS) + 3


def test_a_batch_of_texts_carries_the_mask_of_its_padding(language, tmp_path):
    data = load_data(str(table(tmp_path / "a.csv", ROWS)), language)
    loader = DataLoader(data.train, batch_size=8, collate_fn=data.collate)
    (batch, labels), samples = next(iter(loader)), data.train[:8]
    lengths = [len(text.split()) + 2 for text, _ in samples]
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert batch["input_ids"].shape == (8, max(lengths))
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()
    assert labels.tolist() == [y for _, y in samples]
    with torch.no_grad():
        assert language.model(**batch)["last_hidden_state"].isfinite().all()


def test_long_texts_are_truncated_to_what_the_tokenizer_s_model_takes(language, tmp_path):
    rows = [("very " * 600, "pos"), ("bad", "neg")] * 10
    data = load_data(str(table(tmp_path / "a.csv", rows)), language)
    batch, _ = data.collate(data.train[:14])
    assert batch["input_ids"].shape[1] < 600
    limit, language.tokenizer.model_max_length = language.tokenizer.model_max_length, 12
    try:
        batch, _ = data.collate(data.train[:14])
    finally:
        language.tokenizer.model_max_length = limit
    assert batch["input_ids"].shape[1] <= 12


def test_other_columns_are_read_when_named_and_the_wrong_ones_are_listed(language, tmp_path):
    file = str(table(tmp_path / "a.csv", ROWS, ("review", "verdict")))
    assert load_data(file, language, text="review", label="verdict").labels == ["neg", "pos"]
    with pytest.raises(DataError, match="review.*verdict"):
        load_data(file, language)


def test_a_csv_with_a_byte_order_mark_is_read(language, tmp_path):
    file = table(tmp_path / "a.csv", ROWS, encoding="utf-8-sig")
    assert load_data(str(file), language).labels == ["neg", "pos"]


@pytest.mark.parametrize("key", ["val", "test"])
def test_a_class_that_training_lacks_is_named_with_its_split(key, language, tmp_path):
    table(tmp_path / "train.csv", ROWS)
    table(tmp_path / f"{key}.csv", [*ROWS[:3], ("film", "neutral")])
    with pytest.raises(DataError, match=rf"\({key}\)[\s\S]*neutral"):
        load_data(str(tmp_path), language)


def test_a_row_without_a_label_is_refused_and_makes_no_class_of_its_own(language, tmp_path):
    file = table(tmp_path / "a.csv", [*ROWS, ("film",)])
    with pytest.raises(DataError, match="a.csv"):
        load_data(str(file), language)


@pytest.mark.parametrize(
    "content",
    [
        "text,label\nun film très bon,pos\n".encode("latin-1"),
        "text,label\n".encode("utf-16"),
        b"",
        b"text,label\n",
        b"text,label\ngood,pos\n",
        b"\xff\xd8\xff\xe0",
    ],
)
def test_what_is_no_table_of_two_classes_in_utf_8_is_refused(content, language, tmp_path):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match="a.csv"):
        load_data(str(tmp_path / "a.csv"), language)


def test_texts_and_backbones_that_do_not_go_together_are_refused(language, tmp_path):
    file = str(table(tmp_path / "a.csv", ROWS))
    with pytest.raises(DataError, match="language backbone"):
        load_data(file, IMAGES)
    with pytest.raises(DataError, match="text backbone"):
        load_data("digits", language)
    with pytest.raises(DataError, match="absent.csv"):
        load_data(str(tmp_path / "absent.csv"), language)
    with pytest.raises(UnknownNameError):
        load_data("no-such-set", IMAGES)


# ------------------------------------------------------------------- VTAB lists

WORD = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=8)
NAME = st.lists(WORD.filter(lambda s: "/" not in s), min_size=1, max_size=3).map(" ".join)
LINE = st.tuples(NAME.map("images/{}.jpg".format), st.integers(0, 10**6))
BROKEN = st.one_of(
    NAME,
    NAME.map("{} -1".format),
    NAME.map("{} 1.0".format),
    NAME.map("{} one".format),
    NAME.map("{} \u0663".format),
    NAME.map("{}\t1".format),
    st.just("7"),
).filter(lambda s: not re.fullmatch(r".*\S +[0-9]+", s.strip()))


@settings(max_examples=150, **ANY)
@given(st.lists(LINE, max_size=6), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_any_well_formed_list_parses_to_itself(tmp_path, lines, end, blank):
    text = "".join(f"{name} {label}{end}{end if blank else ''}" for name, label in lines)
    (tmp_path / "list.txt").write_bytes(text.encode())
    assert read_list(tmp_path / "list.txt") == [(tmp_path / n, y) for n, y in lines]


@settings(max_examples=150, **ANY)
@given(st.lists(LINE, max_size=5), st.lists(LINE, max_size=5), BROKEN)
def test_any_malformed_line_is_named_by_file_and_number(tmp_path, before, after, broken):
    lines = [*(f"{n} {y}" for n, y in before), broken, *(f"{n} {y}" for n, y in after)]
    file = tmp_path / "train800.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError) as error:
        read_list(file)
    assert error.value.where == f"{file}, line {len(before) + 1}"


def test_a_label_with_more_digits_than_a_number_may_have_is_named_by_its_line(tmp_path):
    (tmp_path / "test.txt").write_text("images/0.jpg 0\nimages/1.jpg " + "9" * 5000)
    with pytest.raises(DataError, match="line 2"):
        read_list(tmp_path / "test.txt")


def test_a_missing_list_and_one_that_is_no_text_are_named(tmp_path):
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("absent.txt", "bytes.txt"):
        with pytest.raises(DataError, match=name):
            read_list(tmp_path / name)


def vtab(path, line="images/0.png 0", **files):
    for i in range(2):
        picture(path / "images" / f"{i}.png")
    lists = {"train800": f"{line}\nimages/1.png 1\n", "test": "images/1.png 1\n", **files}
    for name, text in lists.items():
        (path / f"{name}.txt").write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "name",
    ["{}/elsewhere/a.png", "../elsewhere/a.png", "images/../../elsewhere/a.png", "out.png"]
    + ["folder/a.png", "circle/a.png"],
)
def test_a_list_names_files_in_its_own_folder_links_followed(tmp_path, name):
    picture(tmp_path / "elsewhere" / "a.png")
    folder = tmp_path / "v"
    vtab(folder)
    (folder / "out.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    (folder / "folder").symlink_to(tmp_path / "elsewhere")
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "within.png").symlink_to(folder / "images" / "0.png")
    named = name.format(tmp_path)
    with pytest.raises(DataError, match="outside of its folder") as error:
        load_data(vtab(folder, f"{named} 0"), IMAGES)
    assert error.value.where.endswith("train800.txt, line 1")
    assert len(load_data(vtab(folder, "within.png 0"), IMAGES).train) == 2
    # What the user links as a whole is the user's own choice.
    (tmp_path / "linked").symlink_to(folder)
    assert load_data(str(tmp_path / "linked"), IMAGES).train[0][0].shape == (3, SIZE, SIZE)


def test_links_in_folders_of_classes_are_the_users_own_and_followed(tmp_path):
    for label in ("cat", "dog"):
        for i in range(5):
            picture(tmp_path / "elsewhere" / label / f"{i}.png")
            (tmp_path / "mine" / label).mkdir(parents=True, exist_ok=True)
            linked = tmp_path / "mine" / label / f"{i}.png"
            linked.symlink_to(tmp_path / "elsewhere" / label / f"{i}.png")
    data = load_data(str(tmp_path / "mine"), IMAGES)
    assert len(data.train) + len(data.val) == 10


def test_an_image_that_a_list_names_but_is_not_there_is_named(tmp_path):
    data = load_data(vtab(tmp_path, "images/gone.png 0"), IMAGES)
    with pytest.raises(DataError, match="gone.png"):
        data.train[0]


def test_a_vtab_task_json_names_the_classes_and_must_fit_the_labels(tmp_path):
    folder = vtab(tmp_path)
    described = tmp_path / "task.json"
    described.write_text('{"classes": ["cat", "dog", "never seen"]}')
    assert load_data(folder, IMAGES).labels == ["cat", "dog", "never seen"]
    for malformed in ("", "[]", "{}", '{"classes": 3}', '{"classes": ["one"]}'):
        described.write_text(malformed)
        with pytest.raises(DataError):
            load_data(folder, IMAGES)


@pytest.mark.parametrize("name", ["train800", "val200", "test"])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_list_without_images_is_refused_and_not_taken_for_no_split(name, content, tmp_path):
    with pytest.raises(DataError, match=rf"empty list[\s\S]*{name}.txt"):
        load_data(vtab(tmp_path, **{name: content}), IMAGES)


# ----------------------------------------------------------------- image files

RAMP = np.linspace(0, 255, 64).astype(np.uint8)[None].repeat(8, 0)
COLOURS = np.stack([RAMP, RAMP[:, ::-1], np.full_like(RAMP, 80)], -1)


def difference(path, wanted):
    return np.abs(np.asarray(read_image(path)).astype(int) - np.asarray(wanted).astype(int)).max()


def test_a_cmyk_jpeg_is_decoded_to_its_colours(tmp_path):
    image = Image.fromarray(COLOURS)
    image.convert("CMYK").save(tmp_path / "a.jpg", quality=95, subsampling=0)
    assert difference(tmp_path / "a.jpg", image) <= JPEG


def test_a_palette_an_alpha_channel_and_grey_are_decoded_to_rgb(tmp_path):
    image = Image.fromarray(COLOURS)
    opaque = image.copy()
    opaque.putalpha(255)
    opaque.save(tmp_path / "rgba.png")
    assert difference(tmp_path / "rgba.png", image) == 0
    palette = image.quantize(64)
    palette.save(tmp_path / "p.png")
    assert difference(tmp_path / "p.png", palette.convert("RGB")) == 0
    palette.save(tmp_path / "t.png", transparency=bytes(range(0, 256, 4)))
    white = Image.new("RGBA", palette.size, "white")
    with Image.open(tmp_path / "t.png") as half_seen:
        composed = Image.alpha_composite(white, half_seen.convert("RGBA")).convert("RGB")
    assert difference(tmp_path / "t.png", composed) <= 1
    Image.fromarray(RAMP).save(tmp_path / "l.png")
    assert difference(tmp_path / "l.png", np.stack([RAMP] * 3, -1)) == 0


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_16_bit_image_keeps_its_range_of_greys(suffix, tmp_path):
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / f"a.{suffix}")
    assert difference(tmp_path / f"a.{suffix}", np.stack([RAMP] * 3, -1)) <= 1


def test_an_image_with_an_orientation_is_read_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(20, 30).save(tmp_path / "a.png", exif=exif)
    found = read_image(tmp_path / "a.png")
    wanted = sets.folder.default_loader(str(tmp_path / "a.png")).transpose(
        Image.Transpose.ROTATE_270
    )
    assert found.size == wanted.size
    assert difference(tmp_path / "a.png", wanted) == 0


def test_an_animated_gif_gives_its_first_frame(tmp_path):
    first, *rest = [grey(level) for level in (10, 120, 240)]
    first.save(tmp_path / "a.gif", save_all=True, append_images=rest)
    assert difference(tmp_path / "a.gif", first) == 0


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "tif", "webp"])
@pytest.mark.parametrize("keep", [0, 10, 200])
def test_a_truncated_file_is_named_in_the_error(suffix, keep, tmp_path):
    file = tmp_path / f"cut.{suffix}"
    noise(60, 60).save(file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DataError, match=file.name):
        read_image(file)


def test_a_file_that_would_fill_the_memory_is_named_in_the_error(tmp_path, monkeypatch):
    picture(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="bomb.png"):
        read_image(tmp_path / "bomb.png")


def encoded(kind):
    stream = io.BytesIO()
    Image.fromarray(COLOURS).save(stream, kind)
    return stream.getvalue()


KINDS = {kind: encoded(kind) for kind in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")}


@settings(max_examples=300, **ANY)
@given(
    st.sampled_from(sorted(KINDS)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    st.floats(0, 1),
)
def test_any_damaged_image_is_decoded_or_refused_in_words(
    tmp_path, monkeypatch, kind, changes, keep
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)  # damage may declare gigapixels
    content = bytearray(KINDS[kind])
    for at, byte in changes:
        content[int(at * at * len(content))] = byte
    file = tmp_path / "damaged"
    file.write_bytes(content[: int(keep * len(content)) + 1])
    try:
        assert read_image(file).mode == "RGB"
    except DataError as error:
        assert str(file) in str(error)


# ---------------------------------------------------------------- class folders


def folders(path, *splits, names=("cat", "dog")):
    for split in splits:
        for name in names:
            for i in range(3):
                picture(path / split / name / f"{i}.png")
    return str(path)


@pytest.mark.parametrize("alias", ["val", "valid", "validation"])
def test_a_validation_folder_is_found_under_each_of_its_names(alias, tmp_path):
    data = load_data(folders(tmp_path, "train", alias, "test"), IMAGES)
    assert [len(s) for s in (data.train, data.val, data.test)] == [6, 6, 6]
    assert {path.parts[-3] for path, _ in data.val.samples} == {alias}
    final = load_data(str(tmp_path), IMAGES, final=True)
    assert len(final.train) == 12
    assert final.val is None


def test_a_train_folder_alone_has_no_val_and_no_test(tmp_path):
    data = load_data(folders(tmp_path, "train"), IMAGES)
    assert data.val is None
    assert data.test is None


@pytest.mark.parametrize("alias", ["val", "valid", "validation", "test"])
def test_a_class_only_outside_training_is_named(alias, tmp_path):
    folders(tmp_path, "train", alias)
    picture(tmp_path / alias / "emu" / "0.png")
    with pytest.raises(DataError, match="emu"):
        load_data(str(tmp_path), IMAGES)


def test_a_class_folder_without_images_is_named(tmp_path):
    folders(tmp_path, "train")
    (tmp_path / "train" / "emu").mkdir()
    with pytest.raises(DataError, match="emu"):
        load_data(str(tmp_path), IMAGES)


@pytest.mark.parametrize("splits", [("",), ("train", "val", "test")])
def test_hidden_folders_are_no_classes(splits, tmp_path):
    folders(tmp_path, *splits)
    for split in splits:
        picture(tmp_path / split / ".ipynb_checkpoints" / "0-checkpoint.png")
    data = load_data(str(tmp_path), IMAGES)
    assert data.labels == ["cat", "dog"]
    parts = [s for s in (data.train, data.val, data.test) if s is not None]
    assert not any(".ipynb_checkpoints" in p.parts for s in parts for p, _ in s.samples)


def test_hidden_files_are_no_images(tmp_path):
    folders(tmp_path, "train")
    (tmp_path / "train" / "cat" / "._0.png").write_bytes(b"what macOS leaves on other disks")
    assert len(load_data(str(tmp_path), IMAGES).train) == 6


def test_val_and_test_without_train_are_not_taken_for_classes(tmp_path):
    with pytest.raises(DataError):
        load_data(folders(tmp_path, "val", "test"), IMAGES)


def test_corrupt_images_are_left_out_and_counted_in_every_split(tmp_path):
    folders(tmp_path, "train", "val", "test")
    for split in ("train", "val", "test"):
        (tmp_path / split / "cat" / "1.png").write_bytes(b"no image")
    data = load_data(str(tmp_path), IMAGES, skip_bad=True)
    assert data.skipped == 3
    assert [len(s) for s in (data.train, data.val, data.test)] == [5, 5, 5]
