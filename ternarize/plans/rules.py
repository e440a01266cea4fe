"""What the options say of tensors: an ordered list of rules, of which the first that matches wins.

    --embeddings, --head  what the model itself calls so: "int8", "int4" or "ternary"
    --keep GLOB           "keep"
    --include GLOB        "ternary", of what can run so
    --planes GLOB         "two planes", of what becomes ternary

They stand in front of the defaults, the verdicts of judge.py and judge_names.py. An option does not
overrule another: `check_together` refuses two that say different things of one tensor. Where head
and embedding are tied they are one tensor and become one thing; embeddings of positions and types
stay kept.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ternarize.errors import SelectionError, UsageError
from ternarize.models.skeleton import END_NAMES
from ternarize.plans.judge import End, Verdict
from ternarize.plans.recipe import KEEP, TERNARY, Recipe
from ternarize.trits.base3 import BASE3
from ternarize.trits.int4 import INT4
from ternarize.trits.int8 import INT8

TWO_PLANES = "two planes"
OF_ENDS = (INT8, INT4)  # codecs that ends alone may have


@dataclass(frozen=True)
class Rule:
    """A line of the list.

    option   that put it there
    pattern  of --head and --embeddings "head" and "embeddings": the tensors that the model itself
             calls so; else a glob on names on disk (fnmatch, case-sensitive)
    choice   "keep", "int8" or "int4" (of an end alone), "ternary"; or "two planes", which is asked
             apart: it says how a tensor becomes ternary, not whether
    """

    option: str
    pattern: str
    choice: str

    def __post_init__(self) -> None:
        assert self.choice not in OF_ENDS or self.of_end

    @property
    def of_end(self) -> bool:
        """Whether it is about what the model itself calls so: a glob may have the same letters."""
        return self.pattern in END_NAMES and self.option == f"--{self.pattern}"

    @property
    def reason(self) -> str:
        """For the record: the same words for all that it decides."""
        return f"{self.option} {self.choice if self.of_end else self.pattern}"

    def __str__(self) -> str:
        """For errors."""
        return self.reason if self.of_end else f"{self.option} {self.pattern!r}"

    def matches(self, names: Iterable[str], ends: Mapping[str, End]) -> dict[str, None]:
        """Those of the names that it speaks of, in their order."""
        if self.of_end:
            return {name: None for name in names if name in ends[self.pattern].tensors}
        return {name: None for name in names if fnmatchcase(name, self.pattern)}


Matches = Mapping[Rule, Mapping[str, None]]  # rule -> the tensors that it matches


def rules_of(recipe: Recipe) -> list[Rule]:
    """The lines that the options of a recipe put in front of the defaults."""
    ends = {"embeddings": recipe.embeddings, "head": recipe.head}
    said = [
        Rule(f"--{end}", end, choice) for end, choice in ends.items() if choice not in (None, KEEP)
    ]
    for option, globs, choice in (
        ("--keep", recipe.keep, KEEP),
        ("--include", recipe.include, TERNARY),
        ("--planes", recipe.planes, TWO_PLANES),
    ):
        said += [Rule(option, glob, choice) for glob in globs]
    return said


def deciding(name: str, matches: Matches) -> list[Rule]:
    """The rules that say what becomes of a tensor; the first one wins."""
    return [r for r, names in matches.items() if r.choice != TWO_PLANES and name in names]


@dataclass(frozen=True)
class Choice:
    """What happens to one tensor of the source.

    name        on disk
    shape       on disk
    codec       "base3": to be ternarized; "int8", "int4": to be rounded to 8 or 4 bits; "": kept as
                it is
    reason      one line, the same words for the same rule, so that a plan can count them
    planes      ternary matrices whose sum it becomes
    transposed  of a linear weight: its last two dimensions on disk are [in, out] (Conv1D, some
                experts), not [out, in]
    parameters  of the model that it fills, none without a skeleton; tensors that share one must be
                packed in the same way
    copy_of     the tensor with the same values to which it is tied, which alone is stored; or ""
    bound       it is a buffer of the class, in which infinity is a value like others
    convolution its rows are kernels: (out, in, height, width) on disk
    table       of a module at hand, one of which --embeddings speaks
    """

    name: str
    shape: tuple[int, ...]
    codec: str
    reason: str
    planes: int = 1
    transposed: bool = False
    parameters: tuple[str, ...] = ()
    copy_of: str = ""
    bound: bool = False
    convolution: bool = False
    table: bool = False

    @property
    def ternary(self) -> bool:
        return self.codec == BASE3

    @property
    def form(self) -> str:
        """What tensors of one parameter must have in common, in words."""
        kind = {"": "kept", BASE3: TERNARY}.get(self.codec, self.codec)
        return kind if self.planes == 1 else f"{kind} in {self.planes} planes"


def check_together(
    matches: Matches,
    verdicts: Mapping[str, Verdict],
    ends: Mapping[str, End],
    choices: Mapping[str, Choice],
) -> None:
    """Check the rules against each other, one by one, and what they have made of the tensors.

    verdicts  the defaults
    ends      what the patterns "head" and "embeddings" mean
    choices   of all tensors

    Raises SelectionError where two rules speak of one tensor, where one matches nothing, or only
    what cannot become what it says, where none says what to do with a weight, and where tensors of
    one parameter become different things; UsageError where the head and the embedding are one
    tensor that is asked to be two things.
    """
    for name in verdicts:
        rules = deciding(name, matches)
        for other in rules[1:]:
            _check_pair(name, rules[0], other)
    for rule, names in matches.items():
        _check_alone(rule, names, verdicts, ends, choices)
    kept = {name for rule, names in matches.items() if rule.choice == KEEP for name in names}
    unexplained = [name for name, each in verdicts.items() if each.error and name not in kept]
    if unexplained:
        found, *others = verdicts[unexplained[0]].error
        more = f" (and {len(unexplained) - 1} more such tensors)" * (len(unexplained) > 1)
        raise SelectionError(unexplained[0], found + more, *others)
    check_fused((choice, choice.form) for choice in choices.values())


def _check_pair(name: str, rule: Rule, other: Rule) -> None:
    """Two options may speak of one tensor where both ask the same of two ends that are tied."""
    if rule.of_end and other.of_end:
        if rule.choice != other.choice:
            raise UsageError(
                f"{other} {rule}",
                "the model ties the two, so that they are one tensor",
                "the same for both",
                "Name one of them",
            )
    elif rule.option != other.option:
        raise SelectionError(
            name,
            f"both {rule} and {other} match",
            "at most one that says what becomes of it",
            "Narrow one of them, or leave it out",
        )


def _check_alone(
    rule: Rule,
    names: Mapping[str, None],
    verdicts: Mapping[str, Verdict],
    ends: Mapping[str, End],
    choices: Mapping[str, Choice],
) -> None:
    """A rule that can change nothing because of what it matches is an error, with the reason."""
    if rule.of_end:
        end = ends[rule.pattern]
        if end.barred:
            raise SelectionError(rule, end.barred, remedy=end.remedy)
        return
    planes = rule.choice == TWO_PLANES
    usable = [name for name, choice in choices.items() if choice.ternary] if planes else choices
    if names.keys().isdisjoint(usable):
        raise SelectionError(
            rule,
            f"matches no tensor {'that becomes ternary' if planes else 'of the checkpoint'}",
            "a glob on tensor names (with .weight)",
            _closest(rule.pattern, usable),
        )
    if rule.choice == TERNARY:
        found = [verdicts[name] for name in names]
        if not any(verdict.ternary or verdict.possible for verdict in found):
            raise SelectionError(
                next(iter(names)),
                f"{rule} asks for a ternary tensor, but it cannot be one: "
                f"{found[0].error[0] if found[0].error else found[0].reason}",
                remedy="Leave it out",
            )


def _closest(pattern: str, names: Iterable[str]) -> str:
    # One name of each shape of name: a large model has thousands that differ in numbers alone.
    distinct = {re.sub(r"\d+", "0", name): name for name in reversed(list(names))}
    matches = difflib.get_close_matches(re.sub(r"\d+", "0", pattern), distinct, n=3, cutoff=0.3)
    if not matches:
        return "The plan (--dry-run) lists the names"
    return "The closest are " + ", ".join(distinct[match] for match in matches)


def check_fused(
    tensors: Iterable[tuple[Choice, str]],
    remedy: str = "Widen --planes, --keep or --include to all of them",
) -> None:
    """Raise SelectionError unless tensors that load into one parameter get the same form.

    tensors  and the form of each, in words
    """
    by_parameter: dict[str, tuple[Choice, str]] = {}
    for choice, form in tensors:
        for parameter in choice.parameters:
            other, theirs = by_parameter.setdefault(parameter, (choice, form))
            if form != theirs:
                raise SelectionError(
                    choice.name,
                    f"{form} ({choice.reason}), but {other.name} is {theirs} ({other.reason}), and "
                    f"both load into {parameter}",
                    "the same of both",
                    remedy,
                )
