"""What the tensors of a module of torch's are, where the module itself is at hand.

There is no config.json, and no class of transformers that would say more: a linear weight is known
by the type of its module, as in judge.py. Ternary by default: the weights of linear layers that are
not small; and likewise those of two-dimensional convolutions, but for the first one, where they are
most of the module's weights. Which is an output head, or stands outside of repeated blocks, nothing
shows: --keep says it. Kept, with the reason:

    <name> of a <Class>                of Conv1d, say: not a linear layer; of a Conv2d in groups, or
                                       beside more weights of other layers. Of Embedding and
                                       EmbeddingBag tables, which --embeddings packs
    the first convolution              few weights, which meet the image itself
    rows changed by max_norm           of a table, by looking them up
    fewer than <n> weights             little is saved, and heads are often small
    shared by modules                  both must stay one float parameter
    read directly by <Class>           code that takes `self.x.weight` would find packed bytes there
    the module itself                  there is no place in which another module could be put
    <dtype>                            no float of 32 or 16 bits
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ternarize.errors import UsageError
from ternarize.models.skeleton import is_convolution, is_linear
from ternarize.models.source_code import raw_reads
from ternarize.plans.judge import Verdict

SMALLEST = 1 << 14  # weights of a layer that becomes ternary by default
# their fast paths hand the weights of their children to torch's own kernels
_READ_BY_TORCH = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TABLES = (nn.Embedding, nn.EmbeddingBag)


def stored_names(module: nn.Module) -> dict[str, str]:
    """Each name of a module's state dict -> the one under which its tensor is stored.

    That is the first name that the same tensor has. Raises UsageError for what is no tensor.
    """
    first: dict[int, str] = {}
    names = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            found = f"is a {type(value).__name__} in the state dict of {type(module).__name__}"
            raise UsageError(name, found, "tensors alone", "Keep it beside the weights")
        names[name] = first.setdefault(id(value), name)
    return names


def holders_of(module: nn.Module) -> dict[int, set[int]]:
    """Identity of each parameter -> those of the modules inside that have it."""
    found: dict[int, set[int]] = {}
    for each in module.modules():
        for parameter in each.parameters(recurse=False):
            found.setdefault(id(parameter), set()).add(id(each))
    return found


def judge_module(module: nn.Module, smallest: int = SMALLEST) -> dict[str, Verdict]:
    """The verdict on each tensor of a module's state dict, under the name by which it is stored.

    smallest  weights of a linear layer that becomes ternary by default, and of a table of which
              --embeddings speaks; --include takes others

    Raises UsageError for what is no tensor.
    """
    modules = dict(module.named_modules(remove_duplicate=False))
    holders = holders_of(module)
    barred = {**_reads(modules), "": "the module itself"}
    against = _against_convolutions(module)
    verdicts = {}
    for name in dict.fromkeys(stored_names(module).values()):
        path, _, leaf = name.rpartition(".")
        owner = modules.get(path, module)  # another: what a module's own hooks have made
        kind: type = type(owner)
        weight = owner._parameters.get(leaf) if path in modules else None
        count, why = 0, f"{leaf} of a {kind.__name__}"
        linear, table = is_linear(kind), isinstance(owner, TABLES)
        kernels = is_convolution(owner)
        if leaf == "weight" and weight is not None and (linear or table or kernels):
            count, why = weight.numel(), barred.get(path, "")
            if getattr(owner, "max_norm", None) is not None:
                why = "rows changed by max_norm"
            elif len(holders[id(weight)]) > 1:
                why = "shared by modules"
            elif weight.dtype not in _DTYPES:
                why = str(weight.dtype)[6:]
        if why or not count:
            bound = weight is None  # a buffer, where infinity is a value like others
            verdicts[name] = Verdict(False, why or "empty", parameters=(name,), bound=bound)
        elif table:
            large = count >= smallest
            reason = f"{leaf} of a {kind.__name__}"
            reason += "" if large else f", fewer than {smallest} weights"
            verdicts[name] = Verdict(False, reason, True, parameters=(name,), table=large)
        else:
            small = f"fewer than {smallest} weights" if count < smallest else ""
            small = (against.get(id(owner), "") if kernels else "") or small
            reason = small or ("convolution" if kernels else "linear layer")
            verdicts[name] = Verdict(
                not small, reason, possible=True, parameters=(name,), convolution=kernels
            )
    return verdicts


def _against_convolutions(module: nn.Module) -> dict[int, str]:
    """Identity of each convolution that stays by default -> why."""
    found: list[Any] = [each for each in module.modules() if is_convolution(each)]
    weights = {id(p): p.numel() for p in module.parameters() if p.ndim > 1}
    kernels = sum({id(each.weight): each.weight.numel() for each in found}.values())
    if 2 * kernels <= sum(weights.values()):
        return {id(each): "weight of a Conv2d" for each in found}
    convolutions = (each for each in module.modules() if isinstance(each, nn.Conv2d))
    return {id(next(convolutions)): "the first convolution"}


def verdicts_on_record(rows: Mapping[str, Any]) -> dict[str, Verdict]:
    """The verdicts by which a module was packed, as far as its record tells: to pack it again.

    rows  of the tensors
    """
    return {
        name: Verdict(
            row.get("becomes") == "ternary",
            str(row.get("reason")),
            possible=True,
            parameters=(name,),
            bound=True,
            table=row.get("table") is True,
            convolution=row.get("kernel") is True,
        )
        for name, row in rows.items()
    }


def _reads(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Path of a module whose weight other code reads -> who does."""
    found: dict[str, str] = {}
    for path, module in modules.items():
        kind: type = type(module)
        prefix = re.escape(f"{path}.") if path else ""
        patterns = [prefix + pattern for pattern in raw_reads(kind)]
        if isinstance(module, _READ_BY_TORCH):
            patterns.append(prefix + ".+")
        for other in modules:
            if any(re.fullmatch(pattern, other) for pattern in patterns):
                found.setdefault(other, f"read directly by {kind.__name__}")
    return found
