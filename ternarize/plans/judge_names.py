"""What a tensor is by its name and shape, where no class of model is known.

There is no config.json, or transformers does not have the architecture: code from a checkpoint is
never run. `why_no_skeleton` says which, for the plan.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ternarize.models.skeleton import OLD_BUFFER
from ternarize.plans.judge import LARGE, Verdict

BY_NAME = "linear by name and shape (no skeleton)"
_KEPT_NAMES = (
    ("embedding", r"embed|(^|_)wte$|(^|_)wpe$|^tok_|position"),
    ("norm", r"norm|^ln(_|$)"),
    ("router", r"router|^gate$|_gate$|^wg$"),
    ("output head", r"(^|_)heads?(_|$)|^classifier|classifier$|^score$"),
    ("outside the repeated blocks", r"pooler"),
    ("convolution", r"conv"),
)
_OTHER_MODALITY = re.compile(r"(^|[._])(vision|visual|audio|image|speech|video)")
_EITHER_WAY = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")


def judge_by_names(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Verdict]:
    """The verdict on each tensor of a checkpoint of which no class of model is known."""
    verdicts = {name: _judge_name(name, shape) for name, shape in shapes.items()}
    chosen = [name for name, verdict in verdicts.items() if verdict.ternary]
    if not all(_OTHER_MODALITY.search(name) for name in chosen):
        for name in filter(_OTHER_MODALITY.search, chosen):
            reason = "encoder of another modality"
            verdicts[name] = replace(verdicts[name], ternary=False, reason=reason)
    # GPT-2 stores these as [in, out], others with the same names as [out, in]. The length of the
    # bias is `out`, which tells it of one that is not square, and so of all.
    either = [name for name in verdicts if _EITHER_WAY.search(name) and verdicts[name].possible]
    votes = {vote for name in either for vote in _bias_votes(name, shapes)}
    for name in either:
        if len(votes) == 1:
            verdicts[name] = replace(verdicts[name], transposed=next(iter(votes)))
        else:
            error = (
                "without a skeleton nothing shows whether it is [out, in] or [in, out]",
                "one of them",
                "Use --keep, or a config.json of an architecture that transformers has",
            )
            verdicts[name] = replace(verdicts[name], ternary=False, possible=False, error=error)
    return verdicts


def _bias_votes(name: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[bool]:
    rows, cols = shapes[name]
    bias = shapes.get(name.removesuffix("weight") + "bias")
    if rows != cols and bias in ((rows,), (cols,)):
        yield bias == (cols,)


def _judge_name(name: str, shape: tuple[int, ...]) -> Verdict:
    """The verdict on a tensor of which only name and shape are known."""
    *path, leaf = name.split(".")
    if leaf.endswith("bias"):
        return Verdict(False, "bias")
    for reason, pattern in _KEPT_NAMES:
        if any(re.search(pattern, part.lower()) for part in (*path, leaf)):
            possible = reason in ("router", "output head") and leaf == "weight" and len(shape) == 2
            return Verdict(False, reason, possible=possible)
    if len(shape) < 2:
        return Verdict(False, "not a matrix (no skeleton)")
    if math.prod(shape) == 0:
        return Verdict(False, "empty")
    if len(shape) == 2 and leaf == "weight":
        if any(part.isdecimal() for part in path):
            return Verdict(True, BY_NAME, possible=True)
        return Verdict(False, "outside the repeated blocks", possible=True)
    reason = "not a linear layer by name and shape (no skeleton)"
    if math.prod(shape) < LARGE or OLD_BUFFER.search(f".{name}"):
        return Verdict(False, reason)
    error = (
        f"without a skeleton nothing shows what a weight of shape {list(shape)} is",
        "a matrix named .weight",
        "Use --keep to copy it as it is",
    )
    return Verdict(False, reason, error=error)
