"""A predictor opens tasks with their backbone and answers what a user has at hand."""

import json
import os
import shutil
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from PIL import Image

from restuning import (
    Tuned,
    _files,
    evaluate,
    evaluate_task,
    load_backbone,
    load_data,
    methods,
    save,
)
from restuning._errors import (
    BackboneError,
    DataError,
    FormatError,
    RestuningError,
    UnknownNameError,
    WrongBackboneError,
)
from restuning._files import seal
from restuning.backbones import load as loaders
from restuning.serve import Answer, Prediction, Predictor, file_texts
from restuning.task import WeightsFile
from restuning.training import calibration_error
from restuning.training.evaluate import collect_logits
from serving import save_task
from zoo import folders

LABELS = ["ant", "bee", "cat"]
WEIGHTS = Path(loaders.__file__).parent / "tiny" / "restuning-tiny.safetensors"
OTHER_BATCH = 1e-5
"""A product of another number of rows sums in another order."""


@pytest.fixture(scope="module")
def tiny():
    return load_backbone("restuning-tiny")


def saved(loaded, folder, method="res-tuning-bypass", seed=0, **more):
    """A task with a head that tells inputs apart, as `restuning train` leaves it."""
    host = loaded.host()
    torch.manual_seed(seed)
    task = methods.build(method, host, num_classes=len(LABELS))
    torch.nn.init.normal_(task.head.weight)
    task.labels = LABELS
    said = loaded.preprocessing.to_dict() if loaded.preprocessing else None
    more = {"weights": loaded.weights_file, "preprocessing": said, **more}
    return save(task, host, folder, backbone=loaded.name, **more)


@pytest.fixture(scope="module")
def pets(tiny, tmp_path_factory):
    return saved(tiny, tmp_path_factory.mktemp("tasks") / "pets.task")


@pytest.fixture(scope="module")
def predictor(pets):
    return Predictor.load(pets)


@pytest.fixture
def photos(tmp_path):
    """Three files in a folder, and the array of each."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    (tmp_path / "photos" / "inner").mkdir(parents=True)
    files = [tmp_path / "photos" / name for name in ("a.png", "b.png", "inner/c.png")]
    for file, array in zip(files, pixels, strict=True):
        Image.fromarray(array).save(file)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return files, pixels


def rows(answers):
    return torch.stack([next(iter(a.predictions.values())).probabilities for a in answers])


def forwards_of(predictor):
    """A list that grows by one with every backbone forward."""
    made = []
    predictor.host.model.register_forward_pre_hook(lambda *_: made.append(1))
    return made


def test_paths_images_arrays_and_tensors_are_answered_alike(predictor, photos):
    files, pixels = photos
    as_images = [Image.open(f) for f in files]
    prepared = [predictor.inputs.preprocessing.image(i) for i in as_images]
    given = (
        files,
        [str(f) for f in files],
        as_images,
        list(pixels),
        pixels,
        [torch.from_numpy(p).permute(2, 0, 1) for p in pixels],
        prepared,
        torch.stack(prepared),
        files[0].parent,
        str(files[0].parent),
        iter(files),
        (files[0], pixels[1], as_images[2]),
    )
    answers = [rows(predictor(each)) for each in given]
    assert answers[0].shape == (3, 3)
    assert torch.pdist(answers[0]).min() > OTHER_BATCH
    for other in answers[1:]:
        assert torch.equal(other, answers[0])


def test_an_answer_says_class_and_probability_as_the_task_itself_does(predictor, pets, photos):
    _, pixels = photos
    tuned = Tuned(predictor.host, predictor.tasks["pets"]).eval()
    images = [predictor.inputs.preprocessing.image(Image.fromarray(p)) for p in pixels]
    with torch.no_grad():
        chances = tuned(torch.stack(images)).softmax(-1)
    for answer, expected in zip(predictor(list(pixels)), chances, strict=True):
        assert answer.label == LABELS[int(expected.argmax())] == answer["pets"].label
        assert answer.probability == pytest.approx(float(expected.max()), abs=OTHER_BATCH)
        assert [c.label for c in answer.top(9)] == [LABELS[i] for i in expected.argsort().flip(0)]
        assert answer.top(1) == [(answer.label, answer.probability)]
        torch.testing.assert_close(answer["pets"].probabilities, expected)


def test_one_input_alone_is_a_list_of_one(predictor, photos):
    files, pixels = photos
    for alone in (files[0], str(files[0]), pixels[0], Image.open(files[0])):
        (answer,) = predictor(alone)
        assert answer.label in LABELS
    assert predictor([]) == []


def test_two_bypass_tasks_share_one_forward_a_batch(tiny, pets, photos):
    more = saved(tiny, pets.parent / "moods.task", "linear", seed=1)
    both = Predictor.load([pets, more], batch_size=2)
    made = forwards_of(both)
    answers = both(photos[0])
    assert len(made) == 2 * both.forwards == 2
    assert list(answers[0].predictions) == ["pets", "moods"]
    for name, folder in (("pets", pets), ("moods", more)):
        alone = Predictor.load(folder)(photos[0])
        ours = torch.stack([a[name].probabilities for a in answers])
        torch.testing.assert_close(ours, rows(alone), atol=OTHER_BATCH, rtol=0)
    with pytest.raises(UnknownNameError, match="which task's answer"):
        _ = answers[0].label
    with pytest.raises(UnknownNameError, match="pets, moods"):
        answers[0]["dogs"]


def test_a_task_inside_the_backbone_takes_a_forward_of_its_own(tiny, pets, photos):
    inline = saved(tiny, pets.parent / "inside.task", "res-tuning", seed=2)
    both = Predictor.load({"beside": pets, "inside": inline})
    made = forwards_of(both)
    assert list(both(photos[0])[0].predictions) == ["beside", "inside"]
    assert len(made) == both.forwards == 2


def test_a_run_folder_stands_for_the_task_in_it(tiny, tmp_path, photos):
    saved(tiny, tmp_path / "run" / "pets.task")
    (tmp_path / "run" / "metrics.json").write_text("{}")
    assert list(Predictor.load(tmp_path / "run").tasks) == ["pets"]
    saved(tiny, tmp_path / "compared" / "linear" / "pets.task", "linear")
    assert list(Predictor.load(str(tmp_path / "compared")).tasks) == ["pets"]
    saved(tiny, tmp_path / "compared" / "bypass" / "pets.task")
    with pytest.raises(FormatError, match=r"bypass/pets\.task, linear/pets\.task"):
        Predictor.load(tmp_path / "compared")
    with pytest.raises(FormatError, match="no task here"):
        Predictor.load(tmp_path / "photos")


def test_two_tasks_of_one_name_are_told_apart_by_names_that_are_given(tiny, pets, tmp_path):
    twin = shutil.copytree(pets, tmp_path / "pets.task")
    with pytest.raises(DataError, match="two tasks have one name"):
        Predictor.load([pets, twin])
    assert list(Predictor.load({"one": pets, "two": twin}).tasks) == ["one", "two"]


def test_a_stream_reads_its_inputs_a_batch_at_a_time(pets, photos):
    predictor, read = Predictor.load(pets, batch_size=2), []

    def inputs():
        for each in photos[1]:
            read.append(1)
            yield each

    stream = predictor.stream(inputs())
    next(stream)
    assert len(read) == 2
    assert len(list(stream)) == 2


def test_threads_that_share_a_predictor_get_the_answers_of_one(predictor, photos):
    expected, found = rows(predictor(photos[0])), {}

    def ask(number):
        found[number] = [rows(predictor(photos[0])) for _ in range(5)]

    threads = [Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(each, expected) for i in range(4) for each in found[i])


def test_files_that_cannot_be_read_raise_or_are_left_out(pets, photos):
    files, pixels = photos
    files[1].write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b\.png"):
        Predictor.load(pets)(files)
    lenient = Predictor.load(pets, skip_bad=True)
    assert [a.input for a in lenient(files)] == [files[0], files[2]]
    assert lenient.skipped == [str(files[1])]
    with pytest.raises(DataError, match="which value is white"):
        lenient([pixels[0].astype(np.float32)])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: torch.zeros(3, 5, 5), "no image"),
        (lambda: np.zeros((4, 4, 7), np.uint8), "no image"),
        (lambda: np.zeros((0, 4, 3), np.uint8), "no image"),
        (lambda: 7, "not an image"),
    ],
)
def test_what_is_no_image_is_refused_in_words(predictor, wrong, words):
    with pytest.raises(DataError, match=words):
        predictor([wrong()])


def test_a_folder_without_images_is_named(predictor, tmp_path):
    with pytest.raises(DataError, match="a folder without images"):
        predictor(tmp_path)


def test_what_a_folder_holds_beside_images_is_left_out_and_named(pets, tmp_path):
    """An image of a kind that is not known must not be without an answer and without a word."""
    predictor = Predictor.load(pets)
    (tmp_path / "more.png").mkdir()
    for name in ("more.png/a.png", "b.JPG"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for name in ("c.heic", "more.png/notes.txt", "._b.JPG"):
        (tmp_path / name).write_text("x")
    answers = predictor([tmp_path])
    assert [a.input for a in answers] == [str(tmp_path / n) for n in ("b.JPG", "more.png/a.png")]
    assert predictor.ignored == [str(tmp_path / n) for n in ("c.heic", "more.png/notes.txt")]
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"gone\.png"):
        predictor([tmp_path])


def test_grey_sixteen_bit_and_transparent_images_are_read_as_files_are(predictor, tmp_path):
    high = np.random.default_rng(1).integers(0, 65536, (40, 40)).astype(np.uint16)
    clear = np.random.default_rng(2).integers(0, 256, (40, 40, 4), dtype=np.uint8)
    for image in (Image.fromarray(high), Image.fromarray(clear)):
        image.save(tmp_path / "x.png")
        assert torch.equal(rows(predictor(image)), rows(predictor(tmp_path / "x.png")))
    grey = clear[..., :1]
    assert torch.equal(rows(predictor(grey)), rows(predictor(grey[..., 0])))


@pytest.fixture
def elsewhere(tmp_path):
    """A task whose backbone has its weights in a file of the user's."""
    weights = Path(shutil.copy(WEIGHTS, tmp_path / "mine.safetensors"))
    loaded = load_backbone("restuning-tiny", weights=weights)
    return weights, saved(loaded, tmp_path / "tasks" / "pets.task")


def test_the_weights_file_of_the_backbone_is_found_again(elsewhere, photos):
    weights, folder = elsewhere
    said = json.loads((folder / "task.json").read_text())["backbone"]["weights"]
    assert said["path"] == str(weights)
    assert len(said["sha256"]) == 64
    predictor = Predictor.load(folder)
    assert predictor.backbone.weights_file == weights
    assert predictor(photos[0])[0].label in LABELS


def test_a_weights_file_that_moved_is_asked_for_by_name_and_digest(elsewhere, tmp_path):
    weights, folder = elsewhere
    moved = weights.rename(tmp_path / "away.safetensors")
    digest = json.loads((folder / "task.json").read_text())["backbone"]["weights"]["sha256"]
    with pytest.raises(BackboneError, match=r"--weights FILE") as error:
        Predictor.load(folder)
    assert str(weights) in str(error.value)
    assert digest[:12] in str(error.value)
    assert Predictor.load(folder, weights=moved).tasks
    moved.rename(folder / weights.name)
    assert Predictor.load(folder).backbone.weights_file == (folder / weights.name).resolve()


def test_another_file_in_the_place_of_the_weights_is_refused(elsewhere):
    from safetensors.torch import load_file, save_file

    weights, folder = elsewhere
    tensors = load_file(weights)
    # One number that the fingerprint of three tensors does not see.
    tensors["blocks.1.mlp.fc1.bias"][0] += 1
    save_file(tensors, weights)
    with pytest.raises(WrongBackboneError, match="sha256"):
        Predictor.load(folder)
    assert Predictor.load(folder, any_backbone=True).tasks


@pytest.mark.parametrize("settled", [True, False])
def test_another_file_of_the_same_size_and_time_has_another_digest(
    elsewhere, tmp_path, monkeypatch, settled
):
    """Within a tick of the disk's clock, and of a copy that keeps its time as `cp -p` does."""
    if settled:
        monkeypatch.setattr(_files, "SETTLED", 0)
    weights, _ = elsewhere
    before, time = WeightsFile.of(weights), weights.stat().st_mtime_ns
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    other = tmp_path / "other"
    other.write_bytes(content)
    os.utime(other, ns=(time, time))
    other.replace(weights)
    assert not before.matches(weights)
    if not settled:
        # In place, and the clock as coarse as can be: every state is the same.
        state = weights.stat()
        monkeypatch.setattr(Path, "stat", lambda self, **how: state)
        now = WeightsFile.of(weights)
        content[-1] ^= 2
        weights.write_bytes(content)
        assert not now.matches(weights)


def test_a_file_of_weights_that_does_not_change_is_read_once(elsewhere, monkeypatch):
    weights, _ = elsewhere
    read = []
    monkeypatch.setattr(_files, "SETTLED", 0)
    monkeypatch.setattr(_files, "sha256_of_file", lambda file: read.append(file) or "0" * 64)
    assert WeightsFile.of(weights) == WeightsFile.of(weights)
    assert len(read) == 1


def test_another_backbone_is_refused(pets, tmp_path):
    torch.manual_seed(3)
    other = load_backbone("restuning-tiny", random=True)
    with pytest.raises(WrongBackboneError):
        Predictor.load(pets, backbone=other)
    assert Predictor.load(pets, backbone=other, any_backbone=True).backbone is other


def rewritten(folder, tmp_path, **backbone):
    copy = shutil.copytree(folder, tmp_path / "copy.task")
    description = json.loads((copy / "task.json").read_text())
    description["backbone"] |= backbone
    (copy / "task.json").write_text(json.dumps(seal(description)))
    return copy


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        ({"name": "pt2:/tmp/x.pt2"}, "not opened for it"),
        ({"name": "timm:vit_tiny_patch16_224:checkpoint_path=/tmp/x.pth"}, "not an argument"),
        ({"name": 'timm:vit_tiny_patch16_224:pretrained_cfg={"file":"/x"}'}, "not an argument"),
        ({"name": ""}, "does not name its backbone"),
        ({"weights": {"path": "//host/share/x.safetensors", "sha256": "0" * 64}}, "not there"),
        ({"weights": {"path": "x.safetensors"}}, "malformed"),
        ({"weights": {"path": "x.safetensors", "sha256": 7}}, "malformed"),
        ({"weights": "x.safetensors"}, "malformed"),
    ],
)
def test_a_strangers_task_cannot_choose_what_is_run_or_fetched(pets, tmp_path, backbone, words):
    with pytest.raises(RestuningError, match=words):
        Predictor.load(rewritten(pets, tmp_path, **backbone))


def test_tasks_of_several_backbones_are_not_answered_together(pets, tmp_path):
    other = rewritten(pets, tmp_path, name="timm:other")
    with pytest.raises(DataError, match="several backbones"):
        Predictor.load([pets, other])


def test_a_task_that_prepares_images_in_another_way_is_not_answered_together(tiny, pets, tmp_path):
    said = {**tiny.preprocessing.to_dict(), "crop": 0.5}
    other = saved(tiny, tmp_path / "other.task", preprocessing=said)
    with pytest.raises(DataError, match="different ways"):
        Predictor.load([pets, other])


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return load_backbone(f"hf:{folders.bert(tmp_path_factory.mktemp('models') / 'bert')}")


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", "text\n"), ("a.tsv", "text\tnote\n\n"), ("a.txt", " \n\n")]
)
def test_a_file_without_texts_is_refused_as_a_folder_without_images_is(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rf"without texts[\s\S]*{name}"):
        file_texts(tmp_path / name)


def test_texts_and_files_of_texts_are_answered(bert, tmp_path):
    said = {"kind": "text", "max_tokens": 6}
    predictor = Predictor.load(saved(bert, tmp_path / "reviews.task", preprocessing=said))
    texts = ["a good film", "the bad film very very", ""]
    answers = predictor(texts)
    assert [a.input for a in answers] == texts
    assert {a.label for a in answers} <= set(LABELS)
    (alone,) = predictor(texts[1])
    torch.testing.assert_close(rows([alone]), rows(answers[1:2]), atol=OTHER_BATCH, rtol=0)
    (tmp_path / "more.txt").write_text("a bad film\n\nthe good film\n")
    (tmp_path / "more.csv").write_text("text,other\na bad film,1\nthe good film,2\n")
    for file in ("more.txt", "more.csv"):
        given = [a.input for a in predictor(tmp_path / file)]
        assert given == ["a bad film", "the good film"]
    with pytest.raises(DataError, match="not a text"):
        predictor([7])


def test_words_are_answered_one_by_one(bert, tmp_path):
    host = bert.host()
    task = methods.build("linear", host, num_classes=3, pool="all")
    task.labels = LABELS
    said = {"kind": "tags", "max_tokens": 6}
    folder = save(task, host, tmp_path / "x.task", backbone=bert.name, preprocessing=said)
    predictor = Predictor.load(folder)
    (answer, same) = predictor(["ann in paris", ["ann", "in", "paris"]])
    assert [w.input for w in answer.words] == ["ann", "in", "paris"] == answer.input
    assert [w.label for w in answer.words] == [w.label for w in same.words]
    with pytest.raises(UnknownNameError, match="each word"):
        _ = answer.label
    with pytest.raises(UnknownNameError, match=r"answer\.words"):
        answer["x"]


def test_a_task_without_a_head_is_refused(tiny, tmp_path):
    host = tiny.host()
    task = methods.build("linear", host, num_classes=3)
    task.head = None
    with pytest.raises(DataError, match="without a head"):
        Predictor(tiny, {"x": task})


def test_a_device_that_is_not_there_is_refused(pets):
    with pytest.raises(BackboneError, match="no such device"):
        Predictor.load(pets, device="tpu9")


def test_an_answer_shows_what_was_said_and_not_the_pixels():
    said = {"pets": Prediction("dog", 0.75, torch.tensor([0.25, 0.75]), ["cat", "dog"])}
    assert repr(Answer("a.png", said)).startswith("Answer('a.png', predictions={'pets'")
    assert repr(Answer(np.zeros((64, 64, 3)), said)).startswith("Answer(<ndarray>, predictions=")


def test_a_task_is_tested_by_one_call_and_several_are_refused(tiny, tmp_path):
    data = load_data("digits", tiny)
    host = tiny.host()
    task = methods.build("linear", host, num_classes=data.num_classes)
    task.labels = data.labels
    path = save(task, host, tmp_path / "digits.task", backbone="restuning-tiny")
    result = evaluate_task(Predictor.load(path), "digits")
    expected = evaluate(Tuned(host, task).eval(), data.test, collate=data.collate)
    assert result["accuracy"] == expected["accuracy"]
    assert (result["data"], result["method"]) == ("digits", "linear")
    with pytest.raises(DataError, match="one task"):
        evaluate_task(Predictor.load({"a": path, "b": path}), "digits")


def test_weights_are_refused_for_a_backbone_that_is_loaded(tiny, pets, tmp_path):
    with pytest.raises(BackboneError, match="taken as it is"):
        Predictor.load(pets, backbone=tiny, weights=tmp_path / "other.safetensors")


def test_answers_have_the_temperature_of_their_own_task(tiny, photos, tmp_path):
    host, temperatures = tiny.host(), {"cold": 0.25, "plain": 1.0, "warm": 4.0}
    tasks = {}
    for name, temperature in temperatures.items():
        torch.manual_seed(0)
        # One inside the backbone, the others in a bank.
        method = "res-tuning" if name == "warm" else "linear"
        task = methods.build(method, host, num_classes=len(LABELS))
        task.labels, task.temperature = LABELS, temperature
        torch.nn.init.normal_(task.head.weight)
        tasks[name] = task
    predictor = Predictor(tiny, tasks, host=host)
    prepared = torch.stack([predictor.inputs.preprocessing.image(f) for f in photos[0]])
    answers = predictor(photos[0])
    for name, task in tasks.items():
        with torch.no_grad():
            logits = Tuned(host, task)(prepared)
        ours = torch.stack([answer[name].probabilities for answer in answers])
        theirs = (logits / temperatures[name]).softmax(1)
        torch.testing.assert_close(ours, theirs, atol=OTHER_BATCH, rtol=0)
        assert [a[name].label for a in answers] == [LABELS[i] for i in logits.argmax(1)]
        assert [a[name].top(1)[0].probability for a in answers] == [
            a[name].probability for a in answers
        ]
    sure = [[answer[name].probability for name in temperatures][:2] for answer in answers]
    assert all(cold > plain for cold, plain in sure)


def test_a_label_is_that_of_the_logits_where_probabilities_round_to_one_number(tiny):
    host = tiny.host()
    task = methods.build("linear", host, num_classes=2)
    torch.nn.init.zeros_(task.head.weight)
    task.head.bias.data = torch.tensor([0.0, 1e-6])
    task.temperature = 1000.0
    (answer,) = Predictor(tiny, {"x": task}, host=host)(np.zeros((32, 32, 3), np.uint8))
    assert answer.label == "1"


def test_a_test_of_a_task_tells_what_its_probabilities_are_worth(tiny, tmp_path):
    data, host = load_data("digits", tiny), tiny.host()
    task = methods.build("linear", host, num_classes=data.num_classes)
    task.labels = data.labels
    path = save(task, host, tmp_path / "digits.task", backbone="restuning-tiny")
    plain = evaluate_task(Predictor.load(path), "digits")
    assert plain["ece"] == plain["ece_uncalibrated"]
    # The one summed in double, the other batch by batch in single precision.
    assert plain["nll"] == pytest.approx(plain["loss"], abs=OTHER_BATCH)
    task.temperature = 0.5
    save(task, host, path, backbone="restuning-tiny")
    told = evaluate_task(Predictor.load(path), "digits")
    for name in ("accuracy", "loss", "count", "ece_uncalibrated"):
        assert told[name] == plain[name]
    assert told["temperature"] == 0.5
    logits, labels = collect_logits(Tuned(host, task), data.test, 64, data.collate)
    chances = task.probabilities(logits)
    error = calibration_error(chances.amax(1), chances.argmax(1) == labels)
    assert told["ece"] == pytest.approx(error, abs=OTHER_BATCH)
    nll = torch.nn.functional.nll_loss(chances.log(), labels)
    assert told["nll"] == pytest.approx(float(nll), abs=OTHER_BATCH)


def test_the_weights_of_a_backbone_are_read_once_for_all_tasks_that_are_opened(
    tmp_path, monkeypatch
):
    backbone = load_backbone("restuning-tiny")
    host, read = backbone.host(), []
    tasks = {f"t{n}": save_task(backbone, tmp_path / f"t{n}.task", host=host) for n in range(3)}
    identity = type(host).identity
    monkeypatch.setattr(type(host), "identity", lambda self: read.append(1) or identity(self))
    assert [*Predictor.load(tasks).tasks] == [*tasks]
    assert read == [1]
