"""A journal replayed on its base: a packed checkpoint again, or rows of a tensor."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ternarize.errors import OutputError, UsageError
from ternarize.files import metadata
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.container import check_data, digest
from ternarize.files.headers import (
    DTYPE_NAMES,
    Entry,
    byte_view,
    file_head,
    read_bytes,
    read_header,
)
from ternarize.files.json_files import strict_json
from ternarize.files.metadata import KEY, SCALE_SUFFIX, Record
from ternarize.files.names import RECORD
from ternarize.files.outputs import check_free, sync_files, write_whole
from ternarize.files.sums import SUMS, renew_sums, sha256
from ternarize.sources.fetch import fetch_file, split_id
from ternarize.sources.packed import check_record, check_uncoded, open_packed
from ternarize.steps.base import (
    check_base,
    moved_scales,
    opened_state,
    parts_of_base,
    replayed,
    stored_after,
)
from ternarize.steps.generator import SCALES, TRITS
from ternarize.steps.journal import SUFFIX, Journal, read_journal
from ternarize.steps.replay import Moves, parts_in_order, start_of
from ternarize.trits.base3 import unpack
from ternarize.trits.scales import scale_values
from ternarize.trits.ternary import largest_of_groups, spread_scales

_PIECE = 1 << 24  # bytes copied at a time


def replay(
    path: str | Path, base: str | Path | None, output: str | Path, *, upto: int | None = None
) -> dict[str, Any]:
    """Write what a journal makes of its base: a packed checkpoint like it, or one file.

    path    of the journal, or the Hub id of a repository that holds it
    base    packed checkpoint that it begins from; None for one that begins from its seed
    output  directory to make; for a start from the seed a .safetensors file, in the container
            format, where the scale of a group is 2^(e / 32)
    upto    the number of the first step that is left out; None: all

    Returns what the record says of it. Raises UsageError where the base is another, DigestError
    where it is damaged, OutputError where the output exists.
    """
    output = Path(output).expanduser()
    check_free(output)
    journal = open_journal(path)
    if base is None:
        _write_from_seed(journal, output, upto)
        return _about(journal, upto)
    packed, records = open_packed(base)
    check_base(path, journal.header, records)
    check_uncoded(packed, records)
    check_data(packed, records)
    if packed.directory.resolve() in output.resolve().parents:
        raise OutputError(output, "is within the base", "a place outside", "Name another")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        made = Path(folder) / "made"
        about = _write_packed(journal, packed, records, made, upto)
        made.rename(output)
    return about


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
    packed, records = (None, {}) if base is None else open_packed(base)
    if packed is not None:
        check_base(path, journal.header, records)
    parts = parts_in_order(journal.header.tensors) if packed is None else parts_of_base(records)
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
        stored = torch.ones(of_scales[1] - of_scales[0], groups)
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


def _write_packed(
    journal: Journal,
    packed: Checkpoint,
    records: Mapping[str, Record],
    output: Path,
    upto: int | None,
) -> dict[str, Any]:
    """The base's files, with the tensors that steps have moved."""
    top = os.fspath(packed.directory)  # weights of the same name below are those of modules
    shutil.copytree(
        top, output, ignore=lambda at, names: {*packed.files, SUMS} & {*names} if at == top else ()
    )
    moved = replayed(packed, records, journal.header, journal.effective(upto))
    after: dict[str, tuple[Tensor, Tensor]] = {}  # those of one file
    now = dict(records)
    for part, trits, exponents, stored in moved:
        tensors = stored_after(trits, exponents, stored, part)
        now[part.name] = replace(records[part.name], sha256=digest(*tensors))
        after[part.name] = tensors
    for file in packed.files:
        _copy_file(packed, file, output / file, now, after)
    about = _about(journal, upto)
    _renew_record(packed, records, now, output, about)
    if (packed.directory / SUMS).is_file():
        renew_sums(output)
    sync_files(output)
    return about


def _copy_file(
    packed: Checkpoint,
    file: str,
    output: Path,
    records: Mapping[str, Record],
    after: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """One file of the base, with new tensors in the place of those in `after`."""
    source = packed.directory / file
    header = read_header(source)
    said = strict_json(header.metadata[KEY])
    here = {name: records[name] for name in said["tensors"]}
    table = dict(header.metadata)
    table |= metadata.dump_metadata(here, recorded=said.get("recorded") is True)
    with output.open("wb") as out:
        out.write(file_head(header.entries, table))
        for name, entry in header.entries.items():
            owner = name.removesuffix(SCALE_SUFFIX)
            if name in after:
                out.write(byte_view(after[name][0]).numpy().data)
            elif name not in here and owner in after:
                out.write(byte_view(after[owner][1]).numpy().data)
            else:
                for at in range(0, entry.nbytes, _PIECE):
                    size = min(_PIECE, entry.nbytes - at)
                    piece = read_bytes(source, header.data_start + entry.start + at, size)
                    out.write(piece.numpy().data)


def _renew_record(
    packed: Checkpoint,
    records: Mapping[str, Record],
    now: Mapping[str, Record],
    output: Path,
    about: dict[str, Any],
) -> None:
    """The record of the conversion, with the new digests, and without figures of the base."""
    record = check_record(packed, dict(records))
    if record is None:
        return
    for name, row in record["tensors"].items():
        if "sha256" in row and name in now:
            row["sha256"] = now[name].sha256
    for part in ("calibration", "training"):
        record.pop(part, None)
    record["steps"] = about
    (output / RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")


def _write_from_seed(journal: Journal, output: Path, upto: int | None) -> None:
    """One container file with the tensors of a journal that begins from its seed."""
    if journal.header.base is not None:
        raise UsageError(
            journal.path,
            "begins from a packed checkpoint",
            "that checkpoint beside it",
            "Name it with --base",
        )
    state = opened_state(journal.header, None, {})
    state.apply(journal.effective(upto))
    names = {part.name for part in state.parts}
    taken = [n for n in names if n == "__metadata__" or n.removesuffix(SCALE_SUFFIX) in names - {n}]
    if taken:
        found = f"a tensor is called {min(taken)!r:.80}, as another entry of the file would be"
        raise UsageError(journal.path, found, "other names", "Read its rows one by one")
    tensors: dict[str, Tensor] = {}
    records: dict[str, Record] = {}
    for part in state.parts:
        ones = torch.ones(part.scales_shape)
        trits, exponents = state.trits[part.name], state.exponents[part.name]
        stored, scales = stored_after(trits, exponents, ones, part)
        tensors |= {part.name: stored, part.name + SCALE_SUFFIX: scales}
        records[part.name] = Record(digest(stored, scales), part.shape, part.group_size)
    entries, at = dict[str, Entry](), 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        entries[name] = Entry(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), at, size)
        at += size
    head = file_head(entries, metadata.dump_metadata(records))
    body = b"".join(byte_view(tensor).numpy().tobytes() for tensor in tensors.values())
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, head + body, f".{os.getpid()}")
