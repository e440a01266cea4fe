"""What the code of a model class does with a weight, read from its source and never run."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache, lru_cache

_SETUP = re.compile(r"__init__|reset_parameters|_?(init|resize|tie|set)_\w+")


@cache
def raw_reads(cls: type) -> tuple[str, ...]:
    """Modules whose `.weight` the code of a class reads: expressions on paths below it.

    `self.wo.weight` is the path `wo`, `self.layers[i].out.weight` is `layers.<n>.out`; of another
    variable (`block.output.weight`) only the end of the path is known. A device may be read. And
    `next(self.mlp.parameters())` is all below `mlp`: its dtype would be that of bytes.
    Code that runs at construction does not count, nor does torch's own.
    """
    patterns: dict[str, None] = {}
    for method in _methods(cls):
        nodes = [n for n in ast.walk(method) if isinstance(n, ast.Attribute)]
        harmless = {id(n.value) for n in nodes if n.attr == "device"}
        for call in (n.value for n in nodes if n.attr != "device"):
            if isinstance(call, ast.Call) and _steps(call.func) == ["next"] and call.args:
                root, *steps = _steps(getattr(call.args[0], "func", call))
                if root == "self" and steps[1:] and steps[-1] == "parameters":
                    patterns[r"\.".join(steps[:-1]) + r"(?:\..+)?"] = None
        for node in nodes:
            if node.attr != "weight" or id(node) in harmless:
                continue
            root, *steps = _steps(node.value)
            if root == "self" and steps:
                patterns[r"\.".join(steps)] = None
            elif root != "self" and (steps or root):
                patterns[r"(?:.+\.)?" + r"\.".join(steps or [root])] = None
    return tuple(patterns)


def _steps(node: ast.expr) -> list[str]:
    """`self.layers[i].out` as ["self", "layers", "<any>", "out"]; [""] for another expression."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        return [*_steps(node.value), node.attr]
    if isinstance(node, ast.Subscript):
        return [*_steps(node.value), r"\w+"]
    return [""]


def _methods(cls: type) -> Iterator[ast.FunctionDef]:
    """The methods that a model class runs, its ancestors' included, as they are written.

    Read from the file, not from the class, whose methods may be wrapped by decorators.
    """
    for ancestor in cls.__mro__:
        package = ancestor.__module__
        if package.startswith("transformers.") and not package.startswith("transformers.models."):
            continue
        if package.split(".")[0] in ("builtins", "torch", "typing"):
            continue
        definition = _class_definitions(package).get(ancestor.__name__)
        for node in definition.body if definition is not None else ():
            if isinstance(node, ast.FunctionDef) and not _SETUP.fullmatch(node.name):
                yield node


@lru_cache(maxsize=8)
def _class_definitions(package: str) -> dict[str, ast.ClassDef]:
    """The class definitions in the file of a module; none where there is no source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[package]))
    except (KeyError, OSError, TypeError):
        return {}
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


@cache
def reads_transposed(cls: type, leaf: str) -> bool | None:
    """Whether the code of a class multiplies by `self.<leaf>` as [in, out]; None if unclear."""
    answers: set[bool] = set()
    for node in (node for method in _methods(cls) for node in ast.walk(method)):
        operands: list[tuple[ast.expr, bool]] = []  # and whether [in, out] is expected there
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            operands = [(node.right, True), (node.left, False)]
        elif isinstance(node, ast.Call) and len(node.args) >= 2:
            called = _steps(node.func)[-1]
            if called in ("bmm", "mm", "matmul"):
                operands = [(node.args[1], True), (node.args[0], False)]
            elif called == "linear":
                operands = [(node.args[1], False)]
        for operand, straight in operands:
            turned = False
            if isinstance(operand, ast.Call) and _steps(operand.func)[-1] in ("t", "transpose"):
                operand, turned = operand.func, True
            steps = _steps(operand)
            if steps[-1] in ("T", "mT", "t", "transpose"):
                steps, turned = steps[:-1], True
            if steps[:2] == ["self", leaf]:
                answers.add(straight != turned)
    return answers.pop() if len(answers) == 1 else None
