"""Names that training has wrapped: `_orig_mod.` of torch.compile, `module.` of DDP and others."""

import os
from collections.abc import Iterator

from ternarize.files.checkpoint import Checkpoint
from ternarize.models.skeleton import lacking, strangers

# what torch puts between the names of modules: compiled, sharded, with recomputed activations
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrapped(source: Checkpoint) -> Checkpoint:
    """A checkpoint under the names of its model, where what is around them explains them all.

    That is so where without it no parameter of the model is left out, or no name is left over.
    """
    names, config = list(source.tensors), source.config
    if not names or not _strange(names, source):
        return source
    before = strangers(names, config)
    for said, found in _candidates(names):
        if len(set(found)) < len(names):
            continue
        left = strangers(found, config)
        if len(left) < len(before) and (not left or not lacking(found, config)):
            result = source.renamed(dict(zip(names, found, strict=True)))
            result.notes.append(f"{said} is taken off all names, e.g. of {names[0]}")
            return result
    return source


def _strange(names: list[str], source: Checkpoint) -> bool:
    """Whether names may be wrapped: one is on torch's own word, or the first ones have no place."""
    if any(not _WRAPPERS.isdisjoint(name.split(".")) for name in names):
        return True
    # weights: the name of a bias could be that of a buffer that models no longer have
    first = ([name for name in names if name.endswith("weight")] or names)[:8]
    return len(strangers(first, source.config)) == len(first)


def _candidates(names: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(what is taken off, the names without it)"""
    bare = [_without_wrappers(name) for name in names]
    if bare != names:
        inside = sorted({step for name in names for step in name.split(".")} & _WRAPPERS)
        yield ", ".join(f"{step}." for step in inside), bare
    common = os.path.commonprefix(bare).rpartition(".")[0].split(".")
    for end in range(1, len(common) + 1):
        prefix = ".".join(common[:end]) + "."
        if prefix != ".":
            yield prefix, [name.removeprefix(prefix) for name in bare]


def _without_wrappers(name: str) -> str:
    return ".".join(step for step in name.split(".") if step not in _WRAPPERS)
