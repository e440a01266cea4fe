"""What each of several processes will read, write, hold and send, and how long that takes.

Without data these are the parts of `convert --part`, with the plan's own bytes. With calibration
they are the processes of torchrun: of T tokens that calibrate and U beside them (held out, and to
report on), and blocks of w weights whose matrices have r rows and c columns, each of N processes

    reads   all of the source;   writes   the packed blocks, the first one the result, too
    holds   16 h (T + 2 U) / n of activations (h columns, n = min(N, 8) that have samples), 8 w of
            the largest block (the source's weights, and what becomes of them), and of its sums
            over the samples ("sums") 8 (c^2 + r c), or of experts 4 c^2 for each that it solves
    sends   what docs/calibration.md says, divided by N, were the inputs of all matrices different
    does    FORWARD operations for each weight that a token meets, / n, and SOLVE r c^2 for each
            matrix, of experts for those that it solves

Only a run tells which matrices share their inputs: so the bytes that are sent are at most these.
A tensor is one of experts where it has three dimensions, or a second number in its name.
Nothing but the plan is read, so that a configuration is enough.
"""

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ternarize.calibrate.data import MAX_SEQ_LEN
from ternarize.calibrate.gptq import PROBE_ROWS
from ternarize.calibrate.pipeline import TOKENS_IN_BATCH
from ternarize.calibrate.ranks import CHUNKS
from ternarize.plans.layout import PIECE, Plan, TensorPlan
from ternarize.plans.parts import names_of_parts, shards_of
from ternarize.plans.recipe import Calibrate
from ternarize.trits.methods import METHODS, itf

# operations, as counted by a product of matrices that takes as long: benchmarks/ranks.py, and of
# solving large matrices benchmarks/calibration.py
FORWARD, SOLVE = 40.0, 120.0


def forecast(
    plan: Plan,
    count: int,
    *,
    bandwidth: float | None = None,
    threads: int = 1,
    cut: bool = True,
    pace: float | None = None,
) -> dict[str, Any]:
    """The work of each of `count` processes, as plain data.

    bandwidth  bytes a second that each reads, writes and sends; None: no times of that
    threads    of each process
    cut        of a conversion without data: whether files may be cut (plans/parts.py)
    pace       what `pace_of` gives, so that several forecasts are of one measurement; None:
               measured now

    Returns {"processes", "bandwidth", "threads", "ranks"}; of each rank "read_bytes",
    "written_bytes", "memory_bytes" (above the interpreter with torch loaded), of which
    "sums_bytes" are sums over the samples, "sent_bytes", "processor_seconds" on this machine, and
    "transfer_seconds" with a bandwidth.
    """
    calibrate = plan.recipe.calibrate
    pace = (pace_of(plan) if pace is None else pace) / threads
    if calibrate is None:
        ranks = _without_data(plan, count, threads, pace, cut=cut)
    else:
        ranks = _calibrated(plan, calibrate, count, pace)
    for row in ranks if bandwidth else ():
        moved = row["read_bytes"] + row["written_bytes"] + row["sent_bytes"]
        row["transfer_seconds"] = moved / bandwidth
    found = {"processes": count, "bandwidth": bandwidth, "threads": threads}
    return {**found, "ranks": ranks}


def pace_of(plan: Plan) -> float:
    """Seconds of one thread on this machine, measured for a moment: for an operation of a product
    of matrices, or without data for a weight.
    """
    if plan.recipe.calibrate is not None:
        square = torch.randn(1024, 1024)
        return _seconds(lambda: square @ square) / (2 * 1024**3)
    method, some = METHODS.get(plan.recipe.method, itf), torch.randn(PIECE >> 11, 1 << 11)
    size = plan.recipe.group_size
    return _seconds(lambda: method(some, 128 if size is None else size)) / some.numel()


def _without_data(
    plan: Plan, count: int, threads: int, pace: float, *, cut: bool
) -> list[dict[str, Any]]:
    names = names_of_parts(plan, count, cut=cut)
    found = []
    for own in names:
        shards = [shard for shard in shards_of(plan, own) if shard.tensors]
        weights = sum(t.info.numel for t in plan.tensors if t.ternary and t.name in own)
        found.append(
            {
                "read_bytes": sum(t.info.nbytes for shard in shards for t in shard.tensors),
                "written_bytes": sum(shard.nbytes() for shard in shards),
                "memory_bytes": plan.convert_memory(threads),
                "sums_bytes": 0,
                "sent_bytes": 0,
                "processor_seconds": weights * pace,
            }
        )
    return found


class _Samples(NamedTuple):
    """Tokens that calibrate, tokens held out (as many are to report on), and chunks of the first.

    used  experts that a token meets; None: the configuration does not say
    """

    train: int
    held: int
    chunks: int
    used: int | None


def _calibrated(plan: Plan, calibrate: Calibrate, count: int, pace: float) -> list[dict[str, Any]]:
    length = calibrate.seq_len or MAX_SEQ_LEN
    batches = -(-calibrate.num_samples // max(1, TOKENS_IN_BATCH // length))
    samples = _Samples(
        calibrate.num_samples * length,
        max(1, calibrate.num_samples // 10) * length,
        min(CHUNKS, batches),
        experts_of_a_token(plan.source.config or {}),
    )
    blocks = _blocks(plan.tensors)
    ternary = [t for block in blocks for t in block if t.ternary]
    widths = Counter(t.shape[-1] for t in ternary)
    hidden = max(widths, key=widths.__getitem__, default=0)
    sharing = min(count, samples.chunks)
    active = 16 * hidden * (samples.train + 2 * samples.held) // sharing
    held = [(8 * sum(t.info.numel for t in b), _sums_held(b, count)) for b in blocks]
    weights, sums = max(held, key=sum, default=(0, 0))
    sent = sum(_sent(block, samples, count) for block in blocks)
    forwards = solving = 0.0
    for alike in (alike for block in blocks for alike in _kinds(block)):
        matrices = sum(map(_matrices, alike))
        share = -(-matrices // count) / matrices  # of experts those that one process solves
        for t in (t for t in alike if t.ternary):
            rows, cols = t.shape[-2:]
            forwards += FORWARD * t.info.numel * _met(alike, samples)
            solving += SOLVE * rows * cols**2 * _matrices(t) * share
    packed = sum(t.stored_bytes() for t in ternary)
    return [
        {
            "read_bytes": sum(t.info.nbytes for t in plan.tensors if not t.tied_to),
            "written_bytes": packed + (0 if rank else plan.packed_bytes()),
            "memory_bytes": active + weights + sums,
            "sums_bytes": sums,
            "sent_bytes": sent // count,
            "processor_seconds": (forwards / sharing + solving) * pace,
        }
        for rank in range(count)
    ]


def _sent(block: list[TensorPlan], samples: _Samples, count: int) -> int:
    """Bytes that all processes together send for a block."""
    if count == 1:
        return 0
    total, others = 0, samples.chunks - samples.chunks // count  # chunks that a solver has not
    for alike in _kinds(block):
        tokens = _met(alike, samples) * (1 + samples.held / samples.train)
        for t in (t for t in alike if t.ternary):
            rows, cols = t.shape[-2:]
            if _experts(alike):
                total += int(_matrices(t) * 4 * cols * tokens * (count - 1) / count)
            else:
                chunk = 4 * cols**2 + 8 * cols + 8 + 4 * rows * cols + 8 * rows + 8
                total += others * chunk + samples.held * (4 * cols + 4 * min(rows, PROBE_ROWS))
            total += 2 * (count - 1) * t.stored_bytes()  # what is solved, and then the file
    return total


def _sums_held(block: list[TensorPlan], count: int) -> int:
    """Bytes of the largest sums of a block."""
    found = [0]
    for alike in _kinds(block):
        stack = -(-sum(map(_matrices, alike)) // count)  # of experts, all of which are held
        for t in (t for t in alike if t.ternary):
            rows, cols = t.shape[-2:]
            one = 4 * cols**2
            found.append(stack * one if _experts(alike) else 2 * (one + 4 * rows * cols))
    return max(found)


def _met(alike: list[TensorPlan], samples: _Samples) -> float:
    """Calibration tokens that come to one of the matrices of a kind."""
    experts = _experts(alike)
    share = 1.0 if not experts or samples.used is None else min(1.0, samples.used / experts)
    return samples.train * share


def _matrices(tensor: TensorPlan) -> int:
    return tensor.shape[0] if len(tensor.shape) == 3 else 1


def _experts(alike: list[TensorPlan]) -> int:
    """How many experts there are whose matrices these are; 0: they are of none."""
    if len(alike[0].shape) == 3:
        return alike[0].shape[0]
    return len(alike) if _kind(alike[0].name).count("*") > 1 and len(alike) > 1 else 0


def _kinds(block: list[TensorPlan]) -> list[list[TensorPlan]]:
    """The tensors of a block, those together whose names differ in numbers alone."""
    found: dict[str, list[TensorPlan]] = {}
    for t in block:
        found.setdefault(_kind(t.name), []).append(t)
    return list(found.values())


def _kind(name: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _blocks(tensors: list[TensorPlan]) -> list[list[TensorPlan]]:
    """The tensors of each block that has ternary ones: those up to the first number of a name."""
    found: dict[str, list[TensorPlan]] = {}
    for t in tensors:
        start = re.match(r".*?\.\d+\.", t.name)
        if start is not None and not t.tied_to:
            found.setdefault(start[0], []).append(t)
    return [block for block in found.values() if any(t.ternary for t in block)]


def experts_of_a_token(config: Mapping[str, Any]) -> int | None:
    """How many experts a token meets, by what configurations call so; None where nothing does."""
    for key, value in config.items():
        if re.search(r"experts?_per_tok", key) and isinstance(value, int):
            return value
        if isinstance(value, Mapping) and (found := experts_of_a_token(value)) is not None:
            return found
    return None


def _seconds(work: Callable[[], Any]) -> float:
    """Processor time of one thread, the least of a few tries."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        tries = []
        for _ in range(5):
            start = time.process_time()
            work()
            tries.append(time.process_time() - start)
        return min(tries)
    finally:
        torch.set_num_threads(threads)
