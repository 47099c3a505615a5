"""Tars by URL: as from a disk, asked again where the network fails, and errors that name the URL and no secret."""

import http.server
import re
import threading

import fsspec
import pytest

import restuning
from restuning._errors import DataError, MissingExtraError
from restuning.data.remote import File, show_url
from restuning.data.tar_index import KEPT
from restuning.features import StoreOptions, build_store
from tars import samples, shots, write_tar

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def memory(tmp_path):
    """Two tars of twenty in memory, and the same on disk."""
    folder = shots(tmp_path / "w", 2, 20)
    system = fsspec.filesystem("memory")
    for file in folder.iterdir():
        system.pipe(f"/w/{file.name}", file.read_bytes())
    yield "memory://w", folder
    system.rm("/w", recursive=True)


class _Ranges(http.server.SimpleHTTPRequestHandler):
    """Files with an etag, whole or in part, as object stores give them."""

    def do_HEAD(self):
        self._answer(False)

    def do_GET(self):
        self._answer(True)

    def _answer(self, body):
        file = self.server.folder / self.path.partition("?")[0].strip("/")
        if not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = content[int(found[1]) : int(found[2]) + 1] if found else content
        self.send_response(206 if found else 200)
        if found:
            stop = int(found[1]) + len(part) - 1
            self.send_header("Content-Range", f"bytes {found[1]}-{stop}/{len(content)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hash(content)}"')
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if body:
            self.wfile.write(part)

    def log_message(self, *told):
        pass


@pytest.fixture
def served(tmp_path):
    pytest.importorskip("aiohttp")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Ranges)
    server.folder = shots(tmp_path / "w", 2, 20)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", server.folder
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("names", ["", "/shots-{000..001}.tar", "/shots-*.tar"])
def test_tars_at_a_url_are_known_as_those_on_disk(names, memory, tiny):
    url, folder = memory
    there, here = (restuning.load_data(f"{place}{names}", tiny) for place in (url, folder))
    assert there.contents() == here.contents() and there.name == here.name
    assert there.test.ids == here.test.ids


@pytest.mark.parametrize("workers", [0, 2])
def test_a_store_of_tars_over_http_has_the_bytes_of_one_from_disk(workers, served, tmp_path, tiny):
    url, folder = served
    names = "shots-{000..001}.tar"
    for place, root in ((url, "there"), (folder, "here")):
        how = StoreOptions(tmp_path / root, progress=False, batch_size=4, workers=workers)
        build_store(f"{place}/{names}", tiny, options=how)
    (there,), (here,) = ((tmp_path / root).iterdir() for root in ("there", "here"))
    assert {p.name: p.read_bytes() for p in there.iterdir()} == {
        p.name: p.read_bytes() for p in here.iterdir()
    }


def test_an_object_that_was_put_again_is_read_again_and_noticed(
    served, tmp_path, tiny, monkeypatch
):
    url, folder = served
    name = f"{url}/shots-000.tar"
    before = restuning.load_data(name, tiny)
    assert len(list((tmp_path / "cache" / KEPT).iterdir())) == 1
    with monkeypatch.context() as without:
        without.setattr("restuning.data.tar_index._read", None)
        assert restuning.load_data(name, tiny).contents() == before.contents()
    # As large as it was: the etag alone is another.
    write_tar(folder / "shots-000.tar", samples(range(20, 40)))
    with pytest.raises(DataError, match="changed while they were read"):
        before.train.check_unchanged()
    assert restuning.load_data(name, tiny).contents() != before.contents()


def test_a_request_that_fails_is_made_again(memory, tiny, monkeypatch):
    url, _ = memory
    system, failed = fsspec.filesystem("memory"), []
    real = type(system).cat_file

    def flaky(self, *given, **named):
        if len(failed) % 3 < 2:
            failed.append(1)
            raise ConnectionResetError("reset by peer")
        failed.append(0)
        return real(self, *given, **named)

    monkeypatch.setattr(type(system), "cat_file", flaky)
    data = restuning.load_data(url, tiny)
    assert data.train[0][0].shape[0] == 3 and failed == [1, 1, 0]


def test_one_that_fails_each_time_names_its_url(memory, tiny, monkeypatch):
    def fails(*given, **named):
        raise ConnectionResetError("reset by peer")

    data = restuning.load_data(memory[0], tiny)
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", fails)
    with pytest.raises(DataError, match=r"memory:.*shots-00\d\.tar[\s\S]*reset by peer"):
        data.train[0]


@pytest.mark.parametrize(
    ("url", "error"),
    [
        ("memory://nowhere/x.tar", DataError),
        ("memory://nowhere", DataError),
        ("memory://nowhere/x-*.tar", DataError),
        ("nosuch://bucket/x.tar", DataError),
    ],
)
def test_a_url_where_nothing_is_read_is_told(url, error, tiny):
    with pytest.raises(error, match=re.escape(url.partition("://")[0])):
        restuning.load_data(url, tiny)


def test_a_kind_of_url_whose_library_is_missing_says_what_to_install(tiny, monkeypatch):
    def without(url, **named):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", without)
    with pytest.raises(MissingExtraError, match=r"restuning\[remote\]"):
        restuning.load_data("s3://bucket/x.tar", tiny)


def test_errors_say_no_password_and_no_signature(monkeypatch):
    url = "https://me:secret@host/x.tar?signature=secret"
    assert show_url(url) == "https://host/x.tar" == str(File(url))

    def fails(given, **named):
        raise ConnectionResetError(f"cannot reach {given}")

    monkeypatch.setattr(fsspec.core, "url_to_fs", fails)
    with pytest.raises(DataError) as told:
        File(url).state()
    assert "secret" not in str(told.value) and "https://host/x.tar" in str(told.value)


def test_a_table_does_not_choose_a_url(tmp_path, tiny):
    file = tmp_path / "table.csv"
    file.write_text("image,label\nhttp://127.0.0.1:9/a.png,a\nmemory://w/b.png,b\n")
    with pytest.raises(DataError, match=r"table\.csv, line 2"):
        restuning.load_data(file, tiny, image="image")
