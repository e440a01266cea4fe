"""The shards of a conversion stored by their frequencies, once all of them are whole.

Up to then every byte has its place, so that a conversion is broken off and taken up anywhere. A
shard is coded beside the one that it replaces, and takes its name by one rename; which of the two
is there its header says, and the digests of both are the same.
"""

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

from ternarize.convert.workplace import CODING
from ternarize.files.checkpoint import open_files
from ternarize.files.metadata import RANS, records_of
from ternarize.files.recoded import recode_file
from ternarize.progress import Progress


def code_shards(
    partial: Path, files: Sequence[str], threads: int, progress: Progress | None
) -> dict[str, int]:
    """Code the tensors of packed files where they lie; returns the bytes of all that they hold.

    files  of `partial`, complete; those that are coded already stay as they are
    """
    scratch, done = partial / CODING, itertools.count(1)
    shutil.rmtree(scratch, ignore_errors=True)  # what a break has left
    scratch.mkdir()
    packed = open_files(partial, list(files))
    records = records_of(packed)

    def told(name: str) -> None:
        if progress is not None:
            progress(next(done), len(records), name, "coding")

    sizes = {name: info.stored_bytes for name, info in packed.tensors.items()}
    for file in files:
        own = {n: r for n, r in records.items() if packed.tensors[n].file == file}
        if not any(record.coded for record in own.values()):
            sizes |= recode_file(packed, file, own, RANS, scratch, threads, told)
            (scratch / file).replace(partial / file)
    scratch.rmdir()
    return sizes
