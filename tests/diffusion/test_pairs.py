"""Images with captions, from folders and parquet, good and bad."""

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from restuning._errors import DataError, StoreError
from restuning.diffusion import encode, load_pairs


def png(shade=128, size=(12, 8)):
    data = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), shade, np.uint8)).save(data, "PNG")
    return data.getvalue()


def folder(path, count=3):
    lines = []
    for i in range(count):
        (path / f"{i}.png").write_bytes(png(40 * i))
        lines.append(json.dumps({"file_name": f"{i}.png", "caption": f"shade {i % 2}"}))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


class Flat:
    """Encodes a picture as the mean of its colours and a caption as its length."""

    calls = 0

    def images(self, pixels):
        Flat.calls += len(pixels)
        mean = pixels.mean((2, 3), keepdim=True)
        return mean, torch.ones_like(mean) * 0.1

    def texts(self, captions):
        return {"words": torch.tensor([[float(len(c))] for c in captions])}

    def identity(self):
        return {"encoder": "flat"}


def test_captions_are_read_from_json_lines_csv_and_text_files(tmp_path):
    for kind in ("metadata", "csv", "txt"):
        home = tmp_path / kind
        home.mkdir()
        folder(home)
        if kind != "metadata":
            (home / "metadata.jsonl").unlink()
        if kind == "csv":
            rows = "".join(f"{i}.png,shade {i % 2}\n" for i in range(3))
            (home / "captions.csv").write_text("file_name,caption\n" + rows)
        if kind == "txt":
            for i in range(3):
                (home / f"{i}.txt").write_text(f"shade {i % 2}\n")
        pairs = load_pairs(home)
        assert pairs.captions == ("shade 0", "shade 1", "shade 0")
        assert pairs.image(1, 8).shape == (3, 8, 8)
        assert torch.allclose(pairs.image(1, 8), torch.full((3, 8, 8), 40 / 127.5 - 1))


def test_parquet_holds_images_as_bytes_or_as_hugging_face_writes_them(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for name, cell in (("plain", png()), ("nested", {"bytes": png(), "path": None})):
        table = pa.table({"image": [cell, cell], "text": ["a", "b"]})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
        pairs = load_pairs(tmp_path / f"{name}.parquet")
        assert pairs.captions == ("a", "b")
        assert pairs.image(0, 4).shape == (3, 4, 4)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("not json", "read"),
        ('{"caption": "x"}', "names no image"),
        ('["a"]', "names no image"),
        ('{"file_name": "../secret.png", "caption": "x"}', "outside"),
        ('{"file_name": "gone.png", "caption": "x"}', "missing"),
    ],
)
def test_malformed_captions_are_refused_with_their_line(tmp_path, content, word):
    (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(DataError, match=word):
        load_pairs(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_as_captions_are_read_or_refused(tmp_path_factory, data):
    home = tmp_path_factory.mktemp("pairs")
    (home / "metadata.jsonl").write_bytes(data)
    with pytest.raises(DataError):
        load_pairs(home)


def test_nothing_there_and_a_broken_image_are_said(tmp_path):
    with pytest.raises(DataError, match="no images"):
        load_pairs(tmp_path / "nowhere")
    with pytest.raises(DataError, match="metadata"):
        load_pairs(tmp_path)
    folder(tmp_path)
    (tmp_path / "1.png").write_bytes(png()[:40])
    with pytest.raises(DataError, match="1.png"):
        load_pairs(tmp_path).image(1, 8)


def test_what_was_encoded_once_is_read_again_and_every_caption_is_kept_once(tmp_path):
    pairs = load_pairs(folder(tmp_path))
    before = Flat.calls
    first = encode(pairs, Flat(), 8, tmp_path / "store")
    again = encode(pairs, Flat(), 8, tmp_path / "store")
    assert Flat.calls == before + 3
    assert torch.equal(first.mean, again.mean) and first.key == again.key
    assert len(again.texts["words"]) == 2
    dropped = again.conditions([0, 1, 2], torch.tensor([False, True, False]))
    assert dropped["words"].flatten().tolist() == [7, 0, 7]
    draws = [again.latents([0, 1], torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_another_image_caption_or_size_is_another_key(tmp_path):
    pairs = load_pairs(folder(tmp_path))
    keys = {encode(pairs, Flat(), size).key for size in (8, 6)}
    (tmp_path / "0.png").write_bytes(png(200))
    keys.add(encode(load_pairs(tmp_path), Flat(), 8).key)
    text = (tmp_path / "metadata.jsonl").read_text()
    (tmp_path / "metadata.jsonl").write_text(text.replace("shade 1", "other"))
    keys.add(encode(load_pairs(tmp_path), Flat(), 8).key)
    assert len(keys) == 4


def test_a_damaged_store_raises_and_never_falls_back(tmp_path):
    pairs = load_pairs(folder(tmp_path))
    found = encode(pairs, Flat(), 8, tmp_path / "store")
    file = tmp_path / "store" / found.key / "mean.npy"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(StoreError, match="damaged"):
        encode(pairs, Flat(), 8, tmp_path / "store")


def test_images_are_read_as_all_others_are(tmp_path):
    folder(tmp_path)
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.save(tmp_path / "1.png")
    assert torch.equal(load_pairs(tmp_path).image(1, 8), torch.ones(3, 8, 8))
    Image.new("L", (3000, 2)).save(tmp_path / "1.png")
    with pytest.raises(DataError, match=r"narrow(.|\n)*1\.png"):
        load_pairs(tmp_path).image(1, 8)
