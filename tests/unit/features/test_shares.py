"""Workers that know nothing of each other write one store: the one that is built at once, byte for byte."""

import csv
import json
import shutil

import pytest
import torch
from PIL import Image

import restuning
from commands import restuning as command
from restuning._errors import RestuningError, StoreError
from restuning._files import seal
from restuning.features import (
    Share,
    Store,
    StoreOptions,
    build_store,
    merge_shares,
    remove,
    stores,
    write_share,
)
from zoo import folders


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pets"
    for split, count in (("train", 22), ("val", 5), ("test", 9)):
        for number in range(count):
            file = folder / split / ("cat", "dog")[number % 2] / f"{number}.bmp"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (10 * number, 3 * count, 80)).save(file)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "reviews.csv"
    with file.open("w", newline="") as stream:
        rows = [(f"{'very ' * (n % 5)}{('good', 'bad')[n % 2]}", n % 2) for n in range(40)]
        csv.writer(stream).writerows([("text", "label"), *rows])
    return file


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = folders.bert(tmp_path_factory.mktemp("models") / "bert")
    return restuning.load_backbone(f"hf:{folder}")


def options(root, **more):
    """A file a batch: a worker has several of each split."""
    return StoreOptions(root, **{"progress": False, "batch_size": 4, "shard_bytes": 1, **more})


def files(root):
    """Name and bytes of all that lies in a folder of stores."""
    return {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
    }


def write_all(data, backbone, root, count, **more):
    for number in range(count, 0, -1):
        write_share(data, backbone, f"{number}/{count}", options=options(root), **more)


@pytest.fixture(scope="module")
def one(pets, tiny, tmp_path_factory):
    """Files of the store that is built at once."""
    root = tmp_path_factory.mktemp("one")
    build_store(pets, tiny, options=options(root))
    return files(root)


@pytest.fixture(scope="module")
def written(pets, tiny, tmp_path_factory):
    """Two workers' shares, each in a folder of its own; not merged."""
    root = tmp_path_factory.mktemp("written")
    for number in (1, 2):
        write_share(pets, tiny, f"{number}/2", options=options(root / str(number)))
    return root


@pytest.fixture
def copied(written, tmp_path):
    """Both copied into one folder."""
    for number in ("1", "2"):
        shutil.copytree(written / number, tmp_path / "stores", dirs_exist_ok=True)
    return tmp_path / "stores"


def test_shares_merge_to_the_bytes_of_one_build(pets, tiny, copied, one):
    merged = merge_shares("pets", copied)
    assert files(copied) == one
    assert merge_shares(pets, copied).key.digest == merged.key.digest
    # Of all methods of one token a tap united: nothing is left to compute for who trains.
    told = []
    build_store(pets, tiny, options=options(copied, log=told.append))
    assert any("reused" in line for line in told)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("images", {"tokens": "cls", "count": 3}),
        ("texts", {"tokens": "auto", "count": 2}),
        *[
            pytest.param(kind, more, marks=pytest.mark.slow)
            for kind, more in (
                ("texts", {"tokens": "last", "count": 3}),
                ("images", {"tokens": "all", "count": 1}),
                ("images", {"dtype": "int8", "count": 3}),
                ("images", {"dtype": "bf16", "views": 3, "count": 4}),
            )
        ],
    ],
)
def test_so_do_those_of_one_method_of_texts_and_of_every_form(
    pets, tiny, texts, request, tmp_path, kind, more
):
    data, backbone = (
        (pets, tiny) if kind == "images" else (texts, request.getfixturevalue("encoder"))
    )
    tokens, count = more.pop("tokens", "auto"), more.pop("count")
    build_store(data, backbone, tokens=tokens, options=options(tmp_path / "one", **more))
    for number in range(count, 0, -1):
        how = options(tmp_path / "many", **more)
        write_share(data, backbone, f"{number}/{count}", tokens=tokens, options=how)
    merge_shares(data, tmp_path / "many")
    assert files(tmp_path / "many") == files(tmp_path / "one")


def test_each_worker_has_some_of_every_split_and_none_has_anothers(written):
    seen = [
        {name.rpartition("/")[2] for name in files(written / number) if name.endswith(".npy")}
        for number in ("1", "2")
    ]
    assert not seen[0] & seen[1]
    assert all({n.partition(".")[0] for n in own} == {"train", "val", "test"} for own in seen)


def test_a_worker_that_is_stopped_at_any_forward_costs_its_share_alone(pets, tiny, tmp_path, one):
    left = [0]

    def stop(module, inputs):
        # The one input is of the key.
        left[0] -= len(inputs[0]) > 1
        if left[0] < 0:
            raise KeyboardInterrupt

    made = []
    handle = tiny.model.register_forward_pre_hook(stop)
    try:
        for forwards in (0, 1, 2):
            left[0] = forwards
            with pytest.raises(KeyboardInterrupt):
                write_share(pets, tiny, "1/2", options=options(tmp_path))
            made.append(len(list(tmp_path.rglob("*.*.0*.json"))))
            with pytest.raises(StoreError, match="1/2 was begun and has not finished"):
                merge_shares("pets", tmp_path)
    finally:
        handle.remove()
    # What was finished is kept.
    assert made == [0, 1, 3]
    with pytest.raises(StoreError, match=r"2/2 was never begun"):
        merge_shares("pets", tmp_path)
    write_all(pets, tiny, tmp_path, 2)
    merge_shares("pets", tmp_path)
    assert files(tmp_path) == one


def test_the_same_worker_twice_or_after_the_merge_changes_nothing(pets, tiny, copied, one):
    before, told = files(copied), []
    write_share(pets, tiny, "2/2", options=options(copied))
    assert files(copied) == before
    merge_shares("pets", copied)
    write_share(pets, tiny, "2/2", options=options(copied, log=told.append))
    assert any("nothing to do" in line for line in told)
    assert files(copied) == one


def test_a_plain_build_takes_over_what_workers_left(pets, tiny, written, tmp_path, one):
    shutil.copytree(written / "2", tmp_path / "stores")
    build_store(pets, tiny, options=options(tmp_path / "stores"))
    assert files(tmp_path / "stores") == one


def test_two_counts_in_one_folder_are_refused(pets, tiny, written, copied):
    with pytest.raises(StoreError, match="shared out in two ways") as refused:
        write_share(pets, tiny, "1/3", options=options(copied))
    assert "1/3" in str(refused.value) and "1/2" in str(refused.value)
    with pytest.raises(StoreError, match="cut it in two ways"):
        write_share(pets, tiny, "2/2", options=options(copied, batch_size=8))
    # Copied together from two places they meet at the merge.
    mark = next(copied.rglob("share.1-of-2.json"))
    content = seal({**json.loads(mark.read_text()), "of": 3})
    mark.with_name("share.1-of-3.json").write_text(json.dumps(content))
    with pytest.raises(StoreError, match="shared out in two ways"):
        merge_shares("pets", copied)


@pytest.mark.parametrize("other", ["data", "backbone", "dtype"])
def test_shares_of_other_data_or_of_another_backbone_are_refused_by_name(
    pets, tiny, written, tmp_path, other
):
    root, data, backbone, more = tmp_path / "stores", pets, tiny, {}
    shutil.copytree(written / "1", root)
    if other == "data":
        data = shutil.copytree(pets, tmp_path / "copy" / "pets")
        Image.new("RGB", (8, 8), (255, 0, 0)).save(data / "val" / "cat" / "0.bmp")
    elif other == "backbone":
        backbone = restuning.load_backbone("restuning-tiny", random=True)
    else:
        more = {"dtype": "fp16"}
    write_share(data, backbone, "2/2", options=options(root, **more))
    first, second = sorted(stores(root), key=lambda p: not (p / "share.1-of-2.json").exists())
    with pytest.raises(StoreError, match="shares of several stores") as refused:
        merge_shares("pets", root)
    assert all(name in str(refused.value) for name in (first.name, second.name, other, "2/2"))
    # Copied into the other's folder it is refused by its file.
    for file in second.iterdir():
        if file.name != "key.json":
            shutil.copy(file, first)
    with pytest.raises(StoreError, match=r"(?s)another store.*share\.2-of-2\.json"):
        merge_shares(first)


@pytest.mark.parametrize("harm", ["bit", "truncated", "entry", "gone"])
def test_a_damaged_share_is_found_before_anything_is_made_of_it(pets, tiny, copied, one, harm):
    (folder,) = stores(copied)
    values, entry = (folder / f"train.0.00000000.{end}" for end in ("npy", "json"))
    if harm == "entry":
        entry.write_text(entry.read_text().replace(": 0", ": 1", 1))
    elif harm == "gone":
        values.unlink()
    else:
        content = bytearray(values.read_bytes())
        content[-1] ^= 1
        values.write_bytes(content if harm == "bit" else content[:-8])
    with pytest.raises(StoreError, match=r"(?s)damaged.*train\.0\.00000000.*--shard 1/2"):
        merge_shares("pets", copied)
    assert not (folder / "manifest.json").exists()
    if harm == "bit":
        # As it says.
        entry.unlink()
        write_share(pets, tiny, "1/2", options=options(copied))
        merge_shares("pets", copied)
        assert files(copied) == one


@pytest.mark.parametrize("harm", ["edited", "unsealed", "truncated", "link"])
def test_a_damaged_mark_costs_no_more_than_its_worker_run_again(
    pets, tiny, copied, tmp_path, one, harm
):
    mark = next(copied.rglob("share.2-of-2.json"))
    text = mark.read_text()
    if harm == "link":
        mark.rename(tmp_path / "elsewhere.json")
        mark.symlink_to(tmp_path / "elsewhere.json")
    elif harm == "unsealed":
        content = json.loads(text)
        mark.write_text(json.dumps({name: content[name] for name in list(content)[:-1]}))
    else:
        mark.write_text(text.replace(": 4,", ": 5,", 1) if harm == "edited" else text[:-9])
    with pytest.raises(StoreError, match=r"(?s)mark.*share\.2-of-2\.json.*run its worker again"):
        merge_shares("pets", copied)
    # As it says.
    mark.unlink()
    write_share(pets, tiny, "2/2", options=options(copied))
    merge_shares("pets", copied)
    assert files(copied) == one


def test_a_store_above_its_limit_is_refused_for_its_size(pets, tiny, tmp_path):
    how = options(tmp_path, limit=1000)
    with pytest.raises(StoreError, match="larger than its limit"):
        build_store(pets, tiny, options=how)
    with pytest.raises(StoreError, match="larger than its limit"):
        write_share(pets, tiny, "1/2", options=how)
    assert not stores(tmp_path)


def test_an_unfinished_store_that_nobody_shares_is_refused_in_words(copied):
    (folder,) = stores(copied)
    for mark in folder.glob("share.*"):
        mark.unlink()
    with pytest.raises(StoreError, match=r"(?s)no shares of a store.*run the same"):
        merge_shares(folder)


def test_a_merge_that_ends_while_another_reads_marks_is_the_others_as_well(copied, monkeypatch):
    (folder,) = stores(copied)
    from restuning.features import share

    def read(folder):
        monkeypatch.undo()
        merge_shares(folder)
        return read_marks(folder)

    read_marks = share.read_marks
    monkeypatch.setattr(share, "read_marks", read)
    assert merge_shares(folder).verify() > 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_is_told_of_in_a_sentence_also_by_loader_processes(
    tmp_path, tiny, workers
):
    for number in range(8):
        file = tmp_path / "data" / "train" / ("cat", "dog")[number % 2] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 64), 90).convert("RGB").save(file)
    file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(RestuningError, match=r"7\.jpg") as refused:
        build_store(tmp_path / "data", tiny, options=options(tmp_path / "stores", workers=workers))
    assert "Traceback" not in str(refused.value)


def test_an_unfinished_share_is_removed_with_its_store(copied):
    (folder,) = stores(copied)
    assert remove(folder).kept == ()
    assert not folder.exists()


def test_a_process_of_a_launcher_takes_no_share(tiny, pets, tmp_path, monkeypatch):
    # It would write what the others of its launcher write as well.
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StoreError, match="share a store by themselves"):
        write_share(pets, tiny, "1/2", options=options(tmp_path))


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/", "a/b", "1/2/3", "-1/2", "1/0"])
def test_what_is_no_share_is_refused(text):
    with pytest.raises(StoreError, match="not a share"):
        Share.parse(text)


def test_loader_processes_change_no_byte_and_their_time_is_told(pets, tiny, tmp_path, one):
    stages = build_store(pets, tiny, options=options(tmp_path, workers=1)).stages
    assert files(tmp_path) == one
    assert (stages.rows, stages.workers) == (36, 1)
    assert stages.read > 0 and stages.decode > 0
    assert stages.bottleneck in ("read", "decode", "forward", "write")
    assert f"the bottleneck is {stages.bottleneck}" in str(stages)


def test_on_a_slow_disk_reading_is_what_takes_the_time(tmp_path, monkeypatch):
    from restuning.features import stages

    clock, in_memory = [0.0], set()

    def read(file):
        # Of what was read before nothing comes from the disk.
        clock[0] += 1.0 * (file not in in_memory)
        in_memory.add(file)
        return file.open("rb")

    class Images(list):
        files = [tmp_path / str(n) for n in range(8)]

        def __getitem__(self, index):
            read(self.files[index]).close()
            clock[0] += 0.25
            return index

    for file in Images.files:
        file.write_bytes(b"x")
    monkeypatch.setattr(stages, "open_plain", read)
    monkeypatch.setattr(stages.time, "perf_counter", lambda: clock[0])
    _, reading, decoding = stages.TimedInputs(Images(range(8))).__getitems__(range(8))
    assert (reading, decoding) == (8.0, 2.0)
    assert stages.Stages(read=reading, decode=decoding, wait=1.0).bottleneck == "read"


def test_where_nothing_was_computed_no_bottleneck_is_told(pets, tiny, copied):
    told = []
    write_share(pets, tiny, "1/2", options=options(copied, log=told.append))
    assert told[-1].startswith("time  none") and "bottleneck" not in told[-1]


def test_few_images_and_those_in_memory_are_read_by_the_main_process(pets, tiny):
    from restuning.features.stages import choose_workers

    assert choose_workers(restuning.load_data(str(pets), tiny).train, 32) == 0
    assert choose_workers([(torch.zeros(3, 8, 8), 0)] * 1000, 32) == 0


def test_larger_shards_are_fewer_files_of_the_same_rows(pets, tiny, tmp_path, copied):
    small = merge_shares("pets", copied)
    large = build_store(pets, tiny, options=options(tmp_path, shard_bytes=2**30)).store
    assert len(large.manifest["shards"]) == 3 < len(small.manifest["shards"])
    assert torch.equal(large.rows("train", 0, range(22)), small.rows("train", 0, range(22)))


def test_the_command_line_shares_merges_and_says_what_is_next(pets, tmp_path):
    how = ("--store", tmp_path, "--batch-size", 2, "--shard-size", "8KB")
    done = command("cache", pets, "--shard", "1/2", *how)
    assert done.returncode == 0, done.stderr
    assert f"restuning cache merge {pets} --store {tmp_path}" in done.stdout
    assert "bottleneck" in done.stdout
    failed = command("cache", "merge", pets, "--store", tmp_path)
    assert failed.returncode == 1 and "--shard 2/2" in failed.stderr
    done = command("cache", pets, "--shard", "2/2", *how, "--json")
    assert json.loads(done.stdout)["share"] == "2/2"
    facts = json.loads(command("cache", "merge", pets, "--store", tmp_path, "--json").stdout)
    assert facts["shards"] > 3
    assert Store(facts["path"]).verify() > 3
    for wrong in ("3/2", "half"):
        done = command("cache", pets, "--shard", wrong, *how)
        assert done.returncode == 1 and "Traceback" not in done.stderr
    for wrong in (("--to", "parquet"), ("--on", "spark")):
        assert command("cache", pets, *wrong, *how).returncode == 2
    assert command("cache", "merge", pets, "--on", "ray", "--store", tmp_path).returncode == 2
    nothing = command("cache", "merge", "others", "--store", tmp_path)
    assert nothing.returncode == 1 and "no shares of a store" in nothing.stderr
