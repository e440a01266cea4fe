"""The conversion: checkpoint in, packed checkpoint out, a piece of a tensor at a time.

    plan (every byte of the output is laid out) -> calibrate, if asked to ->
    for each shard: convert its tensors, seal it with its header ->
    record and other small files -> verify -> rename

The layout is known before the first weight is read, so tensors can be worked on in any order and
by any number of threads with the same bytes as result, the plan's sizes are exact, and the disk is
asked for its space at the start. Work happens in OUTPUT.partial (`workplace`), beside a journal of
the tensors that are done; a second run of the same command checks those against their digests and
goes on. The final name appears by one rename, when everything has been verified. Several processes
can have a part of the tensors each (`parts`); what comes after the shards is then done once.
"""

import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from ternarize.calibrate.pipeline import join
from ternarize.convert.entropy import code_shards
from ternarize.convert.fitting import fit, fit_beside
from ternarize.convert.journal import State, check_same, note, resume
from ternarize.convert.limits import check_disk, threads_that_fit
from ternarize.convert.parts import (
    check_parts,
    check_ranks,
    count_others,
    may_cut,
    put_together,
    refuse_nothing,
    shards_of_part,
)
from ternarize.convert.record import write_small_files
from ternarize.convert.tensor import Change, Result, convert_tensor
from ternarize.convert.workplace import (
    JOURNAL,
    STREAMED,
    check_parts_ended,
    check_place,
    check_unchanged,
    claim,
    exclusive,
    finished,
    has_blocks,
    identity,
    part_at_work,
    part_folder,
    remove,
    remove_parts,
    stamps,
    streamed_source,
    tidy,
)
from ternarize.errors import (
    REMEDY,
    CheckpointError,
    FormatError,
    OutputError,
    UsageError,
    WeightError,
    is_no_memory,
)
from ternarize.files import container, metadata
from ternarize.files.checkpoint import open_files
from ternarize.files.metadata import RANS
from ternarize.files.outputs import partial_of, reserve, sync_files, write_at
from ternarize.files.sums import SUMS, format_sums, listed, sha256
from ternarize.measure.figures import check_bounds
from ternarize.plans.judge import Verdict
from ternarize.plans.layout import Plan, Shard, TensorPlan, header_bytes
from ternarize.plans.lossless import check_lossless, own_groups
from ternarize.plans.parts import PartNumber, part_table
from ternarize.plans.plan import make_plan, refuse_empty
from ternarize.plans.recipe import Recipe
from ternarize.progress import Progress
from ternarize.qat.rounding import Form
from ternarize.ranks import World, check_gpus
from ternarize.runtime.rehearsal import rehearse
from ternarize.threads import THREADS, TICK, let_through, result_of, thread_pool
from ternarize.train.divided import check_divided
from ternarize.train.run import Log
from ternarize.trits.ternary import check_device


def convert(
    model: str | Path,
    output: str | Path,
    recipe: Recipe = Recipe(),  # noqa: B008
    *,
    threads: int = THREADS,
    device: str | None = None,
    progress: Progress | None = None,
    min_quality: Mapping[str, float] | None = None,
    stream: bool = False,
    allow_missing: bool = False,
    log: Log | None = None,
    forms: Mapping[str, Form] = {},  # noqa: B006
    verdicts: Mapping[str, Verdict] | None = None,
    part: PartNumber | None = None,
    finish: bool = False,
    world: World | None = None,
) -> dict[str, Any]:
    """Convert a checkpoint into a packed one, and return its record.

    That is what ternarize.json holds, and "notes": what there is to say about the source and about
    files of its folder that were left out, which is no part of the result.

    model     directory, or Hub id user/name[@revision]
    output    directory that must not exist yet; its parents are made
    threads   tensors worked on at once; the result does not depend on it
    device    where weights are ternarized, "cpu" (native code) or e.g. "cuda"; likewise, but for
              calibration, whose sums are those of the machine
    progress  called after each tensor with (bytes of the source done, in all, tensor, "packing");
              before that, with calibration, for each block and part of it, in stages of their own
    min_quality  bounds on the figures that calibration measures: {"kl_divergence": 0.2}; see
                 `ternarize.measure.figures.check_quality`
    stream    have one weight file of a Hub model at a time on the disk, beside the output, and
              delete it once it is packed; not with calibration, which reads them again and again
    allow_missing  convert a source that lacks parameters of its model: the record names them, and
              transformers makes them up when the result is loaded
    log       called after each step of training with (step, figures by name)
    forms     parameter of the model -> its groups and rotation, of a source whose weights are
              ternary, and rotated, as a training has left them
    verdicts  on the tensors, where the source is the state dict of a module that is at hand
    part      (i, n): convert the i-th of n parts alone, counted from 1, beside other processes or
              machines that have the others; what is returned is then as of `plans.parts.part_table`
    finish    put together what parts have done, all of it; without it the rest is converted here
    world     processes that calibrate and train together, each of which calls this, and the first
              of which writes; what is returned in the others is {}

    Raises UsageError for options that cannot be used, CheckpointError (WeightError) or FormatError
    for a source that cannot be read or converted, SelectionError where no rule says what becomes of
    a tensor, OutputError where the result cannot be put, QualityError where it is worse than
    `min_quality` allows.
    After an error in the source nothing is left; after an interruption or a QualityError
    OUTPUT.partial is, and the same call goes on from there.
    """
    bounds = min_quality or {}
    check_bounds(recipe, bounds)
    check_parts(recipe, part, finish=finish)
    world = world or World()
    check_ranks(recipe, world.size)
    if stream and recipe.fits:
        raise UsageError(
            "--stream",
            "with calibration, which reads the weights more than once",
            "one of the two",
            "Leave out --stream, or --dataset and --method gptq",
        )
    output = Path(os.path.expanduser(output))
    partial, device = partial_of(output), check_device(device)
    if recipe.training:
        check_divided(recipe.training, world.size)
    check_gpus(world, device)
    place = partial if part is None else part_folder(partial, part)

    def planned(folder: Path | None = None) -> Plan:
        plan = checked(make_plan(model, recipe, stream=folder, verdicts=verdicts), allow_missing)
        plan.shards = [_formed(shard, forms) for shard in plan.shards]
        if world.rank == 0:
            _check_output(plan, output, part)
        return plan

    def run(plan: Plan) -> dict[str, Any]:
        work = _Work(plan, place, max(1, threads), device, progress, log, world)
        if part is not None:
            return _carry_out_part(work, output, part)
        check_parts_ended(partial)
        record = finished(output)
        join(plan, world, needed=record is None)
        record = record or _carry_out(work, output, bounds, finish=finish)
        return {**record, "notes": [*plan.remarks(), *_without_zeros(recipe, record)]}

    alone = exclusive(partial) if part is None else part_at_work(partial, part)
    if stream:  # one file at a time, already when the headers are fetched
        with alone, streamed_source(place) as folder:
            return run(planned(folder))
    plan = planned()
    if world.rank:
        if join(plan, world):
            fit_beside(plan, device, world)
        return {}
    with alone:
        _check_output(plan, output, part)  # again: another conversion may just have ended
        return run(plan)


def _formed(shard: Shard, forms: Mapping[str, Form]) -> Shard:
    """A shard whose ternary tensors lie as the forms of their parameters say."""
    tensors = []
    for tensor in shard.tensors:
        form = next((forms[p] for p in tensor.choice.parameters if p in forms), None)
        if form is not None and tensor.ternary:
            tensor = replace(
                tensor,
                group_size=form.group_size,
                scale_dtype=form.scale_dtype,
                scale_bits=form.scale_bits,
                rotation=(form.block, form.seed),
            )
        tensors.append(tensor)
    return replace(shard, tensors=tuple(tensors))


def checked(plan: Plan, allow_missing: bool) -> Plan:
    """A plan that is worth carrying out: the result will load, and something becomes ternary.

    Raises CheckpointError, SelectionError, UsageError where it is not.
    """
    plan = rehearse(plan, allow_missing=allow_missing)
    refuse_empty(plan)
    if plan.missing and plan.recipe.fits:
        raise UsageError(
            "--allow-missing",
            f"{plan.model} lacks {plan.missing[0]}, and calibration runs the model",
            "every weight",
            "Complete the checkpoint, or leave out --dataset and --method gptq",
        )
    return plan


def _without_zeros(recipe: Recipe, record: dict[str, Any]) -> list[str]:
    """A note on the tensors, if any, that keep fewer zeros than were asked for."""
    rows = [row for row in record.get("tensors", {}).values() if row.get("method") == "lossless"]
    count = sum(row["sparsity"] < (recipe.zeros or 0.0) for row in rows)
    if not count:
        return []
    some = f"{count} tensor{'s' * (count > 1)} that were ternary already"
    return [f"zeros {recipe.zeros:g}: not in {some}, which are packed without loss"]


def _check_output(plan: Plan, output: Path, part: PartNumber | None) -> None:
    check_place(plan, output, part)
    if part is None:
        check_disk(plan, partial_of(output), plan.shards, coded=plan.recipe.codec == RANS)
    else:
        check_disk(plan, part_folder(partial_of(output), part), shards_of_part(plan, part))


@dataclass(frozen=True)
class _Work:
    """What a conversion is given: what becomes of what, where, and by what means.

    partial  the place of work: of all, or of a part
    """

    plan: Plan
    partial: Path
    threads: int
    device: str
    progress: Progress | None
    log: Log | None
    world: World


def _carry_out_part(work: _Work, output: Path, part: PartNumber) -> dict[str, Any]:
    """Convert the tensors of a part that are not done yet; returns what all of it is."""
    plan, place = work.plan, work.partial
    table = part_table(plan, part, cut=may_cut(plan))
    if output.exists():  # of this plan, and only to be tidied up: nothing is left to convert
        return table
    work = replace(work, threads=threads_that_fit(plan, work.threads))
    claim(place)
    with _told(work):
        known, before = identity(plan), stamps(plan)
        check_same(partial_of(output), known)
        state = resume(shards_of_part(plan, part), place, known)
        count_others(plan, partial_of(output), place, known, state)
        state.unsealed = {index for index in state.unsealed if state.undone(index)}
        for index, file in enumerate(plan.source.files):
            if plan.source.stream is not None and index not in state.unsealed:
                plan.source.stream.release(file)  # which was fetched to see what is tied
        _convert_shards(work, state, seal=False)
        check_unchanged(plan, before)
    return table


def _carry_out(
    work: _Work, output: Path, bounds: Mapping[str, float], *, finish: bool
) -> dict[str, Any]:
    """Convert into OUTPUT.partial and rename it to `output`; returns the record."""
    plan, partial = work.plan, work.partial
    if not plan.recipe.fits:  # of what calibration needs there is no prediction
        work = replace(work, threads=threads_that_fit(plan, work.threads))
    if finish:
        refuse_nothing(plan, partial)
    claim(partial)
    with _told(work, keep=finish):
        known, before = identity(plan), stamps(plan)
        check_same(partial, known)
        state = resume(plan.shards, partial, known)
        put_together(plan, partial, known, state, all_done=finish)
        if plan.recipe.fits:
            how: dict[str, Any] = {"device": work.device, "progress": work.progress}
            fit(plan, partial, state, bounds, log=work.log, world=work.world, **how)
        _convert_shards(work, state)
        if plan.recipe.codec == RANS:
            files = [shard.file for shard in state.shards]
            state.coded = code_shards(partial, files, work.threads, work.progress)
        record = write_small_files(plan, state, partial)
        check_unchanged(plan, before)
        _verify(work, state)
        remove_parts(partial)
        if (partial / STREAMED).exists():  # of this stream, or of an earlier one that was killed
            shutil.rmtree(partial / STREAMED)
        sync_files(partial, but=[shard.file for shard in state.shards])
        partial.rename(output)
        tidy(output)
    return record


@contextmanager
def _told(work: _Work, *, keep: bool = False) -> Iterator[None]:
    """Tell in one line what goes wrong; remove what has been done where it is of no more use.

    keep  whatever happens: it is what others have done
    """
    source, partial = work.plan.source, work.partial
    try:
        yield
    except (CheckpointError, FormatError, UsageError) as error:
        # a disk or the Hub may come back, bad weights do not; calibrated blocks are worth keeping
        useless = isinstance(error, WeightError) or not has_blocks(partial)
        if useless and not keep and not isinstance(error.__cause__, OSError):
            remove(partial)
        raise
    except OSError as error:
        where = Path(error.filename or partial)
        read = source.directory in where.parents and source.stream is None
        found = f"cannot be {'read' if read else 'written'} ({error.strerror or error})"
        remedy = REMEDY.get(error.errno or 0, "Look after the disk")
        raise OutputError(
            where,
            f"{found}; what is done is kept",
            remedy=f"{remedy}, then run the same command again",
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not is_no_memory(error):
            raise
        need = work.plan.convert_memory(work.threads)
        raise OutputError(
            partial,
            f"out of memory; {work.threads} threads were expected to need {need / 1e9:.3f} GB "
            "beside the program itself; what is done is kept",
            remedy="Make room or use fewer --threads, then run the same command again",
        ) from error


def _convert_shards(work: _Work, state: State, *, seal: bool = True) -> None:
    """Convert and seal the shards in their order, again where the layout has changed since.

    seal  write their headers, which need what came of all tensors
    """
    stream = work.plan.source.stream
    with (work.partial / JOURNAL).open("a", encoding="utf-8") as journal:
        while state.unsealed:
            index = min(state.unsealed)
            file = work.plan.source.files[index]
            if stream is not None and state.undone(index):
                stream.fetch(file)  # here, where it can be interrupted
                for change in _own_groups(work.plan, state, index):
                    note(state, journal, change)
            while changes := _convert_shard(work, state, index, journal):
                for change in changes:
                    note(state, journal, change)
            if seal:
                _write_header(work.partial, state.shards[index], state.results)
            state.unsealed.remove(index)
            if stream is not None:
                stream.release(file)


def _own_groups(plan: Plan, state: State, index: int) -> list[Change]:
    """What `make_plan` does with weights that it can look at: `own_groups` or `check_lossless`."""
    if plan.recipe.group_size is not None:
        check_lossless(plan.source, state.undone(index), plan.recipe.group_size)
        return []
    tensors = state.shards[index].tensors
    found = own_groups(plan.source, tensors, plan.tensors, read=True)
    return [
        Change(own.name, own.group_size, own.scale_dtype)
        for tensor, own in zip(tensors, found, strict=True)
        if own.group_size != tensor.group_size and own.name not in state.results
    ]


def _convert_shard(work: _Work, state: State, index: int, journal: TextIO) -> list[Change]:
    """Convert the tensors of a shard that are not done; returns the changes that they ask for."""
    shard, plan = state.shards[index], work.plan
    path, layout, base = work.partial / shard.file, shard.layout(), shard.data_start()
    solved = state.calibrated.solved if state.calibrated else {}
    reserve(path, shard.nbytes())

    def one(tensor: TensorPlan) -> Result | Change:
        with path.open("r+b", buffering=0) as file:

            def write(name: str, offset: int, data: Tensor) -> None:
                write_at(file, base + layout[name].start + offset, data.numpy().data)

            found = solved.get(tensor.name)
            return convert_tensor(plan.source, tensor, plan.recipe, write, work.device, found)

    changes = []
    done, total = state.bytes_done(), sum(t.info.nbytes for t in state.tensors)
    with thread_pool(work.threads) as pool:
        futures = {pool.submit(one, tensor): tensor for tensor in state.undone(index)}
        for future in _as_they_end(futures):
            outcome = future.result()
            if isinstance(outcome, Change):
                changes.append(outcome)
                continue
            note(state, journal, outcome)
            done += futures[future].info.nbytes
            if work.progress:
                work.progress(done, total, outcome.name, "packing")
    return changes


def _as_they_end(futures: Mapping[Future[Any], TensorPlan]) -> Iterator[Future[Any]]:
    """Futures of `thread_pool`, each as soon as it has ended, with an open ear for signals."""
    pending = set(futures)
    while pending:
        ended, pending = wait(pending, TICK, FIRST_COMPLETED)
        let_through()
        yield from sorted(ended, key=lambda future: futures[future].name)


def _write_header(partial: Path, shard: Shard, results: Mapping[str, Result]) -> None:
    """Write the header of a shard whose data is complete."""
    tensors, records = [], {}
    for tensor in shard.tensors:
        result = results.get(tensor.name)  # None: it is tied to another
        if result is not None:
            records[tensor.name] = tensor.record(result.sha256)
            tensor = replace(tensor, scale_dtype=result.scale_dtype or tensor.scale_dtype)
        tensors.append(tensor)
    header = header_bytes(replace(shard, tensors=tuple(tensors)).layout(), records)
    length = shard.data_start() - 8
    assert len(header) <= length
    with (partial / shard.file).open("r+b") as file:
        file.write(length.to_bytes(8, "little") + header.ljust(length))


def _verify(work: _Work, state: State) -> None:
    """Check the result as the system reads it back, from memory mostly; write its SHA256SUMS."""
    partial, files = work.partial, [shard.file for shard in state.shards]

    def sync_shards() -> None:
        for name in files:
            sync_files(partial / name)

    # the disk works while the processors check
    with thread_pool(1 + work.threads) as beside:
        synced = beside.submit(sync_shards)
        sums = {name: beside.submit(sha256, partial / name) for name in listed(partial)}
        packed = open_files(partial, files)
        container.check_data(packed, metadata.records_of(packed), threads=work.threads)
        result_of(synced)
        text = format_sums({name: result_of(each) for name, each in sums.items()})
        (partial / SUMS).write_bytes(os.fsencode(text))
