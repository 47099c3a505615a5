"""Tars as data: samples by key, in their order, read where they lie; what is malformed is told with shard and key."""

import os
import tarfile

import pytest

from commands import restuning as command
from restuning._errors import DataError, RestuningWarning
from restuning.backbones.images import image_suffixes
from restuning.data import DataOptions, load_data
from restuning.data.loader import Loader
from restuning.data.shards import find_shards
from restuning.data.shown import find_shown, list_names
from restuning.data.tar_index import KEPT
from restuning.features import StoreOptions, build_store, export_store
from tars import encode, samples, shots, write_tar


@pytest.fixture(autouse=True)
def kept(own_cache):
    return own_cache / KEPT


def load_one(folder, members, backbone, **how):
    """A tar of these members beside twenty good samples."""
    more = [*samples(range(1000, 1020)), *members]
    return load_data(write_tar(folder / "one.tar", more), backbone, **how)


def age(file):
    """As if it had been there for long: what is made of it may be kept."""
    os.utime(file, (1e9, 1e9))


# What a name means.


def test_tars_are_read_by_their_names_whatever_the_order_they_are_given_in(tmp_path, tiny):
    shots(tmp_path / "w", 3, 10)
    files = [tmp_path / "w" / f"shots-{n:03d}.tar" for n in (2, 0, 1)]
    ids = load_data(files, tiny).train.ids
    assert ids == sorted(ids) and {each.partition("/")[0] for each in ids} == {
        "shots-000",
        "shots-001",
        "shots-002",
    }
    assert load_data(",".join(map(str, files)), tiny).train.ids == ids


def test_one_tar_by_two_names_is_refused(tmp_path, tiny):
    folder = shots(tmp_path / "w", 1, 20)
    (tmp_path / "link").symlink_to(folder)
    for other in (tmp_path / "link", f"{folder}/../w"):
        with pytest.raises(DataError, match="two ways"):
            load_data(f"{folder}/shots-000.tar,{other}/shots-000.tar", tiny)


def test_names_of_tars_say_their_splits(tmp_path, tiny):
    for split, count in (("train", 8), ("val", 4), ("test", 6)):
        write_tar(tmp_path / "a" / f"{split}-000.tar", samples(range(count)))
        write_tar(tmp_path / "b" / split / "000.tar", samples(range(count)))
    for name in "ab":
        data = load_data(tmp_path / name, tiny)
        assert [len(s) for s in (data.train, data.val, data.test)] == [8, 4, 6]
    assert data.test.ids[0] == "test/000/00000"


def test_an_archive_beside_what_was_in_it_is_passed_over(tmp_path, tiny):
    write_tar(tmp_path / "photos.tar", samples(range(4)))
    for number in range(12):
        file = tmp_path / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(encode(number))
    assert find_shards(tmp_path) is None
    assert load_data(tmp_path, tiny).labels == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("w/shots-{000..999999999}.tar", "too many tars"),
        ("w/shot-*.tar", "no tar fits"),
        ("w/shots-{000..009}.tar", "cannot be read"),
    ],
)
def test_a_pattern_that_nothing_fits_is_refused(name, what, tmp_path, tiny):
    shots(tmp_path / "w", 2, 4)
    with pytest.raises(DataError, match=what):
        load_data(str(tmp_path / name), tiny)


# What a sample is.


def test_images_are_shown_in_their_size_and_by_their_ids(tmp_path, tiny):
    shots(tmp_path / "w", 2, 10)
    data = load_data(tmp_path / "w", tiny)
    assert list_names(data.test) == data.test.ids
    assert find_shown(data.test, 0).size == (8, 8)


def test_tars_are_known_as_the_same_images_in_folders(tmp_path, tiny):
    for split, count in (("train", 8), ("test", 6)):
        write_tar(
            tmp_path / "tars" / f"{split}.tar",
            sorted(samples(range(count)), key=lambda m: (m[0][:5], m[0])),
        )
        for number in range(count):
            file = tmp_path / "files" / split / str(number % 2) / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode(number))
    tars, files = (load_data(tmp_path / name, tiny) for name in ("tars", "files"))
    # A folder is read class by class.
    ours, theirs = (sorted(d.train.sample_digests().inputs) for d in (tars, files))
    assert ours == theirs and tars.labels == files.labels


@pytest.mark.parametrize(("label", "field"), [("txt", "label"), ("json", "kind")])
def test_classes_may_be_names(label, field, tmp_path, tiny):
    shots(tmp_path / "w", 1, 20, label=label)
    data = load_data(tmp_path / "w", tiny, label=field)
    assert data.labels == ["cat", "dog"]
    assert {y for _, y in data.train} == {0, 1}


def test_a_field_of_json_may_be_a_number(tmp_path, tiny):
    shots(tmp_path / "w", 1, 20, label="json")
    assert load_data(tmp_path / "w", tiny, label="n").labels == [str(n) for n in range(20)]


def test_other_members_are_passed_over(tmp_path, tiny):
    more = [
        ("a/00001.webp", encode(1, "webp")),
        ("a/00001.seg.png", b"?"),
        ("a/00001.pyd", b"\x80"),
        ("a/00001.cls", b"1"),
        ("._a.jpg", b"?"),
        ("__MACOSX", b""),
    ]
    data = load_one(tmp_path, more, tiny)
    ids = [*data.train.ids, *data.val.ids, *data.test.ids]
    assert "one/a/00001" in ids and len(ids) == 21


def test_names_of_members_are_never_paths(tmp_path, tiny):
    outside = tmp_path / "outside.png"
    data = load_one(
        tmp_path / "in",
        [
            ("../outside.png", encode(1)),
            ("../outside.cls", b"1"),
            ("/etc/x.png", encode(2)),
            ("/etc/x.cls", b"0"),
        ],
        tiny,
    )
    assert len(data.train) + len(data.val) + len(data.test) == 22
    assert not outside.exists() and [p.name for p in (tmp_path / "in").iterdir()] == ["one.tar"]


def _link(name, kind):
    about = tarfile.TarInfo(name)
    about.type, about.linkname = kind, "/etc/passwd"
    return name, about


@pytest.mark.parametrize(
    ("members", "what"),
    [
        ([("x.cls", b"1")], "without an image"),
        ([("x.png", encode(1))], "without a label"),
        ([("x.png", encode(1)), ("x.cls", b" ")], "without a label"),
        ([("x.png", encode(1)), ("x.jpg", encode(1, "jpeg")), ("x.cls", b"1")], "two images"),
        ([("x.png", encode(1)), ("x.cls", b"cat")], "numbers and others are names"),
        ([("x.png", encode(1)), ("x.cls", b"-1")], "numbers and others are names"),
        ([("x.png", encode(1)), ("x.cls", b"99999999")], "no number of a class"),
        ([("x.png", encode(1)), ("x.cls", b"\xff")], "no text"),
        ([("x.png", encode(1)), ("x.cls", b"1" * 2_000_000)], "too long"),
        (
            [
                ("x.png", encode(1)),
                ("x.cls", b"1"),
                ("y.png", encode(2)),
                ("y.cls", b"1"),
                ("x.txt", b"x"),
            ],
            "stands twice",
        ),
        ([("x.png", encode(1)), ("x.png", encode(1)), ("x.cls", b"1")], "stands twice"),
        ([_link("x.png", tarfile.SYMTYPE), ("x.cls", b"1")], "is a link"),
        ([_link("x.png", tarfile.LNKTYPE), ("x.cls", b"1")], "is a link"),
    ],
)
def test_a_malformed_sample_is_told_with_shard_and_key(members, what, tmp_path, tiny):
    with pytest.raises(DataError, match=what) as told:
        load_one(tmp_path, members, tiny)
    assert "one.tar, x" in str(told.value)


@pytest.mark.parametrize(
    "text", [b"[1]", b"{", b'{"label": 1.5}', b'{"label": true}', b'{"label": [1]}', b"[" * 100_000]
)
def test_json_that_holds_no_class_is_told(text, tmp_path, tiny):
    tar = write_tar(tmp_path / "one.tar", [("x.png", encode(1)), ("x.json", text)])
    with pytest.raises(DataError, match="no class") as told:
        load_data(tar, tiny)
    assert "one.tar, x.json" in str(told.value)


def test_captions_are_not_taken_for_classes(tmp_path, tiny):
    members = [
        m
        for n in range(8)
        for m in ((f"{n}.png", encode(n)), (f"{n}.txt", f"a photo of number {n}".encode()))
    ]
    with pytest.raises(DataError, match="captions"):
        load_data(write_tar(tmp_path / "one.tar", members), tiny)


def test_what_cannot_be_read_may_be_left_out(tmp_path, tiny):
    bad = [("x.png", b"\x89PNG no image"), ("x.cls", b"1"), ("y.cls", b"0")]
    data = load_one(tmp_path, bad, tiny, skip_bad=True)
    assert data.left_out == {"no image": ["one/y"], "corrupt": ["one/x"]}
    tar = write_tar(tmp_path / "bad.tar", [*samples(range(20)), *bad[:2]])
    data = load_data(tar, tiny)
    with pytest.raises(DataError, match=r"bad\.tar, x\.png"):
        [split[n] for split in (data.train, data.val, data.test) for n in range(len(split))]


# What a tar is.


@pytest.mark.parametrize("left", [0.999, 0.7, 0.3, 0.0])
def test_a_tar_that_was_cut_off_is_refused(left, tmp_path, tiny):
    file = write_tar(tmp_path / "one.tar", samples(range(40), side=32))
    content = file.read_bytes().rstrip(b"\0")
    file.write_bytes(content[: int(left * len(content))])
    with pytest.raises(DataError, match=r"one\.tar"):
        load_data(file, tiny)


def test_no_byte_of_a_header_can_end_a_tar_unseen(tmp_path, tiny):
    file = write_tar(tmp_path / "one.tar", samples(range(6)))
    with tarfile.open(file) as tar:
        places = [member.offset for member in tar]
    content = bytearray(file.read_bytes())
    for place in places:
        damaged = content.copy()
        damaged[place + 150] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"one\.tar"):
            load_data(file, tiny)


def test_tars_that_were_joined_as_files_are_refused(tmp_path, tiny):
    one, two = (
        write_tar(tmp_path / f"{n}.tar", samples(range(n * 10, n * 10 + 10))) for n in (0, 1)
    )
    both = tmp_path / "both.tar"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(DataError, match="more behind the end"):
        load_data(both, tiny)


def test_a_compressed_tar_is_refused(tmp_path, tiny):
    with tarfile.open(tmp_path / "one.tar", "w:gz") as tar:
        tar.add(__file__, "x.txt")
    with pytest.raises(DataError, match="uncompressed"):
        load_data(tmp_path / "one.tar", tiny)


def test_an_index_is_kept_beside_stores_and_not_beside_the_data(tmp_path, tiny, kept, monkeypatch):
    folder = shots(tmp_path / "w", 2, 10)
    for file in folder.iterdir():
        age(file)
    monkeypatch.setattr("restuning._files.SETTLED", -1.0)
    before = load_data(folder, tiny).contents()
    assert len(list(kept.iterdir())) == 2 and len(list(folder.iterdir())) == 2
    monkeypatch.setattr("restuning.data.tar_index._read", None)
    assert load_data(folder, tiny).contents() == before


def test_an_index_that_was_made_where_fewer_kinds_of_images_are_read_is_made_again(
    tmp_path, tiny, monkeypatch
):
    folder = shots(tmp_path / "w", 1, 20, kind="webp")
    monkeypatch.setattr("restuning._files.SETTLED", -1.0)
    with monkeypatch.context() as before:
        # As of HEIC, before its library is installed.
        fewer = image_suffixes() - {".webp"}
        before.setattr("restuning.data.tar_index.image_suffixes", lambda: fewer)
        with pytest.raises(DataError, match="without an image"):
            load_data(folder, tiny)
    assert len(load_data(folder, tiny).train) == 14


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"\xff", None])
def test_an_index_that_is_not_what_was_written_is_made_again(
    damage, tmp_path, tiny, kept, monkeypatch
):
    folder = shots(tmp_path / "w", 1, 20)
    monkeypatch.setattr("restuning._files.SETTLED", -1.0)
    before = load_data(folder, tiny).contents()
    (index,) = kept.iterdir()
    whole = index.read_bytes()
    index.write_bytes(whole.replace(b"1536", b"2048", 1) if damage is None else damage)
    assert load_data(folder, tiny).contents() == before
    assert index.read_bytes() == whole


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_process_keeps_no_images_that_nobody_asks_it_for_twice(workers, tmp_path, tiny):
    shots(tmp_path / "w", 1, 20)
    data = load_data(tmp_path / "w", tiny).train
    # What was held when each batch was made.
    told = Loader(_Held(data), batch_size=4, num_workers=workers)
    held = [int(each[0]) for each in told]
    assert held == ([0] * 4 if workers else [4, 8, 12, 14])


class _Held:
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitems__(self, indices):
        self.data.__getitems__(indices)
        return [len(self.data.in_memory)]


def test_a_tar_that_changed_is_another_data_set(tmp_path, tiny):
    folder = shots(tmp_path / "w", 1, 20)
    before = load_data(folder, tiny)
    write_tar(folder / "shots-000.tar", samples(range(100, 120)))
    assert load_data(folder, tiny).contents() != before.contents()
    with pytest.raises(DataError, match="changed while they were read"):
        before.train.check_unchanged()


# What is made of them.


def test_an_export_names_rows_by_shard_and_key(tmp_path, tiny):
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = shots(tmp_path / "w", 2, 10, label="json")
    how = StoreOptions(tmp_path / "s", progress=False)
    build_store(folder, tiny, options=how, reading=DataOptions(label="kind"))
    export_store(folder, tmp_path / "out", label="kind", root=tmp_path / "s")
    ids = parquet.read_table(tmp_path / "out" / "test.parquet").column("id").to_pylist()
    assert ids == load_data(folder, tiny, label="kind").test.ids


def test_labels_of_other_kinds_are_refused(tmp_path, tiny):
    folder = shots(tmp_path / "w", 1, 20)
    with pytest.raises(DataError, match="only a table"):
        load_data(folder, tiny, problem="regression")
    tar = write_tar(
        tmp_path / "gap.tar",
        [
            m
            for n in (0, 3)
            for k in range(9)
            for m in ((f"{n}{k}.png", encode(9 * n + k)), (f"{n}{k}.cls", str(n).encode()))
        ],
    )
    with pytest.warns(RestuningWarning, match="without a training example"):
        assert load_data(tar, tiny).num_classes == 4


@pytest.mark.parametrize("value", ["s3://bucket/shots", "a.tar,https://example.org/b.tar"])
def test_a_file_of_options_does_not_choose_a_url(value, tmp_path):
    config = tmp_path / "options.yaml"
    config.write_text(f"data: '{value}'\nmethod: ridge\n")
    told = command("train", "--config", config)
    assert told.returncode and "does not choose what is fetched" in told.stderr
