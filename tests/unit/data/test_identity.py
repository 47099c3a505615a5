"""Data are known by their contents: whatever is replaced, swapped, renamed or reordered is seen."""

import io
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from restuning import _files, load_data
from restuning._errors import DataError
from restuning.backbones import Backbone, Preprocessing
from restuning.data import Data, digests, identify, with_validation
from restuning.data.decoded import decode_once
from restuning.data.identity import READ, Watch, find_samples

hf = pytest.importorskip("datasets")
sets = pytest.importorskip("torchvision.datasets")

SIZE = 16
IMAGES = Backbone("images", nn.Identity(), (), {}, Preprocessing((SIZE, SIZE)))
WORDS = Backbone("words", nn.Identity(), (), tokenizer=object())


@pytest.fixture(autouse=True)
def a_memory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("RESTUNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_files, "_digests", {})


def bitmap(path, level):
    """Of one size whatever it shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (level,) * 3).save(path, "BMP")


def folder(root, levels=(10, 60, 110, 160), classes=("cat", "dog")):
    for split in ("train", "val", "test"):
        for number, level in enumerate(levels):
            bitmap(root / split / classes[number % 2] / f"{number}.bmp", level)
    return str(root)


def lists(root):
    for number in range(6):
        bitmap(root / "images" / f"{number}.bmp", 20 * number)
    for name, part in (("train800", (0, 1)), ("val200", (2, 3)), ("test", (4, 5))):
        lines = [f"images/{n}.bmp {n % 2}\n" for n in part]
        (root / f"{name}.txt").write_text("".join(lines))
    return str(root)


def table(root):
    root.mkdir()
    rows = [("good film", "a"), ("dull film", "b"), ("fine film", "a"), ("poor film", "b")] * 3
    lines = ["text,label", *(f"{text} {n:02},{label}" for n, (text, label) in enumerate(rows))]
    (root / "reviews.csv").write_text("\n".join(lines))
    return str(root / "reviews.csv")


def tagged(root):
    root.mkdir()
    (root / "names.conll").write_text("Anna B\nruns O\n\nhe O\nsees O\nBen B\n\n" * 5)
    return str(root / "names.conll")


def overwrite(file, level):
    bitmap(file, level)


def keep_time(file, level):
    """As an editor that puts the time back, or a restored backup."""
    before = file.stat()
    bitmap(file, level)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def move_over(file, level):
    """As `cp -p` and `mv`, or an archive that is unpacked again."""
    before, other = file.stat(), file.with_suffix(".new")
    bitmap(other, level)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, file)


def settle(monkeypatch):
    """As if every file had been there for long: what is remembered is trusted."""
    monkeypatch.setattr(_files, "SETTLED", 0)


@pytest.mark.parametrize("replace", [overwrite, keep_time, move_over])
@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("layout", [folder, lists])
def test_an_image_replaced_by_another_of_equal_size_is_other_data(
    tmp_path, monkeypatch, layout, replace, settled
):
    if settled:
        settle(monkeypatch)
    name = layout(tmp_path / "pets")
    before = load_data(name, IMAGES).identity
    file = sorted(Path(name).rglob("*.bmp"))[0]
    size = file.stat().st_size
    replace(file, 200)
    assert file.stat().st_size == size
    assert load_data(name, IMAGES).identity != before


def swap_files(root):
    """Two classes' images change places: labels are swapped."""
    one, other = root / "train/cat/0.bmp", root / "train/dog/1.bmp"
    contents = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(contents)


def rename_class(root):
    for split in ("train", "val", "test"):
        (root / split / "cat").rename(root / split / "bat")


def swap_names(root):
    """The contents of every class under the other's name."""
    for split in ("train", "val", "test"):
        (root / split / "cat").rename(root / split / "x")
        (root / split / "dog").rename(root / split / "cat")
        (root / split / "x").rename(root / split / "dog")


def reorder(root):
    (root / "train/cat/0.bmp").rename(root / "train/cat/3.bmp")


@pytest.mark.parametrize("change", [swap_files, rename_class, swap_names, reorder])
def test_swapped_labels_renamed_classes_and_another_order_are_other_data(tmp_path, change):
    name = folder(tmp_path / "pets")
    before = load_data(name, IMAGES).identity
    change(tmp_path / "pets")
    assert load_data(name, IMAGES).identity != before


def test_a_copy_elsewhere_is_the_same_data(tmp_path):
    name = folder(tmp_path / "pets")
    shutil.copytree(name, tmp_path / "elsewhere")
    for file in (tmp_path / "elsewhere").rglob("*.bmp"):
        os.utime(file, (1, 1))
    there = load_data(str(tmp_path / "elsewhere"), IMAGES)
    assert load_data(name, IMAGES).identity == there.identity


@pytest.mark.parametrize(
    ("make", "old", "new"),
    [
        (table, "dull film 01", "dull film 91"),
        (table, "fine film 02,a", "fine film 02,b"),
        (tagged, "Anna B", "Anno B"),
        (tagged, "runs O", "runs B"),
    ],
)
def test_one_letter_or_label_of_a_text_is_other_data(tmp_path, make, old, new):
    name = make(tmp_path / "texts")
    before, file = load_data(name, WORDS).identity, Path(name)
    text = file.read_text()
    file.write_text(text.replace(old, new, 1))
    assert len(file.read_text()) == len(text)
    assert load_data(name, WORDS).identity != before
    file.write_text(text)
    assert load_data(name, WORDS).identity == before


def hub(root, levels, names=("a", "b")):
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=list(names))})
    images = [Image.new("RGB", (8, 8), (level,) * 3) for level in levels]
    rows = {"image": images, "label": [n % 2 for n in range(len(images))]}
    made = hf.Dataset.from_dict(rows, features=features)
    hf.DatasetDict({"train": made, "test": made}).save_to_disk(str(root))
    return f"hf:{root}"


def test_hugging_face_sets_of_equal_labels_are_told_apart(tmp_path):
    hf.disable_progress_bars()
    dark = list(range(10, 30))
    one = load_data(hub(tmp_path / "1" / "mine", dark), IMAGES)
    other = load_data(hub(tmp_path / "2" / "mine", [*dark[:-1], 200]), IMAGES)
    renamed = load_data(hub(tmp_path / "3" / "mine", dark, names=("b", "a")), IMAGES)
    again = load_data(hub(tmp_path / "4" / "mine", dark), IMAGES)
    assert one.identity == again.identity
    assert len({one.identity, other.identity, renamed.identity}) == 3


def test_a_hugging_face_set_of_paths_is_known_and_watched_by_its_files(tmp_path, monkeypatch):
    hf.disable_progress_bars()
    settle(monkeypatch)
    files = files_of(tmp_path / "images", 4)
    rows = {"image": list(map(str, files)), "label": [0, 1, 0, 1]}
    made = hf.Dataset.from_dict(rows).cast_column("image", hf.Image(decode=False))
    train = load_data(hf.DatasetDict({"train": made, "test": made}), IMAGES).train
    watch, before, shown = Watch(train), identify(train), train[2][0]
    watch.check()
    move_over(files[2], 200)
    assert identify(train).inputs != before.inputs
    assert not torch.equal(train[2][0], shown)
    with pytest.raises(DataError, match="changed while"):
        watch.check()


def test_images_inside_of_a_hugging_face_table_are_read_once_to_know_them(tmp_path, monkeypatch):
    hf.disable_progress_bars()
    settle(monkeypatch)
    train = load_data(hub(tmp_path / "mine", [10, 20, 30, 40]), IMAGES).train
    read, genuine = [], train.cells._cells
    monkeypatch.setattr(train.cells, "_cells", lambda: read.append(1) or genuine())
    Watch(train)
    assert identify(train) == identify(train)
    # What is loaded again, as for another column of answers, is the same table in the same files.
    again = load_data(f"hf:{tmp_path / 'mine'}", IMAGES).train
    monkeypatch.setattr(again.cells, "_cells", lambda: read.append(1) or genuine())
    assert identify(again) == identify(train)
    assert len(read) == 1


def test_torchvision_sets_of_equal_labels_are_told_apart(tmp_path, monkeypatch):
    class Shades(sets.VisionDataset):
        """As CIFAR: images and labels in memory."""

        shift = 0

        def __init__(self, root, train=True):
            super().__init__(root)
            self.classes = ["a", "b"]

        def __len__(self):
            return 20

        def __getitem__(self, index):
            if index >= len(self):
                raise IndexError
            return Image.new("L", (8, 8), 5 * index + self.shift * (index == 7)), index % 2

    monkeypatch.setattr(sets, "Shades", Shades, raising=False)
    before = load_data("torchvision:Shades", IMAGES).identity
    assert load_data("torchvision:Shades", IMAGES).identity == before
    monkeypatch.setattr(Shades, "shift", 1)
    assert load_data("torchvision:Shades", IMAGES).identity != before


def test_derived_splits_are_known_by_what_they_hold(tmp_path):
    data = load_data(folder(tmp_path / "pets"), IMAGES)
    bare = data.with_splits(val=None)
    assert with_validation(bare).identity not in (bare.identity, data.identity)
    both = ConcatDataset([data.train, data.val])
    final = load_data(str(tmp_path / "pets"), IMAGES, final=True).train
    assert identify(both) == identify(final)
    assert identify(Subset(data.train, [1, 0])) != identify(Subset(data.train, [0, 1]))
    assert identify(Subset(data.train, range(4))) == identify(data.train)


def test_decoded_images_are_those_of_the_data(tmp_path):
    name = folder(tmp_path / "pets")
    before = load_data(name, IMAGES)
    decoded = decode_once(before, IMAGES, tmp_path / "decoded")
    assert decoded.contents() == before.contents()
    overwrite(tmp_path / "pets/train/cat/0.bmp", 250)
    after = decode_once(load_data(name, IMAGES), IMAGES, tmp_path / "decoded")
    assert after.train.pixels[0].float().mean() == 250
    assert decoded.train.pixels[0].float().mean() == 10


def test_an_image_that_changes_while_it_is_decoded_is_refused_and_nothing_kept(tmp_path):
    data = load_data(folder(tmp_path / "pets"), IMAGES)
    data.train.image, image = (
        lambda index: (overwrite(data.train.files[3], 99), image(index))[1],
        data.train.image,
    )
    with pytest.raises(DataError, match="changed while") as error:
        decode_once(data, IMAGES, tmp_path / "decoded")
    assert error.value.where == str(data.train.files[3])
    assert not list((tmp_path / "decoded").glob("pets-train*.npy"))


def test_what_was_decoded_of_a_file_that_changed_is_decoded_again(tmp_path):
    data = load_data(folder(tmp_path / "pets"), IMAGES)
    first = data.train[0][0].clone()
    identify(data.train)
    overwrite(data.train.files[0], 200)
    identify(data.train)
    assert not torch.equal(data.train[0][0], first)


def test_what_is_only_predicted_on_is_not_hashed(tmp_path, monkeypatch):
    name = folder(tmp_path / "pets")
    monkeypatch.setattr(digests, "digest_file", lambda file: pytest.fail("it was read"))
    data = load_data(name, IMAGES)
    assert data.test[0][0].shape == (3, SIZE, SIZE)


# ------------------------------------------------------------ what is remembered


def counted(monkeypatch):
    read, genuine = [], _files.sha256_of_file
    monkeypatch.setattr(_files, "sha256_of_file", lambda file: read.append(file) or genuine(file))
    return read


def files_of(root, count=6):
    for number in range(count):
        bitmap(root / f"{number}.bmp", number)
    return sorted(root.glob("*.bmp"))


def test_files_that_did_not_change_are_read_once_by_all_processes(tmp_path, monkeypatch):
    settle(monkeypatch)
    monkeypatch.setattr(digests, "WORTH_KEEPING", 0)
    files, read = files_of(tmp_path / "images"), counted(monkeypatch)
    first = digests.digest_files(files)
    _files._digests.clear()
    assert digests.digest_files(files) == first
    assert len(read) == len(files)
    move_over(files[2], 200)
    _files._digests.clear()
    second = digests.digest_files(files)
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, True, False, *[True] * 3]
    assert read[len(files) :] == [files[2]]


def test_a_file_that_was_just_written_is_read_every_time(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "WORTH_KEEPING", 0)
    files, read = files_of(tmp_path / "images", 2), counted(monkeypatch)
    digests.digest_files(files)
    digests.digest_files(files)
    assert len(read) == 4
    assert not list((tmp_path / "cache").rglob("*.json"))


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"format": 1}', "other folder", "other digest"],
)
def test_what_is_remembered_wrongly_is_not_believed(tmp_path, monkeypatch, content):
    settle(monkeypatch)
    monkeypatch.setattr(digests, "WORTH_KEEPING", 0)
    files = files_of(tmp_path / "images", 3)
    expected = digests.digest_files(files)
    (memo,) = (tmp_path / "cache").rglob("*.json")
    if isinstance(content, str):
        kept = json.loads(memo.read_text())
        if content == "other folder":
            kept["folder"] = "/elsewhere"
            kept["files"] = {n: [*row[:4], "0" * 64] for n, row in kept["files"].items()}
        else:
            kept["files"] = {n: [*row[:4], "0" * 63] for n, row in kept["files"].items()}
        content = json.dumps(kept).encode()
    memo.write_bytes(content)
    _files._digests.clear()
    assert digests.digest_files(files) == expected


def test_much_reading_is_announced(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "LONG", 0)
    said = []
    digests.digest_files(files_of(tmp_path / "images", 3), said.append)
    assert said == ["reading 3 files, 0.0 GiB, to know their contents"]


def test_a_file_that_is_missing_is_no_other_file(tmp_path):
    data = load_data(folder(tmp_path / "pets"), IMAGES)
    before = identify(data.train)
    data.train.files[0].unlink()
    assert identify(data.train).inputs != before.inputs
    with pytest.raises(DataError, match="missing"):
        data.train.image(0)


def test_a_watch_names_the_file_that_changed(tmp_path):
    data = load_data(folder(tmp_path / "pets"), IMAGES)
    watch = Watch(Subset(data.train, [2, 3]))
    overwrite(data.train.files[0], 1)
    watch.check()
    overwrite(data.train.files[3], 1)
    watch.check(0, 1)
    with pytest.raises(DataError, match=data.train.files[3].name):
        watch.check()


# ------------------------------------------------------------ data sets of the user's


class Shown(Dataset):
    """A data set of its own kind, which gives what it is told to."""

    def __init__(self, count=6, give=lambda index: torch.full((3,), float(index))):
        self.count, self.give, self.labels, self.seen = count, give, None, []

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.seen.append(index)
        return self.give(index), index % 2 if self.labels is None else self.labels[index]


def of_palette(alpha):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 255, 0, 0, alpha], "RGBA")
    return image


def of_file(form, **how):
    stream = io.BytesIO()
    Image.fromarray(np.arange(16, dtype=np.uint16).reshape(4, 4) * 4000).save(stream, form, **how)
    return Image.open(stream)


VALUES = {
    "tensor": (torch.arange(6.0), torch.arange(6.0) + 1e-6),
    "shape": (torch.zeros(2, 3), torch.zeros(3, 2)),
    "type": (torch.zeros(4), torch.zeros(4, dtype=torch.float64)),
    "bf16": (torch.ones(3).bfloat16(), torch.tensor([1, 1, 1.01]).bfloat16()),
    "array": (np.arange(4), np.array([0, 1, 2, 4])),
    "image": (Image.new("L", (4, 4), 3), Image.new("L", (4, 4), 4)),
    "palette": (Image.new("P", (2, 2)), Image.new("P", (2, 2))),
    "alpha of a palette": (of_palette(255), of_palette(10)),
    "which end is white": (of_file("TIFF", tiffinfo={262: 0}), of_file("TIFF", tiffinfo={262: 1})),
    "which way up": (of_file("TIFF", tiffinfo={274: 1}), of_file("TIFF", tiffinfo={274: 6})),
    "text": ("a film", "a fjlm"),
    "words": (["ab", "c"], ["a", "bc"]),
    "mapping": ({"ids": [1, 2], "mask": [1, 1]}, {"ids": [1, 2], "mask": [1, 0]}),
    "nested": ((torch.ones(2), {"x": b"ab"}), (torch.ones(2), {"x": b"ac"})),
    "sparse": (torch.eye(3).to_sparse(), (2 * torch.eye(3)).to_sparse()),
    "none": (None, 0),
}
VALUES["palette"][1].putpalette([7] * 768)


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("make", ["list", "own"])
def test_other_inputs_of_a_users_data_set_are_seen(kind, make):
    def data(value):
        values = [VALUES[kind][0]] * 5
        values[3] = value
        return [(v, 0) for v in values] if make == "list" else Shown(5, values.__getitem__)

    one, other = VALUES[kind]
    assert identify(data(one)) == identify(data(one))
    assert identify(data(one)).inputs != identify(data(other)).inputs
    assert identify(data(one)).labels == identify(data(other)).labels


def of_tensors(labels):
    return TensorDataset(torch.arange(12.0).view(4, 3), torch.tensor(labels))


@pytest.mark.parametrize(
    "make",
    [
        of_tensors,
        lambda labels: [(torch.ones(2), y) for y in labels],
        lambda labels: Subset(of_tensors(labels), [3, 2, 1, 0]),
        lambda labels: ConcatDataset([of_tensors(labels), of_tensors(labels)]),
    ],
)
def test_other_labels_of_a_users_data_set_are_seen(make):
    one, other = identify(make([0, 1, 0, 1])), identify(make([1, 0, 1, 0]))
    assert one.inputs == other.inputs
    assert one.labels != other.labels


def test_an_image_folder_of_torchvision_is_known_by_its_files_and_its_transform(tmp_path):
    for number in range(4):
        bitmap(tmp_path / "ab"[number % 2] / f"{number}.bmp", 40 * number)

    def known(transform=None):
        return identify(sets.ImageFolder(str(tmp_path), transform))

    before = known()
    assert known() == before and not before.assumed
    other = known(lambda image: image.resize((4, 4)))
    assert other.inputs == before.inputs and other.reading != before.reading
    move_over(tmp_path / "a" / "2.bmp", 9)
    assert known().inputs != before.inputs


@pytest.mark.parametrize("column", ["image", "text", "label"])
def test_rows_of_a_hugging_face_table_are_known_by_what_is_stored(tmp_path, column):
    bitmap(tmp_path / "one.bmp", 7)

    def made(change=False):
        rows = {
            "image": [str(tmp_path / "one.bmp")] * 3,
            "text": ["a", "b", "c"],
            "label": [0, 1, 0],
        }
        if change and column != "image":
            rows[column][1] = {"text": "x", "label": 0}[column]
        features = hf.Features(
            {"image": hf.Image(), "text": hf.Value("string"), "label": hf.Value("int64")}
        )
        return hf.Dataset.from_dict(rows, features=features)

    before = identify(made())
    assert identify(made()) == before
    if column == "image":
        move_over(tmp_path / "one.bmp", 8)
    changed = identify(made(change=True))
    which = "labels" if column == "label" else "inputs"
    assert getattr(changed, which) != getattr(before, which)


def test_augmentation_is_drawn_alike_and_leaves_all_generators_alone():
    def augmented(index):
        return torch.full((2,), float(index)) + torch.rand(2) + np.random.rand() + random.random()

    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    before = identify(Shown(6, augmented))
    after = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    assert after == (torch.rand(1), np.random.rand(), random.random())
    assert before == identify(Shown(6, augmented))
    assert before != identify(Shown(6, lambda index: augmented(index + (index == 4))))
    assert not before.assumed


def test_inputs_of_generators_of_their_own_are_not_compared_and_labels_are():
    own = np.random.default_rng()

    def given(labels=None):
        data = Shown(6, lambda index: own.random(3))
        data.labels = labels
        return identify(data)

    assert "not compared" in given().assumed
    assert given() == given()
    assert given() != given([0, 1, 0, 1, 1, 1])


def test_of_many_examples_some_are_read_and_that_is_said():
    data = Shown(READ + 500)
    known = identify(data)
    assert f"{READ:,} of {READ + 500:,} examples" in known.assumed
    assert len(set(data.seen)) == READ
    data.labels = [index % 2 for index in range(READ + 500)]
    kept = identify(data)
    # One label that is not among those that are read.
    unread = next(index for index in range(READ + 500) if index not in set(data.seen))
    data.labels[unread] ^= 1
    assert identify(data).labels != kept.labels


def test_a_data_set_may_say_what_it_is():
    data = Shown()
    data.identity = "version 1"
    before = identify(data)
    assert data.seen == []
    data.identity = "version 2"
    assert identify(data) != before


def test_a_text_that_is_given_stands_beside_the_contents():
    def made(text, identity="x"):
        return Data("texts", [(text, 0)], None, None, ["a", "b"], "text", identity=identity)

    assert made("a").identity == "x"
    assert made("a").contents() == made("a").contents() != made("b").contents()
    assert made("a").contents() != made("a", identity="y").contents()


def test_samples_of_unknown_data_sets_are_not_found():
    assert find_samples(Shown()) is None
    assert find_samples(ConcatDataset([[(1, 0)], Shown()])) is None
