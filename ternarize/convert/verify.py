"""Proof that a packed checkpoint is whole, and that it is what its source gives.

Without the source: every file's structure, codes, padding, scales and digests, that the files
agree with each other, and with SHA256SUMS where there is one. With the source: every tensor is
converted again, by the recipe on record, and its digest compared. Nothing is written.

What calibration has found cannot be derived again without its data, which may be gone and would
take hours. Of such a checkpoint each tensor is compared as far as it can be:

    converted again   what calibration left alone: kept, int8, int4, lossless, `itf` as fallback
    by its error      calibrated trits, and trained heads and embeddings in 8 or 4 bits:
                      sum (W - W')^2 / sum W^2 against the source's W, rotated as on record, must be
                      the relative error on record
    in shape alone    biases and norms that calibration has fitted

The error tells any other source from the true one, since W' is fixed by its digest and the figure
has six digits for millions of weights; who can rewrite the record can of course rewrite both.
"""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ternarize.convert.record import relative_error
from ternarize.convert.tensor import Result, convert_tensor
from ternarize.errors import DigestError, FormatError
from ternarize.files import container, metadata
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.json_files import read_json
from ternarize.files.metadata import SCALE_SUFFIX, Record
from ternarize.files.names import MODULE, RECORD
from ternarize.files.sums import check_sums
from ternarize.plans.judge_module import verdicts_on_record
from ternarize.plans.layout import TensorPlan
from ternarize.plans.plan import calibrated_plan, make_plan
from ternarize.plans.recipe import WITHOUT_DATA, Recipe
from ternarize.plans.recipe_files import read_recipe
from ternarize.progress import Progress
from ternarize.sources.packed import check_record, open_packed
from ternarize.threads import THREADS

AGAIN, ERROR, SHAPE = "converted_again", "by_error", "in_shape"  # ways to compare with the source


# A relative error on record has six digits; another machine may add float32 in another order.
TOLERANCE = 2e-6


def verify(
    model: str | Path,
    source: str | Path | None = None,
    *,
    threads: int = THREADS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Check a packed checkpoint in full; with `source`, re-derive it and compare.

    model     packed directory or Hub id
    source    the checkpoint that it was made from; needs the record (ternarize.json)
    progress  called after each tensor

    Returns counts of what was checked: "listed" the files named by SHA256SUMS, None without that
    list (a model saved by save_pretrained); "compared" holds, with a source, how many tensors were
    "converted_again", compared "by_error" or only "in_shape" (see above). Raises FormatError or
    DigestError on the first fault, CheckpointError if the source cannot be read.
    """
    packed, records = open_packed(model)
    total = sum(info.nbytes for info in packed.tensors.values())
    done = 0

    def checked(name: str) -> None:
        nonlocal done
        done += packed.tensors[name].nbytes
        if progress:
            progress(done, total, name, "verifying")

    container.check_data(packed, records, threads=threads, done=checked)
    check_record(packed, records)
    small = [name for name in ("config.json", RECORD) if (packed.directory / name).exists()]
    listed = check_sums(packed.directory, [*packed.files, *small], threads)
    kinds = Counter(record.kind for record in records.values())
    result: dict[str, Any] = {
        "files": len(packed.files),
        "bytes": total,
        "ternary": kinds["ternary"],
        "int8": kinds["int8"],
        "int4": kinds["int4"],
        "kept": kinds["kept"],
        "listed": listed,
        "source_compared": source is not None,
        "compared": None,
    }
    if source is not None:
        result["compared"] = _compare(packed, records, source, progress)
    return result


def _compare(
    packed: Checkpoint, records: dict[str, Record], source: str | Path, progress: Progress | None
) -> dict[str, int]:
    """Compare every tensor with the source; returns how many were compared in which way."""
    table = read_json(packed.directory / RECORD)
    if table is None:
        raise FormatError(
            packed.directory,
            f"has no {RECORD}",
            "the record of its conversion, without which it cannot be repeated",
            "Verify without --source",
        )
    if "steps" in table:
        raise FormatError(
            packed.directory,
            "was moved by the steps of a journal",
            "what a conversion gives",
            "Verify its base with --source, and the journal with `ternarize steps verify`",
        )
    recipe = read_recipe(table)
    of_module = MODULE in (packed.config or {})  # its class is not at hand: the record says what
    verdicts = verdicts_on_record(table["tensors"]) if of_module else None
    plan = make_plan(source, recipe, for_record=True, verdicts=verdicts)
    planned = {t.name: t for t in plan.tensors if not t.tied_to}
    if planned.keys() != records.keys():
        name = sorted(planned.keys() ^ records.keys())[0]
        where = "the source" if name in planned else "the packed checkpoint"
        raise FormatError(
            packed.directory,
            f"{name} is in {where} alone",
            "the same tensors",
            f"Check that {source} is the source",
        )
    total = sum(t.info.nbytes for t in plan.tensors)
    done, ways = 0, Counter({AGAIN: 0, ERROR: 0, SHAPE: 0})
    for name, tensor in planned.items():
        row = table["tensors"][name]
        way = _way_to_compare(tensor, records[name], row, recipe)
        ways[way] += 1
        info = packed.tensors[name]
        where = f"{info.file}: {name}"
        if way == SHAPE:
            same = (info.dtype, info.shape) == (tensor.dtype, tensor.shape)
        else:
            by_error = way == ERROR
            result = _again(packed, records[name], plan.source, tensor, recipe, by_error=by_error)
            same = result is not None
            if result is not None and by_error:
                _check_error(where, relative_error(result), row.get("relative_error"), source)
        if not same:
            raise DigestError(
                where, f"is not what {source} gives by the recipe on record", remedy=_SOURCE
            )
        done += tensor.info.nbytes
        if progress:
            progress(done, total, name, "verifying")
    return dict(ways)


_SOURCE = (
    "Check that it is the source, and that both are unchanged. What another version of ternarize "
    "has converted can differ: verify that without --source, or convert it again"
)


def _way_to_compare(tensor: TensorPlan, record: Record, row: dict[str, Any], recipe: Recipe) -> str:
    """How a tensor can be compared with the source, by what the record says of it."""
    if not recipe.fits:
        return AGAIN
    # what saw too few tokens is not calibrated, but may be rotated, as no plain conversion is, or
    # have a share of zeros, of which the record does not tell how it was met
    if tensor.ternary and (row.get("method") == recipe.method or record.rotation[0]):
        return ERROR
    if tensor.ternary and row.get("method") == WITHOUT_DATA and _has_shares(recipe):
        return ERROR if calibrated_plan(tensor, recipe).rotation == record.rotation else AGAIN
    if not tensor.ternary and row.get("fitted") is True:
        return ERROR if tensor.packed else SHAPE
    return AGAIN


def _has_shares(recipe: Recipe) -> bool:
    """Whether calibration gives matrices a share of zeros."""
    spent = recipe.calibrate is not None and recipe.calibrate.target_bpw is not None
    return recipe.zeros is not None or (spent and recipe.codec == metadata.RANS)


def _again(
    packed: Checkpoint,
    record: Record,
    source: Checkpoint,
    tensor: TensorPlan,
    recipe: Recipe,
    *,
    by_error: bool,
) -> Result | None:
    """Convert the source's tensor in the layout on record; None if that gives something else.

    by_error  with the packed checkpoint in the place of what calibration has found, to measure how
              far its trits are from the weights: the figure is then the same by construction
    """
    if by_error and tensor.ternary:
        tensor = calibrated_plan(tensor, recipe)
    if tensor.packed and record.shape is not None:
        scale = packed.tensors[tensor.name + SCALE_SUFFIX].dtype
        tensor = replace(tensor, group_size=record.group_size, scale_dtype=scale)
        if recipe.calibrate is not None and recipe.calibrate.target_bpw is not None:
            tensor = replace(tensor, planes=record.planes)
    if tensor.record(record.sha256) != record.uncoded():
        return None
    solved = (packed, record) if by_error else None
    result = convert_tensor(source, tensor, recipe, _discard, solved=solved)
    return result if isinstance(result, Result) and result.sha256 == record.sha256 else None


def _check_error(where: str, found: float | None, recorded: Any, source: str | Path) -> None:
    if found is None or not isinstance(recorded, (int, float)):
        same = found is None and recorded is None
    else:
        same = math.isclose(found, recorded, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    if not same:
        what = f"its relative error against {source} is {found}, on record it is {recorded!r}"
        raise DigestError(where, what, "the same", _SOURCE)


def _discard(name: str, offset: int, data: Tensor) -> None:
    """A sink: the digest is all that is wanted."""
