"""A calibration by two processes against one, with one thread each: time, memory, traffic, bytes.

    python benchmarks/ranks.py WORK_DIRECTORY [--counts 1 2] [--repeats 1] [--json FIGURES]

The model is random, LLaMA-shaped, of one block; its samples are random words. Seconds are of
forwards and solving: of the loop over the blocks, in processes that have read all else. Beside
them the processor time of the process that took most, which is what machines of their own would
take but for waiting, and the memory above what it held when the loop began. Bytes between the
processes are those that they count, what docs/calibration.md says, and what the loopback
interface has carried meanwhile (Linux), other programs' and TCP's own with it.
"""

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from common import parser, save_llama, write_figures
from safetensors.torch import save_file

from ternarize.calibrate.ranks import CHUNKS, rank_of, share_out
from ternarize.files.sums import SUMS
from ternarize.ranks import World

HIDDEN, INNER, KV, LAYERS, VOCAB = 384, 1024, 128, 1, 2048
GROUPS = [
    *((HIDDEN, [HIDDEN, KV, KV]), (HIDDEN, [HIDDEN])),
    *((HIDDEN, [INNER, INNER]), (INNER, [HIDDEN])),
]  # columns, and the rows of each matrix, of those with the same inputs
LENGTH, BATCH = 256, 8  # tokens of a sample, samples of a batch
TRAIN, HELD = 8, 1  # batches, the second of a tenth of the samples
HELD_SAMPLES = TRAIN * BATCH // 10

CHILD = """
import json, resource, sys, time
from pathlib import Path
import torch
from ternarize.calibrate import pipeline, run, solve_block
from ternarize.ranks import ranks_of_launcher
from ternarize.convert.run import convert
from ternarize.plans.recipe import Calibrate, Recipe
torch.set_num_threads(1)
source, output, data, told, samples, length, batch = sys.argv[1:]
found, solving = {}, [0.0]

def solve(*args, solve=solve_block.solve, **more):
    start = time.process_time()
    result = solve(*args, **more)
    solving[0] += time.process_time() - start
    return result

solve_block.solve = solve

def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def carried():
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])

class Timed(run.Calibration):
    def run(self):
        for forward in super().run():
            yield forward

    def _step(self):
        if not found:
            self.world.all(None)  # all begin together
            found.update(start=time.perf_counter(), used=time.process_time(), held=peak(),
                         lo=carried())
        super()._step()
        if len(self.done) == len(self.blocks.paths):
            self.world.all(None)
            found.update(seconds=time.perf_counter() - found["start"],
                         processor=time.process_time() - found["used"], solving=solving[0],
                         memory=peak() - found["held"], carried=carried() - found["lo"],
                         sent=dict(self.world.sent))

pipeline.Calibration = Timed
pipeline.TOKENS_IN_BATCH = int(batch)
square = torch.randn(1024, 1024)
tries = []
for _ in range(20):
    start = time.process_time()
    square @ square
    tries.append(time.process_time() - start)
found_rate = 2 * 1024**3 / min(tries)
recipe = Recipe("gptq", calibrate=Calibrate(data, num_samples=int(samples), seq_len=int(length)))
with ranks_of_launcher() as world:
    convert(source, output, recipe, threads=1, world=world)
Path(told).write_text(json.dumps(found | {"rate": found_rate}))
"""


def make(work: Path) -> tuple[Path, Path]:
    """The model and its samples."""
    source, data = work / "source", work / "data.safetensors"
    save_llama(
        source, words=VOCAB, hidden=HIDDEN, inner=INNER, layers=LAYERS, keys=KV, length=LENGTH
    )
    count = (TRAIN + 2 * HELD) * BATCH
    save_file({"input_ids": torch.randint(3, VOCAB, (count, LENGTH))}, data)
    return source, data


def one_run(work: Path, source: Path, data: Path, count: int) -> dict[str, Any]:
    """Calibrate by so many processes; what they have told, and the sums of the result."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    output = work / f"packed-{count}"
    shutil.rmtree(output, ignore_errors=True)
    processes = []
    for rank in range(count):
        place = {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        words = [str(each) for each in (source, output, data, work / f"told-{rank}")]
        words += [str(TRAIN * BATCH), str(LENGTH), str(BATCH * LENGTH)]
        command = [sys.executable, "-c", CHILD, *words]
        processes.append(subprocess.Popen(command, env={**os.environ, **place}))
    assert not any(process.wait() for process in processes)
    told = [json.loads((work / f"told-{rank}").read_text()) for rank in range(count)]
    measured = ("seconds", "processor", "memory", "solving", "rate")
    row = {name: max(each[name] for each in told) for name in measured}
    sent = {kind for each in told for kind in each["sent"]}
    by_kind = {kind: sum(each["sent"].get(kind, 0) for each in told) for kind in sorted(sent)}
    return {**row, "carried": told[0]["carried"], "sent": by_kind, "sums": output / SUMS}


def formula(count: int) -> dict[str, int]:
    """Bytes of sums and of held-out tokens, as docs/calibration.md says."""
    found = {"sums": 0, "tokens": 0}
    for c, rows in GROUPS:
        solvers = share_out({at: (r + c) * c**2 for at, r in enumerate(rows)}, count)
        for solver in set(solvers.values()):
            own = [r for at, r in enumerate(rows) if solvers[at] == solver]
            chunk = 4 * c**2 + 8 * c + 8 + sum(4 * r * c + 8 * r + 8 for r in own)
            batch = HELD_SAMPLES * LENGTH * 4 * (c + sum(min(r, 256) for r in own))
            chunks = range(min(CHUNKS, TRAIN))
            found["sums"] += LAYERS * chunk * sum(k % count != solver for k in chunks)
            holders = [rank_of(World(0, count), "held", at) for at in range(HELD)]
            found["tokens"] += LAYERS * batch * sum(holder != solver for holder in holders)
    return found


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("work", type=Path)
    arguments.add_argument("--repeats", type=int, default=1)
    arguments.add_argument("--counts", type=int, nargs="+", default=[1, 2])
    options = arguments.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    source, data = make(options.work)
    rounds: list[dict[int, dict[str, Any]]] = []
    for _ in range(options.repeats):
        rounds.append({n: one_run(options.work, source, data, n) for n in options.counts})
        print(json.dumps(rounds[-1], default=str), file=sys.stderr, flush=True)
        digests = {n: row.pop("sums").read_bytes() for n, row in rounds[-1].items()}
        assert len(set(digests.values())) == 1, "the bytes differ"
    tokens = TRAIN * BATCH * LENGTH
    print(f"{LAYERS} block, hidden {HIDDEN}, inner {INNER}, {tokens:,} tokens\n")
    print("| processes | seconds | to one | processor time | to one | memory of one, MB |")
    print("|---|---|---|---|---|---|")
    for count in options.counts:
        cells = [str(count)]
        for kind in ("seconds", "processor"):
            values = [row[count][kind] for row in rounds]
            ratios = [row[count][kind] / row[options.counts[0]][kind] for row in rounds]
            cells += [f"{statistics.median(values):.1f}", f"{statistics.median(ratios):.2f}"]
        memory = statistics.median(row[count]["memory"] for row in rounds)
        print(f"| {' | '.join(cells)} | {memory / 1e6:.0f} |")
    alone = rounds[0].get(1)
    if alone is not None:
        weights = LAYERS * sum(c * sum(rows) for c, rows in GROUPS)
        work = LAYERS * sum(c**2 * sum(rows) for c, rows in GROUPS)
        forwards = (alone["processor"] - alone["solving"]) * alone["rate"]
        solving = alone["solving"] * alone["rate"] / work
        print(
            f"\nOf one: {alone['solving']:.1f} s of it solving. At the {alone['rate'] / 1e9:.0f} "
            f"GFLOP/s of a product of 1024 x 1024, {forwards / weights / tokens:.1f} operations "
            f"for each weight and token, {solving:.0f} for rows x columns^2 of a matrix"
        )
    print("\n| processes | bytes of | counted | by the formula |\n|---|---|---|---|")
    for count in options.counts:
        for kind, size in rounds[0][count]["sent"].items():
            told = formula(count).get(kind)
            print(f"| {count} | {kind} | {size:,} | {'' if told is None else f'{told:,}'} |")
        carried = rounds[0][count]["carried"]
        whole = sum(rounds[0][count]["sent"].values())
        print(f"| {count} | all | {whole:,} | on the interface {carried:,} |")
    write_figures(options.json, __file__, {"rounds": rounds})


if __name__ == "__main__":
    main()
