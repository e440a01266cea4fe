"""Which tensors of a checkpoint become ternary, and why the others do not.

The decision needs names, shapes and config.json, never a weight. It comes from a skeleton: the
model's own class in transformers, built on the meta device, where 700 billion parameters take a
second and no memory. A name on disk is led to its parameter by the renamings that transformers
applies when it loads the checkpoint, so the decision is about the module that will run, not about
what its name looks like, and a model released tomorrow needs no entry in a table.

Ternary by default: the weights of linear layers and of experts inside the repeated blocks (below an
`nn.ModuleList` of modules that have children). Kept by default, with the reason in `Choice.reason`:

    embedding, norm, bias, convolution, buffer
    router                             small, and one wrong choice costs a whole expert
    output head                        the last layer; its error reaches the logits undamped
    outside the repeated blocks        poolers, classifiers, projections: few weights, much harm
    encoder of another modality        vision and audio towers of a model that has a text model
    weight read directly by <Class>    code that takes `self.x.weight` would find packed bytes there
    kept in float32 by <Class>         transformers would cast the packed bytes
    tied to <name>                     both names must stay one float parameter
    part of nn.MultiheadAttention      torch reads its weights directly
    stored through <operation>         a conversion at load that rows of packed bytes cannot follow
    not a linear layer, empty, ignored by <Class>, not part of the architecture, --keep <glob>

`--keep` and `--include` change what is a matter of judgement (heads, routers, other modalities,
outside the blocks), not what cannot run. `--head` and `--embeddings` say what becomes of the output
head and of the token embedding, as the model itself names them (`get_output_embeddings`,
`get_input_embeddings`); where the two are tied they are one tensor and become one thing. Embeddings
of positions and types stay kept. A large weight that no rule explains is an error: left out
in silence, it would make a model look converted that is not.

Without a skeleton (no config.json, an architecture that transformers does not have; code from the
checkpoint is never run) rules on names and shapes decide; `why_no_skeleton` says so for the plan.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ternarize.errors import SelectionError, UsageError
from ternarize.models.skeleton import Equal, Skeleton, all_equal, skeleton_of
from ternarize.plans.judge import Verdict, judge_by_skeleton
from ternarize.plans.judge_names import judge_by_names
from ternarize.plans.recipe import KEEP, TERNARY
from ternarize.trits.base3 import BASE3
from ternarize.trits.int8 import INT8


@dataclass(frozen=True)
class Choice:
    """What happens to one tensor of the source.

    name        on disk
    shape       on disk
    codec       "base3": to be ternarized; "int8": to be rounded to 8 bits; "": kept as it is
    reason      one line, the same words for the same rule, so that a plan can count them
    transposed  of a linear weight: its last two dimensions on disk are [in, out] (Conv1D, some
                experts), not [out, in]
    parameters  of the model that it fills, none without a skeleton; tensors that share one must be
                packed in the same way
    copy_of     the tensor with the same values to which it is tied, which alone is stored; or ""
    bound       it is a buffer of the class, in which infinity is a value like others
    """

    name: str
    shape: tuple[int, ...]
    codec: str
    reason: str
    transposed: bool
    parameters: tuple[str, ...] = ()
    copy_of: str = ""
    bound: bool = False

    @property
    def ternary(self) -> bool:
        return self.codec == BASE3


def select(
    shapes: Mapping[str, tuple[int, ...]],
    config: dict[str, Any] | None,
    *,
    keep: Sequence[str] = (),
    include: Sequence[str] = (),
    head: str = KEEP,
    embeddings: str = KEEP,
    equal: Equal = all_equal,
    shared: bool = True,
) -> list[Choice]:
    """Decide for every tensor of a checkpoint whether it becomes ternary.

    shapes   tensor name on disk -> shape on disk
    config   content of config.json, None where there is none
    keep     globs (fnmatch, case-sensitive) on names: kept
    include  globs on names: ternary although kept by default, where that can run. What a glob
             matches and cannot be ternary stays kept, as long as the glob matches one that can
    head     "keep", "int8" or "ternary": what becomes of the output head
    embeddings  likewise the token embedding; tied to the head, it becomes what either asks for
    equal    whether two tensors on disk have the same values: those that the class ties, and that
             have not, are not tied
    shared   whether weights that blocks share may be ternary; calibration, which goes from block to
             block, has no place for them

    Returns one Choice per tensor, in the order of `shapes`.
    Raises SelectionError where no rule says what to do with a large weight or which way round it
    lies, where its shape is not the architecture's, where a glob matches nothing, or only what
    cannot be ternary, or splits tensors that are fused into one parameter, and where a head or an
    embedding is to be packed that is not there or cannot be; UsageError where the two are tied and
    asked to be different things.
    """
    kept_by = _matches("--keep", keep, shapes)
    included_by = _matches("--include", include, shapes)
    for name in shapes:
        if name in kept_by and name in included_by:
            raise SelectionError(
                f"{name}: both --keep {kept_by[name]!r} and --include {included_by[name]!r} match; "
                f"at most one may. Narrow one of them."
            )
    skeleton = skeleton_of(shapes, config, equal)
    if isinstance(skeleton, str):
        verdicts, twice = judge_by_names(shapes), {}
    else:
        verdicts, twice = judge_by_skeleton(shapes, skeleton, shared), skeleton.copies()
    _check_include(include, included_by, verdicts)
    ends = _ends(shapes, skeleton, verdicts, head, embeddings)

    unexplained: list[str] = []
    choices = []
    for name, shape in shapes.items():
        verdict = verdicts[name]
        codec, reason = BASE3 if verdict.ternary else "", verdict.reason
        if name in ends:
            codec, reason = ends[name]
            for option, found in (("--keep", kept_by), ("--include", included_by)):
                if name in found:
                    raise SelectionError(
                        f"{name}: {option} {found[name]!r} matches, but {reason}; at most one may "
                        "say what becomes of it. Leave one of them out."
                    )
        elif name in kept_by:
            if codec or verdict.error:
                codec, reason = "", f"--keep {kept_by[name]}"
        elif name in included_by and not codec and verdict.possible:
            codec, reason = BASE3, f"--include {included_by[name]}"
        if verdict.error and name not in kept_by:
            unexplained.append(f"{name}: {verdict.error}")
        transposed, parameters = verdict.transposed, verdict.parameters
        copy_of, bound = twice.get(name, ""), verdict.bound
        choices.append(Choice(name, shape, codec, reason, transposed, parameters, copy_of, bound))
    if unexplained:
        more = f" ({len(unexplained) - 1} more such tensors.)" if len(unexplained) > 1 else ""
        raise SelectionError(unexplained[0] + more)
    check_fused_choices(choices)
    return choices


def end_tensors(
    shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any] | None, equal: Equal = all_equal
) -> dict[str, set[str]]:
    """Option ("--head", "--embeddings") -> the tensors on disk that it is about.

    The same tensors for both where the two are tied; none without a skeleton. `equal` as in
    `select`.
    """
    skeleton = skeleton_of(shapes, config, equal)
    if isinstance(skeleton, str):
        return {"--head": set(), "--embeddings": set()}
    places = skeleton.places
    families = {which: skeleton.family(skeleton.end(which)) for which in ("--head", "--embeddings")}
    return {
        which: {name for name, at in places.items() if not family.isdisjoint(at.parameters)}
        for which, family in families.items()
    }


def _matches(option: str, patterns: Sequence[str], names: Iterable[str]) -> dict[str, str]:
    """Name -> the first pattern that matches it; every pattern must match something."""
    found: dict[str, str] = {}
    for pattern in patterns:
        hits = [name for name in names if fnmatchcase(name, pattern)]
        if not hits:
            raise SelectionError(
                f"{option} {pattern!r}: matches no tensor of the checkpoint; a glob on tensor "
                f"names (with .weight) is expected. {_closest(pattern, names)}"
            )
        for name in hits:
            found.setdefault(name, pattern)
    return found


def _closest(pattern: str, names: Iterable[str]) -> str:
    # One name of each shape of name: a large model has thousands that differ in numbers alone.
    distinct = {re.sub(r"\d+", "0", name): name for name in reversed(list(names))}
    matches = difflib.get_close_matches(re.sub(r"\d+", "0", pattern), distinct, n=3, cutoff=0.3)
    if not matches:
        return "The plan (--dry-run) lists the names."
    return "The closest are " + ", ".join(distinct[match] for match in matches) + "."


def _check_include(
    patterns: Sequence[str], included_by: Mapping[str, str], verdicts: Mapping[str, Verdict]
) -> None:
    """A pattern that can change nothing because of what it matches is an error, with the reason."""
    for pattern in patterns:
        names = [name for name in included_by if fnmatchcase(name, pattern)]
        if any(verdicts[name].ternary or verdicts[name].possible for name in names):
            continue
        reason = verdicts[names[0]].error or verdicts[names[0]].reason
        raise SelectionError(
            names[0],
            f"--include {pattern!r} asks for a ternary tensor, but it cannot be one: {reason}",
            remedy="Leave it out",
        )


def check_fused_choices(choices: Iterable[Choice]) -> None:
    """Raise SelectionError unless tensors of one parameter are all ternary, or all kept."""
    by_parameter: dict[str, Choice] = {}
    for choice in choices:
        for parameter in choice.parameters:
            other = by_parameter.setdefault(parameter, choice)
            if other.codec != choice.codec:
                kept, ternary = (choice, other) if other.ternary else (other, choice)
                raise SelectionError(
                    kept.name,
                    f"kept ({kept.reason}), but {ternary.name} is ternary ({ternary.reason}), and "
                    f"both load into {parameter}, which is one or the other",
                    remedy="Widen the glob to all of them",
                )


def _ends(
    shapes: Mapping[str, tuple[int, ...]],
    skeleton: Skeleton | str,
    verdicts: Mapping[str, Verdict],
    head: str,
    embeddings: str,
) -> dict[str, tuple[str, str]]:
    """Tensors of the head and the token embedding that are to be packed -> (codec, reason)."""
    asked = {"--head": head, "--embeddings": embeddings}
    asked = {option: what for option, what in asked.items() if what != KEEP}
    if not asked:
        return {}
    if isinstance(skeleton, str):
        raise SelectionError(
            next(iter(asked)),
            f"{skeleton}, so nothing shows which tensor that is",
            "a config.json of an architecture that transformers has",
            "Leave the option out",
        )
    families: dict[str, set[str]] = {}
    for option in ("--head", "--embeddings"):
        families[option] = skeleton.family(skeleton.end(option))
        if option in asked and not families[option]:
            what = "output head" if option == "--head" else "token embedding"
            raise SelectionError(
                f"{option} {asked[option]}",
                f"{skeleton.name} has no {what} that can be packed",
                "one",
                "Leave the option out",
            )
    shared = families["--head"] == families["--embeddings"]
    if shared and len(set(asked.values())) > 1:
        raise UsageError(
            f"--head {head} --embeddings {embeddings}: {skeleton.name} ties the two, so that they "
            "are one tensor; expected the same for both. Name one of them."
        )
    found: dict[str, tuple[str, str]] = {}
    for option, what in asked.items():
        family = families[option]
        why = skeleton.unpackable(family)
        names = [name for name in shapes if not family.isdisjoint(verdicts[name].parameters)]
        if any(skeleton.places[name].converter is not None for name in names):
            why = "stored in another form than the model's"
        if why or not names:
            raise SelectionError(
                f"{option} {what}",
                f"{min(family)} cannot be packed ({why or 'the checkpoint does not have it'})",
                "one that only looks up and multiplies",
                "Leave the option out",
            )
        for name in names:
            tie = "; the output head and the token embedding are tied" if shared else ""
            found[name] = (BASE3 if what == TERNARY else INT8, f"{option} {what}{tie}")
            wanted = tuple(skeleton.parameters[verdicts[name].parameters[0]].shape)
            if shapes[name] != wanted:
                raise SelectionError(
                    name,
                    f"its shape is {list(shapes[name])}; {skeleton.name} with this config.json "
                    f"has {list(wanted)}",
                    remedy="Repair config.json",
                )
    return found
