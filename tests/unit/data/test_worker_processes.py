"""All that a loader holds can be sent to worker processes that are started afresh, not forked.

macOS, Windows and Python 3.14 start them so: data sets, their transforms and what makes a batch of
examples travel by pickle.
"""

import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from store_script import host_and_key
from torch.utils.data import ConcatDataset, default_collate

from restuning import load_backbone, load_data
from restuning._errors import DataError
from restuning._torch import tree_leaves
from restuning.backbones import Backbone, Preprocessing
from restuning.data import with_validation
from restuning.data.decoded import decode_once
from restuning.features import StoredFeatures, build
from restuning.features.views import view_of
from restuning.runtime.randomness import seed_everything
from restuning.training.evaluate import iterate_logits
from restuning.training.prepare import PreparedSplit
from restuning.training.randomness import Order, batches
from zoo import folders

SIZE = 16
IMAGES = Backbone("images", torch.nn.Identity(), (), {}, Preprocessing((SIZE, SIZE)))
POLICIES = [
    "none",
    "flip",
    "timm",
    "timm:rand-m9-mstd0.5",
    "timm:augmix-m5-w4-d2",
    "timm:original-mstd0.5",
    "timm:3a",
]
LARGEST = 400_000
"""Bytes that a small data set is sent as: it grows tenfold where decoded images travel with it."""


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(str(path))).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def class_folders(root):
    for name in ("cat", "dog"):
        for number in range(8):
            picture(root / name / f"{number:02}.png")
    return load_data(str(root), IMAGES)


def augmented(policy):
    def make(root):
        class_folders(root)
        return load_data(str(root), IMAGES, augment=policy)

    return make


def lists(root):
    for number in range(6):
        picture(root / "images" / f"{number}.png")
    lines = [f"images/{number}.png {number % 2}\n" for number in range(6)]
    for name, part in (("train800", lines[:3]), ("val200", lines[3:5]), ("test", lines[5:])):
        (root / f"{name}.txt").write_text("".join(part))
    return load_data(str(root), IMAGES)


def digits(root):
    return load_data("digits", IMAGES, augment="flip")


def hub(root):
    hf = pytest.importorskip("datasets")
    images = [Image.new("RGB", (SIZE, SIZE), (9 * number,) * 3) for number in range(20)]
    kinds = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=["a", "b"])})
    rows = {"image": images, "label": [number % 2 for number in range(20)]}
    hf.Dataset.from_dict(rows, features=kinds).save_to_disk(str(root))
    return load_data(f"hf:{root}", IMAGES, augment="timm")


def torchvision(root):
    pytest.importorskip("torchvision")
    for split in ("train", "valid", "test"):
        for name in ("negative", "positive"):
            for number in range(4):
                picture(root / "rendered-sst2" / split / name / f"{number}.png")
    return load_data("torchvision:RenderedSST2", IMAGES, root=root, augment="flip")


def bert(root):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folders.bert(root / "bert"))
    return Backbone("bert", torch.nn.Identity(), (), {}, None, tokenizer)


def csv(root):
    rows = "".join(f"a good film {n},yes\na bad film {n},no\n" for n in range(10))
    (root / "films.csv").write_text("text,label\n" + rows)
    return load_data(str(root / "films.csv"), bert(root))


def conll(root):
    (root / "names.conll").write_text("ann PER\nin O\nparis LOC\n\nbob PER\n\n" * 10)
    return load_data(str(root / "names.conll"), bert(root))


def held_out(root):
    return with_validation(load_data(str(root), IMAGES)) if class_folders(root) else None


def decoded(root):
    return decode_once(class_folders(root / "images"), IMAGES, root / "decoded")


KINDS = {
    **{f"folders, {policy}": augmented(policy) for policy in POLICIES},
    "lists": lists,
    "digits": digits,
    "hub": hub,
    "torchvision": torchvision,
    "csv": csv,
    "conll": conll,
    "held out": held_out,
    "decoded": decoded,
}


def same(ours, theirs):
    pairs = zip(tree_leaves(ours), tree_leaves(theirs), strict=True)
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


def looked_at(dataset, collate):
    """A batch of some examples, under one seed."""
    seed_everything("look", devices=False)
    rows = [0, len(dataset) - 1]
    if hasattr(dataset, "__getitems__"):
        return (collate or default_collate)(dataset.__getitems__(rows))
    return (collate or default_collate)([dataset[row] for row in rows])


def sent(value):
    return pickle.loads(pickle.dumps(value))  # noqa: S301


@pytest.mark.parametrize("kind", KINDS)
def test_a_data_set_that_was_sent_gives_the_batches_it_gave(kind, tmp_path):
    data = KINDS[kind](tmp_path)
    for split in (data.train, data.val, data.test):
        if split is not None:
            before = looked_at(split, data.collate)
            assert same(before, looked_at(sent(split), sent(data.collate)))


def test_decoded_images_are_not_sent_and_what_is_not_kept_stays_so(tmp_path):
    data = load_data("digits", load_backbone("restuning-tiny"))
    for index in range(len(data.train)):
        data.train[index]
    assert len(data.train.in_memory) == len(data.train)
    assert sent(data.train).in_memory == {}
    assert len(pickle.dumps(data.train)) < LARGEST
    assert sent(augmented("flip")(tmp_path).train).in_memory is None


def as_given(batch):
    """Whole batches as they are, and lists of examples as one."""
    return default_collate(batch) if isinstance(batch, list) else batch


def stored(root):
    host, key = host_and_key()
    images = [(torch.randn(3, 32, 32), number % 5) for number in range(96)]
    return StoredFeatures(build(host, key, root, {("train", 0): images}, progress=False), ["train"])


def test_stored_features_views_and_prepared_splits_are_sent_whole(tmp_path):
    features = stored(tmp_path / "stores")
    beside = PreparedSplit(features, {"answers": torch.randn(96, 2)})
    images = class_folders(tmp_path / "images").train
    joined = ConcatDataset([images, images])
    with_rows = PreparedSplit(joined, {"answers": torch.randn(len(joined), 2)})
    crops = view_of("crop.2", images, augmented("timm")(tmp_path / "images").train)
    collate = with_rows.collate(None)
    for split in (features, beside, joined, view_of("flip", images, None), crops):
        assert same(looked_at(split, as_given), looked_at(sent(split), as_given))
    assert same(looked_at(with_rows, collate), looked_at(sent(with_rows), sent(collate)))


def read_to_train(data, model):
    list(batches(data.train, Order(len(data.train), 4, 1, seed=0), 0, 0, 1, None, 1, pin=False))


def read_to_judge(data, model):
    list(iterate_logits(model, data.train, 4, workers=1))


def read_to_store(data, model):
    host, key = host_and_key()
    build(host, key, data.root, {("train", 0): data.train}, workers=1, progress=False)


@pytest.mark.parametrize("read", [read_to_train, read_to_judge, read_to_store])
def test_an_error_of_a_worker_process_is_the_error_of_one_process(read, tmp_path):
    data = class_folders(tmp_path / "images")
    data.root = tmp_path / "stores"
    for path, _ in data.train.samples:
        path.write_bytes(b"no image")
    with pytest.raises(DataError) as alone:
        list(map(data.train.__getitem__, range(4)))
    with pytest.raises(DataError) as told:
        read(data, torch.nn.Flatten())
    assert told.value.what == alone.value.what
    assert "Traceback" not in str(told.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "start"),
    [
        ("folders, timm:rand-m9-mstd0.5", "spawn"),
        ("held out", "forkserver"),
        ("conll", "spawn"),
        ("decoded", "spawn"),
    ],
)
def test_workers_that_are_started_afresh_load_what_one_process_loads(kind, start, tmp_path):
    if start == "forkserver" and sys.platform == "win32":
        pytest.skip("Windows has no fork")
    data = KINDS[kind](tmp_path)
    order = Order(len(data.train), 4, 2, seed=0)
    how = (data.train, order, 0, 0, 1, data.collate)
    alone = list(batches(*how, workers=0, pin=False))
    loader = batches(*how, workers=2, pin=False)
    loader.multiprocessing_context = start
    assert same(alone, list(loader))
