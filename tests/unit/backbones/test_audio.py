"""The one reader of sounds, and how they become a backbone's input."""

import io
import json
import pickle
import warnings

import numpy as np
import pytest
import torch

import restuning
import sounds
from restuning._errors import BackboneError, DataError, EngineError, FormatError, RestuningWarning
from restuning.backbones.audio import (
    FORMATS,
    Sound,
    looks_like_audio,
    measure_audio,
    read_audio,
)
from restuning.backbones.audio_preprocessing import AudioPreprocessing
from restuning.serve.export import export_tasks
from serving import save_task

ROUNDED = 1e-6
"""Floats through a WAV of floats, and whole numbers divided by a power of two."""
SIXTEEN_BITS = 1 / 32767
"""A step of a file of 16 bits."""
SAME = 1e-5
"""A sound in a batch, whose sums are of other lengths, and alone."""


def wave(**how):
    return sounds.tone(440, **how)


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3", ".aiff", ".au", ".caf"])
def test_a_file_of_any_kind_is_the_sound_that_was_written(suffix, tmp_path):
    pytest.importorskip("soundfile")
    rate = 16_000
    drawn = wave(rate=rate, seconds=1.0)
    file = sounds.write(tmp_path / f"x{suffix}", drawn, rate)
    read = read_audio(file, rate)
    assert read.dtype == np.float32
    assert np.corrcoef(read[2000:14_000], drawn[2000:14_000])[0, 1] > 0.98
    lossy = suffix in (".ogg", ".mp3")
    assert lossy or np.abs(read - drawn).max() <= SIXTEEN_BITS
    content = file.read_bytes()
    assert np.array_equal(read_audio(content, rate), read)
    assert looks_like_audio(content)
    assert measure_audio(content).format in FORMATS


def test_samples_of_all_kinds_are_one_sound():
    floats = wave()
    whole = (floats * 32767).astype(np.int16)
    ways = [
        (floats, sounds.RATE),
        Sound(torch.from_numpy(floats), sounds.RATE),
        (floats.astype(np.float64)[:, None], sounds.RATE),
        (np.stack([floats, floats], 1), np.int64(sounds.RATE)),
    ]
    for way in ways:
        assert np.abs(read_audio(way, sounds.RATE) - floats).max() <= ROUNDED
    assert np.abs(read_audio((whole, sounds.RATE), sounds.RATE) - floats).max() <= 2 * SIXTEEN_BITS
    half = np.stack([floats, 0 * floats], 1)
    assert np.abs(read_audio((half, sounds.RATE), sounds.RATE) - floats / 2).max() <= ROUNDED
    loud = (whole.astype(np.int32) * 65536, sounds.RATE)
    assert np.abs(read_audio(loud, sounds.RATE) - floats).max() <= 2 * SIXTEEN_BITS


def test_another_rate_is_the_same_tone_resampled():
    fine = wave(rate=48_000, seconds=1.0, noise=0)
    read = read_audio((fine, 48_000), sounds.RATE)
    assert len(read) == sounds.RATE
    spectrum = np.abs(np.fft.rfft(read))
    assert spectrum.argmax() == 440
    assert read_audio((fine, 48_000), sounds.RATE, seconds=0.5).shape == (4000,)


def refusals(where):
    noise = np.random.default_rng(0).integers(0, 255, 5000, np.uint8).tobytes()
    for name, content in {"noise.wav": noise, "empty.wav": b"", "text.mp3": b"hello " * 90}.items():
        (where / name).write_bytes(content)
    sounds.write(where / "head.wav", np.zeros(0, np.float32))
    sounds.write(where / "nan.wav", np.full(500, np.nan, np.float32), subtype="FLOAT")
    (where / "folder.wav").mkdir()
    return {
        where / "noise.wav": "cannot be read",
        where / "empty.wav": "an empty file",
        where / "text.mp3": "cannot be read",
        where / "head.wav": "no samples",
        where / "nan.wav": "no finite numbers",
        where / "folder.wav": "a folder",
        where / "gone.wav": "a sound is missing",
    }


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".aiff", ".caf"])
def test_a_file_whose_end_is_missing_is_refused_and_not_read_as_a_shorter_one(suffix, tmp_path):
    file = sounds.write(tmp_path / f"x{suffix}", wave(rate=16_000, seconds=5.0), 16_000)
    content = file.read_bytes()
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(DataError, match="a sound cannot be read"):
            read_audio(content[: round(share * len(content))], 16_000)


def test_many_channels_are_one_and_no_more_than_is_read_is_decoded(tmp_path):
    waves = np.stack([wave(seed=n) for n in range(40)], 1)
    file = sounds.write(tmp_path / "x.wav", waves, subtype="FLOAT")
    assert np.abs(read_audio(file, sounds.RATE) - waves.mean(1)).max() <= ROUNDED
    assert len(read_audio(file, sounds.RATE, seconds=0.1)) == 800


def test_what_is_no_sound_is_refused_by_name_and_says_what_to_do(tmp_path):
    for file, words in refusals(tmp_path).items():
        with pytest.raises(DataError, match=words) as error:
            read_audio(file, sounds.RATE)
        assert str(file) in str(error.value)
        assert "do:" in str(error.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.zeros(9), "not a sound"),
        ((np.zeros(9), 0), "a rate of 0"),
        ((np.zeros(9), 8000.0), "a rate of 8000"),
        ((np.zeros(9), True), "a rate of True"),
        ((np.zeros((2, 900)), 8000), "channels go last|shape"),
        ((np.zeros((900, 2, 1)), 8000), "shape"),
        ((np.full(9, 20000.0), 8000), "no samples in -1..1"),
        ((np.zeros(9, np.int64), 8000), "int64"),
        ((np.zeros(0, np.float32), 8000), "no samples"),
        (7, "not a sound"),
    ],
)
def test_samples_that_are_none_are_refused(given, words):
    with pytest.raises(DataError, match=words):
        read_audio(given, sounds.RATE)


def test_a_sound_that_is_too_short_is_refused():
    with pytest.raises(DataError, match="too short"):
        read_audio((wave()[:50], sounds.RATE), sounds.RATE, least=72)


def test_what_begins_like_a_picture_does_not_look_like_a_sound():
    stream = io.BytesIO()
    from PIL import Image

    for kind in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"):
        stream = io.BytesIO()
        Image.new("RGB", (9, 9)).save(stream, kind)
        assert not looks_like_audio(stream.getvalue())
    assert not looks_like_audio(b"")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    where = tmp_path_factory.mktemp("models")
    return {name: sounds.save(name, where / name.replace(" ", "-")) for name in sounds.MODELS}


def prepared(audio, counts):
    waves = [wave(seconds=n / sounds.RATE, seed=n)[:n] for n in counts]
    return [audio.prepare(audio.read((each, sounds.RATE))) for each in waves]


@pytest.mark.parametrize("name", sounds.MODELS)
def test_a_padded_batch_answers_as_each_sound_alone(name, folders):
    backbone = restuning.load_backbone(f"hf:{folders[name]}")
    host, audio = backbone.host(), backbone.preprocessing.with_seconds(None)
    if audio.padding == "repeat":
        audio = audio.with_seconds(0.6)
    task = restuning.methods.build("linear", host, num_classes=3)
    tuned = restuning.Tuned(host, task).eval()
    inputs = prepared(audio, (2400, 3200, 1999, 4800))
    with torch.no_grad():
        together = tuned(**audio.collate(inputs))
        alone = torch.cat([tuned(**audio.collate([each])) for each in inputs])
    assert (together - alone).abs().max() <= SAME * alone.abs().max()
    assert (alone[0] - alone[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", sounds.MODELS)
def test_sites_of_a_backbone_of_sounds_are_proved_and_its_readout_is_its_authors(name, folders):
    backbone = restuning.load_backbone(f"hf:{folders[name]}")
    host = backbone.host()
    assert host.sites.layers == 2
    assert all(s.proof == "residual" for s in host.sites.pick("mha", "ffn").values())
    assert host.readout_rule.pool == "mean"
    if name == "ast":
        with torch.no_grad():
            own = host(**backbone.kwargs).pooler_output
            features = host.features(**backbone.kwargs)
        made = host.readout(features["block.2"])
        assert (made - own).abs().max() <= SAME
    if name == "whisper":
        assert type(backbone.model).__name__ == "WhisperEncoder"


def test_the_mean_of_wav2vec2_is_over_valid_frames(folders):
    backbone = restuning.load_backbone(f"hf:{folders['wav2vec2']}")
    host, audio = backbone.host(), backbone.preprocessing
    inputs = prepared(audio, (2400, 4800))
    features = host.features(**audio.collate(inputs))
    counts = features.mask.sum(1).tolist()
    assert counts == [37, 74]
    own = features["block.2"][0, :37]
    normed = host.model.encoder.layer_norm(own).mean(0)
    made = host.readout(features["block.2"], mask=features.mask)[0]
    assert (made - normed).abs().max() <= SAME


@pytest.mark.parametrize("name", sounds.MODELS)
def test_what_a_task_file_says_of_sounds_is_read_back_and_sent_to_workers(name, folders):
    audio = restuning.load_backbone(f"hf:{folders[name]}", random=True).preprocessing
    told = json.loads(json.dumps(audio.to_dict()))
    again = AudioPreprocessing.from_dict(told)
    assert again == audio
    sent = pickle.loads(pickle.dumps(audio))  # noqa: S301
    (one,), (other,) = prepared(again, (2400,)), prepared(sent, (2400,))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    "change",
    [
        {"extractor": "EncodecFeatureExtractor"},
        {"extractor": "AutoModel"},
        {"seconds": -1.0},
        {"seconds": 1e9},
        {"seconds": "10"},
        {"padding": "own"},
        {"padding": "zeros"},
        {"least": 0},
        {"settings": {"sampling_rate": 8000}},
        {"settings": {"sampling_rate": 10**9, "do_normalize": True}},
        {"settings": {"sampling_rate": 8000, "do_normalize": True, "more": 1}},
        {"settings": None},
    ],
)
def test_a_malformed_preprocessing_is_refused(change, folders):
    audio = restuning.load_backbone(f"hf:{folders['wav2vec2']}", random=True).preprocessing
    with pytest.raises(FormatError):
        AudioPreprocessing.from_dict({**audio.to_dict(), **change})


def test_frames_that_another_library_made_are_said_and_have_stores_of_their_own(
    folders, monkeypatch
):
    made = restuning.load_backbone(f"hf:{folders['ast']}").preprocessing
    here = made.to_dict()["frames"]
    other = {"numpy": "torchaudio", "torchaudio": "numpy"}[here]
    told = AudioPreprocessing.from_dict({**made.to_dict(), "frames": other})
    assert told.to_dict() != made.to_dict()
    with pytest.warns(RestuningWarning, match="by another library"):
        _ = told._extractor
    with warnings.catch_warnings():
        warnings.simplefilter("error", RestuningWarning)
        _ = AudioPreprocessing.from_dict(made.to_dict())._extractor
    with pytest.raises(FormatError, match="frames"):
        AudioPreprocessing.from_dict({**made.to_dict(), "frames": "mine"})


def test_only_backbones_of_any_length_take_other_seconds(folders):
    audio = restuning.load_backbone(f"hf:{folders['wav2vec2']}", random=True).preprocessing
    assert audio.with_seconds(3).longest == 24_000
    fixed = restuning.load_backbone(f"hf:{folders['ast']}", random=True).preprocessing
    with pytest.raises(DataError, match="one length only"):
        fixed.with_seconds(3)
    with pytest.raises(DataError, match="not a length"):
        audio.with_seconds(float("nan"))


def test_a_backbone_of_sounds_without_its_extractor_or_with_another_is_refused(folders, tmp_path):
    import shutil

    import transformers as hf

    bare = shutil.copytree(folders["wav2vec2"], tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(BackboneError, match="preprocessor_config"):
        restuning.load_backbone(f"hf:{bare}")
    hf.EncodecFeatureExtractor().save_pretrained(bare)
    with pytest.raises(BackboneError, match="EncodecFeatureExtractor"):
        restuning.load_backbone(f"hf:{bare}")
    other = shutil.copytree(folders["ast"], tmp_path / "other")
    hf.ASTFeatureExtractor(max_length=99, num_mel_bins=16).save_pretrained(other)
    with pytest.raises(BackboneError, match="99"):
        restuning.load_backbone(f"hf:{other}")


def test_the_half_of_whisper_that_hears_is_loaded_from_a_file_of_the_whole(folders):
    own = restuning.load_backbone(f"hf:{folders['whisper']}")
    file = folders["whisper"] / "model.safetensors"
    given = restuning.load_backbone(f"hf:{folders['whisper']}", weights=file)
    for a, b in zip(own.model.parameters(), given.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_backbone_of_sounds_is_not_exported_and_says_so(folders, tmp_path):
    backbone = restuning.load_backbone(f"hf:{folders['ast']}")
    with pytest.raises(EngineError, match="sounds is not exported"):
        restuning.backbones.export_engine(backbone, tmp_path / "ast.onnx")
    task = save_task(backbone, tmp_path / "owl.task")
    with pytest.raises(EngineError, match="sounds is not exported"):
        export_tasks(restuning.Predictor.load(task), tmp_path / "owl.onnx")
    assert not list(tmp_path.glob("*.onnx"))
