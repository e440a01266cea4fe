"""A training by two processes against one, with one thread each: time, memory, traffic, bytes.

    python benchmarks/ranks_training.py WORK_DIRECTORY [--counts 1 2] [--threads 2] [--json FIGURES]

The model is random and LLaMA-shaped, its texts random words; four micro-batches in a step. Seconds
are of the steps, with looks at held-out text and the states at the end among them; beside them the
processor time of the process that took most, which is what machines of their own would take but for
waiting. Memory is the most in the steps above what the process took before it had read anything
(Linux). Bytes between the processes are those that they count, and what docs/training.md says. With
more than one process `--shard` is measured, too; with `--threads` one process with so many, which
is what the others would take the place of on one machine.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import parser, save_llama, write_figures
from safetensors.torch import save_file

HIDDEN, INNER, LAYERS, VOCAB, LENGTH = 512, 1408, 4, 2048, 256
STEPS, BATCH, PART = 6, 4096, 1024  # tokens of a step, and of a micro-batch
ROWS = 256  # of the texts

CHILD = """
import json, sys, time
from pathlib import Path
import torch
from ternarize.convert.run import convert
from ternarize.plans.recipe import Recipe, Train
from ternarize.ranks import ranks_of_launcher
from ternarize.train import loop, run
source, output, data, told, shard, threads, steps, batch, part = sys.argv[1:]
torch.set_num_threads(int(threads))
found = {}

def memory(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return 1024 * int(line.split()[1])

before = memory("VmRSS")

def timed(job, samples, train=loop.train):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    job.world.all(None)
    sent, start, used = dict(job.world.sent), time.perf_counter(), time.process_time()
    result = train(job, samples)
    job.world.all(None)
    found.update(seconds=time.perf_counter() - start, processor=time.process_time() - used,
                 memory=memory("VmHWM") - before, trained=sum(p.numel() for p in
                 job.parameters.values()), sent=job.world.sent["gradients"])
    return result

run.train = timed
train = Train((data,), steps=int(steps), batch=int(batch), micro_batch=int(part),
              shard=shard == "1")
with ranks_of_launcher() as world:
    convert(source, output, Recipe("itf", train=train), threads=1, world=world)
Path(told).write_text(json.dumps(found))
"""


class Kind(NamedTuple):
    """So many processes, threads of each, and whether blocks are divided."""

    processes: int
    threads: int = 1
    shard: bool = False


def make(work: Path) -> tuple[Path, Path]:
    """The model and its texts."""
    source, data = work / "source", work / "data.safetensors"
    save_llama(
        source,
        words=VOCAB,
        hidden=HIDDEN,
        inner=INNER,
        layers=LAYERS,
        keys=HIDDEN // 2,
        length=LENGTH,
    )
    save_file({"input_ids": torch.randint(3, VOCAB, (ROWS, LENGTH))}, data)
    return source, data


def one_run(work: Path, source: Path, data: Path, kind: Kind) -> dict[str, Any]:
    """What some processes take: the most of any, bytes all together."""
    count, threads, shard = kind
    output = work / f"packed-{count}-{threads}-{int(shard)}"
    shutil.rmtree(output, ignore_errors=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(count):
        place = {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": str(threads)}
        words = [str(source), str(output), str(data), str(work / f"told-{rank}"), str(int(shard))]
        words += [str(number) for number in (threads, STEPS, BATCH, PART)]
        command = [sys.executable, "-c", CHILD, *words]
        processes.append(subprocess.Popen(command, env={**os.environ, **place}))
    assert not any(process.wait() for process in processes)
    told = [json.loads((work / f"told-{rank}").read_text()) for rank in range(count)]
    row = {name: max(each[name] for each in told) for name in ("seconds", "processor", "memory")}
    trained, sent = told[0]["trained"], sum(each["sent"] for each in told)
    return {**row, "trained": trained, "sent": sent, "output": output}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("work", type=Path)
    arguments.add_argument("--counts", type=int, nargs="+", default=[1, 2])
    arguments.add_argument("--threads", type=int)
    options = arguments.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    source, data = make(options.work)
    kinds = [Kind(count) for count in options.counts]
    kinds += [Kind(count, shard=True) for count in options.counts if count > 1]
    kinds += [Kind(1, options.threads)] if options.threads else []
    rows = {kind: one_run(options.work, source, data, kind) for kind in kinds}
    weights = {
        (row["output"] / "model.safetensors").read_bytes()
        for kind, row in rows.items()
        if kind == Kind(kind.processes)
    }
    assert len(weights) == 1, "the bytes differ"
    first = rows[kinds[0]]
    print(f"{first['trained']:,} weights trained, {STEPS} steps of {BATCH} tokens\n")
    titles = ["processes", "threads of each", "tokens a second"]
    titles += ["seconds", "to one", "processor time", "to one"]
    print("|", " | ".join([*titles, "memory of one, MB", "sent"]), "|")
    print("|---" * 9 + "|")
    for (count, threads, shard), row in rows.items():
        cells = [f"{count}, `--shard`" if shard else str(count), str(threads)]
        cells += [f"{STEPS * BATCH / row['seconds']:,.0f}"]
        for what in ("seconds", "processor"):
            cells += [f"{row[what]:.1f}", f"{row[what] / first[what]:.2f}"]
        cells += [f"{row['memory'] / 1e6:.0f}", "" if shard else f"{row['sent']:,}"]
        print(f"| {' | '.join(cells)} |")
    for count in options.counts:
        told = STEPS * (BATCH // PART + count) * 4 * first["trained"] * (count - 1) // count
        print(f"\nof {count} by docs/training.md: {told:,}")
    write_figures(options.json, __file__, {"rows": [{**r, "output": ""} for r in rows.values()]})


if __name__ == "__main__":
    main()
