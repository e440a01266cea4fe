"""What a packed checkpoint holds, tensor by tensor, and how near it is to its source.

Read from its headers and its record (ternarize.json), as plain data and as a drawing.
"""

import importlib
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ternarize.errors import FormatError, OutputError, UsageError
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.metadata import RANS, SCALE_SUFFIX, Record
from ternarize.sources.packed import check_record, open_packed
from ternarize.trits.base3 import unpack
from ternarize.trits.int4 import INT4, unpack_int4
from ternarize.trits.int8 import INT8


def inspect(model: str | Path) -> dict[str, Any]:
    """Describe a packed checkpoint: a row for each tensor, and totals against its source.

    model  packed directory or Hub id

    Bits per weight (bpw) are measured from the stored bytes, scales and padding included;
    "bits_per_parameter" of the whole model from its files, headers included. Method,
    relative error sum (w - scale trit)^2 / sum w^2 and the source's size come from ternarize.json
    and are None without it (a model saved by save_pretrained); the sparsity is then counted.
    "calibration" is what a calibrated conversion measured, else None: its data, the figures on the
    report samples, the errors of the blocks before and after.
    Raises FormatError as `open_packed`.
    """
    packed, records = open_packed(model)
    record = check_record(packed, records) or {}
    rows = [
        _row(packed, name, found, record.get("tensors", {}).get(name, {}))
        for name, found in records.items()
    ]
    ternary = [row for row in rows if row["kind"] == "ternary"]
    of_kind = Counter[str]()
    for row in rows:
        of_kind[row["kind"]] += row["parameters"]
    weights, parameters = of_kind["ternary"], of_kind.total()
    bits = sum(row["stored_bytes"] for row in ternary) * 8
    files = sum((packed.directory / file).stat().st_size for file in packed.files)
    stored = sum(row["stored_bytes"] for row in rows)
    source = record.get("source")
    size = source.get("bytes") if isinstance(source, dict) else None
    size = size if isinstance(size, int) else None
    return {
        "model": str(model),
        "recipe": record.get("recipe"),
        "calibration": record.get("calibration"),
        "training": record.get("training"),
        "totals": {
            "parameters": parameters,
            "ternary_parameters": weights,
            "int8_parameters": of_kind["int8"],
            "int4_parameters": of_kind["int4"],
            "ternary_bpw": round(bits / weights, 4) if weights else None,
            "sparsity": _mean(ternary, "sparsity"),
            "relative_error": _mean(ternary, "relative_error"),
            "stored_bytes": stored,
            "file_bytes": files,
            "bits_per_parameter": round(files * 8 / parameters, 4) if parameters else None,
            "header_bytes": files - stored,
            "source_bytes": size,
            "ratio": round(size / files, 3) if size else None,
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
            "reason": _said_in_words(said.get("reason")),
            "parameters": info.numel,
            "stored_bytes": info.nbytes,
        }
    scale = packed.tensors[name + SCALE_SUFFIX]
    size, stored = math.prod(record.shape), info.stored_bytes + scale.stored_bytes
    sparsity, error = said.get("sparsity"), said.get("relative_error")
    if not isinstance(sparsity, float):
        sparsity = _count_zeros(packed, name, record) / max(1, size * record.planes)
    return {
        "name": name,
        "kind": record.kind,
        "shape": list(record.shape),
        "dtype": f"{RANS if record.coded else record.codec}+{scale.dtype}",
        "method": _said_in_words(said.get("method")) if record.kind == "ternary" else record.codec,
        "group_size": record.group_size,
        "planes": record.planes,
        "rotation": record.rotation[0],
        "parameters": size,
        "stored_bytes": stored,
        "bpw": round(stored * 8 / size, 4) if size else 0.0,
        "sparsity": round(sparsity, 6),
        "relative_error": error if isinstance(error, float) else None,
    }


def _said_in_words(said: Any) -> str | None:
    """What a record says, where it says it in words: anything may have been put there."""
    return said if isinstance(said, str) else None


def _count_zeros(packed: Checkpoint, name: str, record: Record) -> int:
    """Zeros among the trits of all planes, or among int8 or int4 weights."""
    assert record.shape is not None
    width, cols = packed.tensors[name].shape[-1], record.shape[-1]
    total = packed.tensors[name].numel
    zeros, step = 0, max(1, (1 << 20) // max(1, width)) * max(1, width)
    for start in range(0, total, step):
        rows = packed.read(name, start, min(start + step, total))
        if record.codec == INT8:
            zeros += rows.numel() - int(rows.count_nonzero())
            continue
        if record.codec == INT4:
            q = unpack_int4(rows.view(-1, width), cols, record.group_size)
            zeros += q.numel() - int(q.count_nonzero())
            continue
        try:
            trits = unpack(rows.view(-1, width // record.planes), cols, record.group_size)
        except FormatError as error:
            raise error.within(f"{packed.tensors[name].file}: {name}") from None
        zeros += trits.numel() - int(trits.count_nonzero())
    return zeros


def _mean(rows: list[dict[str, Any]], key: str) -> float | None:
    """Mean over weights (not over tensors) of a figure that every row has, else None."""
    weights: int = sum(row["parameters"] for row in rows)
    if not weights or any(row[key] is None for row in rows):
        return None
    total: float = math.fsum(row[key] * row["parameters"] for row in rows)
    return round(total / weights, 6)


TITLE = {  # the figures in the title, and how they are written
    "perplexity": "perplexity {:.4g}",
    "source_perplexity": "source {:.4g}",
    "kl_divergence": "KL divergence {:.3g}",
    "top1_agreement": "top-1 agreement {:.1%}",
    "cosine": "cosine {:.4f}",
}
ROLES = 12  # kinds of matrices that a legend can tell apart


def plot(report: dict[str, Any], path: str | Path) -> None:
    """Draw a report of `inspect`: error of each block, error and sparsity of each tensor.

    path  the image to write, of a kind that its suffix tells (.png, .svg, .pdf)

    Errors of blocks are squared errors of their outputs on held-out samples, relative to the source
    model's, before calibration (`itf` on the same weights) and after; without calibration there are
    none. Tensors lie at the number of their block, in a series for each kind of matrix.
    Needs matplotlib, and no display. Raises UsageError where it is missing or the suffix unknown,
    OutputError where there is no directory to write to.
    """
    errors = (report["calibration"] or {}).get("blocks", [])
    rows = [row for row in report["tensors"] if row["kind"] == "ternary"]
    with figure_for(path, (8, 9 if errors else 6.5)) as figure:
        axes = list(figure.subplots(3 if errors else 2, 1))
        if errors:
            _draw_blocks(axes.pop(0), errors)
        _draw_tensors(axes[0], rows, "relative_error", "relative error of weights")
        _draw_tensors(axes[1], rows, "sparsity", "zeros among trits")
        axes[1].set_xlabel("block")
        handles, labels = axes[0].get_legend_handles_labels()
        if 0 < len(labels) <= ROLES:
            figure.legend(handles, labels, fontsize=8, ncols=4, loc="outside lower center")
        # a dollar would begin a formula
        figure.suptitle(_title(report).replace("$", r"\$"), fontsize=10)


@contextmanager
def figure_for(path: str | Path, size: tuple[float, float]) -> Iterator[Any]:
    """A figure of matplotlib to draw on, which is saved afterwards.

    path  as in `plot`, with the same errors
    size  in inches
    """
    path = Path(path).expanduser()
    try:
        backend, figures = map(
            importlib.import_module, ("matplotlib.backends.backend_agg", "matplotlib.figure")
        )
    except ImportError:
        raise UsageError(
            path,
            "plots are drawn with matplotlib, which is not installed",
            "it",
            "Run pip install 'ternarize[plot]'",
        ) from None
    if not path.parent.is_dir():
        raise OutputError(
            path, f"there is no directory {path.parent}", "one", "Make it, or name another"
        )
    figure = figures.Figure(figsize=size, layout="constrained")
    known = backend.FigureCanvasAgg(figure).get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise UsageError(
            path,
            f"{path.suffix or 'no suffix'} is no kind of image",
            f"one of {', '.join(sorted(known))}",
            "Name it .png",
        )
    yield figure
    figure.savefig(path, dpi=150)


def _title(report: dict[str, Any]) -> str:
    """The model's name, its bits, and the figures that were measured."""
    bpw = report["totals"]["ternary_bpw"]
    name = Path(report["model"]).resolve().name
    parts = [f"{name}: {bpw:.3f} bits per ternary weight" if bpw else name]
    quality = (report["training"] or report["calibration"] or {}).get("quality", {})
    for figure, text in TITLE.items():
        value = quality.get(figure, {}).get("value")
        if value is not None:
            parts.append(text.format(value))
    return "\n".join([parts[0], ", ".join(parts[1:])]).strip()


def _draw_blocks(axes: Any, errors: list[dict[str, Any]]) -> None:
    places = range(len(errors))
    for key, marker in (("before", "o"), ("after", "s")):
        values = [block[key] for block in errors]
        axes.plot(places, values, marker=marker, markersize=4, label=f"{key} calibration")
    axes.set_ylabel("relative error of outputs")
    axes.legend(fontsize=8)
    _mark_blocks(axes)


def _draw_tensors(axes: Any, rows: list[dict[str, Any]], key: str, label: str) -> None:
    series: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        role, block = _role(row["name"])
        places, values = series.setdefault(role, ([], []))
        if row[key] is not None:
            places.append(block)
            values.append(row[key])
    short = _without_common(list(series))
    for at, (role, (places, values)) in enumerate(series.items()):
        marker = "osv^D<>pPX*h"[at % 12]
        axes.plot(places, values, marker, markersize=4, label=short[role], color=f"C{at % 10}")
    axes.set_ylabel(label)
    _mark_blocks(axes)


def _mark_blocks(axes: Any) -> None:
    """Blocks are whole numbers; errors begin at nothing."""
    top = float(axes.dataLim.y1)  # minus infinity where nothing is drawn
    axes.set_ylim(bottom=0, top=1.1 * top if 0 < top < math.inf else 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)


def _role(name: str) -> tuple[str, int]:
    """What a tensor is in its block, and the number of the block (the first in its name)."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name), int(numbers[0]) if numbers else 0


def _without_common(names: list[str]) -> dict[str, str]:
    """Names without the parts at both ends that all of them share."""
    parts = [name.split(".") for name in names]
    least = min(map(len, parts), default=1)
    first = min(len(os.path.commonprefix(parts)), least - 1)
    last = min(len(os.path.commonprefix([p[::-1] for p in parts])), least - 1 - first)
    return {name: ".".join(p[first : len(p) - last]) for name, p in zip(names, parts, strict=True)}
