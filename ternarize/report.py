"""What a packed checkpoint holds, tensor by tensor: read from its headers and its record."""

import math
from pathlib import Path
from typing import Any

from ternarize.checkpoint import Checkpoint
from ternarize.codecs import INT8, unpack
from ternarize.container import SCALE_SUFFIX, Record
from ternarize.verify import check_record, open_packed


def inspect(model: str | Path) -> dict[str, Any]:
    """Describe a packed checkpoint: a row for each tensor, and totals against its source.

    model  packed directory or Hub id

    Bits per weight (bpw) are measured from the stored bytes, scales and padding included. Method,
    relative error sum (w - scale trit)^2 / sum w^2 and the source's size come from ternarize.json
    and are None without it (a model saved by save_pretrained); the sparsity is then counted.
    Raises FormatError as `open_packed`.
    """
    packed, records = open_packed(model)
    record = check_record(packed, records) or {}
    rows = [
        _row(packed, name, found, record.get("tensors", {}).get(name, {}))
        for name, found in records.items()
    ]
    ternary = [row for row in rows if row["kind"] == "ternary"]
    int8 = [row for row in rows if row["kind"] == "int8"]
    weights = sum(row["parameters"] for row in ternary)
    bits = sum(row["stored_bytes"] for row in ternary) * 8
    files = sum((packed.directory / file).stat().st_size for file in packed.files)
    stored = sum(row["stored_bytes"] for row in rows)
    source = record.get("source")
    source = source if isinstance(source, dict) else {}
    return {
        "model": str(model),
        "recipe": record.get("recipe"),
        "totals": {
            "parameters": sum(row["parameters"] for row in rows),
            "ternary_parameters": weights,
            "int8_parameters": sum(row["parameters"] for row in int8),
            "ternary_bpw": round(bits / weights, 4) if weights else None,
            "sparsity": _mean(ternary, "sparsity"),
            "relative_error": _mean(ternary, "relative_error"),
            "stored_bytes": stored,
            "file_bytes": files,
            "header_bytes": files - stored,
            "source_bytes": source.get("bytes"),
            "ratio": round(source["bytes"] / files, 3) if source.get("bytes") else None,
        },
        "tensors": rows,
    }


def _row(packed: Checkpoint, name: str, record: Record, said: dict[str, Any]) -> dict[str, Any]:
    info = packed.tensors[name]
    if record.shape is None:
        return {
            "name": name,
            "kind": "kept",
            "shape": list(info.shape),
            "dtype": info.dtype,
            "reason": said.get("reason"),
            "parameters": info.numel,
            "stored_bytes": info.nbytes,
        }
    scale = packed.tensors[name + SCALE_SUFFIX]
    size, stored = math.prod(record.shape), info.nbytes + scale.nbytes
    sparsity = said.get("sparsity")
    if not isinstance(sparsity, float):
        sparsity = _count_zeros(packed, name, record) / max(1, size * record.planes)
    return {
        "name": name,
        "kind": record.kind,
        "shape": list(record.shape),
        "dtype": f"{record.codec}+{scale.dtype}",
        "method": said.get("method") if record.kind == "ternary" else record.codec,
        "group_size": record.group_size,
        "planes": record.planes,
        "parameters": size,
        "stored_bytes": stored,
        "bpw": round(stored * 8 / size, 4) if size else 0.0,
        "sparsity": round(sparsity, 6),
        "relative_error": said.get("relative_error"),
    }


def _count_zeros(packed: Checkpoint, name: str, record: Record) -> int:
    """Zeros among the trits of all planes, or among int8 weights."""
    assert record.shape is not None
    width, cols = packed.tensors[name].shape[-1], record.shape[-1]
    total = packed.tensors[name].numel
    zeros, step = 0, max(1, (1 << 20) // max(1, width)) * max(1, width)
    for start in range(0, total, step):
        rows = packed.read(name, start, min(start + step, total))
        if record.codec == INT8:
            zeros += rows.numel() - int(rows.count_nonzero())
            continue
        trits = unpack(rows.view(-1, width // record.planes), cols, record.group_size)
        zeros += trits.numel() - int(trits.count_nonzero())
    return zeros


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    """Mean over weights (not over tensors) of a figure that every row has, else None."""
    weights: int = sum(row["parameters"] for row in rows)
    if not weights or any(row[key] is None for row in rows):
        return None
    total: float = math.fsum(row[key] * row["parameters"] for row in rows)
    return round(total / weights, 6)
