"""A start from the seed after steps, as files: a container, or a whole model."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import UsageError
from ternarize.files import metadata
from ternarize.files.container import digest
from ternarize.files.headers import DTYPE_NAMES, byte_view, file_head, lay_out
from ternarize.files.metadata import SCALE_SUFFIX, Record
from ternarize.files.names import RECORD, SAFETENSORS
from ternarize.files.sums import renew_sums, sha256
from ternarize.plans.recipe import TERNARY, Recipe
from ternarize.steps.base import replayed, stored_after
from ternarize.steps.journal import Journal
from ternarize.version import __version__


def file_of_seed(
    journal: Journal, upto: int | None, *, recorded: bool = False
) -> tuple[bytes, dict[str, Record]]:
    """A container file with the tensors of a journal that begins from its seed; their records.

    recorded  a record beside it lists their digests
    """
    header = journal.header
    constants = () if header.model is None else header.model.constants
    names = {name for name, _, _ in (*header.tensors, *constants)}
    taken = [n for n in names if n == "__metadata__" or n.removesuffix(SCALE_SUFFIX) in names - {n}]
    if taken:
        found = f"a tensor is called {min(taken)!r:.80}, as another entry of the file would be"
        raise UsageError(journal.path, found, "other names", "Read its rows one by one")
    tensors: dict[str, Tensor] = {}
    records: dict[str, Record] = {}
    for part, trits, exponents, start in replayed(None, {}, header, journal.effective(upto)):
        stored, scales = stored_after(trits, exponents, start, part)
        tensors |= {part.name: stored, part.name + SCALE_SUFFIX: scales}
        records[part.name] = Record(digest(stored, scales), part.shape, part.group_size)
    for name, shape, value in constants:
        tensors[name] = torch.full(shape, float(value))
        records[name] = Record(digest(tensors[name]))
    entries = lay_out((n, DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in tensors.items())
    head = file_head(entries, metadata.dump_metadata(records, recorded=recorded))
    body = b"".join(byte_view(tensors[name]).numpy().tobytes() for name in entries)
    return head + body, records


def write_model(
    journal: Journal, folder: Path | None, output: Path, upto: int | None, about: dict[str, Any]
) -> list[str]:
    """A packed checkpoint of a model that begins from its seed, into a directory.

    folder  with the files beside the weights

    Returns those that are left out.
    """
    model = journal.header.model
    assert model is not None
    data, records = file_of_seed(journal, upto, recorded=True)
    (output / SAFETENSORS).write_bytes(data)
    sizes = {size for _, _, size in journal.header.tensors}
    quantization: dict[str, Any] = {
        "quant_method": metadata.KEY,
        "format_version": metadata.FORMAT_VERSION,
        "method": "steps",
        "group_size": sizes.pop() if len(sizes) == 1 else None,
        "activations": "none",
    }
    # by which a training that goes on from here knows what is ternary
    recipe = Recipe("itf", quantization["group_size"], head=TERNARY, embeddings=TERNARY)
    values = {name: ("zeros", "ones")[value] for name, _, value in model.constants}
    rows = {
        name: {
            "becomes": record.kind,
            **({"reason": values[name]} if name in values else {"method": "steps"}),
            "sha256": record.sha256,
        }
        for name, record in records.items()
    }
    tables = {
        "config.json": {**model.config, "quantization_config": quantization},
        RECORD: {
            "format_version": metadata.FORMAT_VERSION,
            "tool": {"name": "ternarize", "version": __version__},
            "recipe": asdict(recipe),
            "tensors": rows,
            "steps": {**about, "seed": f"{journal.header.seed:016x}"},
        },
    }
    for name, table in tables.items():
        text = json.dumps(table, indent=2, ensure_ascii=False) + "\n"
        (output / name).write_text(text, "utf-8")
    if folder is None:
        renew_sums(output)
        return list(model.files)
    for name, digest_of_file in model.files.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, output / name)
        if sha256(output / name) != digest_of_file:
            raise another_file(folder / name, digest_of_file)
    renew_sums(output)
    return []


def another_file(file: Path, digest_of_file: str) -> UsageError:
    """The error of a file beside a model that is not the one of the journal."""
    return UsageError(
        file,
        "is another than the model was trained with" if file.is_file() else "is not there",
        f"one with the SHA-256 {digest_of_file[:12]}...",
        "Name the folder that it was trained with",
    )
