"""Decoders against each other: `python -m tests.campaigns.differential --count 100000`.

Random ternary tensors (shape, stack, group size, planes, type of scales, sparsity) are stored and
read back by whoever can read them:

    native      the compiled core, on each of its variants for weights in turn
    torch       the twin in torch
    reference   formats/reference.py, which shares no code with either
    gguf        where groups fit blocks and scales are float16 numbers: TQ1_0, TQ2_0 of the export,
                decoded by the package gguf, and Q2_0, which it does not know, by a plain loop here

All must give the same bytes, trits, scales and weights. The bytes of trits and of scales are
coded, too (formats/rans.md), in chunks of any height; the core and the reference decode them, torch
one in 64 times; then one bit is flipped, and all must say the same: refused, or other bytes, which
their digest tells. Then, in full: every byte in every place of rows of 1 to 11 trits in groups of 1
to 11, valid or not: the same trits, or refused by all.

Exits with 1 at the first difference, with the tensor's number; --first goes on from it. With
--streams nothing but what is coded is compared.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import math
import sys
import time
import unittest.mock
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TESTS = Path(__file__).resolve().parents[1]
FORMATS = str(TESTS.parent / "formats")
sys.path[:0] = [path for path in (FORMATS,) if path not in sys.path]

import reference  # noqa: E402

from ternarize.errors import FormatError  # noqa: E402
from ternarize.files import container  # noqa: E402
from ternarize.files.headers import byte_view  # noqa: E402
from ternarize.files.metadata import Record  # noqa: E402
from ternarize.native import lib  # noqa: E402
from ternarize.publish.export.common import common_scales  # noqa: E402
from ternarize.trits import base3, ggml, rans  # noqa: E402
from ternarize.trits.planes import join_planes, split_planes  # noqa: E402
from ternarize.trits.scales import scale_values  # noqa: E402
from ternarize.trits.ternary import Ternary, group_count, split_groups  # noqa: E402

SCALES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "U8": torch.uint8}
ENGINES = ("native", "torch") if lib is not None else ("torch",)


class Difference(Exception):
    """Two decoders do not agree."""


def same(a: Any, b: Any, what: str) -> None:
    """Raise Difference unless two arrays have the same shape and the same bits."""
    left, right = (np.ascontiguousarray(x.numpy() if isinstance(x, Tensor) else x) for x in (a, b))
    if left.shape != right.shape or left.dtype != right.dtype or left.tobytes() != right.tobytes():
        raise Difference(what)


@contextlib.contextmanager
def engine(name: str) -> Iterator[None]:
    """Use the compiled core or torch inside."""
    with unittest.mock.patch.object(base3, "lib", lib if name == "native" else None):
        yield


def random_scales(shape: Sequence[int], kind: str, draw: torch.Generator) -> Tensor:
    """Scales of all magnitudes that a type has, as stored: finite and above 0."""
    if kind == "U8":
        return torch.randint(8, 248, tuple(shape), generator=draw, dtype=torch.uint8)
    dtype, bits = SCALES[kind], torch.int32 if kind == "F32" else torch.int16
    most = int(torch.tensor(torch.inf, dtype=dtype).view(bits))
    return torch.randint(1, most, tuple(shape), generator=draw).to(bits).view(dtype)


def random_tensor(number: int) -> tuple[Tensor, Tensor, Record]:
    """Trits (..., rows, planes * cols), scales as stored, and the record, of a tensor by number."""
    draw = torch.Generator().manual_seed(number)

    def below(n: int) -> int:
        return int(torch.randint(n, (1,), generator=draw))

    # half of them fit blocks of 64 or 256 weights
    cols = (1 + below(3)) * (64, 256)[below(2)] if below(2) else 1 + below(200)
    rows = below(9) if below(12) else 0
    stack = (below(4),) if below(6) == 0 else ()
    group_size = (-1, 0, 64, 128, 256, 1 + below(cols), 1 + below(300), 2**62)[below(8)]
    kind, planes = list(SCALES)[below(4)], 1 + (below(4) == 0)
    groups = group_count(cols, group_size)
    sparsity = (0.0, 0.5, 0.9, 1.0)[below(4)]
    zeros = torch.rand((*stack, rows, planes * cols), generator=draw) < sparsity
    trits = torch.randint(-1, 2, zeros.shape, generator=draw, dtype=torch.int8)
    trits[zeros] = 0
    lead = (*stack, 1 if group_size == 0 else rows)
    scales = random_scales((*lead, planes * groups), kind, draw)
    used = torch.cat(
        [split_groups(t, group_size).ne(0).any(-1) for t in trits.chunk(planes, -1)], -1
    )
    if group_size == 0:
        used = used.any(-2, keepdim=True)
    scales = torch.where(used, scales, torch.zeros((), dtype=scales.dtype))
    record = Record("", (*stack, rows, cols), group_size, planes=planes, scale8=kind == "U8")
    return trits, scales, record


def check_tensor(number: int, done: Counter[str]) -> None:
    """Store and read back tensor `number` by all; raises Difference, counts comparisons."""
    trits, scales, record = random_tensor(number)
    assert record.shape is not None
    cols, group_size = record.shape[-1], record.group_size
    kind = next(name for name, dtype in SCALES.items() if dtype == scales.dtype)
    planes = trits.chunk(record.planes, -1)
    if lib is not None:
        variants = lib.cpus()
        lib.use_cpu(variants[number % len(variants)])
    packed: list[Tensor] = []
    found: dict[str, tuple[Tensor, Tensor]] = {}
    dense: dict[tuple[str, torch.dtype], Tensor] = {}
    for name in ENGINES:
        with engine(name):
            packed.append(join_planes([base3.pack(t, group_size) for t in planes]))
            decoded = container.decode_planes(packed[0], scales, record)
            values = join_planes([plane.scales for plane in decoded])
            found[name] = torch.cat([plane.trits for plane in decoded], -1), values
            flat = packed[0].reshape(-1, packed[0].shape[-1])
            matrices = max(1, math.prod(record.shape[:-2]))
            if flat.shape[0] and (group_size or matrices == 1):
                for dtype in (torch.float32, torch.bfloat16, torch.float16):
                    dense[name, dtype] = base3.dequantize_base3(
                        flat, scales.reshape(-1, scales.shape[-1]), cols, group_size, dtype,
                        planes=record.planes,
                    )  # fmt: skip
    for other in packed[1:]:
        same(packed[0], other, "bytes of native and torch")
    for name, (numbers, values) in found.items():
        same(numbers, trits, f"trits of {name}")
        same(values, scale_values(scales, torch.float64), f"scales of {name}")
        done[name] += 1
    for (name, dtype), values in dense.items():
        same(
            values.view(torch.uint8), dense[ENGINES[0], dtype].view(torch.uint8), f"{dtype}, {name}"
        )

    codes, held = (byte_view(t).numpy().tobytes() for t in (packed[0], scales))
    expected = reference.decode_packed(
        "w",
        {
            "shape": list(record.shape),
            "group_size": group_size,
            "codec": "base3",
            "sha256": hashlib.sha256(codes + held).hexdigest(),
            **({"planes": 2} if record.planes == 2 else {}),
        },
        {"scale8", "planes"},
        reference.Entry("U8", tuple(packed[0].shape), 0, len(codes)),
        codes,
        reference.Entry(kind, tuple(scales.shape), 0, len(held)),
        held,
    )
    assert isinstance(expected, reference.Ternary)
    same(trits, expected.trits, "trits of the reference")
    same(scale_values(scales), expected.scales, "scales of the reference")
    stored = expected.stored()
    same(container.dequantize(packed[0], scales, record), stored, "weights of the reference")
    if (ENGINES[0], torch.float32) in dense:
        same(dense[ENGINES[0], torch.float32], stored.reshape(-1, cols), "weights at run time")
    done["reference"] += 1
    if trits.dim() == 2 and trits.numel():
        parts = split_planes(scale_values(scales, torch.float64), record.planes)
        for plane, part in zip(planes, parts, strict=True):
            check_blocks(Ternary(plane, part, group_size), done)


def check_streams(number: int, done: Counter[str]) -> None:
    """Code the bytes of tensor `number`, decode them by all, whole and with a flipped bit."""
    trits, scales, record = random_tensor(number)
    assert record.shape is not None
    cols, group_size = record.shape[-1], record.group_size
    if lib is not None:
        variants = lib.cpus()
        lib.use_cpu(variants[number % len(variants)])
    planes = [base3.pack(each, group_size) for each in trits.chunk(record.planes, -1)]
    packed, held = join_planes(planes), byte_view(scales)
    classes = rans.classes_of_trits(cols, group_size, record.planes)
    expected = reference.classes_of_trits(cols, group_size, record.planes)
    same(classes.to(torch.int64), torch.tensor(expected), "classes")
    check_stream(number, packed, classes, done)
    items = rans.classes_of_items(scales.shape[-1], scales.element_size())
    check_stream(number, held.reshape(-1, len(items)), items, done)


def check_stream(number: int, rows: Tensor, classes: Tensor, done: Counter[str]) -> None:
    """One matrix of bytes (..., width), in chunks of a height that the number gives."""
    draw, rows = np.random.default_rng(number), rows.reshape(-1, rows.shape[-1])
    shape = (rows.shape[0], rows.shape[1])
    height = int(draw.integers(1, max(1, len(rows)) + 1))  # where it is that of all: the usual one
    most = height * shape[1] if height < len(rows) else rans.CHUNK
    with unittest.mock.patch.object(rans, "CHUNK", most):
        stream = rans.encode_rows(rows, classes, threads=1)
    damaged, place = stream.clone(), 0
    if len(stream):
        place = int(draw.integers(len(stream)))
        damaged[place] ^= 1 << int(draw.integers(8))
    engines = ENGINES if number % 64 == 0 else ENGINES[:1]
    for data, what in ((stream, "whole"), (damaged, "flipped")) if len(stream) else ():
        results: dict[str, bytes | None] = {}
        for name in engines:
            with unittest.mock.patch.object(rans, "lib", lib if name == "native" else None):
                try:
                    found = rans.decode_rows(partial(_part, data), len(data), shape, classes)
                    results[name] = found.numpy().tobytes()
                except FormatError:
                    results[name] = None
        try:
            of_all = classes.tolist()
            results["reference"] = reference.read_stream(
                data.numpy().tobytes(), *shape[:1], of_all, ""
            )
        except reference.Invalid:
            results["reference"] = None
        if len({*results.values()}) > 1:
            raise Difference(f"a {what} stream of {shape[0]} rows: {results}")
        if what == "whole" and results["reference"] != rows.contiguous().numpy().tobytes():
            raise Difference("what comes of a stream")
        refused = results["reference"] is None
        done[f"streams {what}" if not refused else "streams refused"] += 1
        if what == "flipped" and results["reference"] == rows.numpy().tobytes():
            # the height of chunks of which nothing has to be read may be another (formats/rans.md)
            parts = [rows[:, classes == each] for each in range(int(classes.max()) + 1)]
            if place >= 4 or any(bool((part != part[0, 0]).any()) for part in parts):
                raise Difference(f"byte {place} of a stream is flipped, and nobody notices")
            done["streams unnoticed"] += 1


def _part(stream: Tensor, at: int, size: int) -> Tensor:
    return stream[at : at + size].clone()


def q2_0(data: NDArray[np.uint8], cols: int) -> NDArray[np.float32]:
    """Weights of Q2_0, one at a time: scale, then four of two bits in a byte, from the low bits."""
    rows = []
    for row in data:
        weights: list[float] = []
        for block in row.reshape(-1, 18):
            scale = block[:2].view(np.float16)[0]
            for byte in block[2:].tolist():
                weights += [float(scale) * ((byte >> 2 * i & 3) - 1) for i in range(4)]
        rows.append(weights)
    return np.array(rows, np.float32).reshape(len(data), cols)


def check_blocks(plane: Ternary, done: Counter[str]) -> None:
    """Export a matrix to each type of block that can hold it, and read it back."""
    gguf = importlib.import_module("gguf")
    for kind, block in ggml.TYPES.items():
        if plane.trits.shape[-1] % block.block:
            continue
        scales = common_scales(plane, block.block)
        if scales is None or not torch.equal(scales.to(torch.float16).to(torch.float64), scales):
            continue  # the export refuses or rounds it
        trits = plane.trits
        data = ggml.encode_blocks(Ternary(trits, scales, block.block), kind).numpy()
        if kind == "q2_0":
            weights = q2_0(data, trits.shape[-1])
        else:
            weights = gguf.dequantize(data, gguf.GGMLQuantizationType[kind.upper()])
        # the sign of a zero weight is nobody's promise in ggml
        if not np.array_equal(weights, plane.dequantize().numpy()):
            raise Difference(f"weights in {kind}")
        done[kind] += 1


def check_all_bytes(most: int, done: Counter[str]) -> None:
    """Every byte in every place of rows of up to `most` trits: the same, or refused by all."""
    for cols in range(1, most + 1):
        for group_size in (-1, *range(1, most + 1)):
            width = base3.packed_width(cols, group_size)
            row = base3.pack(torch.zeros(1, cols, dtype=torch.int8), group_size)
            assert row.shape == (1, width)
            for place in range(width):
                for byte in range(256):
                    changed = row.clone()
                    changed[0, place] = byte
                    results: dict[str, Any] = {}
                    for name in ENGINES:
                        with engine(name):
                            try:
                                results[name] = base3.unpack(changed, cols, group_size).tolist()
                            except FormatError:
                                results[name] = None
                            try:
                                base3.used_groups(changed, cols, group_size)
                            except FormatError:
                                results[f"{name} check"] = None
                            else:
                                results[f"{name} check"] = results[name]
                    try:
                        array = reference.unpack(changed.numpy(), cols, group_size, "w")
                        results["reference"] = array.tolist()
                    except reference.Invalid:
                        results["reference"] = None
                    if any(value != results["reference"] for value in results.values()):
                        raise Difference(f"{cols} columns, groups of {group_size}: {results}")
                    if byte > 242 and results["reference"] is not None:
                        raise Difference(f"byte {byte} is accepted")
                    done["refused" if results["reference"] is None else "accepted"] += 1


def campaign(
    count: int, first: int = 0, *, most: int = 11, streams: bool = False
) -> dict[str, Any]:
    """Compare tensors [first, first + count) and all bytes; raises Difference.

    most     of the trits of the rows in which all bytes are tried
    streams  compare nothing but what is coded
    """
    start, done, every = time.perf_counter(), Counter[str](), Counter[str]()
    checks = (check_streams,) if streams else (check_tensor, check_streams)
    if not streams:
        check_all_bytes(most, every)
    before = lib.cpu() if lib is not None else None
    try:
        for number in range(first, first + count):
            try:
                for check in checks:
                    check(number, done)
            except Difference as error:
                raise Difference(f"tensor {number}: {error}") from None
    finally:
        if lib is not None:
            lib.use_cpu(before)
    return {
        "tensors": count,
        "compared": dict(done),
        "bytes": dict(every),
        "variants": lib.cpus() if lib is not None else [],
        "seconds": round(time.perf_counter() - start, 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 1 at a difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--streams", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        report = campaign(options.count, options.first, streams=options.streams)
    except Difference as error:
        print(f"difference: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
