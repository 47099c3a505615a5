"""A task as a LightningModule: steps, optimiser, metrics by its problem, checkpoints of the task alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from restuning._errors import TrainingError, require
from restuning.backbones import Backbone
from restuning.host import Extractor
from restuning.integrations.inputs import LABELS
from restuning.integrations.schedule import WARMUP, make_optimizers
from restuning.integrations.task_model import TaskModel
from restuning.problems.problem import read_meters
from restuning.task import Task
from restuning.training import FitSettings
from restuning.training.batch import keep_labelled

if TYPE_CHECKING:
    from lightning import LightningModule
else:
    LightningModule = require(
        "lightning", "lightning", "restuning.integrations.lightning"
    ).LightningModule


class TaskModule(LightningModule):
    """`lightning.Trainer().fit(TaskModule(host, task), loader)` trains the task; the backbone stays what it is.

    Batches are `(inputs, labels)`, as restuning's data sets and their collate give them, or mappings by name
    (`TaskModel`, `Collator`). Logged are `train_loss`, and of validation and test `loss` and the metrics of the
    task's problem: `val_accuracy`, `test_r2`. `predict` gives probabilities, or numbers in their units.

    A checkpoint holds the task, the optimiser and what Lightning adds; another task or another backbone is
    refused when it is loaded. In several processes losses and metrics are of all of them.

    Args:
        host: The frozen backbone, as for `TaskModel`.
        task: Likewise.
        backbone: Likewise.
        lr: Highest learning rate; this and what follows with the defaults of `FitSettings`.
        weight_decay: Of matrices.
        lambda_rate: What multiplies the rate of the lambdas of a bypass.
        warmup: Share of all steps in which the rate rises; then it falls by half a cosine.
        label_smoothing: While training.
        class_weights: While training, as for `TaskModel`.

    Raises:
        WrongTaskError: As `TaskModel`.
        TrainingError: A value is out of its range; in steps as `TaskModel.forward`.
    """

    def __init__(
        self,
        host: Extractor,
        task: Task,
        backbone: Backbone | None = None,
        *,
        lr: float = FitSettings.lr,
        weight_decay: float = FitSettings.weight_decay,
        lambda_rate: float = FitSettings.lambda_rate,
        warmup: float = WARMUP,
        label_smoothing: float = FitSettings.label_smoothing,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        FitSettings(lr=lr, weight_decay=weight_decay, lambda_rate=lambda_rate)
        self.save_hyperparameters("lr", "weight_decay", "lambda_rate", "warmup", "label_smoothing")
        self.model = TaskModel(
            host, task, backbone, label_smoothing=label_smoothing, class_weights=class_weights
        )
        # By the name that Lightning's search for a rate sets.
        self.lr, self.weight_decay, self.lambda_rate, self.warmup = (
            lr,
            weight_decay,
            lambda_rate,
            warmup,
        )
        # Not a submodule: what metrics have counted is none of the task's state.
        self._meters: list[Any] = []

    @property
    def task(self) -> Task:
        """What is trained."""
        return self.model.task

    def forward(self, **inputs: Any) -> Tensor:
        """Logits of inputs by name."""
        return self.model(**inputs)["logits"]

    def training_step(self, batch: Any, _number: int) -> Tensor:
        """The loss of a batch."""
        named = self._labelled(batch)
        loss = self.model(**named)["loss"]
        self.log("train_loss", loss, prog_bar=True, batch_size=len(named[LABELS]))
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW over the task's groups, with warm-up and half a cosine over all steps (`make_optimizers`)."""
        # Infinite where nothing says when the run ends, which is refused.
        steps: Any = self.trainer.estimated_stepping_batches
        optimiser, schedule = make_optimizers(
            self.task,
            steps,
            lr=self.lr,
            weight_decay=self.weight_decay,
            lambda_rate=self.lambda_rate,
            warmup=self.warmup,
        )
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }

    def on_validation_epoch_start(self) -> None:
        """Begin to count."""
        self._open_meters()

    def validation_step(self, batch: Any, _number: int) -> None:
        """Count a batch."""
        self._count(batch, "val")

    def on_validation_epoch_end(self) -> None:
        """Log what was counted."""
        self._tell_meters("val")

    def on_test_epoch_start(self) -> None:
        """Begin to count."""
        self._open_meters()

    def test_step(self, batch: Any, _number: int) -> None:
        """Count a batch."""
        self._count(batch, "test")

    def on_test_epoch_end(self) -> None:
        """Log what was counted."""
        self._tell_meters("test")

    def predict_step(self, batch: Any, _number: int) -> Tensor:
        """Probabilities, or numbers in their units; labels of the batch are not looked at."""
        named = self.model.name_batch(batch)
        named.pop(LABELS, None)
        return self.task.values(self.model(**named)["logits"])

    def save(self, folder: str | Path, **options: Any) -> Path:
        """Write the task as a folder that `Predictor` opens; see `TaskModel.save`."""
        return self.model.save(folder, **options)

    def _labelled(self, batch: Any) -> dict[str, Any]:
        named = self.model.name_batch(batch)
        if named.get(LABELS) is None:
            raise TrainingError(
                "a batch has no labels",
                found=", ".join(named),
                fix="let the loader give (inputs, labels), or a mapping with labels; trainer.predict needs none",
            )
        return named

    def _open_meters(self) -> None:
        assert self.task.head is not None
        self._meters = [self.task.problem.metrics(self.task.head.out_features).to(self.device)]

    def _count(self, batch: Any, split: str) -> None:
        named = self._labelled(batch)
        told = self.model(**named)
        logits = told["logits"]
        targets = self.model.targets_of(named[LABELS], logits)
        self._meters[0].update(*keep_labelled(logits, targets))
        self.log(f"{split}_loss", told["loss"], batch_size=len(targets), sync_dist=True)

    def _tell_meters(self, split: str) -> None:
        (meters,) = self._meters
        if self.trainer.world_size > 1:
            for meter in meters.values():
                meter.sync(distributed_available=lambda: True)
        found = read_meters(meters)
        self._meters = []
        # One that is not defined on what it was shown is not logged, as no number says so.
        figures = {f"{split}_{name}": value for name, value in found.items() if value is not None}
        main = f"{split}_{self.task.problem.metric}"
        for name, value in figures.items():
            # All have the same value by now; Lightning warns where it is not told to see to that.
            self.log(name, torch.tensor(value), prog_bar=name == main, sync_dist=True)
