"""The modules of the package, as the README lists them."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ternarize"
OUTSIDE = ("__init__", "__main__", "version")  # the package's face, and a number


def imported(path: Path) -> set[str]:
    """The top modules of the package that a file imports, also within functions."""
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports are not seen here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "ternarize" and len(part) > 1}


def test_a_module_imports_only_from_those_above_it() -> None:
    house = (ROOT / "README.md").read_text("utf-8").split("## The house")[1]
    listed = re.findall(r"^  (\w+)(?:\.py|/)  ", house, re.M)
    files = {
        path: path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for path in PACKAGE.rglob("*.py")
    }
    assert set(files.values()) - {*OUTSIDE} == {*listed} - {"csrc"}
    for path, module in files.items():
        if module not in OUTSIDE:
            below = imported(path) & set(listed[listed.index(module) + 1 :])
            assert not below, f"{path.relative_to(ROOT)} imports {below}, which come after it"
