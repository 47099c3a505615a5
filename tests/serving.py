"""What tests of the server share: tasks on the embedded backbone, and pictures."""

import io
import json
import shutil
import threading
import time
from contextlib import contextmanager

import httpx
import numpy as np
import torch
import uvicorn
from PIL import Image

from restuning import load, load_backbone, methods, save
from restuning._files import SEAL, seal
from restuning.serve.web.run import Server, bind
from zoo import folders

LABELS = ["ant", "bee", "cat"]
ROUNDING = 1e-5
"""A product of another number of rows sums in another order."""


def save_task(
    backbone,
    folder,
    method="res-tuning-bypass",
    seed=0,
    labels=LABELS,
    host=None,
    problem=None,
    **more,
):
    """A task whose head tells inputs apart, as `restuning train` leaves it."""
    host = host or backbone.host()
    torch.manual_seed(seed)
    task = methods.build(method, host, num_classes=len(labels), **more)
    torch.nn.init.normal_(task.head.weight)
    task.labels = labels
    task.problem = problem or task.problem
    said = backbone.preprocessing.to_dict() if backbone.preprocessing else {}
    return save(task, host, folder, backbone=backbone.name, preprocessing=said)


def save_tasks(folder, count=3, inline=True):
    """Bypass tasks `t0`, `t1`, ... and an inline one, `inline`, in a folder; by name."""
    backbone = load_backbone("restuning-tiny")
    host = backbone.host()
    made = {
        f"t{i}": save_task(backbone, folder / f"t{i}.task", seed=i, host=host) for i in range(count)
    }
    if inline:
        made["inline"] = save_task(backbone, folder / "inline.task", "bitfit", seed=9, host=host)
    return made


def save_all_kinds(folder):
    """Tasks on images, texts (`mood`) and tagged words (`words`); by name."""
    backbone = load_backbone(f"hf:{folders.bert(folder / 'bert')}")
    host = backbone.host()
    words = as_words(save_task(backbone, folder / "words.task", host=host, pool="all"))
    mood = save_task(backbone, folder / "mood.task", host=host, pool="mean")
    return {**save_tasks(folder, 2), "mood": mood, "words": words}


def save_overflowing(backbone, folder, **more):
    """A task of finite weights whose answers are none: they overflow."""
    saved = save_task(backbone, folder, **more)
    host = more.get("host") or backbone.host()
    task = load(saved, host)
    torch.nn.init.constant_(task.head.weight, 3e38)
    said = backbone.preprocessing.to_dict() if backbone.preprocessing else {}
    return save(task, host, folder, backbone=backbone.name, preprocessing=said)


def prepared_otherwise(source, folder):
    """A copy of a task that wants its images normalised in another way, hence another forward."""
    said = json.loads((shutil.copytree(source, folder) / "task.json").read_text())
    del said[SEAL]
    said["preprocessing"]["mean"] = [0.1, 0.2, 0.3]
    (folder / "task.json").write_text(json.dumps(seal(said)))
    return folder


def as_words(folder):
    """A saved task on texts as one on tagged words."""
    said = json.loads((folder / "task.json").read_text())
    del said[SEAL]
    said["preprocessing"] = {"kind": "tags", "max_tokens": 64}
    (folder / "task.json").write_text(json.dumps(seal(said)))
    return folder


def picture(seed=0, form="PNG", size=(40, 48)):
    """The bytes of an image file."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def same(one, other):
    """Whether two answers say the same, but for rounding."""
    if one.words or other.words:
        pairs = list(zip(one.words, other.words, strict=True))
        return all(a.input == b.input and same(a, b) for a, b in pairs)
    return one.predictions.keys() == other.predictions.keys() and all(
        torch.allclose(one[n].probabilities, other[n].probabilities, atol=ROUNDING)
        and one[n].labels == other[n].labels
        for n in one.predictions
    )


@contextmanager
def running(application, seconds=10):
    """A server over loopback in a thread of this process; gives its address."""
    listening = bind("127.0.0.1", 0)
    config = uvicorn.Config(application, log_config=None, access_log=False)
    server = Server(application, config, seconds)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        wait_until_ready(address)
        yield address
    finally:
        application.state.service.drain(seconds)
        server.should_exit = True
        thread.join(seconds)


def wait_until_ready(address, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if httpx.get(f"{address}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise TimeoutError(address)
