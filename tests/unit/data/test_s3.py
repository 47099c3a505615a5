"""Tars and parquet files on a server of S3: known as those on a disk, noticed when they are put again, read while they are."""

import pytest

import restuning
from packed import PACKED
from parquets import rows, write
from restuning._errors import DataError
from restuning.features import StoreOptions, build_store, export_store
from s3 import BUCKET, put
from tars import samples, write_tar

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(params=PACKED)
def there(request, s3_client, tmp_path):
    """The URL of two files of twenty, their folder, and what kind they are of."""
    kind = PACKED[request.param]
    folder = kind.write(tmp_path / "w", 2, 20)
    return put(s3_client, folder, f"{tmp_path.name}/w"), folder, kind


@pytest.mark.parametrize("names", ["", "/*-*.{1}", "/{0}-{{000..001}}.{1}"])
def test_files_at_a_url_are_known_as_those_on_disk(names, there, tiny):
    url, folder, kind = there
    names = names.format(kind.first, kind.ending)
    far, here = (restuning.load_data(f"{place}{names}", tiny) for place in (url, folder))
    assert far.contents() == here.contents() and far.name == here.name
    assert far.test.ids == here.test.ids


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_of_them_has_the_bytes_of_one_from_disk(workers, there, tmp_path, tiny):
    url, folder, _ = there
    for place, root in ((url, "there"), (folder, "here")):
        how = StoreOptions(tmp_path / root, progress=False, batch_size=4, workers=workers)
        build_store(str(place), tiny, options=how)
    (far,), (here,) = ((tmp_path / root).iterdir() for root in ("there", "here"))
    assert {p.name: p.read_bytes() for p in far.iterdir()} == {
        p.name: p.read_bytes() for p in here.iterdir()
    }
    parquet = pytest.importorskip("pyarrow.parquet")
    export_store(url, tmp_path / "out", root=tmp_path / "there")
    ids = parquet.read_table(tmp_path / "out" / "test.parquet").column("id").to_pylist()
    assert ids == restuning.load_data(url, tiny).test.ids


def test_an_object_that_was_put_again_is_noticed_and_read_again(there, s3_client, tmp_path, tiny):
    url, folder, kind = there
    before = restuning.load_data(url, tiny)
    file = sorted(folder.iterdir())[0]
    if kind.ending == "tar":
        write_tar(file, samples(range(20, 40)))
    else:
        write(file, rows(range(20, 40)))
    put(s3_client, folder, f"{tmp_path.name}/w")
    with pytest.raises(
        DataError, match=rf"changed while they were read[\s\S]*s3://[\s\S]*{file.name}"
    ):
        before.train.check_unchanged()
    assert restuning.load_data(url, tiny).contents() != before.contents()


def test_what_is_not_there_names_its_url(s3_client, tiny):
    for name in ("nowhere/x.tar", "nowhere/x.parquet", "nowhere", "nowhere/x-*.parquet"):
        with pytest.raises(DataError, match=f"s3://{BUCKET}/nowhere"):
            restuning.load_data(f"s3://{BUCKET}/{name}", tiny)


def test_a_table_at_a_url_names_no_files_of_this_machine(s3_client, tmp_path, tiny):
    columns = rows(range(20))
    write(
        tmp_path / "w" / "paths.parquet", {"path": ["/etc/passwd"] * 20, "label": columns["label"]}
    )
    write(tmp_path / "w" / "masks.parquet", {**columns, "mask": ["/etc/x.png"] * 20})
    url = put(s3_client, tmp_path / "w", f"{tmp_path.name}/w")
    with pytest.raises(DataError, match="but their names"):
        restuning.load_data(f"{url}/paths.parquet", tiny)
    with pytest.raises(DataError, match="by a path"):
        restuning.load_data(f"{url}/masks.parquet", tiny, label="mask", classes=["a", "b"])
