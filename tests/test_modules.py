"""The rooms of the package and the modules in them, as their docstrings list them.

`ternarize/__init__.py` lists the rooms and each room its modules, in the order of their imports:
a line `name.py` or `name/` and what it is for. README.md repeats the rooms.
"""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from ternarize import errors

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ternarize"
MODULES = sorted(PACKAGE.rglob("*.py"))
PACKAGES = sorted(path.parent for path in MODULES if path.name == "__init__.py")
FACE = ("__init__", "__main__")  # of the package: they bring together what stands in the rooms
PUBLIC = "ternarize.qat"  # a room that is also a face: its `pack` stands in the room of conversions
MOST_LINES = 500


def listed(text: str) -> list[str]:
    """The modules and packages that a list names, in its order: `name` of `name.py` and `name/`."""
    return re.findall(r"^ +(\w+)(?:\.py|/) {2,}\S", text, re.M)


def docstring(package: Path) -> str:
    return ast.get_docstring(ast.parse((package / "__init__.py").read_text("utf-8")), False) or ""


def name_of(path: Path) -> str:
    """ternarize/trits/base3.py -> ternarize.trits.base3"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, also within functions."""
    known = {name_of(each) for each in MODULES}
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports are not seen here"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in known else str(node.module))
    return {name for name in names if name.split(".")[0] == "ternarize"}


def place(name: str) -> list[int]:
    """Where a module stands: its room's place in the list of rooms, its own place in the room's."""
    *packages, _ = parts = name.split(".")
    found = []
    for depth in range(len(packages)):
        inside = listed(docstring(ROOT.joinpath(*parts[: depth + 1])))
        found.append(inside.index(parts[depth + 1]))
    return found


@pytest.mark.parametrize("package", PACKAGES, ids=name_of)
def test_a_package_lists_what_is_in_it(package: Path) -> None:
    there = {path.stem for path in package.glob("*.py")} - {*FACE}
    there |= {path.parent.name for path in package.glob("*/__init__.py")}
    names = listed(docstring(package))
    assert sorted(names) == sorted(there - {"version"})


def test_the_readme_lists_the_rooms() -> None:
    house = (ROOT / "README.md").read_text("utf-8").split("## The house")[1]
    rooms = [name for name in listed(docstring(PACKAGE)) if (PACKAGE / name).is_dir()]
    assert [name for name in listed(house) if name in rooms] == rooms


@pytest.mark.parametrize(
    "path", [p for p in MODULES if not (p.parent == PACKAGE and p.stem in FACE)], ids=name_of
)
def test_a_module_imports_only_from_those_above_it(path: Path) -> None:
    name = name_of(path)
    if name in ("ternarize.version", PUBLIC):
        return
    own = [*place(name), *([10**6] if path.name == "__init__.py" else [])]  # behind its modules
    for other in imported(path) - {"ternarize", "ternarize.version"}:
        inside = (ROOT.joinpath(*other.split(".")) / "__init__.py").is_file()
        theirs = [*place(other), *([10**6] if inside else [])]
        assert theirs < own, f"{name} imports {other}, which comes after it"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_can_be_read_at_one_go(path: Path) -> None:
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= MOST_LINES, f"{lines} lines"


def test_no_module_shadows_one_of_the_standard_library() -> None:
    names = {path.stem for path in MODULES} - {*FACE}
    assert not names & sys.stdlib_module_names


def definitions(path: Path) -> Iterator[str]:
    """What a module defines for others: names at its top without an underscore."""
    for node in ast.parse(path.read_text("utf-8")).body:
        targets: list[ast.expr] = []
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        for target in targets:
            yield from (each.id for each in ast.walk(target) if isinstance(each, ast.Name))


def test_no_two_modules_have_a_name_in_common() -> None:
    count = Counter(
        name for path in MODULES for name in definitions(path) if not name.startswith("_")
    )
    assert not [name for name, times in count.items() if times > 1]


def test_every_error_says_at_least_where_and_what() -> None:
    classes = {
        name for name, each in vars(errors).items() if isinstance(each, type) and "Error" in name
    }
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in classes:
                    parts = len(node.args) + len(node.keywords)
                    assert parts >= 2, f"{path.relative_to(ROOT)}:{node.lineno}"
