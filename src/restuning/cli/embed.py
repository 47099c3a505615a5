"""`restuning embed` and `restuning search`: vectors of inputs, and the inputs nearest to a question."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from restuning.cli.common import (
    FEATURES,
    OUTPUT,
    AudioColumn,
    BackboneName,
    CacheDtype,
    CachePrecision,
    Device,
    ForwardBatch,
    ImageColumn,
    Json,
    Label,
    Quantize,
    Random,
    ScaledJpeg,
    Seconds,
    SkipBad,
    StoreFolder,
    Text,
    Weights,
    command,
    group,
    messages,
    option,
    show_json,
    show_rows,
)
from restuning.cli.results import log_to

app = group("Use a backbone's features as they are.")


@command(
    app,
    "restuning embed photos/ --backbone timm:vit_small_patch14_dinov2 --out photos.npy",
    "restuning embed photos/ --normalize --out photos.parquet",
    "restuning embed reviews.csv --text review --backbone hf:sentence-transformers/all-MiniLM-L6-v2 --out reviews.npy",
)
def embed(
    data: Annotated[
        str, typer.Argument(help="A folder of images, a file of texts, or data as for train")
    ],
    out: Annotated[
        Path, option(OUTPUT, "FILE.npy, with FILE.ids.json beside it, or FILE.parquet", "--out")
    ],
    skip_bad: SkipBad = False,
    text: Text = "text",
    label: Label = "label",
    image: ImageColumn = None,
    audio: AudioColumn = None,
    seconds: Seconds = None,
    scaled_jpeg: ScaledJpeg = False,
    backbone: BackboneName = "restuning-tiny",
    weights: Weights = None,
    random: Random = False,
    quantize: Quantize = None,
    device: Device = None,
    batch_size: ForwardBatch = 32,
    feature: Annotated[
        str,
        option(
            FEATURES, "own (what linear reads), a tap such as block.6, or a part: block.6/places"
        ),
    ] = "own",
    normalize: Annotated[bool, option(FEATURES, "To unit length", "--normalize")] = False,
    dtype: CacheDtype = "fp32",
    precision: CachePrecision = "fp32",
    store: StoreFolder = None,
    task: Annotated[str | None, typer.Option(hidden=True)] = None,
    as_json: Json = False,
) -> None:
    """Write one vector an input, from features that are stored or are stored now."""
    from restuning.backbones import add_quantization
    from restuning.data import DataOptions
    from restuning.features import StoreOptions
    from restuning.features.embeddings import embed as make_vectors
    from restuning.features.vectors_file import FORMS, check_place, write_vectors

    if task is not None:
        raise typer.BadParameter(
            "vectors here are a backbone's; those of a task of problem embedding are its answers: "
            f"restuning predict {data} --task {task} --out vectors.csv",
            param_hint="--task",
        )
    out = check_place(out, FORMS)
    screen = messages(as_json)
    found = make_vectors(
        data,
        add_quantization(backbone, quantize),
        feature=feature,
        normalize=normalize,
        weights=weights,
        random=random,
        device=device,
        options=StoreOptions(store, dtype, precision, batch_size=batch_size, log=log_to(screen)),
        reading=DataOptions(
            skip_bad=skip_bad,
            text=text,
            label=label,
            image=image,
            audio=audio,
            seconds=seconds,
            scaled_jpeg=scaled_jpeg,
        ),
    )
    about: dict[str, Any] = {"backbone": backbone, "feature": feature, "normalized": normalize}
    # Whatever else makes them other vectors.
    changed = {"weights": weights and str(weights), "random": random, "quantize": quantize}
    kept = {"dtype": dtype, "precision": precision}
    about |= {name: value for name, value in changed.items() if value}
    about |= {name: value for name, value in kept.items() if value != "fp32"}
    files = write_vectors(found, out, about)
    count, width = found.vectors.shape
    told = {"rows": count, "width": width, **about, "files": [str(file) for file in files]}
    if as_json:
        show_json(told)
        return
    screen.print(
        f"{count:,} vectors of {width} numbers: {', '.join(told['files'])}", soft_wrap=True
    )


@command(
    app,
    "restuning search photos/ query.jpg --backbone timm:vit_small_patch14_dinov2",
    "restuning search photos/ 'a dog on snow' --backbone hf:openai/clip-vit-base-patch32 --out found.html",
)
def search(
    photos: Annotated[
        str, typer.Argument(help="A folder of images, a file of texts, or data as for train")
    ],
    query: Annotated[
        str, typer.Argument(help="An image file; or words, of a backbone that reads words as well")
    ],
    skip_bad: SkipBad = False,
    text: Text = "text",
    backbone: BackboneName = "restuning-tiny",
    weights: Weights = None,
    random: Random = False,
    quantize: Quantize = None,
    device: Device = None,
    batch_size: ForwardBatch = 32,
    store: StoreFolder = None,
    top: Annotated[int, option(OUTPUT, "How many are shown", min=1)] = 10,
    out: Annotated[
        Path | None, option(OUTPUT, "FILE.html, a page of the pictures, or FILE.jsonl", "--out")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the inputs nearest to an image or to words; the second search costs one forward."""
    from restuning._files import expand_home
    from restuning.backbones import add_quantization
    from restuning.backbones.audio import AUDIO_SUFFIXES
    from restuning.data import DataOptions
    from restuning.features import StoreOptions
    from restuning.features.embeddings import retrieve
    from restuning.features.vectors_file import SHOWN, check_place, match_to_json, write_matches

    if out is not None:
        out = check_place(out, SHOWN)
    screen = messages(as_json)
    matches = retrieve(
        photos,
        query,
        add_quantization(backbone, quantize),
        count=top,
        weights=weights,
        random=random,
        device=device,
        options=StoreOptions(store, batch_size=batch_size, log=log_to(screen)),
        reading=DataOptions(skip_bad=skip_bad, text=text),
    )
    if out is not None:
        folder = expand_home(photos)
        folder = folder.parent if folder.is_file() else folder
        files = [folder / match.id for match in matches]
        pictured = all(f.is_file() and f.suffix.lower() not in AUDIO_SUFFIXES for f in files)
        write_matches(matches, out, query, folder if pictured else None)
    if as_json:
        show_json([match_to_json(match) for match in matches])
        return
    rows: list[dict[str, Any]] = [
        {"": place, "score": f"{match.score:.4f}", "id": match.id, "text": match.text}
        for place, match in enumerate(matches, 1)
    ]
    show_rows(rows, "nearest")
    if out is not None:
        screen.print(f"written  {out}", soft_wrap=True)
