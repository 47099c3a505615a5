"""`restuning train`: a task on a frozen backbone, one method, several, or one that is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from restuning.cli.common import (
    DATA,
    FEATURES,
    METHOD,
    OPTIMISER,
    Accumulate,
    AudioColumn,
    Augment,
    BackboneName,
    BalancedSampling,
    BatchSize,
    CacheDtype,
    CachePrecision,
    CheckpointEvery,
    ClassesFile,
    ClassWeights,
    Clip,
    DataName,
    Device,
    Dimensions,
    Ema,
    Epochs,
    ImageColumn,
    Json,
    Label,
    LabelSmoothing,
    MaxTokens,
    NoReport,
    NoResume,
    Out,
    Precision,
    ProblemName,
    Quantize,
    Random,
    Rank,
    ScaledJpeg,
    Seconds,
    SkipBad,
    StoreFolder,
    Text,
    Track,
    WeightDecay,
    Weights,
    Whole,
    Workers,
    add_heading,
    command,
    complete_method,
    group,
    messages,
    option,
    show_json,
)
from restuning.cli.config import Config, read_config
from restuning.cli.results import log_to, show_choice, show_columns, show_result
from restuning.cli.speech import is_quiet

app = group("Train a task.")


@command(
    app,
    "restuning train digits",
    "restuning train photos/ --method res-tuning --backbone timm:vit_base_patch16_224",
    "restuning train reviews.csv --backbone hf:sentence-transformers/all-MiniLM-L6-v2 "
    "--text review --label verdict",
    "restuning train pets/ --backbone hf:openai/clip-vit-base-patch32 "
    "--zero-shot 'a photo of a {}, a pet.'",
    "restuning train sounds/ --backbone hf:MIT/ast-finetuned-audioset-10-10-0.4593 --method ridge",
    "restuning train photos/ --method ridge --method ensemble",
    "restuning train table.csv --image path --label species,age,tags --method ridge",
    "restuning train photos/ --method auto --memory 2GiB --minutes 10",
    "restuning train photos/ --config runs/x/settings.json --seed 1",
    "restuning train digits --method 'res-tuning[mha=prompt,ffn=adapter]' --epochs 30",
)
def train(
    data: DataName,
    augment: Augment = "none",
    final: Annotated[bool, option(DATA, "Train on train and val together", "--final")] = False,
    text: Text = "text",
    label: Label = "label",
    image: ImageColumn = None,
    audio: AudioColumn = None,
    problem: ProblemName = None,
    classes: ClassesFile = None,
    whole: Whole = False,
    scaled_jpeg: ScaledJpeg = False,
    dimensions: Dimensions = None,
    max_tokens: MaxTokens = 256,
    seconds: Seconds = None,
    skip_bad: SkipBad = False,
    workers: Workers = 0,
    backbone: BackboneName = "restuning-tiny",
    weights: Weights = None,
    random: Random = False,
    quantize: Quantize = None,
    device: Device = None,
    method: Annotated[
        list[str] | None,
        option(
            METHOD,
            "One method, or auto; several (--method A --method B) are compared, without it linear, "
            "res-tuning and res-tuning-bypass",
            autocompletion=complete_method,
        ),
    ] = None,
    memory: Annotated[
        str | None,
        option(
            METHOD,
            "Of auto: budget for everything, e.g. 2GiB. Of a method: what stored features may take in "
            "memory, larger stores are trained from in portions; default: what is free",
        ),
    ] = None,
    minutes: Annotated[float | None, option(METHOD, "Of auto: budget for the whole run")] = None,
    rank: Rank = None,
    scale: Annotated[
        str | None,
        option(METHOD, "Of tuners: none, scalar, channel, gate, exact; default: the method's"),
    ] = None,
    drop_path: Annotated[float, option(METHOD, "Chance to leave a tuner out")] = 0.0,
    pool: Annotated[
        str | None,
        option(METHOD, "Readout: cls, mean, last, own; default: as the backbone does"),
    ] = None,
    targets: Annotated[
        str | None,
        option(METHOD, "Of lora: what the maps are for, e.g. q+v, qkv+down, all; default qkv"),
    ] = None,
    alpha: Annotated[float | None, option(METHOD, "Of lora: default the rank")] = None,
    zero_shot: Annotated[
        list[str] | None,
        option(
            METHOD,
            "Start the head from class names in this prompt, e.g. 'a photo of a {}.'; "
            "more than one are averaged; or a .txt file of prompts",
        ),
    ] = None,
    class_names: Annotated[
        Path | None, option(METHOD, "File of class names for --zero-shot, a line each")
    ] = None,
    epochs: Epochs = None,
    batch_size: BatchSize | None = None,
    lr: Annotated[
        float | None,
        option(
            OPTIMISER, "Highest learning rate; default: the method's", "--lr", "--learning-rate"
        ),
    ] = None,
    lambda_rate: Annotated[
        float | None,
        option(OPTIMISER, "Of a bypass's lambdas, times lr; default: the method's, 10 or 1"),
    ] = None,
    weight_decay: WeightDecay = 1e-4,
    warmup_epochs: Annotated[float | None, option(OPTIMISER, "Default: a tenth of epochs")] = None,
    label_smoothing: LabelSmoothing = 0.0,
    class_weights: ClassWeights = None,
    balanced_sampling: BalancedSampling = False,
    precision: Precision = "no",
    accumulate: Accumulate = 1,
    clip: Clip = None,
    ema: Ema = None,
    early_stopping: Annotated[
        int | None,
        option(
            OPTIMISER, "End after so many epochs no better on validation; default: never", min=1
        ),
    ] = None,
    keep_best: Annotated[
        bool,
        option(
            OPTIMISER, "Leave the weights that were best on validation, not the last", "--keep-best"
        ),
    ] = False,
    monitor: Annotated[
        str, option(OPTIMISER, "What both of these follow: metric (accuracy, ...) or loss")
    ] = "metric",
    seed: Annotated[int, option(OPTIMISER, "Of weights, order and augmentation")] = 0,
    no_cache: Annotated[
        bool, option(FEATURES, "Run the backbone in every epoch", "--no-cache")
    ] = False,
    store: StoreFolder = None,
    cache_dtype: CacheDtype = "fp32",
    cache_precision: CachePrecision = "fp32",
    out: Out = None,
    no_resume: NoResume = False,
    checkpoint_every: CheckpointEvery = 100,
    track: Track = None,
    no_report: NoReport = False,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Train a task on a frozen backbone; several methods, or none named, are compared."""
    from restuning.backbones import add_quantization
    from restuning.features import StoreOptions
    from restuning.features.stored import BY_ITSELF
    from restuning.search import Columns, Comparison
    from restuning.search.train import train as train_tasks
    from restuning.training.defaults import COMPARED

    screen = messages(as_json)
    if config is not None and tells_only_the_end_of_a_choice(config):
        typer.echo(
            f"{config} was left by --method auto, whose run went on from the weights of a trial; "
            "this one begins anew and ends otherwise",
            err=True,
        )
    # Several columns of a table are a task each, by one method.
    unasked = ["ensemble"] if "," in label else list(COMPARED)
    names = method or unasked
    result: Any = train_tasks(
        data,
        backbone=add_quantization(backbone, quantize),
        weights=weights,
        method=names[0] if len(names) == 1 else names,
        out=out,
        device=device,
        resume=not no_resume,
        log=log_to(screen),
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        lambda_rate=lambda_rate,
        weight_decay=weight_decay,
        warmup_epochs=warmup_epochs,
        label_smoothing=label_smoothing,
        class_weights=class_weights,
        balanced_sampling=balanced_sampling,
        precision=precision,
        accumulate=accumulate,
        clip=clip,
        drop_path=drop_path,
        ema=ema,
        early_stopping=early_stopping,
        keep_best=keep_best,
        monitor=monitor,
        seed=seed,
        workers=workers,
        checkpoint_every=checkpoint_every,
        track=tuple(track or ()),
        rank=rank,
        scale=scale,
        pool=pool,
        targets=targets,
        alpha=alpha,
        augment=augment,
        final=final,
        skip_bad=skip_bad,
        text=text,
        label=label,
        image=image,
        problem=problem,
        classes=classes,
        whole=whole,
        scaled_jpeg=scaled_jpeg,
        dimensions=dimensions,
        max_tokens=max_tokens,
        audio=audio,
        seconds=seconds,
        # Up to a few GiB features are stored unasked; `restuning cache` builds larger stores.
        store=False
        if no_cache
        else StoreOptions(store, cache_dtype, cache_precision, limit=BY_ITSELF),
        random=random,
        zero_shot=zero_shot,
        class_names=class_names,
        memory=memory,
        minutes=minutes,
        report=not no_report,
        progress=not is_quiet(),
    )
    if isinstance(result, Columns):
        show_columns(result.rows(), screen)
        screen.print(add_heading("left in", str(result.folder)), soft_wrap=True)
        if as_json:
            show_json(result.metrics)
        return
    if isinstance(result, Comparison):
        rows: list[dict[str, Any]] = result.rows()
    else:
        rows = [result.row()]
        # Only `auto` has chosen anything.
        if result.choice is not None:
            show_choice(result.choice, screen)
            rows[0]["choice"] = result.choice.to_dict()
    show_result(rows, screen)
    screen.print(add_heading("left in", str(result.folder)), soft_wrap=True)
    if as_json:
        # A list only where several methods were compared.
        show_json(rows if len(names) > 1 else rows[0])


def tells_only_the_end_of_a_choice(config: Path) -> bool:
    """Whether settings are those that `auto` found, as it wrote before it wrote what it began with."""
    from restuning._files import read_json
    from restuning.search import AUTO
    from restuning.search.train import CHOICE

    choice = config.with_name(CHOICE)
    if not choice.exists() or read_config(config).get("method") == AUTO:
        return False
    return bool(read_json(choice).get("goes_on"))
