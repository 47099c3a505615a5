"""A store that is killed, filled up or built by two at once is whole, or says that it is not."""

import os
import signal
import time
from pathlib import Path

import pytest
from store_script import BATCH, COUNT

from children import Child
from restuning.features import Store, stores

SCRIPT = Path(__file__).with_name("store_script.py")
PATIENCE = 120
FORWARDS = COUNT // BATCH
SHARD = 2
"""Forwards of one shard of the script."""
pytestmark = pytest.mark.skipif(os.name == "nt", reason="SIGKILL and RLIMIT are of POSIX systems")


def start(root, sleep=0.0, limit=0):
    return Child([SCRIPT, root, sleep, limit])


def finish(process):
    out, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, out.count("forward"), errors


def digests(root):
    (folder,) = stores(root)
    shards = Store(folder).manifest["shards"]
    Store(folder).verify()
    return [f["sha256"] for shard in shards for f in shard["files"]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    status, forwards, errors = finish(start(root))
    assert (status, forwards) == (0, FORWARDS), errors
    return digests(root)


def test_a_killed_writer_goes_on_at_the_shard_where_it_was(tmp_path, whole):
    process = start(tmp_path, sleep=0.05)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and len(list(tmp_path.glob("*/train*.json"))) < 4:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (folder,) = stores(tmp_path)
    done = len(list(folder.glob("train*.json")))
    assert 4 <= done < FORWARDS // SHARD
    with pytest.raises(Exception, match="unfinished"):
        Store(folder)
    status, forwards, errors = finish(start(tmp_path))
    assert status == 0, errors
    assert forwards == FORWARDS - done * SHARD
    assert digests(tmp_path) == whole


def test_two_writers_share_the_work_and_do_none_twice(tmp_path, whole):
    both = [start(tmp_path, sleep=0.05), start(tmp_path, sleep=0.05)]
    results = [finish(process) for process in both]
    assert [status for status, _, _ in results] == [0, 0], results
    assert sum(forwards for _, forwards, _ in results) == FORWARDS
    assert digests(tmp_path) == whole


def test_a_full_disk_ends_in_words_and_loses_no_finished_shard(tmp_path, whole):
    # Large enough for key.json, too small for a shard.
    status, _, errors = finish(start(tmp_path, limit=2000))
    assert status == 1
    assert "cannot be written" in errors
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("*/.*partial"))
    status, _, errors = finish(start(tmp_path))
    assert status == 0, errors
    assert digests(tmp_path) == whole
