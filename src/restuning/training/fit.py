"""`fit`: train a task, in one process or several, to the end, whatever interrupts it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, is_initialized
from torch import nn

from restuning._errors import TrainingError
from restuning.host import is_offloaded
from restuning.training.checkpoint import is_finished
from restuning.training.interrupts import Interrupts, short_of_memory
from restuning.training.log import Bar, check_trackers, finish_trackers, start_trackers
from restuning.training.loop import Loop
from restuning.training.prepare import prepare_tuned
from restuning.training.randomness import own_randomness
from restuning.training.settings import FitResult, FitSettings


def fit(
    tuned: nn.Module,
    train: Any,
    val: Any = None,
    *,
    settings: FitSettings | None = None,
    out: str | Path,
    collate: Callable | None = None,
    resume: bool = True,
    progress: bool | Literal["force"] = True,
    stop: Callable[[list[dict[str, Any]]], bool] | None = None,
) -> FitResult:
    """Train `tuned.task` and leave it in eval mode with its final weights.

    Killed at any moment and started again with the same arguments, it goes on from its last
    checkpoint and ends with the same weights as if it had not been; a finished run returns its
    result at once. A side network that wants to see the split before the first step
    (`SideNetwork.prepare`: `ridge` is solved there) is shown it. Under `accelerate launch` every process takes its share of each batch.

    `out` receives `log.jsonl`, `curves.png` and `checkpoints/`, the last holding one small file
    once the run is finished.

    Args:
        tuned: A module with `.task` (what is trained) and `.host`.
        train: Map-style data set of `(input, label)`; a dict input is called by keyword.
        val: As `train`; evaluated after every epoch and never used to choose a checkpoint.
        settings: None for the defaults.
        out: The run's folder.
        collate: Makes a batch of a list of examples.
        resume: False starts over and forgets what the folder holds.
        progress: A bar: True on a terminal only, "force" always.
        stop: Shown `FitResult.history` after each epoch; true ends the run there. It must follow from
            the history alone, or a resumed run may end elsewhere.

    Raises:
        TrainingError: A side network has to be prepared, and the inputs change each time they are
            read (random augmentation); the loss became NaN or infinite, the folder belongs to a run with other
            settings, the disk is full, memory is short, or there is nothing to train.
        KeyboardInterrupt: Ctrl-C; a checkpoint was written first.
        SystemExit: SIGTERM, likewise.
    """
    settings = FitSettings() if settings is None else settings
    out = Path(out)
    _check(tuned, train, val, settings)
    with (
        accelerated(settings.precision, out, settings.track) as accelerator,
        own_randomness(),
        Interrupts() as interrupts,
    ):
        own_forward = "forward" in vars(tuned)
        model = _placed(tuned, accelerator)
        try:
            if not (resume and is_finished(out / "checkpoints")):
                train, collate = prepare_tuned(tuned, train, collate)
            loop = Loop(
                tuned, model, train, val, settings, out, collate, accelerator, interrupts, stop
            )
            finished = loop.open(resume)
            if finished is None:
                start_trackers(accelerator, settings, out)
                show = progress if accelerator.is_main_process else False
                bar = Bar(loop.order.total, settings.epochs, show)
                try:
                    finished = loop.run(bar)
                finally:
                    finish_trackers(accelerator)
        except torch.OutOfMemoryError as error:
            raise short_of_memory(error, settings) from None
        finally:
            # Undoes the autocast that Accelerate puts around the caller's own forward.
            accelerator.unwrap_model(model, keep_fp32_wrapper=False)
            if not own_forward:
                # It leaves a bound method behind, which a copy of the module would share.
                vars(tuned).pop("forward", None)
            tuned.zero_grad(set_to_none=True)
            tuned.eval()
        # One that came after the last step must not be swallowed.
        interrupts.stop()
    return finished


def _placed(tuned: nn.Module, accelerator: Accelerator) -> nn.Module:
    """On its device and wrapped; a backbone whose weights are kept elsewhere stays where it is."""
    model = getattr(getattr(tuned, "host", None), "model", None)
    if not isinstance(model, nn.Module) or not is_offloaded(model):
        return accelerator.prepare_model(tuned)
    tuned.task.to(accelerator.device)  # type: ignore[operator, union-attr]
    return accelerator.prepare_model(tuned, device_placement=False)


@contextmanager
def accelerated(precision: str, out: Path, track: Sequence[str] = ()) -> Iterator[Accelerator]:
    """Accelerate for one run; the next one may want another precision."""
    ours = not is_initialized()
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=list(track) or None,
            project_dir=str(out),
            # The backbone is frozen, so its buffers are equal already.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except (ValueError, RuntimeError) as error:
        if ours:
            AcceleratorState._reset_state()
        raise TrainingError(
            "Accelerate cannot start",
            where=f"precision={precision!r}",
            found=str(error).splitlines()[0][:300],
            fix='choose precision="no" or "bf16", or another device',
        ) from None
    try:
        if precision == "fp16" and accelerator.device.type == "cpu":
            # torch would run it, but without the scaling that keeps small gradients above zero.
            raise TrainingError(
                "fp16 trains on GPUs only",
                found="device cpu",
                fix='choose precision="bf16" or "no"',
            )
        yield accelerator
    finally:
        # Its precision is one per process for ever; a second fit may want another.
        if ours:
            AcceleratorState._reset_state()


def _check(tuned: nn.Module, train: Any, val: Any, settings: FitSettings) -> None:
    check_trackers(settings.track)
    if not isinstance(getattr(tuned, "task", None), nn.Module):
        raise TrainingError(
            "fit trains a module with a task",
            found=type(tuned).__name__,
            fix="give it Tuned(host, task)",
        )
    for name, data in (("training", train), ("validation", val)):
        if data is not None and not hasattr(data, "__len__"):
            raise TrainingError(
                f"the {name} data must be map-style",
                found=f"{type(data).__name__} has no length",
                fix="give a data set with __len__ and __getitem__",
            )
    if len(train) == 0:
        raise TrainingError("there is nothing to train on", found="an empty data set")
    if val is not None and len(val) == 0:
        raise TrainingError(
            "the validation data are empty", fix="give some, or none at all (val=None)"
        )
