"""Top-1 of a ResNet on Fashion-MNIST: the source, without data, calibrated, trained; its speed.

    apt-get install dataset-fashion-mnist
    python benchmarks/images.py train FOLDER [--epochs 8]
    python benchmarks/images.py quality FOLDER [--only NAME ...] [--json OUT.json]
    python benchmarks/images.py speed FOLDER [--threads N] [--json OUT.json]

`train` makes the source: a ResNet of transformers (basic blocks of 64, 128 and 256 channels, two of
each, 2.8 M parameters) from nothing, on the 60,000 images that train, shifted and mirrored. The
10,000 others are never trained or calibrated on: all figures are of them. `quality` converts it,
calibrates it on 1,024 of the images that train, without labels, and trains it with `ternarize.qat`
to give what the source gives.
"""

import gzip
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from common import hide_bars, parser
from torch import Tensor

DATA = Path("/usr/share/datasets/fashion-mnist")
MEAN, DEVIATION = 0.2860, 0.3530  # of the pixels of the images that train, 0 to 1
BATCH = 128


def images_of(part: str) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 28, 28) float32, normalized, and labels (n,) int64; part: "train" or "t10k"."""
    if not DATA.is_dir():
        sys.exit(f"{DATA}: not there. Run `apt-get install dataset-fashion-mnist`.")
    with gzip.open(DATA / f"{part}-images-idx3-ubyte.gz") as file:
        pixels = torch.frombuffer(bytearray(file.read()[16:]), dtype=torch.uint8)
    with gzip.open(DATA / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = torch.frombuffer(bytearray(file.read()[8:]), dtype=torch.uint8)
    images = (pixels.view(-1, 1, 28, 28).float() / 255 - MEAN) / DEVIATION
    return images, labels.long()


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """A batch shifted by up to two pixels, and mirrored half of the time: one way for all of it."""
    down, right, mirror = torch.randint(0, 5, (3,), generator=generator).tolist()
    moved = F.pad(images, (2, 2, 2, 2), value=-MEAN / DEVIATION)[
        ..., down : down + 28, right : right + 28
    ]
    return moved.flip(-1) if mirror % 2 else moved


@torch.inference_mode()
def logits_of(model: Any, images: Tensor) -> Tensor:
    """What a model gives, (n, 10) float32."""
    model.eval()
    return torch.cat([model(pixel_values=part).logits for part in images.split(500)])


def top1(logits: Tensor, labels: Tensor) -> float:
    """The share of images whose largest logit is that of their label."""
    return float((logits.argmax(-1) == labels).double().mean())


def train_source(folder: Path, epochs: int) -> None:
    """Train the source, and save it."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=1,
        embedding_size=64,
        hidden_sizes=[64, 128, 256],
        depths=[2, 2, 2],
        layer_type="basic",
        num_labels=10,
    )
    model: Any = transformers.ResNetForImageClassification(config)
    images, labels = images_of("train")
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.2)
    generator = torch.Generator().manual_seed(0)
    model.to(memory_format=torch.channels_last)
    began = time.process_time()
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        for at in order.split(BATCH)[: len(images) // BATCH]:
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(pixel_values=varied(images[at], generator)).logits
                loss = F.cross_entropy(logits.float(), labels[at], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        took = time.process_time() - began
        print(f"epoch {epoch + 1}: loss {float(loss):.3f}, {took:.0f} s of processor", flush=True)
    model.to(memory_format=torch.contiguous_format)
    model.save_pretrained(folder)
    images, labels = images_of("t10k")
    print(f"top-1 {top1(logits_of(model, images), labels):.4f}")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("what", choices=("train", "quality", "speed"))
    arguments.add_argument("folder", type=Path, help="of the source")
    arguments.add_argument("--epochs", type=int, default=8)
    args = arguments.parse_args()
    hide_bars()
    random.seed(0)
    if args.what == "train":
        train_source(args.folder, args.epochs)


if __name__ == "__main__":
    main()
