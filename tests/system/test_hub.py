"""Tasks go to a hub and come back: the real client against a server on loopback."""

import inspect
import json
import re
import threading

import pytest
import torch
import yaml
from small_hub import READS, STRANGER, WRITES, at_hub, log_in, small_hub

from awake import tiny_vit
from children import Child
from commands import restuning
from restuning import Host, Predictor, RestuningError, load_backbone, methods, save
from restuning._errors import RestuningWarning
from restuning.task import describe, find_origin, find_task, list_hub, push_to_hub
from restuning.task.hub import LARGEST, HubTask, _check_files, tasks_in
from serving import save_task

pytest.importorskip("huggingface_hub", reason="needs the extra hub")

AFRESH = """
import sys
# The client reads its address when it is imported.
for name in [n for n in sys.modules if n.partition(".")[0] == "huggingface_hub"]:
    del sys.modules[name]
"""
PUSH = """
import sys, restuning
print(restuning.push_to_hub(sys.argv[1], "someone/pets"))
"""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with at_hub(monkeypatch, tmp_path / "cache") as server:
        # Names of a hub are found from a folder that has none like them.
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield server


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("restuning-tiny")


@pytest.fixture(scope="module")
def tasks(backbone, tmp_path_factory):
    """Two tasks on the embedded backbone: folders `pets.task` and `scenes.task`."""
    folder, host = tmp_path_factory.mktemp("tasks"), backbone.host()
    for seed, name in enumerate(("pets", "scenes")):
        save_task(backbone, folder / f"{name}.task", seed=seed, host=host)
    return folder


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    return list((torch.rand(2, 3, 32, 32) * 255).to(torch.uint8))


def chances(predictor, images, name):
    return torch.stack([answer[name].probabilities for answer in predictor(images)])


def test_a_task_that_was_pushed_is_loaded_by_its_name_and_answers_the_same(hub, tasks, images):
    pushed = push_to_hub(tasks / "pets.task", "someone/pets", private=True)
    assert pushed.address.startswith(hub.url)
    there = hub.repositories["someone/pets"]
    assert there.private and pushed.name == f"someone/pets@{there.branches['main']}"
    own = tasks / "pets.task" / "weights.safetensors"
    assert there.files()["weights.safetensors"] == own.read_bytes()
    fetched = Predictor.load("someone/pets")
    local = Predictor.load(tasks / "pets.task")
    assert torch.equal(chances(fetched, images, "pets"), chances(local, images, "pets"))
    assert find_origin(find_task("someone/pets")) == pushed.name


def test_a_revision_is_a_branch_or_a_commit_and_stands_in_the_name_or_beside_it(hub, tasks):
    first = push_to_hub(tasks / "pets.task", "someone/pets")
    second = push_to_hub(tasks / "scenes.task", "someone/pets")
    other = push_to_hub(tasks / "pets.task", "someone/pets", revision="trial")
    assert second.replaced == first.commit
    assert len({first.commit, second.commit, other.commit}) == 3
    for name, revision, commit in (
        ("someone/pets", None, second.commit),
        ("someone/pets@trial", None, other.commit),
        ("someone/pets", "trial", other.commit),
        (f"someone/pets@{first.commit}", None, first.commit),
    ):
        folder = find_task(name, revision)
        assert find_origin(folder) == f"someone/pets@{commit}"
    asked = len(hub.asked)
    assert find_task("someone/pets", first.commit) and len(hub.asked) == asked
    with pytest.raises(RestuningError, match="no revision v9"):
        find_task("someone/pets@v9")
    with pytest.raises(RestuningError, match="two revisions"):
        find_task("someone/pets@trial", "main")


def test_a_repository_holds_several_tasks_which_answer_from_one_forward(hub, tasks, images):
    for name in ("pets", "scenes"):
        push_to_hub(tasks / f"{name}.task", f"someone/zoo/{name}")
    predictor = Predictor.load(["someone/zoo/pets", "someone/zoo/scenes@main"])
    assert [*predictor.tasks] == ["pets", "scenes"] and predictor.forwards == 1
    with pytest.raises(RestuningError, match="several tasks") as error:
        find_task("someone/zoo")
    assert "pets, scenes" in str(error.value) and "someone/zoo/pets" in str(error.value)
    with pytest.raises(RestuningError, match="no such task in a repository"):
        find_task("someone/zoo/cars")
    # The repository has a card of its own, with a line each, that opens all of them.
    card = hub.repositories["someone/zoo"].files()["README.md"].decode()
    assert "`someone/zoo/pets`" in card and "`someone/zoo/scenes`" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.S)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102
    assert {*names["predictor"].tasks} == {"pets", "scenes"}


def refusal(what, *arguments, **more):
    with pytest.raises(RestuningError) as error:
        what(*arguments, **more)
    return str(error.value)


def test_who_one_is_what_one_may_and_what_there_is_are_told_apart(hub, tasks, monkeypatch):
    folder = tasks / "pets.task"
    push_to_hub(folder, "someone/pets", private=True)
    push_to_hub(folder, "someone/shared")
    hub.repositories["someone/gated"] = gated = hub.repositories["someone/shared"]
    told = {
        "other": refusal(find_task, "someone/pets", token=STRANGER),
        "bad token": refusal(find_task, "someone/pets", token="hf_wrong"),
        "none": refusal(find_task, "someone/pets", token=False),
        "missing": refusal(find_task, "someone/nothing"),
        "read only": refusal(push_to_hub, folder, "someone/shared", token=READS),
        "not theirs": refusal(push_to_hub, folder, "someone/shared", token=STRANGER),
        "push without": refusal(push_to_hub, folder, "someone/shared", token=False),
        "no task": refusal(find_task, "someone/shared/cars"),
    }
    gated.gated = True
    told["gated"] = refusal(find_task, "someone/gated", token=STRANGER)
    for name, words in {
        "other": "(404)",
        "bad token": "does not know the token",
        "none": "no token was sent (401)",
        "missing": "the hub gave no such task",
        "read only": "may not write there (403)",
        "not theirs": "may not write there (403)",
        "push without": "hf auth login",
        "no task": "no such task in a repository",
        "gated": "its owner admits who asks",
    }.items():
        assert words in told[name], (name, told[name])
    assert "hf_" not in "".join(told.values())
    assert find_task("someone/pets", token=READS)
    hub.failing = 500
    assert "the hub answers 500" in refusal(find_task, "someone/never")


def test_offline_a_task_is_opened_from_the_cache_at_once_and_no_hub_is_asked(
    hub, tasks, monkeypatch
):
    push_to_hub(tasks / "pets.task", "someone/pets")
    folder = find_task("someone/pets")
    push_to_hub(tasks / "scenes.task", "someone/pets")
    hub.asked.clear()
    assert find_task("someone/pets", local_files_only=True) == folder
    assert "local_files_only" in refusal(find_task, "someone/other", local_files_only=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_task("someone/pets") == folder
    said = refusal(find_task, "someone/other")
    assert "HF_HUB_OFFLINE is set" in said and "copy the task folder" in said
    assert "HF_HUB_OFFLINE" in refusal(push_to_hub, tasks / "pets.task", "someone/pets")
    assert "HF_HUB_OFFLINE" in refusal(list_hub)
    assert hub.asked == []


def test_a_hub_that_fails_gives_what_was_fetched_before_and_says_so(hub, tasks):
    push_to_hub(tasks / "pets.task", "someone/pets")
    folder = find_task("someone/pets")
    hub.failing = 503
    with pytest.warns(RestuningWarning, match="fetched before"):
        assert find_task("someone/pets") == folder


def test_a_fetch_that_stops_half_way_leaves_the_whole_task_of_before(hub, tasks, monkeypatch):
    import huggingface_hub

    push_to_hub(tasks / "pets.task", "someone/pets")
    folder = find_task("someone/pets")
    push_to_hub(tasks / "scenes.task", "someone/pets")
    real = huggingface_hub.hf_hub_download

    def stop(repository, file, **more):
        if file == "weights.safetensors":
            raise ConnectionResetError("cut")
        return real(repository, file, **more)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", stop)
    assert "cut" in refusal(find_task, "someone/pets")
    assert find_task("someone/pets", local_files_only=True) == folder
    monkeypatch.undo()


def test_of_a_repository_the_files_of_a_task_are_fetched_and_nothing_else(hub, tasks):
    push_to_hub(tasks / "pets.task", "someone/pets")
    there = hub.repositories["someone/pets"]
    there.commit({**there.files(), "modeling.py": b"boom", "pytorch_model.bin": b"x"})
    hub.asked.clear()
    folder = find_task("someone/pets")
    names = {"README.md", "task.json", "weights.safetensors"}
    assert {p.name for p in folder.iterdir()} == names
    resolved = {path.rpartition("/")[2] for _, path in hub.asked if "/resolve/" in path}
    assert resolved == names


@pytest.mark.parametrize("name", [*LARGEST])
def test_a_file_that_is_larger_than_any_of_a_task_is_not_fetched(hub, tasks, name):
    push_to_hub(tasks / "pets.task", "someone/pets")
    hub.sizes[name] = LARGEST[name] + 1
    hub.asked.clear()
    assert "too large" in refusal(find_task, "someone/pets")
    assert not any("/resolve/" in path for _, path in hub.asked)


@pytest.mark.parametrize(
    ("files", "tasks", "said"),
    [
        (["task.json", "README.md"], [], "is no task.*no weights.safetensors"),
        (["multitask.json", "task.json.bak"], [], "is no task.*no task.json"),
        (["zoo/multitask.json", "a/b/task.json"], [], "is no task.*no task.json"),
        (["pets/task.json", "task.json"], ["pets"], "several tasks.*pets"),
    ],
)
def test_a_task_in_a_repository_is_a_folder_with_a_task_json_and_nothing_that_is_called_alike(
    files, tasks, said
):
    assert tasks_in(files) == tasks
    with pytest.raises(RestuningError, match=f"(?s){said}"):
        _check_files(HubTask.read("someone/pets"), dict.fromkeys(files, 10))


def test_a_file_of_another_size_than_was_told_is_refused(hub, tasks):
    push_to_hub(tasks / "pets.task", "someone/pets")
    hub.sizes["weights.safetensors"] = 5
    assert "another size" in refusal(find_task, "someone/pets")


def test_the_backbone_that_a_fetched_task_names_is_not_fetched_for_it(hub, tmp_path):
    host = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    task = methods.build("linear", host, num_classes=3)
    for name in ("hf:someone/model", "timm:vit_tiny_patch16_224.augreg_in21k", "pt2:/tmp/x.pt2"):
        folder = save(task, host, tmp_path / "x.task", backbone=name)
        push_to_hub(folder, "someone/x")
        find_task("someone/x")
        hub.asked.clear()
        said = refusal(Predictor.load, "someone/x")
        assert "if you trust it, name it yourself" in said, said
        # The task's own commit is asked for, and no model.
        assert all("someone/x" in path for _, path in hub.asked), hub.asked


def test_a_folder_of_the_name_is_taken_first_and_it_is_said_where_both_are(hub, tasks, tmp_path):
    push_to_hub(tasks / "pets.task", "someone/pets")
    find_task("someone/pets")
    own = tmp_path / "here" / "someone" / "pets"
    own.parent.mkdir()
    own.symlink_to(tasks / "scenes.task")
    with pytest.warns(RestuningWarning, match="a folder is taken") as said:
        assert find_task("someone/pets").resolve() == (tasks / "scenes.task").resolve()
    assert "someone/pets@main" in str(said[0].message)
    assert find_origin(find_task("someone/pets@main"))
    with pytest.warns(RestuningWarning, match="which has no revision v1"):
        find_task("someone/pets", "v1")


# Pushing.


def test_a_push_that_is_killed_half_way_leaves_the_old_version_whole(hub, tasks, tmp_path):
    first = push_to_hub(tasks / "pets.task", "someone/pets")
    hub.hold = threading.Event()
    hub.uploading.clear()
    child = Child(
        ["-c", AFRESH + PUSH, tasks / "scenes.task"],
        {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": WRITES,
        },
    )
    assert hub.uploading.wait(120), child.communicate(1)
    child.kill()
    hub.hold.set()
    assert find_origin(find_task("someone/pets")) == first.name
    assert describe(find_task("someone/pets")) == describe(tasks / "pets.task")
    again = push_to_hub(tasks / "scenes.task", "someone/pets")
    assert again.replaced == first.commit


def test_what_others_push_meanwhile_is_not_written_over(hub, tasks, monkeypatch):
    from huggingface_hub import HfApi

    first = push_to_hub(tasks / "pets.task", "someone/pets")
    real = HfApi.create_commit

    def others_first(self, *arguments, **more):
        monkeypatch.setattr(HfApi, "create_commit", real)
        there = hub.repositories["someone/pets"]
        there.commit({**there.files(), "note.txt": b"of another"})
        return real(self, *arguments, **more)

    monkeypatch.setattr(HfApi, "create_commit", others_first)
    said = refusal(push_to_hub, tasks / "scenes.task", "someone/pets")
    assert "somebody pushed there since this push began" in said
    assert b"of another" in hub.repositories["someone/pets"].files().values()
    said = refusal(push_to_hub, tasks / "scenes.task", "someone/pets", parent=first.commit)
    assert "another commit is to be replaced" in said
    newest = hub.repositories["someone/pets"].branches["main"]
    done = push_to_hub(tasks / "scenes.task", "someone/pets", parent=newest[:12])
    assert done.replaced == newest
    same = push_to_hub(tasks / "scenes.task", "someone/pets")
    assert same.commit == same.replaced == done.commit


def test_what_is_no_task_on_a_hub_is_not_written_over(hub, tasks):
    from huggingface_hub import HfApi

    HfApi(endpoint=hub.url).create_repo("someone/bert")
    there = hub.repositories["someone/bert"]
    there.commit({"README.md": b"mine", "model.safetensors": b"x", "task/notes": b"y"})
    for name in ("someone/bert", "someone/bert/task"):
        assert "holds something else" in refusal(push_to_hub, tasks / "pets.task", name)
    assert there.files()["README.md"] == b"mine"
    # Beside it a task has room, and a card that somebody wrote stays.
    push_to_hub(tasks / "pets.task", "someone/bert/pets")
    assert there.files()["README.md"] == b"mine"
    assert find_origin(find_task("someone/bert/pets"))
    for name in ("pets", "someone/pets.task", "/tmp/x", "someone/zoo/pets/deep"):
        assert "not a name on a hub" in refusal(push_to_hub, tasks / "pets.task", name)


def test_what_is_to_be_private_is_not_pushed_where_everybody_sees_it(hub, tasks):
    push_to_hub(tasks / "pets.task", "someone/pets")
    before = hub.repositories["someone/pets"].branches["main"]
    said = refusal(push_to_hub, tasks / "scenes.task", "someone/pets", private=True)
    assert "everybody sees it" in said
    assert hub.repositories["someone/pets"].branches["main"] == before
    assert "a commit is not pushed to" in refusal(
        push_to_hub, tasks / "pets.task", "someone/pets", revision=before
    )


def test_lines_that_an_author_wrote_below_ours_are_pushed_as_they_are(hub, tasks, tmp_path):
    import shutil

    folder = tmp_path / "own.task"
    shutil.copytree(tasks / "pets.task", folder)
    more = '\nBeside it: `restuning.Predictor.load("org/other")`\n'
    with (folder / "README.md").open("a") as card:
        card.write(more)
    push_to_hub(folder, "someone/pets")
    text = hub.repositories["someone/pets"].files()["README.md"].decode()
    assert text.endswith(more) and text.count('load("someone/pets")') == 1


def test_a_path_of_this_machine_in_a_pushed_task_is_warned_of(hub, tmp_path):
    host = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    task = methods.build("linear", host, num_classes=3)
    folder = save(task, host, tmp_path / "x.task", backbone=f"hf:{tmp_path}")
    with pytest.warns(RestuningWarning, match="by a path of this machine"):
        push_to_hub(folder, "someone/x")


# Cards.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run as `restuning train` leaves it, with its picture."""
    out = tmp_path_factory.mktemp("run")
    done = restuning("train", "digits", "--method", "linear", "--epochs", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def test_the_card_of_a_run_is_what_a_hub_takes_and_its_lines_open_the_task(
    hub, run, images, monkeypatch, tmp_path, capsys
):
    from huggingface_hub import ModelCard, metadata_load

    pushed = push_to_hub(run, "someone/digits", license="apache-2.0")
    files = hub.repositories["someone/digits"].files()
    assert {"README.md", "curves.png", "task.json", "weights.safetensors"} <= files.keys()
    assert "curves.png" in pushed.files and b"(curves.png)" in files["README.md"]
    (tmp_path / "README.md").write_bytes(files["README.md"])
    head = metadata_load(tmp_path / "README.md")
    card = ModelCard.load(tmp_path / "README.md")
    # The client asks the hub, here the small one; what is wrong raises. Before version 2 it asked the one of the company.
    if "ENDPOINT" in inspect.getsource(ModelCard.validate):
        card.validate()
    (result,) = card.data.eval_results
    score = json.loads((run / "metrics.json").read_text())["test_accuracy"]
    assert (result.task_type, result.metric_type) == ("image-classification", "accuracy")
    assert (result.dataset_name, result.dataset_split) == ("digits", "test")
    assert result.metric_value == score
    model_index = head.pop("model-index")
    assert model_index[0]["results"]
    assert head == {
        "library_name": "restuning",
        "pipeline_tag": "image-classification",
        "tags": ["res-tuning", "inline", "single-label"],
        "license": "apache-2.0",
    }
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    assert 'Predictor.load("someone/digits")' in code
    exec(compile(code, "README.md", "exec"), {"inputs": images})  # noqa: S102
    label, probability = capsys.readouterr().out.split()[:2]
    assert label in map(str, range(10)) and 0 < float(probability) <= 1


def test_what_the_head_of_a_card_says_on_the_hub_stays_when_the_task_is_pushed_again(hub, tasks):
    push_to_hub(tasks / "pets.task", "someone/pets")
    there = hub.repositories["someone/pets"]
    card = there.files()["README.md"].decode()
    edited = card.replace("---\n", "---\nlicense: mit\n", 1)
    there.commit({**there.files(), "README.md": edited.encode(), "curves.png": b"of before"})
    push_to_hub(tasks / "scenes.task", "someone/pets")
    files = there.files()
    assert "license: mit" in files["README.md"].decode()
    # A picture of the task that was there is no picture of this one.
    assert "curves.png" not in files


def test_what_a_card_said_of_the_task_that_was_there_is_not_said_of_the_one_that_takes_its_place():
    from restuning.task.card import card_for_hub, split_card, write_card

    host = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    task = methods.build("linear", host, num_classes=3)
    told = {"test accuracy": 0.99}
    first = write_card("pets", task, "hf:org/vit", {"mean": 1}, told, "hf:org/pets")
    of_task = {*split_card(first)[0]}
    assert {"model-index", "datasets", "base_model", "pipeline_tag"} <= of_task
    there = card_for_hub(first, "someone/pets", license="mit")
    # On data of somebody's own, without a test, on a backbone that no hub has.
    second = write_card("pets", task, "", {}, {})
    plain, _ = split_card(card_for_hub(second, "someone/pets"))
    replaced, _ = split_card(card_for_hub(second, "someone/pets", before=there))
    assert replaced == {**plain, "license": "mit"}


def test_a_head_that_a_hub_refuses_is_told_and_nothing_is_pushed(hub, tasks):
    said = refusal(push_to_hub, tasks / "pets.task", "someone/pets", license="my own")
    assert "the hub refuses what was sent" in said and '"license" must be' in said
    assert "task.json" not in hub.repositories["someone/pets"].files()


KINDS = [
    ("single-label", {"mean": 1}, "image-classification"),
    ("single-label", {"kind": "text"}, "text-classification"),
    ("single-label", {"kind": "tags"}, "token-classification"),
    ("single-label", {}, None),
    ("single-label", {"kind": "audio"}, "audio-classification"),
    ("multi-label", {"kind": "audio"}, "audio-classification"),
    ("regression", {"kind": "audio"}, None),
    ("multi-label", {"mean": 1}, "image-classification"),
    ("segmentation", {"mean": 1}, "image-segmentation"),
    ("embedding", {"mean": 1}, "image-feature-extraction"),
    ("regression", {"mean": 1}, None),
    ("depth", {"mean": 1}, "depth-estimation"),
]


@pytest.mark.parametrize(("problem", "preprocessing", "tag"), KINDS)
def test_a_card_says_what_is_asked_of_what_in_the_words_of_the_hub(problem, preprocessing, tag):
    from restuning.problems import kinds
    from restuning.task.card import _pipeline_tag

    assert _pipeline_tag(kinds()[problem], preprocessing) == tag


@pytest.mark.parametrize(
    ("backbone", "base"),
    [
        ("hf:org/vit", "org/vit"),
        ("clip:org/clip", "org/clip"),
        ("timm:vit_tiny_patch16_224.augreg_in21k", "timm/vit_tiny_patch16_224.augreg_in21k"),
        ("restuning-tiny", None),
        ("hf:/data/my-model", None),
        ("timm:vit_tiny_patch16_224", None),
        ("", None),
    ],
)
def test_the_card_names_its_base_model_where_that_is_one_of_the_hub(backbone, base):
    from restuning.task.card import split_card, write_card

    host = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    task = methods.build("linear", host, num_classes=3)
    head, _ = split_card(write_card("pets", task, backbone, {}, {}))
    assert head.get("base_model") == base
    assert head.get("base_model_relation") == ("adapter" if base else None)


def test_data_of_a_hub_are_named_and_paths_are_not(tmp_path, monkeypatch):
    from restuning.task.card import split_card, write_card

    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    host = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    task = methods.build("linear", host, num_classes=3)

    def card(data):
        return write_card("pets", task, "", {"kind": "text"}, {"test accuracy": 0.5}, data)

    head, _ = split_card(card("hf:org/set"))
    assert head["datasets"] == ["org/set"]
    assert head["model-index"][0]["results"][0]["dataset"]["type"] == "org/set"
    for private in ("hf:/home/ann/set", "hf:own", "/home/ann/set", "../set"):
        assert "datasets" not in split_card(card(private))[0]
        assert "ann" not in card(private) and "model-index" not in card(private)


# The command line.


def test_the_commands_push_list_show_and_predict(hub, tasks, tmp_path, images):
    from PIL import Image

    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    done = restuning("push", tasks / "pets.task", "someone/zoo/pets", "--license", "mit")
    commit = hub.repositories["someone/zoo"].branches["main"]
    assert done.returncode == 0, done.stderr
    assert f"someone/zoo/pets@{commit}" in done.stdout
    told = json.loads(restuning("info", "someone/zoo/pets", "--json").stdout)
    assert told["fetched"] == f"someone/zoo/pets@{commit}"
    said = restuning("predict", tmp_path / "a.png", "--task", "someone/zoo/pets@main", "--json")
    (found,) = json.loads(said.stdout)["predictions"]
    assert found["label"] in ("ant", "bee", "cat"), said.stderr
    judged = restuning("eval", "someone/zoo/pets", "digits")
    assert judged.returncode == 1 and "Traceback" not in judged.stderr
    out = tmp_path / "both.onnx"
    assert restuning("export", "someone/zoo/pets", "--out", out).returncode == 0 and out.exists()
    listed = json.loads(restuning("ls-hub", "--user", "someone", "--json").stdout)
    assert [(r["name"], r["problem"], r["revision"]) for r in listed] == [
        ("someone/zoo", "single-label", commit)
    ]
    assert "someone/zoo" in restuning("ls-hub", "--search", "zoo").stdout
    assert "no task" in restuning("ls-hub", "--search", "nothing").stdout


def test_the_list_tells_figures_and_leaves_private_tasks_to_their_owner(
    hub, run, monkeypatch, tmp_path
):
    push_to_hub(run, "someone/digits")
    push_to_hub(run, "someone/secret", private=True)
    # What somebody wrote into a card is shown, and breaks nothing.
    there = hub.repositories["someone/secret"]
    odd = {"library_name": "restuning", "tags": ["x"], "model-index": [{"results": 3}]}
    there.commit({**there.files(), "README.md": f"---\n{yaml.safe_dump(odd)}---\n".encode()})
    mine = {each.name: each for each in list_hub()}
    assert mine.keys() == {"someone/digits", "someone/secret"}
    assert mine["someone/digits"].metric.startswith("test accuracy 0.")
    assert mine["someone/secret"].metric is None and mine["someone/secret"].private
    vit = Host(tiny_vit(), torch.zeros(1, 3, 32, 32))
    task = methods.build("linear", vit, num_classes=3)
    push_to_hub(save(task, vit, tmp_path / "x.task", backbone="hf:org/vit"), "someone/vit")
    assert [each.backbone for each in list_hub(search="vit")] == ["org/vit"]
    hub.repositories.pop("someone/vit")
    log_in(monkeypatch, "")
    assert [each.name for each in list_hub()] == ["someone/digits"]


def test_a_server_tells_the_commit_of_a_task_that_was_fetched(hub, tasks):
    from restuning.serve import Service
    from restuning.serve.web.json_answers import entry_to_json

    pushed = push_to_hub(tasks / "pets.task", "someone/pets")
    service = Service(["someone/pets", tasks / "scenes.task"])
    told = {name: entry_to_json(entry)["fetched"] for name, entry in service.entries.items()}
    assert told == {"pets": pushed.name, "scenes": None}
    service.drain(0)


def test_the_small_hub_ends_when_it_is_left():
    with small_hub() as server:
        thread = next(t for t in threading.enumerate() if "serve_forever" in t.name)
    thread.join(5)
    assert not thread.is_alive() and server.socket.fileno() == -1
