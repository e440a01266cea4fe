"""What becomes of each tensor of a checkpoint: what the rules say of it, else its verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ternarize.errors import SelectionError
from ternarize.models.skeleton import Equal, all_equal, skeleton_of
from ternarize.plans.judge import End, Verdict, judge_by_skeleton, judge_ends
from ternarize.plans.judge_names import judge_by_names
from ternarize.plans.recipe import KEEP
from ternarize.plans.rules import OF_ENDS, TWO_PLANES, Choice, Rule, check_together, deciding
from ternarize.trits.base3 import BASE3

TIED_ENDS = "; the output head and the token embedding are tied"  # in a reason


def select(
    shapes: Mapping[str, tuple[int, ...]],
    config: dict[str, Any] | None,
    rules: Sequence[Rule] = (),
    *,
    dense: Mapping[str, str] = {},  # noqa: B006
    equal: Equal = all_equal,
    shared: bool = True,
    verdicts: Mapping[str, Verdict] | None = None,
) -> list[Choice]:
    """Decide for every tensor of a checkpoint what becomes of it.

    shapes  tensor name on disk -> shape on disk
    config  content of config.json, None where there is none
    rules   of which the first that matches a tensor wins
    dense   tensors that stay in floating point unless a rule speaks of them -> the reason
    equal   whether two tensors on disk have the same values: those that the class ties, and that
            have not, are not tied
    shared  whether weights that blocks share may be ternary; calibration, which goes from block to
            block, has no place for them
    verdicts  of a module that is at hand (`plans.judge_module`), which no config.json describes

    Returns one Choice per tensor, in the order of `shapes`.
    Raises SelectionError where no rule says what to do with a large weight or which way round it
    lies, and where its shape is not the architecture's; and what `check_together` raises.
    """
    at_hand = verdicts is not None
    skeleton = "a module is at hand" if at_hand else skeleton_of(shapes, config, equal)
    copies: dict[str, str] = {}
    if not isinstance(skeleton, str):
        verdicts, copies = judge_by_skeleton(shapes, skeleton, shared), skeleton.copies()
    elif verdicts is None:
        verdicts = judge_by_names(shapes)
    elif unknown := shapes.keys() - verdicts.keys():
        raise SelectionError(min(unknown), "is no tensor of the module", "its tensors alone")
    asked = any(rule.of_end for rule in rules)
    ends = judge_ends(shapes, skeleton) if asked else {}
    if asked and at_hand:
        ends["embeddings"] = _tables(verdicts, rules)
    matches = {rule: rule.matches(shapes, ends) for rule in rules}
    split = [names for rule, names in matches.items() if rule.choice == TWO_PLANES]
    choices: dict[str, Choice] = {}
    for name, shape in shapes.items():
        verdict = verdicts[name]
        codec, reason = _decide(name, verdict, deciding(name, matches), ends, dense)
        choices[name] = Choice(
            name,
            shape,
            codec,
            reason,
            2 if codec == BASE3 and any(name in names for names in split) else 1,
            verdict.transposed,
            verdict.parameters,
            copies.get(name, ""),
            verdict.bound,
            verdict.convolution,
            verdict.table,
        )
    check_together(matches, verdicts, ends, choices)
    return list(choices.values())


def _tables(verdicts: Mapping[str, Verdict], rules: Sequence[Rule]) -> End:
    """What --embeddings means in a module that is at hand: its tables that no glob names."""
    globs = [rule for rule in rules if not rule.of_end]
    named = {name for rule in globs for name in rule.matches(verdicts, {})}
    tables = {name for name, verdict in verdicts.items() if verdict.table} - named
    barred = "" if tables else "the module has no large table that no glob names"
    return End(frozenset(tables), barred)


def _decide(
    name: str,
    verdict: Verdict,
    rules: Sequence[Rule],
    ends: Mapping[str, End],
    dense: Mapping[str, str],
) -> tuple[str, str]:
    """(codec, reason) of a tensor, by the first of the rules that match it, or by default."""
    if not rules:
        if verdict.ternary and name in dense:
            return "", dense[name]
    elif rules[0].choice == KEEP:
        if verdict.ternary or verdict.error:
            return "", rules[0].reason
    elif rules[0].of_end:
        tie = TIED_ENDS if ends["head"] == ends["embeddings"] else ""
        codec = rules[0].choice if rules[0].choice in OF_ENDS else BASE3
        return codec, rules[0].reason + tie
    elif verdict.possible and not verdict.ternary:
        return BASE3, rules[0].reason
    return BASE3 if verdict.ternary else "", verdict.reason
