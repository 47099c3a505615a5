"""The model for loops of others, without any of them: inputs, loss, state, files, and what it refuses."""

import copy
import inspect
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from torch import nn

import restuning
from awake import tiny_bert, tiny_vit, wake
from loops import CLASSES, METHODS, build, build_model, copied, example
from restuning import Host, Task, methods
from restuning._errors import (
    DataError,
    DivergedError,
    EngineError,
    FormatError,
    RestuningWarning,
    TrainingError,
    WrongBackboneError,
    WrongTaskError,
)
from restuning.backbones import Preprocessing
from restuning.forecast import load_shapes
from restuning.integrations.transformers import TaskModel
from restuning.problems import Depth, MultiLabel, Regression, Segmentation, Tokens

ROUNDING = 1e-6
"""fp32: the same products, and sums in another order."""
MEGABYTES = 3
X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(7))
Y = torch.tensor([0, 4, 2, 1])


class Words(nn.Module):
    """A small language backbone, with the names that BERT has."""

    def __init__(self):
        super().__init__()
        self.embeddings = nn.Embedding(20, 16)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0) for _ in range(2)
        )

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, labels=None):
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def of_problem(problem, outputs, **options):
    host = Host(tiny_vit(seed=3), example())
    task = methods.build("res-tuning-bypass", host, num_classes=outputs, rank=3)
    task.problem = problem
    wake(task, seed=4).train()
    return TaskModel(host, task, **options)


def tiny(method="res-tuning-bypass"):
    backbone = restuning.load_backbone("restuning-tiny")
    host = backbone.host()
    task = methods.build(method, host, num_classes=3)
    task.labels = ["a", "b", "c"]
    return TaskModel(host, wake(task), backbone)


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_logits_are_those_of_the_tuned_backbone(method):
    model = build_model(method)
    told = model(pixel_values=X, labels=Y)
    assert torch.equal(told["logits"], model.tuned(X))
    torch.testing.assert_close(
        told["loss"], F.cross_entropy(told["logits"], Y), atol=ROUNDING, rtol=ROUNDING
    )
    assert list(model(pixel_values=X, labels=None)) == ["logits"]


def test_images_are_pixel_values_and_other_inputs_have_the_names_of_the_backbone():
    images = inspect.signature(build_model().forward).parameters
    assert list(images)[0] == "pixel_values" and "x" not in images and "labels" in images
    host = Host(Words(), torch.ones(1, 4, dtype=torch.long))
    task = Task(head=nn.Linear(host.dim, 2), pool="mean")
    model = TaskModel(host, task)
    words = inspect.signature(model.forward).parameters
    # The backbone's own labels are not what `labels` are here.
    assert list(words)[:4] == ["input_ids", "attention_mask", "token_type_ids", "labels"]
    told = model(input_ids=torch.arange(6).view(2, 3), labels=torch.tensor([0, 1]))
    assert told["logits"].shape == (2, 2)
    # That of the class is what Trainer finds the labels by.
    assert [p for p in inspect.signature(type(model).forward).parameters if "label" in p] == [
        "labels"
    ]


def test_a_text_backbone_of_transformers_names_its_inputs():
    host = Host(tiny_bert(), input_ids=torch.arange(1, 6).view(1, 5))
    task = methods.build("lora", host, num_classes=3, rank=2)
    model = TaskModel(host, task)
    batch = {"input_ids": torch.arange(1, 9).view(2, 4), "attention_mask": torch.ones(2, 4).long()}
    batch["token_type_ids"] = torch.zeros(2, 4).long()
    assert set(batch) <= set(inspect.signature(model.forward).parameters)
    model(**batch, labels=torch.tensor([0, 2]))["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_an_image_backbone_of_transformers_is_given_its_own_name():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
    )
    host = Host(transformers.ViTModel(config, add_pooling_layer=False).eval(), example())
    model = TaskModel(host, methods.build("res-tuning", host, num_classes=5, rank=2))
    assert model(pixel_values=X, labels=Y)["logits"].shape == (4, 5)


def test_losses_are_those_of_the_problem_from_labels_as_collators_make_them():
    several = of_problem(MultiLabel(), 3)
    there = torch.tensor([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])
    told = several(pixel_values=X, labels=there)
    wanted = F.binary_cross_entropy_with_logits(told["logits"], there.float())
    torch.testing.assert_close(told["loss"], wanted, atol=ROUNDING, rtol=ROUNDING)
    number = of_problem(Regression([2.0], [4.0]), 1)
    y = torch.tensor([1.0, 3.0, 2.0, 10.0], dtype=torch.float64)
    told = number(pixel_values=X, labels=y)
    wanted = F.mse_loss(told["logits"][:, 0], ((y - 2) / 4).float())
    torch.testing.assert_close(told["loss"], wanted, atol=ROUNDING, rtol=ROUNDING)
    assert torch.equal(told["loss"], number(pixel_values=X, labels=y.view(4, 1))["loss"])
    host = Host(tiny_vit(seed=3), example())
    task = methods.build("res-tuning", host, num_classes=3, rank=2)
    task.pool, task.problem = "all", Tokens()
    tokens = TaskModel(host, task)
    table = torch.full((4, 17), -100)
    table[:, 2] = torch.tensor([0, 2, 1, 1])
    told = tokens(pixel_values=X, labels=table)
    wanted = F.cross_entropy(told["logits"][:, 2], table[:, 2])
    torch.testing.assert_close(told["loss"], wanted, atol=ROUNDING, rtol=ROUNDING)


def test_smoothing_and_class_weights_are_of_training_alone():
    weights = torch.tensor([5.0, 1.0, 1.0, 1.0, 1.0])
    model = build_model(label_smoothing=0.2, class_weights=weights)
    logits = model(pixel_values=X)["logits"]
    each = F.cross_entropy(logits, Y, reduction="none", label_smoothing=0.2) * weights[Y]
    torch.testing.assert_close(model(pixel_values=X, labels=Y)["loss"], each.mean())
    plain = model.eval()(pixel_values=X, labels=Y)["loss"]
    torch.testing.assert_close(plain, F.cross_entropy(logits, Y))
    assert "class_weights" not in model.state_dict()


@pytest.mark.parametrize("method", METHODS)
def test_only_the_task_has_parameters_and_state_and_all_of_them_get_gradients(method):
    model = build_model(method)
    assert {id(p) for p in model.parameters()} == {id(p) for p in model.task.parameters()}
    state = model.state_dict()
    assert set(state) == {f"task.{n}" for n in model.task.state_dict()} | {"backbone"}
    # Nothing has to be looked for by DDP: there is no parameter that a step does not use.
    model(pixel_values=X, labels=Y)["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in model.host.model.parameters())


@pytest.fixture(scope="module")
def shapes_of_vit_b():
    _, host = load_shapes("timm:vit_base_patch16_224")
    return host


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_of_a_task_on_vit_b_is_below_three_megabytes(method, shapes_of_vit_b):
    host = shapes_of_vit_b
    with torch.device("meta"):
        task = methods.build(method, host, num_classes=100)
    size = sum(t.numel() * t.element_size() for t in task.state_dict().values())
    assert 0 < size < MEGABYTES * 10**6
    assert sum(p.numel() for p in host.model.parameters()) > 85e6


def test_state_goes_back_into_the_same_task_also_under_a_wrapper():
    model, other = build_model(), build_model()
    wake(other.task, seed=9)
    nn.Sequential(other).load_state_dict(nn.Sequential(model).state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_weights_of_another_task_or_backbone_are_refused_strict_or_not():
    state = build_model("res-tuning").state_dict()
    with pytest.raises(FormatError, match="another task"):
        build_model("lora").load_state_dict(state, strict=False)
    host = Host(tiny_vit(seed=8), example())
    elsewhere = TaskModel(host, methods.build("res-tuning", host, num_classes=CLASSES, rank=3))
    before = copied(elsewhere.task)
    with pytest.raises(WrongBackboneError, match="another backbone"):
        elsewhere.load_state_dict(state, strict=False)
    assert all(torch.equal(before[n], t) for n, t in elsewhere.task.state_dict().items())
    with pytest.raises(FormatError, match="missing"):
        build_model("res-tuning").load_state_dict({}, strict=False)


def test_tensors_that_two_modules_share_are_in_the_state_once_and_come_back():
    def shared():
        host, task = build()
        first, second = list(task.tuners.values())[:2]
        second.tuner.down = first.tuner.down
        return TaskModel(host, task)

    model, other = shared(), shared()
    state = model.state_dict()
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    wake(other.task, seed=9)
    other.load_state_dict(state)
    assert all(torch.equal(model.task.state_dict()[n], t) for n, t in copied(other.task).items())


def test_a_model_comes_whole_out_of_a_pickle():
    model = tiny()
    model.collator("photo")
    again = pickle.loads(pickle.dumps(model))  # noqa: S301 (our own bytes)
    assert inspect.signature(again.forward) == inspect.signature(model.forward)
    assert "photo" in inspect.signature(again.forward).parameters
    x = X[:, :, :32, :32]
    assert torch.equal(again(pixel_values=x)["logits"], model(pixel_values=x)["logits"])
    again.load_state_dict(model.state_dict())


def test_moves_and_casts_reach_the_backbone_and_a_copy_is_whole():
    model = build_model()
    twin = copy.deepcopy(model)
    assert twin.host is not model.host and twin.tuned.task is twin.task
    assert torch.equal(twin(pixel_values=X)["logits"], model(pixel_values=X)["logits"])
    twin.to(torch.float64)
    assert {p.dtype for p in twin.host.parameters()} == {torch.float64}
    assert {p.dtype for p in model.host.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_gives_the_same_gradients(method):
    model = build_model(method)
    model(pixel_values=X, labels=Y)["loss"].backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    wrapped = [m for m in model.host.modules() if type(m).__name__ == "RecomputedBlock"]
    assert bool(wrapped) == (method != "res-tuning-bypass")
    model(pixel_values=X, labels=Y)["loss"].backward()
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=ROUNDING, rtol=ROUNDING)
    model.gradient_checkpointing_disable()
    assert not [m for m in model.host.modules() if type(m).__name__ == "RecomputedBlock"]
    with pytest.raises(TrainingError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(TrainingError, match="every_n_layers"):
        model.activation_checkpointing_enable(every_n_layers=2)


def test_a_collator_reads_paths_pictures_and_prepared_tensors_as_a_predictor_does(tmp_path):
    model = tiny()
    picture = Image.linear_gradient("L").resize((40, 50)).convert("RGB")
    picture.save(tmp_path / "a.png")
    collate = model.collator()
    assert "image" in inspect.signature(model.forward).parameters
    batch = collate(
        [{"image": str(tmp_path / "a.png"), "label": 1, "id": 7}, {"image": picture, "label": 2}]
    )
    assert torch.equal(batch["labels"], torch.tensor([1, 2])) and set(batch) == {
        "pixel_values",
        "labels",
    }
    ready = batch["pixel_values"][0]
    assert torch.equal(collate([(ready, 1)])["pixel_values"][0], ready)
    assert set(collate([{"image": picture}])) == {"pixel_values"}
    folder = model.save(tmp_path / "x.task")
    predictor = restuning.Predictor.load(folder)
    logits = model.eval()(pixel_values=batch["pixel_values"][:1])["logits"]
    (answer,) = predictor([tmp_path / "a.png"])
    torch.testing.assert_close(
        answer["x"].probabilities, logits[0].detach().softmax(-1), atol=ROUNDING, rtol=ROUNDING
    )


@pytest.mark.parametrize(
    ("problem", "outputs", "labels"),
    [
        (Segmentation(), 3, torch.arange(4 * 32 * 32).view(4, 32, 32) % 3),
        (Depth(2.0, 1.0), 1, torch.linspace(1, 3, 4 * 32 * 32).view(4, 32, 32)),
    ],
    ids=("segmentation", "depth"),
)
def test_where_every_place_is_answered_nothing_is_cut_off_and_the_loss_is_of_pixels(
    problem, outputs, labels
):
    backbone = restuning.load_backbone("restuning-tiny")
    host = backbone.host()
    task = Task(head=nn.Linear(host.dim, outputs), pool="grid")
    task.problem = problem
    model = TaskModel(host, task, backbone)
    assert model.collator().prepare == backbone.preprocessing.whole()
    told = model(pixel_values=X, labels=labels, num_items_in_batch=labels.numel())
    wanted = problem.loss(told["logits"], labels) / len(labels)
    torch.testing.assert_close(told["loss"], wanted, atol=ROUNDING, rtol=ROUNDING)
    told["loss"].backward()


def test_a_collator_refuses_examples_without_input_mixed_labels_and_names_for_numbers():
    model = tiny()
    picture = Image.new("RGB", (32, 32))
    collate = model.collator("photo")
    with pytest.raises(DataError, match="no input"):
        collate([{"image": picture, "label": 0}])
    with pytest.raises(DataError, match="some have none"):
        collate([{"photo": picture, "label": 0}, {"photo": picture}])
    with pytest.raises(DataError, match="no number"):
        collate([{"photo": picture, "label": "cat"}])
    for name in ("my photo", "class", "label"):
        with pytest.raises(DataError, match="cannot be read"):
            model.collator(name)
    with pytest.raises(DataError, match="backbone"):
        build_model().collator()
    host, task = build()
    with pytest.raises(WrongBackboneError, match="another backbone"):
        TaskModel(host, task, model.backbone)


def test_a_task_is_saved_as_it_is_and_says_where_nothing_told_how_inputs_were_prepared(tmp_path):
    model = tiny("res-tuning")
    model.train()
    with pytest.warns(RestuningWarning, match="prepared"):
        folder = model.save(tmp_path / "x.task")
    assert model.task.training
    again = restuning.load(folder, model.host)
    assert all(torch.equal(again.state_dict()[n], t) for n, t in copied(model.task).items())
    told = Preprocessing.from_dict(restuning.describe(folder)["preprocessing"])
    assert told == model.backbone.preprocessing


def test_a_temperature_of_before_is_gone_with_the_first_step():
    model = build_model()
    model.task.temperature = 3.0
    model.eval()(pixel_values=X, labels=Y)
    assert model.task.temperature == 3.0
    model.train()(pixel_values=X, labels=Y)
    assert model.task.temperature == 1.0


@pytest.mark.parametrize("labels", [torch.tensor([0, 5, 1, 1]), torch.tensor([0, -1, 1, 1])])
def test_labels_out_of_range_are_refused_with_their_number(labels):
    with pytest.raises(TrainingError, match=f"label {labels[1]}, 5 classes"):
        build_model()(pixel_values=X, labels=labels)


def test_labels_of_another_kind_and_numbers_that_are_none_are_refused():
    with pytest.raises(TrainingError, match="whole numbers"):
        build_model()(pixel_values=X, labels=Y.float())
    with pytest.raises(TrainingError, match="no number"):
        of_problem(Regression([0.0], [1.0]), 1)(pixel_values=X, labels=torch.full((4,), torch.nan))
    with pytest.raises(TrainingError, match="0 or 1"):
        of_problem(MultiLabel(), 3)(pixel_values=X, labels=torch.full((4, 3), 2))


def test_a_loss_that_is_not_finite_is_told_in_training_and_shown_in_evaluation():
    model = build_model()
    with torch.no_grad():
        model.task.head.bias.fill_(torch.nan)
    with pytest.raises(DivergedError, match="nan"):
        model(pixel_values=X, labels=Y)
    assert model.eval()(pixel_values=X, labels=Y)["loss"].isnan()


@pytest.mark.parametrize("method", METHODS)
def test_a_backbone_whose_weights_would_train_is_refused(method):
    model = build_model(method)
    model.requires_grad_(True)
    # The backbone is no part of the model: switching all of it on does no harm.
    model(pixel_values=X, labels=Y)
    model.host.model.norm.weight.requires_grad_(True)
    with pytest.raises(TrainingError, match="norm.weight"):
        model(pixel_values=X, labels=Y)
    model.eval()
    with torch.no_grad():
        model(pixel_values=X, labels=Y)


def test_inputs_of_another_name_are_refused_with_those_that_are_taken():
    with pytest.raises(DataError, match="pixel_values"):
        build_model()(images=X, labels=Y)
    with pytest.raises(DataError, match="no input"):
        build_model()(labels=Y)


def test_batches_that_are_no_tensors_or_have_more_parts_are_refused():
    model = build_model()
    with pytest.raises(DataError, match="collator"):
        model(pixel_values=["a.png", "b.png"], labels=Y)
    with pytest.raises(DataError, match="3 parts"):
        model.name_batch((X, Y, Y))
    assert list(model.name_batch([X])) == list(model.name_batch(X)) == ["pixel_values"]


def test_an_engine_trains_a_task_beside_it(tmp_path):
    pytest.importorskip("onnxruntime")
    backbone = restuning.load_backbone("restuning-tiny")
    restuning.export_engine(backbone, tmp_path / "tiny.onnx")
    engine = restuning.load_backbone(f"onnx:{tmp_path / 'tiny.onnx'}")
    host = engine.host()
    model = TaskModel(host, wake(methods.build("res-tuning-bypass", host, num_classes=5)), engine)
    model(pixel_values=X, labels=Y)["loss"].backward()
    assert all(p.grad is not None for p in model.parameters())
    again = TaskModel(host, methods.build("res-tuning-bypass", host, num_classes=5), engine)
    again.load_state_dict(model.state_dict())
    with pytest.raises(EngineError):
        TaskModel(host, methods.build("res-tuning", backbone.host(), num_classes=5))


def test_tasks_that_steps_do_not_train_are_refused():
    backbone = restuning.load_backbone("restuning-tiny")
    host = backbone.host()
    for method in ("ridge", "ensemble", "knn"):
        with pytest.raises(WrongTaskError, match="whole training split"):
            TaskModel(host, methods.build(method, host, num_classes=3))
    headless = methods.build("res-tuning", host)
    assert headless.head is None
    with pytest.raises(WrongTaskError, match="without a head"):
        TaskModel(host, headless)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps", 0),
        ("steps", 2.5),
        ("steps", float("inf")),
        ("warmup", 2),
        ("lr", 0),
        ("weight_decay", -1),
    ],
)
def test_settings_out_of_their_range_are_refused(setting, value):
    with pytest.raises(TrainingError, match=setting):
        build_model().optimizers(**{"steps": 3, setting: value})


def test_lambdas_of_a_bypass_have_the_rate_that_is_asked_for():
    model = build_model("res-tuning-bypass")
    optimiser, schedule = model.optimizers(20, lr=1e-2, lambda_rate=10.0, warmup=0.1)
    assert schedule.base_lrs == [1e-2, 1e-2, 1e-1]
    rates = []
    for _ in range(20):
        rates.append([group["lr"] for group in optimiser.param_groups])
        optimiser.step()
        schedule.step()
    assert rates[2] == [1e-2, 1e-2, 1e-1] and rates[0][0] < rates[1][0] < rates[2][0]
    assert all(a[2] == pytest.approx(10 * a[0]) for a in rates)


@pytest.mark.parametrize(
    ("problem", "places", "targets"),
    [
        (Segmentation(), (2, 2), torch.full((2, 8, 8), -100)),
        (Depth(1.0, 1.0), (2, 2), torch.full((2, 8, 8), -100.0)),
        (MultiLabel(), (), torch.full((2, 3), -100.0)),
        (restuning.problems.SingleLabel(), (), torch.tensor([0, 3])),
    ],
    ids=lambda each: getattr(each, "kind", ""),
)
def test_metrics_of_labels_that_are_none_are_refused(problem, places, targets):
    # Trainer pads with -100 what differs in size between batches.
    outputs = 1 if isinstance(problem, Depth) else 3
    model = of_problem(problem, outputs)
    predicted = SimpleNamespace(predictions=torch.zeros(2, *places, outputs), label_ids=targets)
    with pytest.raises(TrainingError):
        model.compute_metrics(predicted)
