"""A process that ends leaves no thread inside the backbone: one that is stopped there takes the process with it."""

import os
import subprocess
import sys
import threading

from restuning import load_backbone, serve
from restuning.serve.service import Service
from serving import picture, running, save_task

ENDS = """
import atexit, sys, threading

def tell():
    print([t.name for t in threading.enumerate() if t.name.startswith("restuning")])

# Before what is imported below: the last to run.
atexit.register(tell)
from restuning import serve
application = serve.app({"pets": sys.argv[1]})
if sys.argv[2] == "asked":
    # Given up at once: the answer is being made when the process ends.
    application.state.service.ask("image", [open(sys.argv[3], "rb").read()])
"""


def ours():
    return [t.name for t in threading.enumerate() if t.name.startswith("restuning-answer")]


def test_a_server_that_ended_has_no_thread(tmp_path):
    folder = save_task(load_backbone("restuning-tiny"), tmp_path / "pets.task")
    before = ours()
    with running(serve.app({"pets": folder})):
        assert len(ours()) == len(before) + 1
    assert ours() == before


def test_a_service_that_is_drained_has_no_thread(tmp_path):
    service = Service({"pets": save_task(load_backbone("restuning-tiny"), tmp_path / "pets.task")})
    batcher = service.batchers[0]
    service.ask("image", [picture()])[0][0].result()
    assert service.drain(30)
    assert not batcher._thread.is_alive()


def test_a_process_that_ends_without_a_word_ends_its_threads_first(tmp_path):
    folder = save_task(load_backbone("restuning-tiny"), tmp_path / "pets.task")
    (tmp_path / "photo.png").write_bytes(picture())
    for what in ("warming", "asked"):
        done = subprocess.run(
            [sys.executable, "-c", ENDS, folder, what, tmp_path / "photo.png"],
            capture_output=True,
            text=True,
            env=os.environ,
        )
        assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
