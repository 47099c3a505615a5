"""Trainer trains on texts, tagged words and sounds as they are, and the task answers as a predictor."""

import pytest
import torch

import restuning
from loops import trainer
from restuning import evaluate, methods
from restuning.data import TagBatch
from restuning.integrations.transformers import TaskModel
from restuning.problems import Tokens

pytest.importorskip("transformers")
import sounds  # noqa: E402 (needs transformers)
from zoo import folders  # noqa: E402

ROUNDING = 1e-5
"""Batches are padded to other lengths: sums over other numbers of zeros."""
TEXTS = [("a good film", 1), ("a very bad film", 0), ("good", 1), ("to the bad bad film", 0)] * 3
TAGGED = [
    (["ann", "and", "bob", "in", "paris"], [1, 0, 1, 0, 2]),
    (["berlin"], [2]),
    (["to", "the", "film"], [0, 0, 0]),
]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return restuning.load_backbone(f"hf:{folders.bert(tmp_path_factory.mktemp('bert'))}")


def test_texts_are_read_by_the_collator_and_the_saved_task_reads_them_alike(backbone, tmp_path):
    host = backbone.host()
    task = methods.build("lora", host, num_classes=2, rank=4)
    task.labels = ["bad", "good"]
    model = TaskModel(host, task, backbone)
    rows = [{"review": text, "label": label} for text, label in TEXTS]
    collate = model.collator("review")
    more = {"data_collator": collate, "compute_metrics": model.compute_metrics}
    arguments = {"learning_rate": 1e-2, "num_train_epochs": 30}
    told = trainer(model, tmp_path, rows, more=more, **arguments)
    told.train()
    assert told.evaluate(rows)["eval_accuracy"] == 1
    predictor = restuning.Predictor.load(model.save(tmp_path / "reviews.task"))
    assert [a.label for a in predictor(["a very good film", "bad"])] == ["good", "bad"]


def test_tagged_words_of_several_lengths_are_counted_as_evaluate_counts_them(backbone, tmp_path):
    host = backbone.host()
    torch.manual_seed(0)
    task = methods.build("linear", host, num_classes=3, pool="all")
    task.problem = Tokens()
    model = TaskModel(host, task, backbone)
    rows = [{"tokens": words, "labels": tags} for words, tags in TAGGED]
    more = {"data_collator": model.collator(), "compute_metrics": model.compute_metrics}
    # One row a batch: each has another length.
    told = trainer(model, tmp_path, rows, more=more, per_device_eval_batch_size=1)
    figures = told.evaluate(rows)
    wanted = evaluate(model.tuned, TAGGED, 1, TagBatch(backbone.tokenizer))
    assert wanted["count"] == 9
    assert figures["eval_accuracy"] == pytest.approx(wanted["accuracy"])
    before = told.predict(rows).metrics["test_loss"]
    told.train()
    assert told.predict(rows).metrics["test_loss"] < before


def test_sounds_are_read_by_the_collator_and_the_saved_task_hears_them_alike(tmp_path):
    pytest.importorskip("soundfile")
    heard = restuning.load_backbone(f"hf:{sounds.save('wav2vec2', tmp_path / 'model')}")
    host = heard.host()
    task = methods.build("linear", host, num_classes=2)
    model = TaskModel(host, task, heard)
    files = sorted(sounds.folder(tmp_path / "sounds", each=2).glob("*/*.wav"))
    collate = model.collator()
    batch = collate([{"audio": file, "label": k % 2} for k, file in enumerate(files)])
    logits = model.eval()(**batch)["logits"].detach()
    answers = restuning.Predictor.load(model.save(tmp_path / "pitch.task"))(files)
    for row, answer in zip(logits, answers, strict=True):
        wanted = row.softmax(-1)
        torch.testing.assert_close(
            answer["pitch"].probabilities, wanted, atol=ROUNDING, rtol=ROUNDING
        )
