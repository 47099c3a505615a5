"""Stores at a URL: read and written by way of a mirror, shared between machines, refused where they are not what was written."""

import pytest

import restuning
from commands import restuning as command
from restuning._errors import StoreError
from restuning._files import cache_root
from restuning.features import (
    Store,
    StoreOptions,
    away,
    build_on_ray,
    build_store,
    export_store,
    merge_shares,
    write_share,
)
from restuning.features.away import MIRRORS, Away
from restuning.features.manifest import MANIFEST
from s3 import BUCKET
from tars import shots

SMALL = {"progress": False, "batch_size": 4, "shard_bytes": 1}


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Go to another machine: one with nothing kept on it."""

    def go(name):
        monkeypatch.setenv("RESTUNING_CACHE", str(tmp_path / name))
        return tmp_path / name

    monkeypatch.setattr("restuning.data.remote.PAUSE", 0.0)
    go("one")
    return go


@pytest.fixture
def url(s3_client, tmp_path):
    return f"s3://{BUCKET}/{tmp_path.name}/stores"


@pytest.fixture
def photos(tmp_path):
    return shots(tmp_path / "w", 2, 20)


def listed(s3_client, url):
    """Contents at the URL by name below it."""
    prefix = url.partition(f"{BUCKET}/")[2]
    found = s3_client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return {
        each["Key"].removeprefix(f"{prefix}/"): s3_client.get_object(
            Bucket=BUCKET, Key=each["Key"]
        )["Body"].read()
        for each in found
    }


def without_notes(files):
    """Of a store what its manifest names, and itself."""
    return {name: content for name, content in files.items() if name.endswith((".npy", MANIFEST))}


def test_a_store_at_a_url_has_the_bytes_of_one_in_a_folder(
    s3_client, url, photos, tmp_path, machine, tiny
):
    build_store(photos, tiny, options=StoreOptions(url, **SMALL))
    build_store(photos, tiny, options=StoreOptions(tmp_path / "here", **SMALL))
    (here,) = (tmp_path / "here").iterdir()
    wanted = {f"{here.name}/{p.name}": p.read_bytes() for p in here.iterdir()}
    assert without_notes(listed(s3_client, url)) == without_notes(wanted)


def test_another_machine_reads_it_and_computes_nothing(
    s3_client, url, photos, machine, tiny, monkeypatch
):
    build_store(photos, tiny, options=StoreOptions(url, **SMALL))
    before = listed(s3_client, url)
    machine("two")
    monkeypatch.setattr("restuning.features.stored.build", None)
    stored = build_store(photos, tiny, options=StoreOptions(url, **SMALL))
    assert stored.seconds == 0 and stored.store.path.is_relative_to(cache_root())
    assert stored.store.verify() and listed(s3_client, url) == before


def test_processes_that_bring_one_store_at_once_do_not_meet(
    url, photos, machine, tiny, monkeypatch
):
    name = build_store(photos, tiny, options=StoreOptions(url, **SMALL)).store.path.name
    machine("two")
    real, others = away.digest_files, []

    def meanwhile(files):
        if not others:
            # Another process of a launcher, which began as this one did and ends before it.
            others.append(None)
            others.append(Away(url).fetch(name))
        return real(files)

    monkeypatch.setattr(away, "digest_files", meanwhile)
    assert Away(url).fetch(name) == others[1] and Store(others[1]).verify()
    assert {p.suffix for p in others[1].iterdir()} == {".npy", ".json"}


def test_a_task_trains_from_a_store_at_a_url(url, photos, tmp_path, machine):
    options = {"method": "ridge", "store": url}
    first = restuning.train(str(photos), out=tmp_path / "first", **options)
    machine("two")
    again = restuning.train(str(photos), out=tmp_path / "again", **options)
    assert first.metrics["test_accuracy"] == again.metrics["test_accuracy"]


def test_machines_that_share_a_store_write_the_bytes_of_one(
    s3_client, url, photos, tmp_path, machine, tiny
):
    build_store(photos, tiny, options=StoreOptions(tmp_path / "here", **SMALL))
    for number in (2, 1):
        machine(f"worker {number}")
        write_share(photos, tiny, f"{number}/2", options=StoreOptions(url, **SMALL))
    machine("merges")
    merged = merge_shares(photos, url)
    assert merged.verify()
    (here,) = (tmp_path / "here").iterdir()
    there = listed(s3_client, url)
    assert without_notes(there) == without_notes(
        {f"{here.name}/{p.name}": p.read_bytes() for p in here.iterdir()}
    )
    assert not any("share." in name for name in there)
    assert merge_shares(photos, url).key.digest == merged.key.digest


def test_a_share_that_was_stopped_goes_on_on_another_machine(
    url, photos, machine, tiny, monkeypatch
):
    options = StoreOptions(url, **SMALL)
    real, written = Away.put_shard, []

    def stops(self, store, key, shard):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(shard.name)
        real(self, store, key, shard)

    with monkeypatch.context() as killed:
        killed.setattr(Away, "put_shard", stops)
        with pytest.raises(KeyboardInterrupt):
            write_share(photos, tiny, "1/1", options=options)
    machine("two")
    with monkeypatch.context() as counted:
        more = []
        counted.setattr(Away, "put_shard", lambda *at: more.append(at[-1].name) or real(*at))
        write_share(photos, tiny, "1/1", options=options)
    assert len(written) == 3 and more and not {*written} & {*more}
    machine("merges")
    assert merge_shares(photos, url).verify()


def test_a_share_that_is_missing_is_told(url, photos, machine, tiny):
    write_share(photos, tiny, "1/2", options=StoreOptions(url, **SMALL))
    with pytest.raises(StoreError, match=r"missing[\s\S]*2/2"):
        merge_shares(photos, url)


@pytest.mark.parametrize("damage", ["changed", "short", "gone"])
def test_a_file_that_is_not_what_was_written_is_refused_and_nothing_is_used(
    damage, s3_client, url, photos, machine, tiny
):
    build_store(photos, tiny, options=StoreOptions(url, **SMALL))
    name = next(n for n in listed(s3_client, url) if n.endswith(".npy"))
    content = listed(s3_client, url)[name]
    key = f"{url.partition(f'{BUCKET}/')[2]}/{name}"
    if damage == "gone":
        s3_client.delete_object(Bucket=BUCKET, Key=key)
    else:
        body = content[:-1] if damage == "short" else content[:-1] + bytes([content[-1] ^ 1])
        s3_client.put_object(Bucket=BUCKET, Key=key, Body=body)
    machine("two")
    with pytest.raises(restuning.RestuningError, match="s3:/"):
        build_store(photos, tiny, options=StoreOptions(url, **SMALL))
    assert not list(cache_root().glob(f"{MIRRORS}/*/*/{MANIFEST}"))


def test_names_of_files_lead_nowhere_and_what_is_no_store_is_passed_over(s3_client, url, machine):
    prefix = url.partition(f"{BUCKET}/")[2]
    for name in (
        "../x/key.json",
        "a/../../key.json",
        "b/notes.txt",
        "c/deep/key.json",
        "d/key.json",
        "e/x.pkl",
    ):
        s3_client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=b"{}")
    assert Away(url).list_files() == {"d": {"key.json"}}


def test_mirrors_take_so_much_room_and_the_oldest_goes_first(
    url, photos, machine, tiny, tmp_path, monkeypatch
):
    other = shots(tmp_path / "v", 1, 24)
    sizes = [
        build_store(d, tiny, options=StoreOptions(url, **SMALL)).store.bytes
        for d in (photos, other)
    ]
    machine("two")
    monkeypatch.setattr("restuning.features.away.MOST", int(1.1 * max(sizes) + 4000))
    for data in (photos, other):
        path = build_store(data, tiny, options=StoreOptions(url, **SMALL)).store.path
        assert [p.parent for p in cache_root().glob(f"{MIRRORS}/*/*/{MANIFEST}")] == [path]
    third = shots(tmp_path / "u", 1, 28)
    sizes.append(build_store(third, tiny, options=StoreOptions(url, **SMALL)).store.bytes)
    machine("three")
    monkeypatch.setattr("restuning.features.away.MOST", int(2.2 * max(sizes) + 8000))
    paths = [
        build_store(data, tiny, options=StoreOptions(url, **SMALL)).store.path
        for data in (photos, other, photos, third)
    ]
    left = {p.parent for p in cache_root().glob(f"{MIRRORS}/*/*/{MANIFEST}")}
    assert left == {paths[0], paths[3]}
    monkeypatch.setattr("restuning.features.away.MOST", 10)
    machine("four")
    with pytest.raises(StoreError, match="too large to be read from there"):
        build_store(photos, tiny, options=StoreOptions(url, **SMALL))


def test_commands_that_only_read_take_a_url_and_others_refuse_it_in_words(
    url, photos, machine, tiny, tmp_path
):
    pytest.importorskip("pyarrow")
    store = build_store(photos, tiny, options=StoreOptions(url, **SMALL)).store
    machine("two")
    assert export_store(photos, tmp_path / "out", root=url)["rows"] == dict(store.key.splits)
    for what in ("info", "verify"):
        told = command("cache", what, store.path.name, "--store", url, "--json")
        assert told.returncode == 0, told.stderr
    for given in (("ls",), ("rm", store.path.name)):
        told = command("cache", *given, "--store", url)
        assert told.returncode and "not at a URL" in told.stderr
    with pytest.raises(StoreError, match="not at a URL"):
        build_on_ray(photos, "restuning-tiny", options=StoreOptions(url))
    with pytest.raises(StoreError, match="signs one file"):
        StoreOptions(f"{url}?signature=x").folder  # noqa: B018


def test_a_file_of_options_does_not_choose_where_stores_are_fetched_from(tmp_path):
    config = tmp_path / "options.yaml"
    config.write_text("store: s3://bucket/stores\nmethod: ridge\n")
    told = command("train", "digits", "--config", config)
    assert told.returncode and "does not choose what is fetched" in told.stderr
    config.write_text(f"store: {tmp_path / 'stores'}\n")
    assert command("cache", "ls", "--config", config).returncode == 0


def test_any_file_system_holds_stores(photos, machine, tiny):
    options = StoreOptions("memory://stores-of-a-test", **SMALL)
    build_store(photos, tiny, options=options)
    machine("two")
    assert Store(build_store(photos, tiny, options=options).store.path).verify()
