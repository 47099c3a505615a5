"""Measure how the embedded backbone transfers to scikit-learn's handwritten digits.

    python recipes/pretrain_tiny/check_transfer.py DIR

reads `DIR/restuning-tiny.safetensors` and `DIR/config.json` and prints test accuracies for three
seeds: a linear probe on the pre-trained weights, the same probe on random weights, and adapters
inside the frozen network. Only PyTorch, timm and scikit-learn are used, so that the numbers do
not depend on the library this backbone is made for.

With `--validation` the test images stay untouched: part of the training images is scored
instead. Every choice made while the pre-training was designed used that option.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

CLASSES = 10
Split = tuple[Tensor, Tensor, Tensor, Tensor]


def load_split(config: dict, validation: bool) -> Split:
    """Return training images (N, 3, 32, 32), training labels, test images and test labels."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    preparation = config["preprocessing"]
    size = preparation["input_size"][1:]
    images = F.interpolate(images, size=size, mode="bicubic").clamp(0, 1).expand(-1, 3, -1, -1)
    average, spread = (torch.tensor(preparation[k]).view(3, 1, 1) for k in ("mean", "std"))
    images, labels = (images - average) / spread, torch.tensor(digits.target)
    rows = list(range(len(labels)))
    train, test = train_test_split(rows, test_size=0.25, stratify=labels, random_state=0)
    if validation:
        train, test = train_test_split(
            train, test_size=0.25, stratify=labels[train], random_state=0
        )
    return images[train], labels[train], images[test], labels[test]


def build(folder: Path, config: dict, seed: int | None) -> VisionTransformer:
    """Rebuild the backbone with its trained weights, or with random ones if a seed is given."""
    torch.manual_seed(seed or 0)
    model = VisionTransformer(**config["arguments"])
    if seed is None:
        state = load_file(folder / f"{config['name']}.safetensors")
        model.load_state_dict({name: value.float() for name, value in state.items()})
    return model.eval().requires_grad_(False)


@torch.no_grad()
def features(model: nn.Module, images: Tensor) -> Tensor:
    """Return what the model gives for all images, computed in batches."""
    return torch.cat([model(part) for part in images.split(128)])


def regression(model: VisionTransformer, split: Split) -> float:
    """Fit a logistic regression on the class token and return its test accuracy."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(features(model, split[0]).numpy(), split[1].numpy())
    return probe.score(features(model, split[2]).numpy(), split[3].numpy())


class Adapter(nn.Module):
    """A bottleneck on the residual stream that starts as zero."""

    def __init__(self, width: int, rank: int) -> None:
        """Make the two projections."""
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the correction for tokens (B, N, width)."""
        return self.up(F.gelu(self.down(tokens)))


class AdaptedBlock(nn.Module):
    """A frozen block with one adapter beside its attention and one beside its MLP."""

    def __init__(self, block: Block, width: int, rank: int) -> None:
        """Wrap a block of a timm vision transformer."""
        super().__init__()
        self.block = block
        self.beside_attention, self.beside_mlp = Adapter(width, rank), Adapter(width, rank)

    def forward(self, tokens: Tensor) -> Tensor:
        """Run the block on tokens (B, N, width)."""
        block = self.block
        tokens = tokens + block.attn(block.norm1(tokens)) + self.beside_attention(tokens)
        return tokens + block.mlp(block.norm2(tokens)) + self.beside_mlp(tokens)


def fit(
    model: nn.Module, split: Split, seed: int, epochs: int, rate: float, batch: int = 32
) -> float:
    """Train whatever is trainable with AdamW and a cosine schedule; return the test accuracy."""
    generator = torch.Generator().manual_seed(seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.01)
    steps = epochs * (len(split[0]) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        order = torch.randperm(len(split[0]), generator=generator)
        for rows in order[: len(order) // batch * batch].split(batch):
            loss = F.cross_entropy(model(split[0][rows]), split[1][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    right = features(model, split[2]).argmax(1) == split[3]
    return right.float().mean().item()


def head_only(model: VisionTransformer, split: Split, seed: int, args: argparse.Namespace) -> float:
    """Train a linear head on the frozen class token in the same way as the adapters."""
    cached = (features(model, split[0]), split[1], features(model, split[2]), split[3])
    torch.manual_seed(seed)
    return fit(nn.Linear(model.embed_dim, CLASSES), cached, seed, args.epochs, args.rate)


def adapters(model: VisionTransformer, split: Split, seed: int, args: argparse.Namespace) -> float:
    """Train adapters in every block of the frozen network together with a linear head."""
    torch.manual_seed(seed)
    blocks = [AdaptedBlock(block, model.embed_dim, args.rank) for block in model.blocks]
    model.blocks = nn.Sequential(*blocks)
    model.head = nn.Linear(model.embed_dim, CLASSES)
    return fit(model, split, seed, args.epochs, args.rate)


def main() -> None:
    """Print a line per measurement."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("folder", type=Path, help="folder of the weights and config.json")
    parser.add_argument("--validation", action="store_true", help="leave the test images alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rate", type=float, default=2e-3, help="AdamW learning rate")
    parser.add_argument("--rank", type=int, default=10, help="width of the adapters")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only-probes", action="store_true", help="skip what takes minutes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = json.loads((args.folder / "config.json").read_text(encoding="utf-8"))
    split = load_split(config, args.validation)
    print(f"{len(split[0])} training images, {len(split[2])} scored", flush=True)

    def trained() -> VisionTransformer:
        return build(args.folder, config, None)

    def untrained(seed: int) -> VisionTransformer:
        return build(args.folder, config, seed)

    # A logistic regression on fixed features has one solution, hence no seeds.
    score = 100 * regression(trained(), split)
    print(f"logistic regression, trained weights: {score:.2f}", flush=True)
    measurements = {
        "logistic regression, random weights": lambda seed: regression(untrained(seed), split),
        "linear head, random weights": lambda seed: head_only(untrained(seed), split, seed, args),
        "linear head, trained weights": lambda seed: head_only(trained(), split, seed, args),
        "adapters, trained weights": lambda seed: adapters(trained(), split, seed, args),
    }
    if args.only_probes:
        measurements.popitem()
    for name, measure in measurements.items():
        started = time.monotonic()
        scores = [100 * measure(seed) for seed in range(args.seeds)]
        spread = f" +- {stdev(scores):.2f}" if len(scores) > 1 else ""
        seconds = (time.monotonic() - started) / len(scores)
        listed = " ".join(f"{score:.2f}" for score in scores)
        print(f"{name}: {mean(scores):.2f}{spread} ({listed}), {seconds:.0f} s each", flush=True)


if __name__ == "__main__":
    main()
