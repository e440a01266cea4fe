"""Bits a weight that a patch takes, beside the entropy of what has changed.

    python benchmarks/patches.py [--model examples/tiny-llama] [--trained STEPS] [--json FILE]

The model is converted (`itf`), and shares of its trits are moved to a neighbour at random: a zero
to either sign, others to zero. The entropy of that, for each trit of the matrices,

    H = h(p) + p z        h(p) = -p log2 p - (1 - p) log2(1 - p)

with p the share that moves and z that of zeros among what moves, is what no coding of independent
moves goes below. Beside it stands what LZMA makes of the differences of the trits, packed five to a
byte. With --trained both ends of a short training are compared as they come out, scales and norms
too; the entropy is then that of the shares that are found, tensor by tensor.
"""

import lzma
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import parser, write_figures
from safetensors.torch import load_file, save_file

from ternarize.convert.run import convert
from ternarize.files import container, metadata
from ternarize.files.patch import open_patch
from ternarize.files.sums import SUMS
from ternarize.plans.recipe import Recipe, Train
from ternarize.publish.patches import apply_patch, diff_packed
from ternarize.sources.packed import open_packed
from ternarize.trits.base3 import BASE3, unpack
from ternarize.trits.base3 import pack as pack_base3
from ternarize.trits.ternary import split_groups

SHARES = (0.001, 0.01, 0.024, 0.1)
LZMA2 = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 0, "pb": 0}]


def binary_entropy(p: float) -> float:
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p) if 0 < p < 1 else 0.0


def move_trits(a: Path, b: Path, share: float) -> None:
    """A copy of a packed checkpoint, with this share of all trits moved; no group becomes zero."""
    shutil.copytree(a, b)
    (b / SUMS).unlink()
    packed, records = open_packed(a)
    generator = torch.Generator().manual_seed(0)
    for file in packed.files:
        tensors = load_file(a / file)
        here = {name: record for name, record in records.items() if name in tensors}
        for name, record in here.items():
            if record.codec != BASE3 or record.shape is None:
                continue
            trits = unpack(tensors[name], record.shape[-1], record.group_size)
            moved = torch.rand(trits.shape, generator=generator) < share
            signs = 2 * torch.randint(0, 2, trits.shape, generator=generator) - 1
            new = torch.where(moved, torch.where(trits == 0, signs, 0), trits).to(torch.int8)
            used, before = (split_groups(t, record.group_size).any(-1) for t in (new, trits))
            assert torch.equal(used, before), "a group has become zero, or is no longer"
            tensors[name] = pack_base3(new, record.group_size)
            digest = container.digest(tensors[name], tensors[f"{name}_scale"])
            here[name] = metadata.Record(digest, record.shape, record.group_size)
        save_file(tensors, b / file, metadata=metadata.dump_metadata(here))


def compare(a: Path, b: Path) -> dict[str, Any]:
    """Bits a trit of the patch's parts, of the entropy, of LZMA; bytes of the rest."""
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "p"
        found = diff_packed(a, b, path)
        told = open_patch(path)
        apply_patch(a, path, Path(work) / "c")
        for file in b.iterdir():
            assert (Path(work) / "c" / file.name).read_bytes() == file.read_bytes(), file.name
    old, records = open_packed(a)
    new, _ = open_packed(b)
    count = moves = 0
    entropy = by_lzma = 0.0
    parts = {"trits": 0, "scales": 0, "others": 0}
    for name, part in told.parts.items():
        kind = "scales" if name not in records else "others"
        ternary = name in records and records[name].kind == "ternary"
        parts["trits" if ternary else kind] += part.size
    for name, record in records.items():
        if record.kind != "ternary" or record.shape is None:
            continue
        before, after = (
            unpack(
                each.read(name).view(each.tensors[name].shape), record.shape[-1], record.group_size
            ).flatten()
            for each in (old, new)
        )
        moved = before != after
        p, size = float(moved.float().mean()), before.numel()
        zeros = int((moved & (before == 0)).sum())
        crossing = int((moved & (before + after == 0)).sum())
        others = int(moved.sum()) - zeros
        signs = zeros + others * binary_entropy(crossing / others) if others else zeros
        entropy += size * binary_entropy(p) + signs
        change = ((after - before) % 3 - 3 * ((after - before) % 3 == 2).to(torch.int8)).numpy()
        digits = np.pad(change.astype(np.int64) + 1, (0, -size % 5), constant_values=1)
        data = (digits.reshape(-1, 5) * 3 ** np.arange(5)).sum(1).astype(np.uint8).tobytes()
        by_lzma += 8 * len(lzma.compress(data, lzma.FORMAT_RAW, filters=LZMA2))
        count, moves = count + size, moves + int(moved.sum())
    return {
        "moved": moves / count,
        "entropy": entropy / count,
        "trits": 8 * parts["trits"] / count,
        "lzma": by_lzma / count,
        "scales": 8 * parts["scales"] / count,
        "others": parts["others"],
        "header_and_files": found["bytes"] - sum(parts.values()),
        "bytes": found["bytes"],
        "result_bytes": found["result_bytes"],
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--model", type=Path, default=Path("examples/tiny-llama"))
    arguments.add_argument("--trained", type=int, metavar="STEPS", help="also a short training")
    options = arguments.parse_args()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        a = Path(work) / "a"
        convert(options.model, a, Recipe("itf"))
        for share in SHARES:
            b = Path(work) / f"b{share}"
            move_trits(a, b, share)
            rows[f"{share:.1%} at random"] = compare(a, b)
        if options.trained:
            train = Train(texts=("default",), steps=options.trained, batch=512)
            b = Path(work) / "trained"
            convert(options.model, b, Recipe("itf", train=train))
            rows[f"{options.trained} steps of training"] = compare(a, b)
    print(
        "| what | moved | entropy | trits | above | by LZMA | above | scales | other tensors |",
        end="",
    )
    print(" header, small files | patch | result |")
    print("|" + "---|" * 12)
    for name, row in rows.items():
        above = [100 * (row[key] / row["entropy"] - 1) for key in ("trits", "lzma")]
        print(
            f"| {name} | {row['moved']:.3%} | {row['entropy']:.4f} | {row['trits']:.4f} "
            f"| {above[0]:.1f} % | {row['lzma']:.4f} | {above[1]:.1f} % | {row['scales']:.4f} "
            f"| {row['others']:,} | {row['header_and_files']:,} | {row['bytes']:,} "
            f"| {row['result_bytes']:,} |"
        )
    write_figures(options.json, __file__, {"rows": rows})


if __name__ == "__main__":
    main()
