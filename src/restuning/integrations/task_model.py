"""A task and its backbone as one model that takes named inputs and labels and gives loss and logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from keyword import iskeyword
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from restuning._errors import (
    DataError,
    DivergedError,
    TrainingError,
    WrongBackboneError,
    WrongTaskError,
    warn,
)
from restuning.backbones import AnyPreprocessing, Backbone, Preprocessing
from restuning.bypass import SideNetwork
from restuning.data import TagBatch, TextBatch
from restuning.host import Extractor, Host, is_offloaded
from restuning.integrations import checkpoint
from restuning.integrations.collator import OF_LABELS, Collator, Prepare
from restuning.integrations.inputs import LABELS, blank, input_names, own_names, with_inputs
from restuning.integrations.schedule import make_optimizers
from restuning.problems import Tokens
from restuning.problems.problem import read_meters
from restuning.task import Task, Tuned, save
from restuning.training import FitSettings
from restuning.training.batch import compute_logits, keep_labelled

COLUMNS = {
    "Preprocessing": "image",
    "AudioPreprocessing": "audio",
    "TextBatch": "text",
    "TagBatch": "tokens",
}
"""What the raw input is called in a data set, as those of the hub have it, by what prepares it."""


class TaskModel(nn.Module):
    """`TaskModel(host, task)(pixel_values=x, labels=y)` gives `{"loss", "logits"}`: what Trainer trains.

    The loss is the mean over examples of the task's problem (`task.problem`): cross-entropy of classes and of
    tokens, binary cross-entropy of several labels, squared error of numbers. Without labels there are logits
    alone. Inputs have the names of the backbone's own forward (`input_ids`, `attention_mask`), images are
    `pixel_values`; the signature of `forward` names them, so that Trainer keeps these columns of a data set and
    drops the others.

    The task is a submodule and the backbone is none: `parameters()`, `state_dict()`, DDP and checkpoints are of the
    task alone, and no parameter of a wrapped model is without a gradient. `model.to(device)` moves both.
    A checkpoint says which backbone it belongs to; another one, or another task, is refused.

    Args:
        host: The frozen backbone; an engine for a task beside it.
        task: With a head; inline, bypass or LoRA. What is solved in closed form or prepared from the data is
            trained by `restuning.train` or `fit`.
        backbone: What the host was made of, for `collator` and `save`; None where neither is used.
        label_smoothing: While training, as for `fit` (0).
        class_weights: Weights of what is answered while training, as `task.problem.balance` gives them; None weighs
            all alike.

    Shape:
        logits: `b c`; `b n c` with a label for every token, `b h w c` for every place. In float32.
        labels: as `task.problem` has targets; whole numbers for floats, and `b` for `b 1`, are taken as well.

    Raises:
        WrongTaskError: The task has no head, or is one that steps do not train.
        WrongBackboneError: `backbone` is not what the host was made of.
        EngineError: The task runs inside the backbone, and that is an engine.
        TrainingError: In `forward` with labels: they are none of the problem, a weight of the backbone asks for a
            gradient, or the loss is no finite number (`DivergedError`).

    Cost: beside the forward, a wait for the device at each step, to see the loss.
    """

    def __init__(
        self,
        host: Extractor,
        task: Task,
        backbone: Backbone | None = None,
        *,
        label_smoothing: float = FitSettings.label_smoothing,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        _refuse_untrainable(task)
        if backbone is not None and backbone.model is not host and backbone.model is not host.model:
            raise WrongBackboneError(
                "the host was made of another backbone",
                where=backbone.name,
                fix="give the one that it was made of: host = backbone.host()",
            )
        self.task = task
        # In a tuple, which registers nothing: only the task is trained, wrapped and saved.
        self._tuned = (Tuned(host, task),)
        self.backbone = backbone
        self.label_smoothing = FitSettings(label_smoothing=label_smoothing).label_smoothing
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.inputs = input_names(host)
        self.main_input_name = self.inputs[0]
        self._own = own_names(host)
        self._prepared: Mapping[str, Any] | None = None
        self._base, self._names = type(self), self.inputs
        self.__class__ = with_inputs(self._base, self._names)
        self.register_state_dict_post_hook(checkpoint.complete)
        self.register_load_state_dict_pre_hook(checkpoint.check)

    @property
    def tuned(self) -> Tuned:
        """Host and task as `fit` and `evaluate` take them."""
        return self._tuned[0]

    @property
    def host(self) -> Extractor:
        """The frozen backbone."""
        return self.tuned.host

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether Trainer shall say how many targets a step has: where an example has one, that is the examples."""
        return self.task.problem.one_hot and self.task.pool not in ("all", "grid")

    def forward(
        self,
        *,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """Logits of one batch, and the loss where there are labels.

        Args:
            labels: Targets; None for logits alone.
            num_items_in_batch: Examples that the loss is divided by; None for those of this batch. Trainer
                gives those of all pieces and processes of a step.
            inputs: By name; None says nothing.

        Raises:
            DataError: The backbone takes no input of that name.
            TrainingError: See the class.
        """
        training = self.training and torch.is_grad_enabled()
        if training:
            self._begin()
        logits = self._answer({n: value for n, value in inputs.items() if value is not None})
        if labels is None:
            return {"logits": logits}
        problem, targets = self.task.problem, self.targets_of(labels, logits)
        problem.check_targets(targets, logits.shape[-1])
        smoothing = self.label_smoothing if self.training else 0.0
        weights = self.class_weights if self.training else None
        if isinstance(weights, Tensor):
            loss = problem.weighted_loss(logits, targets, weights, smoothing)
        else:
            loss = problem.loss(logits, targets, smoothing)
        # Of several targets an example the number says nothing of examples.
        count = num_items_in_batch if targets.ndim == 1 else None
        loss = loss / (len(targets) if count is None else count)
        if training and not bool(loss.detach().isfinite().all()):
            # Trainer leaves such a loss out of its mean, and goes on.
            raise _divergence_error(float(loss.detach().sum()))
        return {"loss": loss, "logits": logits}

    def name_batch(self, batch: Any) -> dict[str, Any]:
        """A batch as `forward` takes it: a mapping as it is, `(inputs, labels)` by name, inputs alone without labels.

        Args:
            batch: A mapping by name; a pair of a tensor (or such a mapping) and labels, as restuning's data sets
                give; a tensor, alone or in a tuple.

        Raises:
            DataError: It is another tuple.
        """
        if isinstance(batch, Mapping):
            return dict(batch)
        parts = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
        if len(parts) not in (1, 2):
            raise DataError(
                "a batch is not inputs and labels",
                found=f"{len(parts)} parts",
                fix="let the data set yield (input, label), or a mapping by name",
            )
        inputs, labels = (*parts, None)[:2]
        named = dict(inputs) if isinstance(inputs, Mapping) else {self.inputs[0]: inputs}
        return named if labels is None else {**named, LABELS: labels}

    def targets_of(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Labels in the type and shape that the problem has: floats of whole numbers, `b 1` of `b`.

        What cannot be meant so stays as it is, for `task.problem.check_targets` to refuse.
        """
        form = self.task.problem.stand_in(logits.detach()[:1])
        if form.is_floating_point() or not labels.is_floating_point():
            labels = labels.to(form.dtype)
        if form.ndim == 2 and form.shape[1] == 1 and labels.ndim == 1:
            labels = labels.unsqueeze(1)
        return labels

    def compute_metrics(self, predicted: Any) -> dict[str, float]:
        """The metrics of the task's problem, for Trainer's `compute_metrics`; without those that are not defined.

        Args:
            predicted: With `predictions` (logits) and `label_ids`, as Trainer's `EvalPrediction`.

        Raises:
            TrainingError: They are none of the problem, as Trainer pads them where batches differ in size.
        """
        logits = torch.as_tensor(predicted.predictions).float()
        targets = self.targets_of(torch.as_tensor(predicted.label_ids), logits)
        self.task.problem.check_targets(targets, logits.shape[-1])
        meters = self.task.problem.metrics(logits.shape[-1])
        meters.update(*keep_labelled(logits, targets))
        return {name: value for name, value in read_meters(meters).items() if value is not None}

    def optimizers(self, steps: int, **settings: Any) -> tuple[AdamW, LambdaLR]:
        """The optimiser and schedule of `fit`, for `Trainer(optimizers=...)`.

        Trainer's own AdamW is of one rate, with the decay of `TrainingArguments`, and may be used as well.

        Args:
            steps: Optimiser steps of the whole run.
            settings: `lr`, `weight_decay`, `lambda_rate` and `warmup` (a share of the steps), as for `FitSettings`.

        Raises:
            TrainingError: A value is out of its range.
        """
        return make_optimizers(self.task, steps, **settings)

    def collator(
        self, column: str | None = None, *, preprocessing: Prepare | None = None
    ) -> Collator:
        """A collator of images, sounds, texts or tagged words as the backbone wants them, for `data_collator`.

        Trainer is told to keep `column` of a data set. What `save` writes is then how this prepares inputs.

        Args:
            column: Where an example that is a mapping has its input; None for "image", "audio", "text", or
                "tokens" of tagged words.
            preprocessing: Another one than the backbone's own; of texts a `TextBatch`.

        Raises:
            DataError: The backbone does not say how its inputs are prepared, or none was given; Trainer cannot be
                told of a column of this name.
        """
        backbone = self._require_backbone("a collator")
        prepare = preprocessing
        if prepare is None and backbone.tokenizer is not None:
            tagged = isinstance(self.task.problem, Tokens)
            prepare = (TagBatch if tagged else TextBatch)(backbone.tokenizer)
        elif prepare is None:
            prepare = self._own_preprocessing(backbone)
        if prepare is None:
            raise DataError(
                "nothing says how inputs are prepared",
                where=backbone.name,
                fix="give preprocessing=restuning.backbones.Preprocessing(...)",
            )
        usual = COLUMNS[type(prepare).__name__]
        column = usual if column is None else column
        if not column.isidentifier() or iskeyword(column) or column in OF_LABELS:
            raise DataError(
                "a column of this name cannot be read",
                where=repr(column),
                found="a name of labels" if column in OF_LABELS else "no name of an argument",
                fix="rename it, such as data.rename_column(old, new)",
            )
        self._prepared = prepare.to_dict()
        self._names = (*self.inputs, column)
        self.__class__ = with_inputs(self._base, self._names)
        return Collator(prepare, column, self.inputs[0])

    def save(self, folder: str | Path, *, results: Mapping[str, Any] | None = None) -> Path:
        """Write the task as `restuning.save` does: a folder that `Predictor` opens.

        Args:
            folder: By habit `NAME.task`.
            results: Figures for the model card.

        Raises:
            DataError: The model was made without `backbone`.
            RestuningError: As `restuning.save`.

        Warns:
            RestuningWarning: No collator was made, so that inputs are taken to be prepared as the backbone's own.
        """
        backbone = self._require_backbone("a task folder")
        prepared = self._prepared
        if prepared is None:
            own = self._own_preprocessing(backbone)
            prepared = {} if own is None else own.to_dict()
            warn(
                "a task is saved that does not say how its inputs were prepared",
                where=str(folder),
                found="no collator of this model",
                fix="answers are right if they were prepared as the backbone's own; train with "
                "data_collator=model.collator()",
            )
        return save(
            self.task,
            self.host,
            folder,
            backbone=backbone.name,
            weights=backbone.weights_file,
            preprocessing=prepared,
            results=results,
        )

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Compute the blocks of the backbone again in the backward pass (`Host.checkpoint`), as Trainer asks for it.

        Of a task beside the backbone nothing is kept that could be computed again, so nothing is done.

        Args:
            activation_checkpointing_kwargs: None, or `{"use_reentrant": False}`.
            every_n_layers: 1.
            offload: False.

        Raises:
            TrainingError: Something else is asked for.
        """
        asked = {
            **(activation_checkpointing_kwargs or {}),
            **({} if every_n_layers == 1 else {"every_n_layers": every_n_layers}),
            **({"offload": offload} if offload else {}),
        }
        asked = {n: value for n, value in asked.items() if (n, value) != ("use_reentrant", False)}
        if asked:
            raise TrainingError(
                "blocks are checkpointed in one way",
                where="gradient checkpointing",
                found=", ".join(f"{name}={value!r}" for name, value in asked.items()),
                fix='leave it out, or give {"use_reentrant": False}: the reentrant form loses the gradients of tuners',
            )
        if isinstance(self.host, Host) and self._inside:
            self.host.checkpoint()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        """The same under the name of Trainers before 5.20."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **more)

    def gradient_checkpointing_disable(self) -> None:
        """Keep the activations of all blocks again."""
        if isinstance(self.host, Host):
            self.host.checkpoint(False)

    @property
    def _inside(self) -> bool:
        return bool(self.task.inline_tuners or len(self.task.weights))

    def _answer(self, inputs: dict[str, Any]) -> Tensor:
        unknown = [name for name in inputs if name not in self.inputs]
        if unknown or not inputs:
            raise DataError(
                "a batch is not what the backbone takes",
                found=", ".join(unknown) or "no input",
                fix=f"give inputs by name: {', '.join(self.inputs)}",
            )
        if raw := [name for name, value in inputs.items() if isinstance(value, str | list | tuple)]:
            raise DataError(
                "a batch was not made into tensors",
                where=raw[0],
                found=type(inputs[raw[0]]).__name__,
                fix="give the loader collate_fn=model.collator() (Trainer: data_collator)",
            )
        # The first one by its place where the backbone has another name for it, or none.
        first = self.inputs[0]
        given = (inputs.pop(first),) if first in inputs and first not in self._own else ()
        return compute_logits(partial(self.tuned, *given), inputs)

    def _begin(self) -> None:
        """What holds whenever a step is trained."""
        if isinstance(self.host, Host):
            _refuse_trained(self.host.model)
        task = self.task
        # Fitted to answers of other weights.
        if task.temperature != 1:
            task.temperature = 1.0
        plain = task.problem.without_errors()
        if plain is not task.problem and plain != task.problem:
            task.problem = plain

    def _own_preprocessing(self, backbone: Backbone) -> AnyPreprocessing | None:
        own = backbone.preprocessing
        # Where every place is answered nothing may be cut off.
        if isinstance(own, Preprocessing) and self.task.problem.pool == "grid":
            return own.whole()
        return own

    def _require_backbone(self, purpose: str) -> Backbone:
        if self.backbone is None:
            raise DataError(
                f"{purpose} needs the backbone that the host was made of",
                fix=f"make the model with it: {type(self).__name__}(host, task, backbone)",
            )
        return self.backbone

    def __reduce__(self) -> tuple[Any, ...]:
        """By the class that was written, and the names of inputs."""
        return blank, (self._base, self._names), self.__dict__

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TaskModel:
        """Moves and casts reach the backbone as well, unless its weights are kept elsewhere."""
        super()._apply(fn, recurse)
        if not is_offloaded(self.host.model):
            self.host._apply(fn, recurse)
        return self

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise TrainingError(
            "DataParallel cannot run a backbone with hooks",
            found=f"{torch.cuda.device_count()} GPUs in one process",
            fix="start a process for each GPU (torchrun, accelerate launch), or show one: CUDA_VISIBLE_DEVICES=0",
        )


def _refuse_untrainable(task: Task) -> None:
    """Refuse a task that steps on a loss of its head do not train.

    Raises:
        WrongTaskError: It is one.
    """
    side = task.side
    if task.head is None:
        raise WrongTaskError(
            "a task without a head has no answers to be trained",
            where=task.method,
            fix="give it a head: methods.build(..., num_classes=...)",
        )
    kind: Any = type(side)
    prepares = side is not None and (
        kind.prepare is not SideNetwork.prepare or kind.conclude is not SideNetwork.conclude
    )
    if task.solved or prepares:
        raise WrongTaskError(
            "such a task is not trained by steps alone",
            where=task.method,
            found=f"{kind.__name__} is {'solved' if task.solved else 'prepared'} from the whole training split",
            fix=f'use restuning.train(..., method="{task.method}") or restuning.fit',
        )


def _refuse_trained(model: nn.Module) -> None:
    """Refuse a backbone of which a weight asks for a gradient.

    Raises:
        TrainingError: One does.
    """
    asking = [name for name, p in model.named_parameters() if p.requires_grad]
    if asking:
        raise TrainingError(
            "weights of a frozen backbone ask for gradients",
            where=asking[0],
            found=f"{len(asking)} parameters with requires_grad",
            fix="model.host.model.requires_grad_(False); to train weights of it, build the task with the method "
            '"full" or "bitfit"',
        )


def _divergence_error(loss: float) -> DivergedError:
    return DivergedError(
        "training diverged",
        found=f"a loss that is not finite: {loss:.4g}",
        fix="lower the learning rate, clip gradients (max_grad_norm=1.0, gradient_clip_val=1.0), or look for NaN "
        "in the data; go on from the last checkpoint",
    )
