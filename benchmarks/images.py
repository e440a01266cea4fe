"""Top-1 of a ResNet on Fashion-MNIST: the source, without data, calibrated, trained; its speed.

    apt-get install dataset-fashion-mnist
    python benchmarks/images.py train FOLDER [--width 64] [--epochs 3]
    python benchmarks/images.py quality FOLDER [--only NAME ...] [--json OUT.json]
    python benchmarks/images.py speed FOLDER [--rounds 7] [--json OUT.json]
    python benchmarks/images.py layers [--rounds 7]

`train` makes the source: a ResNet of transformers (basic blocks of 64, 128 and 256 channels, two of
each, 2.8 M parameters; with --width 32 of half of that, 0.7 M) from nothing, on the 60,000 images
that train, shifted and mirrored. The 10,000 others are never trained or calibrated on: all figures
are of them. `quality` converts it, calibrates it on some of the images that train, without labels,
and trains that to give what the source gives (`ternarize.qat`), without labels too. `speed` times
it beside torch, as it is (from FOLDER-packed, which `quality` leaves) and in the sizes of ResNet-18
with random weights; `layers` such convolutions one by one, both ways that they have.
"""

import argparse
import copy
import gzip
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from common import hide_bars, parser, timed_convert, write_figures
from safetensors.torch import save_file
from torch import Tensor

import ternarize
from ternarize.measure.report import inspect
from ternarize.plans.recipe import Calibrate, Recipe
from ternarize.runtime.modules import convolution

DATA = Path("/usr/share/datasets/fashion-mnist")
MEAN, DEVIATION = 0.2860, 0.3530  # of the pixels of the images that train, 0 to 1
BATCH = 128
CALIBRATED = "gptq, 128, calibrated"
CALL = convolution._CALL


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
    return torch.cat([model(pixel_values=part).logits for part in torch.split(images, 500)])


def top1(logits: Tensor, labels: Tensor) -> float:
    """The share of images whose largest logit is that of their label."""
    return float((logits.argmax(-1) == labels).double().mean())


def train_source(folder: Path, width: int, epochs: int) -> None:
    """Train the source, and save it."""
    torch.manual_seed(0)
    config = transformers.ResNetConfig(  # type: ignore[call-arg]
        num_channels=1,
        embedding_size=width,
        hidden_sizes=[width, 2 * width, 4 * width],
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
        for at in torch.split(order, BATCH)[: len(images) // BATCH]:
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(pixel_values=varied(images[at], generator)).logits
                loss = F.cross_entropy(logits.float(), labels[at], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        took = time.process_time() - began
        told = f"loss {float(loss.detach()):.3f}, {took:.0f} s of processor"
        print(f"epoch {epoch + 1}: {told}", flush=True)
    model.to(memory_format=torch.contiguous_format)
    model.save_pretrained(folder)
    images, labels = images_of("t10k")
    print(f"top-1 {top1(logits_of(model, images), labels):.4f}")


def recipes(data: str, samples: int) -> dict[str, Recipe]:
    """The rows of the table, of which two are then trained."""

    def gptq(group_size: int, **options: Any) -> Recipe:
        how = Calibrate(data, num_samples=samples, **options)
        return Recipe("gptq", group_size, calibrate=how)

    return {
        "absmean, 128": Recipe("absmean", 128),
        "itf, 128": Recipe("itf", 128),
        "itf, 64": Recipe("itf", 64),
        CALIBRATED: gptq(128),
        "gptq, 128, reconstruct": gptq(128, reconstruct=100),
    }


def trained(source: Path, start: Path | None, output: Path, steps: int) -> None:
    """Train a ternary model to give what the source gives, and pack it.

    start  packed checkpoint to begin from; None: what `itf` gives
    """
    torch.manual_seed(0)
    models = (
        transformers.AutoModelForImageClassification.from_pretrained(source) for _ in range(2)
    )
    teacher, student = (model.eval() for model in models)
    student = ternarize.qat.prepare(student, start=start)
    groups = ternarize.qat.parameter_groups(student, 0.006, relative=True)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    images, _ = images_of("train")
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        student.train()
        at = torch.randint(0, len(images), (BATCH,), generator=generator)
        batch = varied(images[at], generator)
        with torch.no_grad():
            wanted = teacher(pixel_values=batch).logits.softmax(-1)
        loss = F.cross_entropy(student(pixel_values=batch).logits, wanted)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    ternarize.qat.pack(student.eval(), output)


def quality(args: argparse.Namespace) -> None:
    """Print what each way leaves of the source's top-1."""
    source, only = args.folder, args.only
    images, labels = (each[: args.images] for each in images_of("t10k"))
    model = transformers.AutoModelForImageClassification.from_pretrained(source)
    reference = logits_of(model, images)
    best = top1(reference, labels)
    rows: list[dict[str, Any]] = []
    packed = source.with_name(f"{source.name}-packed")

    def row(name: str, folder: Path, seconds: float) -> None:
        totals = inspect(folder)["totals"]
        found = logits_of(ternarize.load(folder), images)
        same = float((found.argmax(-1) == reference.argmax(-1)).double().mean())
        figures = {"bpw": totals["ternary_bpw"], "bytes": totals["file_bytes"], "seconds": seconds}
        rows.append({"name": name, "top1": top1(found, labels), "agreement": same, **figures})
        print(markdown(rows[-1:], best).splitlines()[-1], file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "images.safetensors"
        save_file({"pixel_values": images_of("train")[0][: 2 * args.samples].contiguous()}, data)
        for name, recipe in recipes(str(data), args.samples).items():
            if only is not None and name not in only:
                continue
            output = Path(scratch) / name.replace(", ", "-")
            row(name, output, timed_convert(source, output, recipe)["seconds"])
            if name == CALIBRATED:
                shutil.rmtree(packed, ignore_errors=True)
                shutil.copytree(output, packed)
        for name, start in {"itf, 128": None, CALIBRATED: packed}.items():
            if only is None or f"{name}, trained" in only:
                began, output = time.perf_counter(), Path(scratch) / f"trained-{len(rows)}"
                trained(source, start, output, args.steps)
                row(f"{name}, trained", output, time.perf_counter() - began)
    print(f"source: top-1 {best:.4f}, {(source / 'model.safetensors').stat().st_size:,} bytes")
    print(markdown(rows, best))
    write_figures(args.json, __file__, {"source_top1": best, "rows": rows})


def markdown(rows: list[dict[str, Any]], best: float) -> str:
    lines = [
        "| method, group | bpw | file, bytes | top-1 | of the source's | same class | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['bpw']:.4g} | {row['bytes']:,} | {row['top1']:.4f} "
            f"| {row['top1'] / best:.1%} | {row['agreement']:.1%} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def networks(source: Path, scratch: Path) -> Iterator[tuple[str, Path, Path, Tensor]]:
    """Name, source, packed folder and a batch of each network that is timed."""
    packed = source.with_name(f"{source.name}-packed")
    yield "28 x 28, batch 1", source, packed, torch.randn(1, 1, 28, 28)
    yield "28 x 28, batch 64", source, packed, torch.randn(64, 1, 28, 28)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}
    config = transformers.ResNetConfig(embedding_size=64, layer_type="basic", **sizes)
    large: Any = transformers.ResNetForImageClassification(config)
    large.save_pretrained(scratch / "large")
    timed_convert(scratch / "large", scratch / "packed", Recipe("itf", 128))
    for batch in (1, 8):
        name = f"ResNet-18's sizes, 224 x 224, batch {batch}"
        yield name, scratch / "large", scratch / "packed", torch.randn(batch, 3, 224, 224)


def speed(source: Path, rounds: int, json: Path | None) -> None:
    """Print milliseconds of a forward: torch in float32, and packed."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        for name, dense, packed, x in networks(source, Path(scratch)):
            plain: Any = transformers.AutoModelForImageClassification.from_pretrained(dense).eval()
            last: Any = transformers.AutoModelForImageClassification.from_pretrained(dense).eval()
            models = {
                "torch": plain,
                "torch, channels last": last.to(memory_format=torch.channels_last),
                "packed": ternarize.load(packed),
                "packed, int8": ternarize.load(packed, activations="int8"),
            }
            times: dict[str, list[float]] = {each: [] for each in models}
            for _ in range(rounds + 1):
                for each, model in models.items():
                    began = time.perf_counter()
                    model(pixel_values=x)
                    times[each].append(1e3 * (time.perf_counter() - began))
            found = {each: statistics.median(some[1:]) for each, some in times.items()}
            ratios = {
                each: statistics.median(
                    a / b for a, b in zip(times["torch"][1:], times[each][1:], strict=True)
                )
                for each in models
            }
            memory = {
                each: sum(t.nbytes for t in model.state_dict().values())
                for each, model in models.items()
            }
            rows.append({"name": name, "ms": found, "ratios": ratios, "memory": memory})
            print(rows[-1], file=sys.stderr, flush=True)
    print(f"{torch.get_num_threads()} threads")
    heads = list(rows[0]["ms"])
    cells = ["ms for a forward (times as fast as torch)", *heads, "MB, float32 and packed"]
    print(f"| {' | '.join(cells)} |")
    print("|---" * (len(heads) + 2) + "|")
    for row in rows:
        cells = [f"{row['ms'][each]:.2f} ({row['ratios'][each]:.2f})" for each in heads]
        sizes = " ".join(f"{row['memory'][each] / 1e6:.2f}" for each in ("torch", "packed"))
        print(f"| {row['name']} | {' | '.join(cells)} | {sizes} |")
    write_figures(json, __file__, {"threads": torch.get_num_threads(), "rows": rows})


def layers(rounds: int) -> None:
    """Print milliseconds of convolutions of ResNet-18 and ResNet-50: torch's, and packed.

    Packed as `TernaryConv2d` chooses, then by patches and by a dense weight whatever it chooses.
    """

    def by(model: Any, x: Tensor, cost: int) -> None:
        convolution._CALL = cost  # of a dense weight
        model(x)

    columns = ("torch", "packed", "by patches", "by a dense weight", "packed, int8")
    print(f"| channels, kernel, size, images | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 1) + "|")
    for channels, kernels, width, size in (
        (64, 64, 3, 56),
        (128, 128, 3, 28),
        (256, 256, 3, 14),
        (512, 512, 3, 7),
        (64, 256, 1, 56),
        (256, 64, 1, 56),
        (512, 128, 1, 28),
        (256, 1024, 1, 14),
    ):
        torch.manual_seed(0)
        dense = torch.nn.Conv2d(channels, kernels, width, padding=width // 2, bias=False)
        around = torch.nn.Sequential(torch.nn.Identity(), dense)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "packed"
            ternarize.pack_module(around, folder, include=["1.weight"])
            packed, rounded = (
                ternarize.load_module(folder, copy.deepcopy(around), activations=activations)
                for activations in ("none", "int8")
            )
        for images in (1, 8):
            x = torch.randn(images, channels, size, size).to(memory_format=torch.channels_last)
            calls = (
                partial(dense, x),
                partial(by, packed, x, CALL),
                partial(by, packed, x, 1 << 60),
                partial(by, packed, x, -(1 << 60)),
                partial(rounded, x),
            )
            times: list[list[float]] = [[] for _ in calls]
            with torch.inference_mode():
                for _ in range(rounds + 1):
                    for call, mine in zip(calls, times, strict=True):
                        began = time.perf_counter()
                        call()
                        mine.append(1e3 * (time.perf_counter() - began))
            cells = " | ".join(f"{statistics.median(mine[1:]):.2f}" for mine in times)
            name = f"{channels} to {kernels}, {width} x {width}, {size} x {size}, {images}"
            print(f"| {name} | {cells} |", flush=True)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("what", choices=("train", "quality", "speed", "layers"))
    arguments.add_argument("folder", type=Path, nargs="?", help="of the source")
    arguments.add_argument("--width", type=int, default=64, help="channels of the first stage")
    arguments.add_argument("--epochs", type=int, default=3)
    arguments.add_argument("--samples", type=int, default=1024, help="images to calibrate on")
    arguments.add_argument("--only", nargs="*", help="names of rows")
    arguments.add_argument("--steps", type=int, default=300, help="of the trained row")
    arguments.add_argument("--images", type=int, default=10000, help="that figures are of")
    arguments.add_argument("--rounds", type=int, default=7)
    args = arguments.parse_args()
    hide_bars()
    if args.what == "train":
        train_source(args.folder, args.width, args.epochs)
    elif args.what == "quality":
        quality(args)
    elif args.what == "layers":
        layers(args.rounds)
    else:
        speed(args.folder, args.rounds, args.json)


if __name__ == "__main__":
    main()
