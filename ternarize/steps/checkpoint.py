"""A journal replayed on what it begins from: a packed checkpoint, a file, or rows of a tensor."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ternarize.errors import UsageError
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.container import check_data, digest
from ternarize.files.headers import byte_view, read_header
from ternarize.files.metadata import SCALE_SUFFIX, Record
from ternarize.files.names import RECORD
from ternarize.files.outputs import check_free, fresh_output, write_at, write_whole
from ternarize.files.recoded import head_again, rewritten
from ternarize.files.sums import sha256
from ternarize.sources.checkpoint import locate
from ternarize.sources.fetch import fetch_file, split_id
from ternarize.sources.packed import check_record, check_uncoded, open_packed
from ternarize.steps.base import (
    check_base,
    moved_scales,
    parts_of_base,
    parts_of_start,
    replayed,
    start_scales,
    stored_after,
)
from ternarize.steps.generator import SCALES, TRITS
from ternarize.steps.journal import SUFFIX, Journal, read_journal
from ternarize.steps.replay import Moves, start_of
from ternarize.steps.seeded import another_file, file_of_seed, write_model
from ternarize.trits.base3 import unpack
from ternarize.trits.scales import scale_values
from ternarize.trits.ternary import largest_of_groups, spread_scales

_PIECE = 1 << 22  # elements copied at a time


def replay(
    path: str | Path, base: str | Path | None, output: str | Path, *, upto: int | None = None
) -> dict[str, Any]:
    """Write what a journal makes of its start: a packed checkpoint, or one file.

    path    of the journal, or the Hub id of a repository that holds it
    base    what it begins from: a packed checkpoint; of a model from its seed the folder with the
            files that belong beside the weights, which are left out without it; else None
    output  directory to make; for tensors from a seed that are no model a .safetensors file, in
            the container format, where the scale of a group is 2^(e / 32)
    upto    the number of the first step that is left out; None: all

    Returns what the record says of it, and of a model the files that are left out ("missing").
    Raises UsageError where the base is another, DigestError where it is damaged, OutputError where
    the output exists.
    """
    output = Path(output).expanduser()
    check_free(output)
    journal = open_journal(path)
    packed, records, folder = open_base(journal, base)
    about = _about(journal, upto)
    if packed is None and journal.header.model is None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(output, file_of_seed(journal, upto)[0], f".{os.getpid()}")
        return about
    if packed is None:
        source = Path(journal.path) if folder is None else folder
        with fresh_output(source, output, folder=True) as partial:
            return about | {"missing": write_model(journal, folder, partial, upto, about)}
    check_uncoded(packed, records)
    check_data(packed, records)
    with rewritten(packed, output) as partial:
        now = _write_weights(journal, packed, records, partial, upto)
        _renew_record(packed, records, now, partial, about)
    return about


def open_base(
    journal: Journal, base: str | Path | None
) -> tuple[Checkpoint | None, dict[str, Record], Path | None]:
    """What a journal begins from: a packed checkpoint and its records, or None and {}.

    And the folder with the files beside a model that begins from its seed, if it is named. Raises
    UsageError where it is another, and where one is missing, or there is none.
    """
    model = journal.header.model
    if model is not None and base is not None:
        folder = locate(base, config_only=True)
        for name, digest_of_file in model.files.items():
            there = (folder / name).is_file()
            if not there or sha256(folder / name) != digest_of_file:
                raise another_file(folder / name, digest_of_file)
        return None, {}, folder
    packed, records = (None, {}) if base is None else open_packed(base)
    check_base(journal.path, journal.header, None if packed is None else records)
    return packed, records, None


def open_journal(path: str | Path) -> Journal:
    """A journal by its path, or from the Hub: user/name[@revision] that is no file.

    Raises CheckpointError for what the Hub answers, or a repository with another number of them.
    """
    named = split_id(str(path))
    if os.path.exists(path) or named is None or "/" not in named[0] or named[0].endswith(SUFFIX):
        return read_journal(path)
    return read_journal(fetch_file(*named, SUFFIX))


@contextmanager
def replayed_directory(path: str | Path, base: str | Path) -> Iterator[Path]:
    """A packed checkpoint of a journal on its base, for as long as it takes to load it."""
    with tempfile.TemporaryDirectory(prefix="ternarize-steps-") as folder:
        replay(path, base, Path(folder) / "replayed")
        yield Path(folder) / "replayed"


def replayed_rows(
    path: str | Path,
    base: str | Path | None,
    name: str,
    rows: tuple[int, int] | None = None,
    *,
    upto: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows of one tensor after a journal's steps, for what these rows cost.

    rows  first and last + 1, counted through a stack of matrices; None: all

    Returns trits (n, cols) int8 and scales (n or 1, groups) float32. Raises UsageError for a tensor
    or rows that there are not, and where the base is another.
    """
    journal = open_journal(path)
    packed, records, _ = open_base(journal, base)
    parts = parts_of_start(journal.header, records)
    part = next((each for each in parts if each.name == name), None)
    if part is None:
        raise UsageError("--tensor", f"{name!r} is not moved by steps", "one that is ternary")
    if packed is not None:
        check_data(packed, {name: records[name]})
    whole, cols = torch.Size(part.shape[:-1]).numel(), part.shape[-1]
    first, stop = rows or (0, whole)
    if not 0 <= first < stop <= whole:
        raise UsageError("--rows", f"{first}:{stop}", f"some of the {whole} rows of {name}")
    shared = part.shape[-2] if part.group_size == 0 else 1  # rows that have a scale in common
    of_scales = first // shared, (stop - 1) // shared + 1
    groups = part.scales_shape[-1]
    if packed is None:
        trits = start_of(part, journal.header, (first, stop))
        stored = start_scales(part, of_scales[1] - of_scales[0])
    else:
        width = records[name].stored_shapes()[0][-1]
        raw = packed.read(name, first * width, stop * width).view(-1, width)
        trits = unpack(raw, cols, part.group_size)
        stored = packed.read(name + SCALE_SUFFIX, of_scales[0] * groups, of_scales[1] * groups)
        stored = stored.view(-1, groups)
    exponents = torch.zeros(stored.shape, dtype=torch.int8)
    steps = journal.effective(upto)
    for target, values, at in (
        (TRITS, trits, part.trits + first * cols),
        (SCALES, exponents, part.scales + of_scales[0] * groups),
    ):
        Moves(steps, target, journal.header.seed).apply(values.view(-1), at)
    row = torch.arange(first, stop) // shared - of_scales[0]
    zero = scale_values(stored[row]) == 0
    trits.masked_fill_(spread_scales(zero, cols, part.group_size), 0)
    scales = scale_values(moved_scales(stored[row], exponents[row]))
    if not shared > 1:  # of a whole matrix some rows do not tell whether all of it is zero
        scales[largest_of_groups(trits.abs(), part.group_size or -1) == 0] = 0
    return trits, scales


def write_rows(
    path: str | Path,
    base: str | Path | None,
    name: str,
    rows: tuple[int, int] | None,
    output: str | Path,
    *,
    upto: int | None = None,
) -> dict[str, Any]:
    """Write what `replayed_rows` gives into a .safetensors file.

    NAME has its trits (I8), NAME_scale its scales (F32). Returns what `replay` does. Raises
    OutputError where the file exists.
    """
    output = Path(output).expanduser()
    check_free(output)
    trits, scales = replayed_rows(path, base, name, rows, upto=upto)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, save({name: trits, name + SCALE_SUFFIX: scales}), f".{os.getpid()}")
    return _about(open_journal(path), upto)


def _about(journal: Journal, upto: int | None) -> dict[str, Any]:
    """What the record says of the steps."""
    steps = journal.effective(upto)
    return {
        "journal": {"sha256": sha256(Path(journal.path)), "upto": upto},
        "steps": len(steps),
        "perturbations": sum(len(step.chosen) for step in steps),
    }


def _write_weights(
    journal: Journal,
    packed: Checkpoint,
    records: Mapping[str, Record],
    folder: Path,
    upto: int | None,
) -> dict[str, Record]:
    """The base's files of weights after steps, a tensor at a time; returns their records."""
    moved = {each for p in parts_of_base(records) for each in (p.name, p.name + SCALE_SUFFIX)}
    headers = {file: read_header(packed.directory / file) for file in packed.files}
    own = {f: [n for n in records if packed.tensors[n].file == f] for f in packed.files}

    def head_of(file: str, records: Mapping[str, Record]) -> bytes:
        here = {name: records[name] for name in own[file]}
        return head_again(packed, file, headers[file].entries, here)

    places = dict[str, int]()
    for file, header in headers.items():
        with (folder / file).open("wb") as out:
            out.write(head_of(file, records))
            for name, entry in header.entries.items():
                places[name] = out.tell()
                if name in moved:
                    out.truncate(out.seek(entry.nbytes, os.SEEK_CUR))
                    continue
                count = packed.tensors[name].numel
                for at in range(0, count, _PIECE):
                    piece = packed.read(name, at, min(at + _PIECE, count))
                    out.write(byte_view(piece).numpy().data)
    now = dict(records)
    for part, trits, exponents, stored in replayed(
        packed, records, journal.header, journal.effective(upto)
    ):
        tensors = stored_after(trits, exponents, stored, part)
        now[part.name] = replace(records[part.name], sha256=digest(*tensors))
        for name, tensor in zip((part.name, part.name + SCALE_SUFFIX), tensors, strict=True):
            with (folder / packed.tensors[name].file).open("r+b", buffering=0) as there:
                write_at(there, places[name], byte_view(tensor).numpy().data)
    for file in packed.files:  # of the same length, with the digests
        with (folder / file).open("r+b", buffering=0) as there:
            write_at(there, 0, memoryview(head_of(file, now)))
    return now


def _renew_record(
    packed: Checkpoint,
    records: Mapping[str, Record],
    now: Mapping[str, Record],
    output: Path,
    about: dict[str, Any],
) -> None:
    """The record of the conversion, with the new digests, and without figures of the base: as it
    was, if no step has moved anything."""
    record = check_record(packed, dict(records))
    if record is None or all(now[name].sha256 == records[name].sha256 for name in records):
        return
    for name, row in record["tensors"].items():
        if name in now and now[name].sha256 != records[name].sha256:
            if "sha256" in row:
                row["sha256"] = now[name].sha256
            row["method"] = "steps"
            for figure in ("relative_error", "sparsity"):
                row.pop(figure, None)
    for part in ("calibration", "training"):
        record.pop(part, None)
    record["steps"] = {**about, "before": record["steps"]} if "steps" in record else about
    (output / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
