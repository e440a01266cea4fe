"""How far a conversion is, in memory and in its journal, from which a second run takes it up.

The journal has a line of identity, then one for each tensor that is done (a Result) and each change
of layout (a Change). A Result counts only if the bytes in the shard have the digest that it says.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from ternarize.calibrate.pipeline import Calibrated
from ternarize.convert.tensor import Change, Result
from ternarize.convert.workplace import JOURNAL, PARTS, STREAMED, changed, not_ours, part_folders
from ternarize.errors import OutputError
from ternarize.files.headers import read_bytes
from ternarize.files.outputs import write_whole
from ternarize.files.recoded import digests_of_whole
from ternarize.plans.layout import PIECE, Shard, TensorPlan
from ternarize.plans.recipe import CHANGEABLE


@dataclass
class State:
    """How far a conversion is.

    shards      the files of the output, as they are laid out by now
    unsealed    which of them have no header yet
    results     what came of the tensors that are done
    calibrated  what calibration has found
    coded       bytes of the entries of shards that are coded, by name
    """

    shards: list[Shard]
    unsealed: set[int]
    results: dict[str, Result] = field(default_factory=dict)
    calibrated: Calibrated | None = None
    coded: dict[str, int] = field(default_factory=dict)

    @property
    def tensors(self) -> list[TensorPlan]:
        return [tensor for shard in self.shards for tensor in shard.tensors]

    def undone(self, index: int) -> list[TensorPlan]:
        """The tensors of a shard that are to be converted."""
        tensors = self.shards[index].tensors
        return [t for t in tensors if not t.tied_to and t.name not in self.results]

    def bytes_done(self) -> int:
        """Bytes of the source's tensors that are done."""
        return sum(t.info.nbytes for t in self.tensors if t.tied_to or t.name in self.results)

    def stored_bytes(self, tensor: TensorPlan) -> int:
        """Bytes that a tensor takes in its file."""
        names = [name for name, _, _ in tensor.stored()]
        if all(name in self.coded for name in names):
            return sum(self.coded[name] for name in names)
        return tensor.stored_bytes()

    def take(self, entry: Result | Change) -> None:
        """Count a tensor as done, or change the layout: what its shard has is to be done again."""
        if isinstance(entry, Result):
            self.results[entry.name] = entry
            return
        asking = next(t for t in self.tensors if t.name == entry.name)
        if entry.scale_dtype == "U8":  # whichever of a parameter's tensors asks first
            if any(t.scale_dtype != "U8" and _fused(t, asking) for t in self.tensors):
                entry = replace(entry, scale_dtype="F16")
        for index, shard in enumerate(self.shards):
            tensors = tuple(_relaid(t, asking, entry) for t in shard.tensors)
            if tensors != shard.tensors:
                self.shards[index] = replace(shard, tensors=tensors)
                self.unsealed.add(index)
                for tensor in tensors:
                    self.results.pop(tensor.name, None)

    def forget_unwritten(self, partial: Path) -> None:
        """Forget results whose bytes, in the layout of now, did not reach the disk.

        A shard that is whole counts, coded or not: it has its header, and needs no layout.
        """
        for index, shard in enumerate(self.shards):
            done = {t.name: self.results[t.name] for t in shard.tensors if t.name in self.results}
            digests = {name: result.sha256 for name, result in done.items()}
            if digests and digests_of_whole(partial / shard.file) == digests:
                self.unsealed.discard(index)
                continue
            there = dict(_digests(partial / shard.file, shard, self.results))
            for name, digest in digests.items():
                if there.get(name) != digest:
                    del self.results[name]


def _relaid(tensor: TensorPlan, asking: TensorPlan, change: Change) -> TensorPlan:
    """A tensor's plan after `asking` has got its change of layout.

    8-bit scales do not mix with others in the parameter that several tensors load into.
    """
    if tensor.name == asking.name:
        return replace(tensor, group_size=change.group_size, scale_dtype=change.scale_dtype)
    if _fused(tensor, asking) and tensor.scale_dtype == "U8" and change.scale_dtype != "U8":
        return replace(tensor, scale_dtype="F16")
    return tensor


def _fused(tensor: TensorPlan, other: TensorPlan) -> bool:
    """Whether two ternary tensors load into one parameter."""
    shared = not set(tensor.choice.parameters).isdisjoint(other.choice.parameters)
    return tensor.ternary and tensor.name != other.name and shared


def _digests(path: Path, shard: Shard, results: dict[str, Result]) -> Iterator[tuple[str, str]]:
    """What the bytes on the disk give for the tensors of a shard that have results."""
    done = [tensor for tensor in shard.tensors if tensor.name in results]
    if not done or not path.is_file() or path.stat().st_size != shard.nbytes():
        return
    for tensor, pieces in stored_pieces(path, shard, done):
        sha = hashlib.sha256()
        for _, _, piece in pieces:
            sha.update(piece.numpy().data)
        yield tensor.name, sha.hexdigest()


def stored_pieces(
    path: Path, shard: Shard, tensors: Sequence[TensorPlan]
) -> Iterator[tuple[TensorPlan, Iterator[tuple[str, int, Tensor]]]]:
    """The bytes of some tensors of a shard, piece by piece: (entry, byte offset in it, uint8)."""
    layout, base = shard.layout(), shard.data_start()

    def pieces(tensor: TensorPlan) -> Iterator[tuple[str, int, Tensor]]:
        for name, _, _ in tensor.stored():
            start, nbytes = base + layout[name].start, layout[name].nbytes
            for at in range(0, nbytes, PIECE):
                yield name, at, read_bytes(path, start + at, min(PIECE, nbytes - at))

    for tensor in tensors:
        yield tensor, pieces(tensor)


def note(state: State, journal: TextIO, entry: Result | Change) -> None:
    """Take an entry, and add its line to the journal, which is open."""
    state.take(entry)
    journal.write(json.dumps(asdict(entry)) + "\n")
    journal.flush()


def resume(shards: Sequence[Shard], partial: Path, own: dict[str, Any]) -> State:
    """Take up what an earlier run has left, or begin; raises OutputError if it is another's.

    A training may go on with another budget: what was packed after it ended is then done again.

    shards  what is to be written there, as it is planned
    own     the `identity` of this conversion
    """
    path = partial / JOURNAL
    if not _lines(path):
        ours = (path.name, path.with_suffix(".new").name, STREAMED, PARTS)
        found = [p.name for p in partial.iterdir() if p.name not in ours]
        if found:  # the journal is written before anything else, so this is not ours
            raise not_ours(partial, found[0])
    state, changes = read_state(shards, partial, own)
    lines = [own, *map(asdict, changes), *map(asdict, state.results.values())]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_whole(path, text.encode())
    return state


def read_state(
    shards: Sequence[Shard],
    partial: Path,
    own: dict[str, Any],
    names: Collection[str] | None = None,
) -> tuple[State, list[Change]]:
    """How far the conversion in a folder is, and all changes of layout that it has made.

    names  tensors whose bytes are worth a look: of no others there are results; None: all

    The other arguments, and what is raised, as of `resume`. Nothing is written.
    """
    lines = _own_lines(partial, own)
    entries = [Result(**line) if "sha256" in line else Change(**line) for line in lines]
    state = State(list(shards), set(range(len(shards))))
    for entry in entries:
        state.take(entry)
    if names is not None:
        state.results = {name: each for name, each in state.results.items() if name in names}
    state.forget_unwritten(partial)
    return state, [entry for entry in entries if isinstance(entry, Change)]


def check_same(partial: Path, own: dict[str, Any]) -> None:
    """Raise OutputError where anything in OUTPUT.partial is of another conversion.

    own  the `identity` of this one

    To be asked before a journal is written: one with options that were a mistake would stand in the
    way of all others.
    """
    for folder in (partial, *part_folders(partial).values()):
        _own_lines(folder, own)


def _own_lines(partial: Path, own: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of the journal in a folder, if any; none of a training with another budget.

    own  the `identity` of this conversion

    Raises OutputError where the journal is one of another conversion.
    """
    first, *lines = _lines(partial / JOURNAL) or [own]
    if _without_budget(first) != _without_budget(own):
        raise _of_another(partial, first, own)
    return lines if first == own else []


def _without_budget(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity but for when its training ends."""
    recipe = dict(identity.get("recipe", {}))
    if recipe.get("train"):
        recipe["train"] = {n: v for n, v in recipe["train"].items() if n not in CHANGEABLE}
    return {**identity, "recipe": recipe}


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:  # cut off in the middle of writing: nothing after it counts
            break
    return lines


def _of_another(partial: Path, before: dict[str, Any], now: dict[str, Any]) -> OutputError:
    files = changed(now["source"], before.get("source", []))
    why = f"of another source ({files} differs)" if files else "with other options"
    if files and {**before, "source": 0} != {**now, "source": 0}:
        why += " and with other options"
    found = f"holds an unfinished conversion {why}"
    return OutputError(partial, found, "none", "Finish it with its own command, or remove it")
