"""Vectors of a collection are the backbone's feature, made once; a search asks one forward more."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

from commands import restuning as command
from restuning import Task, Tuned, embed, load_backbone, retrieve, train
from restuning._errors import BackboneError, DataError, StoreError, UnknownNameError
from restuning.data import DataOptions, read_image
from restuning.data.collection import load_collection
from restuning.features import StoreOptions
from restuning.features.embeddings import Match
from restuning.features.vectors_file import write_matches, write_vectors

SAME_TOLERANCE = 1e-5
"""Forwards of other batch sizes round elsewhere."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Albums with loose pictures beside them: no data set of classes."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    draw = np.random.default_rng(0)
    for place in ("summer/a", "summer/b", "winter/a", "winter/b", "loose", "snow & <ice>"):
        file = folder / f"{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype="uint8")).save(file)
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pets"
    draw = np.random.default_rng(1)
    for split, count in (("train", 6), ("test", 4)):
        for number in range(count):
            file = folder / split / ("cat", "dog")[number % 2] / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 255, (16, 16, 3), dtype="uint8")).save(file)
    return folder


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("restuning-tiny")


class Counted:
    """Inputs that went through a backbone, beside the example that it is looked at with."""

    def __init__(self, backbone):
        self.rows, example = 0, backbone.example[0]

        def count(_, args, __):
            self.rows += int((args[0] != example).flatten(1).any(1).sum())

        self.handle = backbone.model.register_forward_hook(count)

    def since(self, call):
        self.rows = 0
        made = call()
        return self.rows, made


@pytest.fixture
def counted(backbone):
    made = Counted(backbone)
    yield made
    made.handle.remove()


def stored_in(folder, **more):
    return StoreOptions(folder, progress=False, **more)


def test_vectors_are_the_backbone_s_feature_with_paths_as_ids(photos, backbone, tmp_path):
    vectors, ids = embed(photos, backbone, options=stored_in(tmp_path))
    assert ids == sorted(ids)
    assert ids[:2] == ["loose.png", "snow & <ice>.png"]
    assert vectors.shape == (6, 128)
    assert vectors.dtype == np.float32
    host = backbone.host()
    feature = Tuned(host, Task(pool=host.readout_rule.pool)).eval()
    pixels = [backbone.preprocessing.image(read_image(photos / each)) for each in ids]
    with torch.no_grad():
        wanted = feature(torch.stack(pixels))
    found = torch.from_numpy(vectors)
    torch.testing.assert_close(found, wanted, atol=SAME_TOLERANCE, rtol=SAME_TOLERANCE)
    unit, _ = embed(photos, backbone, normalize=True, options=stored_in(tmp_path))
    torch.testing.assert_close(torch.from_numpy(unit), F.normalize(found, dim=-1))


def test_what_a_linear_probe_stored_is_not_computed_again(pets, backbone, counted, tmp_path):
    train(pets, backbone=backbone, method="linear", epochs=1, out=tmp_path / "x", store=tmp_path)
    # A host looks at the backbone with inputs of its own.
    own, _ = counted.since(backbone.host)
    rows, (vectors, ids) = counted.since(lambda: embed(pets, backbone, options=stored_in(tmp_path)))
    assert rows == own
    assert ids[0] == "train/cat/0.png"
    assert ids[-1] == "test/dog/3.png"
    assert len(vectors) == len(ids) == 10


def test_a_second_search_costs_one_forward(photos, backbone, counted, tmp_path):
    own, _ = counted.since(backbone.host)
    query = photos / "winter" / "a.png"

    def ask():
        return retrieve(photos, query, backbone, count=3, options=stored_in(tmp_path))

    first, found = counted.since(ask)
    second, again = counted.since(ask)
    assert (first, second) == (own + 7, own + 1)
    assert again == found
    assert (found[0].id, found[0].score) == ("winter/a.png", pytest.approx(1.0, abs=1e-5))
    assert [each.score for each in found] == sorted((e.score for e in found), reverse=True)
    vectors, ids = embed(photos, backbone, normalize=True, options=stored_in(tmp_path))
    cosines = vectors @ vectors[ids.index("winter/a.png")]
    assert [each.id for each in found] == [ids[n] for n in (-cosines).argsort()[:3]]


def test_other_features_are_taps_and_parts_of_them(photos, backbone, tmp_path):
    how = stored_in(tmp_path)
    for feature, width in (("block.3", 128), ("block.3/places", 14 * 128)):
        vectors, _ = embed(photos, backbone, feature=feature, options=how)
        assert vectors.shape == (6, width)
    for wrong in ("block.99", "head", "block.1/eyes"):
        with pytest.raises(Exception, match="no such (feature|tap)"):
            embed(photos, backbone, feature=wrong, options=how)


def test_what_cannot_be_asked_is_refused_before_anything_is_stored(photos, backbone, tmp_path):
    def ask(query, data=photos):
        return retrieve(data, query, backbone, options=stored_in(tmp_path / "stores"))

    with pytest.raises(BackboneError, match="without a text tower"):
        ask("a dog on snow")
    for query in ("gone.png", photos / "gone"):
        with pytest.raises(DataError, match="no such image"):
            ask(query)
    with pytest.raises(DataError, match="nothing is asked"):
        ask(" ")
    with pytest.raises(DataError):
        ask(photos / "notes.txt")
    assert not (tmp_path / "stores").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="without images"):
        ask(photos / "loose.png", tmp_path / "empty")
    with pytest.raises(UnknownNameError, match="no such data set"):
        embed("gone", backbone)


def test_damaged_files_are_left_out_where_that_is_asked(photos, backbone, tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "good.png").write_bytes((photos / "loose.png").read_bytes())
    (tmp_path / "some" / "bad.png").write_bytes(b"none")
    found = load_collection(tmp_path / "some", backbone, None)
    assert found.ids == ["bad.png", "good.png"]
    _, ids = embed(
        tmp_path / "some",
        backbone,
        reading=DataOptions(skip_bad=True),
        options=stored_in(tmp_path / "s"),
    )
    assert ids == ["good.png"]


def test_files_hold_vectors_and_ids_and_never_take_another_s_place(photos, backbone, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    found = embed(photos, backbone, options=stored_in(tmp_path / "s"))
    about = {"backbone": "restuning-tiny"}
    files = write_vectors(found, tmp_path / "x.npy", about)
    assert np.array_equal(np.load(files[0]), found.vectors)
    assert json.loads(files[1].read_text()) == {**about, "ids": found.ids}
    write_vectors(found, tmp_path / "x.parquet", about)
    table = parquet.read_table(tmp_path / "x.parquet")
    assert table["id"].to_pylist() == found.ids
    assert np.array_equal(np.stack(table["embedding"].to_numpy()), found.vectors)
    for name in ("x.npy", "x.parquet"):
        with pytest.raises(StoreError, match="there already"):
            write_vectors(found, tmp_path / name, about)
    (tmp_path / "y.ids.json").write_text("{}")
    with pytest.raises(StoreError, match="there already"):
        write_vectors(found, tmp_path / "y.npy", about)
    with pytest.raises(StoreError, match="no such form"):
        write_vectors(found, tmp_path / "x.csv", about)
    assert not list(tmp_path.glob("y.npy"))


def test_a_page_of_matches_shows_pictures_and_runs_nothing(photos, tmp_path):
    matches = [Match("snow & <ice>.png", 0.5), Match("loose.png", 0.25)]
    page = write_matches(matches, tmp_path / "x.html", "<script>", photos).read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "snow &amp; &lt;ice&gt;.png" in page
    assert "<script>" not in page
    texts = [Match("loose.png", 0.5, "a text of this number")]
    assert "<img" not in write_matches(texts, tmp_path / "t.html", "dog", photos).read_text()
    lines = write_matches(matches, tmp_path / "x.jsonl", "dog", None).read_text().splitlines()
    assert json.loads(lines[1]) == {"id": "loose.png", "score": 0.25}


def test_the_commands_write_and_show(photos, tmp_path):
    where = ("--store", tmp_path / "s", "--out", tmp_path / "x.npy")
    done = command("embed", photos, *where, "--dtype", "fp16", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "x.ids.json").read_text())
    assert (told["dtype"], json.loads(done.stdout)["rows"]) == ("fp16", 6)
    assert "precision" not in told
    refused = command("embed", photos, "--task", "mine.task", "--out", tmp_path / "y.npy")
    assert refused.returncode != 0
    assert "restuning predict" in refused.stderr and not (tmp_path / "y.npy").exists()
    again = command("embed", photos, "--store", tmp_path / "s", "--out", tmp_path / "x.npy")
    assert again.returncode == 1
    assert "there already" in again.stderr
    query, page = photos / "loose.png", tmp_path / "x.html"
    done = command("search", photos, query, "--store", tmp_path / "s", "--top", 2, "--out", page)
    assert done.returncode == 0, done.stderr
    assert "loose.png" in done.stdout
    assert page.exists()
    done = command("search", photos, "a dog", "--store", tmp_path / "s")
    assert done.returncode == 1
    assert "text tower" in done.stderr


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_words_find_the_images_whose_own_logits_are_highest(kind, photos, tmp_path):
    transformers = pytest.importorskip("transformers")
    import towers

    made = getattr(towers, kind)()
    name = towers.saved(made, tmp_path / "model")
    words = "a photo of a dog"
    # As a user writes it who knows the model's name and nothing of towers.
    found = retrieve(
        photos, words, name.replace("clip:", "hf:", 1), options=stored_in(tmp_path / "s")
    )
    assert len(found) == 6
    loaded = load_backbone(name)
    pixels = torch.stack(
        [loaded.preprocessing.image(read_image(photos / each.id)) for each in found]
    )
    model = transformers.AutoModel.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        own = model(pixel_values=pixels, **loaded.text.tokenize([words])).logits_per_image[:, 0]
    bias = getattr(model, "logit_bias", torch.zeros(()))
    cosines = ((own - bias) / model.logit_scale.exp()).tolist()
    assert [each.score for each in found] == pytest.approx(cosines, abs=1e-4)
    image = retrieve(
        photos, photos / "loose.png", loaded, count=1, options=stored_in(tmp_path / "s")
    )
    assert image[0].id == "loose.png"
