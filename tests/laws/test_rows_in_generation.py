"""A task for every input, where `generate()`, a pipeline or a backbone makes several rows of each input."""

import pytest
import torch

from diffusion.small import sampled, stable_diffusion, unet
from restuning import Host, PerRow, RestuningError, methods
from restuning._errors import PlacementError, TunerShapeError, WrongTaskError
from zoo.language import ALL, batch, example, texts

BATCHED = 2e-4
"""Products of fewer rows round otherwise, and steps of sampling add that up; tasks differ by far more."""
STRATEGIES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams without cache": {"num_beams": 2, "use_cache": False},
    "returned beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled": {"do_sample": True, "num_return_sequences": 3},
    "sampled beams": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
}
METHODS = ["res-tuning", "res-tuning-bypass"]


@pytest.fixture(
    scope="module", params=["gpt2", pytest.param("llama", marks=pytest.mark.slow), "t5"]
)
def member(request):
    model = ALL[request.param].make()
    return model, Host(model, **example(ALL[request.param]))


def tasks_of(host, method, count=2, strength=0.8, **options):
    tasks = [methods.build(method, host, **options).eval() for _ in range(count)]
    for seed, task in enumerate(tasks):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in task.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator) * strength)
    return tasks


def written(model, host, task, rows, **how):
    """Tokens, a row a sequence, and the logits that they were chosen from, a row a beam."""
    given = batch(model, rows, "left")
    torch.manual_seed(5)
    with host.using(task):
        found = model.generate(
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            max_new_tokens=5,
            min_new_tokens=5,
            return_dict_in_generate=True,
            output_logits=True,
            **{"do_sample": False, **how},
        )
    return found.sequences, torch.stack(found.logits, 1)


def of_their_own(alone):
    """Of each input the rows that its task gave, from the same batch under each task."""
    inputs = 4
    for answers in zip(*alone, strict=True):
        each = [answer.unflatten(0, (inputs, -1)) for answer in answers]
        yield torch.stack([each[i % len(alone)][i] for i in range(inputs)]).flatten(0, 1)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", METHODS)
def test_all_rows_of_an_input_are_answered_by_its_task(member, method, strategy):
    model, host = member
    how, rows = STRATEGIES[strategy], texts((6, 4, 5, 6))
    first, second = tasks_of(host, method)
    alone = [written(model, host, task, rows, **how) for task in (first, second)]
    assert not torch.equal(alone[0][1], alone[1][1])
    both = written(model, host, PerRow([first, second]), rows, **how)
    (tokens, logits), (wanted, close) = both, of_their_own(alone)
    assert torch.equal(tokens, wanted)
    assert (logits - close).abs().max() < BATCHED
    if "num_beams" in how and not model.config.is_encoder_decoder:
        # Bit for bit, or of two equal beams the other would win.
        assert torch.equal(logits, close)


def test_two_tasks_may_be_asked_the_same_and_one_may_be_none(member):
    model, host = member
    (task,) = tasks_of(host, "res-tuning", 1)
    rows = texts((5,)) * 4
    alone = [written(model, host, each, rows, num_beams=2) for each in (task, None)]
    both = written(model, host, PerRow([task, None]), rows, num_beams=2)
    assert all(map(torch.equal, both, of_their_own(alone)))


@pytest.mark.parametrize(("inputs", "beams"), [(1, 2), (3, 2), (1, 4), (3, 4)])
def test_inputs_that_do_not_divide_among_the_tasks_are_refused_however_many_rows_there_are(
    member, inputs, beams
):
    model, host = member
    for method in ("res-tuning", "res-tuning-bypass"):
        with pytest.raises(TunerShapeError, match="divide"):
            written(
                model,
                host,
                PerRow(tasks_of(host, method)),
                texts((4,) * inputs),
                num_beams=beams,
            )


def test_a_gate_over_tokens_reads_the_padding_of_its_own_rows(member):
    model, host = member
    rows = texts((6, 3, 5, 2))
    tasks = tasks_of(host, "res-tuning", scale="gate")
    how = {"num_beams": 2, "use_cache": False}
    alone = [written(model, host, task, rows, **how) for task in tasks]
    both = written(model, host, PerRow(tasks), rows, **how)
    assert all(map(torch.equal, both, of_their_own(alone)))
    # Without beams rows are cut, and the mask must be cut alike.
    given = batch(model, rows, "left")
    given |= {"decoder_input_ids": torch.full((4, 3), 5)} if model.config.is_encoder_decoder else {}

    def logits(task):
        with torch.no_grad(), host.using(task):
            return model(**given).logits

    together = logits(PerRow(tasks))
    for row in range(4):
        assert torch.allclose(together[row], logits(tasks[row % 2])[row], atol=BATCHED)


def test_a_model_s_own_generate_around_the_common_one_is_refused(member, monkeypatch):
    model, host = member
    namespace = {"__name__": "transformers.models.whisper.generation_whisper"}
    exec("def generate(call):\n    return call()", namespace)  # noqa: S102
    task = PerRow(tasks_of(host, "res-tuning"))
    with pytest.raises(WrongTaskError, match="whisper"):
        namespace["generate"](lambda: written(model, host, task, texts((4, 5)), num_beams=2))


@pytest.mark.parametrize(
    ("prompts", "images", "owners"),
    [
        (["a red ball", "a blue box"], 2, [0, 0, 1, 1]),
        (["a red ball"], 2, [0, 1]),
        (["a red ball", "a blue box"], 1, [0, 1]),
    ],
)
def test_images_of_a_prompt_belong_to_its_task_and_those_of_one_prompt_to_one_each(
    tmp_path, prompts, images, owners
):
    pytest.importorskip("diffusers")
    pipeline, case = stable_diffusion(tmp_path), unet()
    host = Host(pipeline.unet, *case.args, **case.kwargs)
    for method in ("res-tuning-bypass", "res-tuning[mha=adapter,ffn=adapter]"):
        tasks = tasks_of(host, method, strength=0.1)
        made = []
        for task in (*tasks, PerRow(tasks)):
            with host.using(task):
                made.append(sampled(pipeline, prompts, num_images_per_prompt=images))
        for row, owner in enumerate(owners):
            assert (made[2][row] - made[owner][row]).abs().max() < BATCHED
            assert (made[2][row] - made[1 - owner][row]).abs().max() > 10 * BATCHED


def test_images_that_cannot_be_shared_out_by_prompts_are_refused(tmp_path):
    pytest.importorskip("diffusers")
    pipeline, case = stable_diffusion(tmp_path), unet()
    host = Host(pipeline.unet, *case.args, **case.kwargs)
    tasks = tasks_of(host, "res-tuning-bypass", 3)
    with (
        pytest.raises(RestuningError, match="2 images of each of 2 prompts"),
        host.using(PerRow(tasks)),
    ):
        sampled(pipeline, ["a red ball", "a blue box"], num_images_per_prompt=2)


FOLDED = {
    "mobilevit_xxs": {},
    "samvit_base_patch16": {
        "img_size": 64,
        "depth": 2,
        "embed_dim": 48,
        "num_heads": 4,
        "window_size": 2,
    },
}


@pytest.mark.parametrize("name", FOLDED)
def test_windows_of_an_input_are_no_inputs_and_are_refused(name):
    timm = pytest.importorskip("timm")
    model, images = (
        timm.create_model(name, num_classes=3, **FOLDED[name]),
        torch.randn(4, 3, 64, 64),
    )
    host = Host(model, images[:1])
    with (
        pytest.raises(PlacementError, match="cannot be told apart"),
        host.using(PerRow(tasks_of(host, "res-tuning"))),
    ):
        model(images)


def test_windows_that_are_put_together_again_before_the_sum_keep_their_rows():
    timm = pytest.importorskip("timm")
    settings = {"img_size": 56, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 24}
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **settings)
    images = torch.randn(4, 3, 56, 56)
    host = Host(model, images[:1])
    tasks, answers = tasks_of(host, "res-tuning", strength=0.2), []
    with torch.no_grad():
        for task in (*tasks, PerRow(tasks)):
            with host.using(task):
                answers.append(model(images))
    for row in range(4):
        assert torch.allclose(answers[2][row], answers[row % 2][row], atol=BATCHED)
        assert not torch.allclose(answers[2][row], answers[1 - row % 2][row], atol=10 * BATCHED)
