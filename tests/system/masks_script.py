"""Two small runs on masks as a program, `masks_script.py OUT [METHOD ...]`: a head by steps, and a closed form.

Rare classes are weighed in both, and the images of the head are drawn evenly by class. What each ends with goes to
OUT/METHOD.safetensors.
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.data import TensorDataset

from restuning import FitSettings, Tuned, fit, load_backbone, methods
from restuning.problems import UNLABELLED, Segmentation

CLASSES = 3


def draw(count, seed):
    """Images whose shade says the class of a pixel; the last class is in few of them, and in few pixels."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(count, 32, 32, dtype=torch.uint8)
    for number, mask in enumerate(masks):
        y, x = torch.randint(24, (2,), generator=generator).tolist()
        mask[y : y + 8, x : x + 8] = 2 if number % 5 == 0 else 1
        mask[31] = UNLABELLED
    shades = masks.where(masks != UNLABELLED, 0)[:, None].expand(-1, 3, -1, -1) - 1.0
    return TensorDataset(shades + torch.randn(shades.shape, generator=generator) / 4, masks)


def main():
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    host = load_backbone("restuning-tiny").host()
    for method in sys.argv[2:] or ("linear", "ridge"):
        own = {"balanced_sampling": True} if method == "linear" else {}
        torch.manual_seed(3)
        task = methods.build(method, host, num_classes=CLASSES, pool="grid")
        task.problem = Segmentation()
        # 21 images: the last batch of an epoch has one, and one process of two none.
        settings = FitSettings(
            epochs=2, batch_size=4, lr=0.01, class_weights="balanced", accumulate=2, **own
        )
        tuned = Tuned(host, task)
        fit(tuned, draw(21, 0), draw(9, 1), settings=settings, out=out / method, progress=False)
        if int(os.environ.get("RANK", "0")) == 0:
            state = {name: t.contiguous() for name, t in task.state_dict().items()}
            save_file(state, out / f"{method}.safetensors")


if __name__ == "__main__":
    main()
