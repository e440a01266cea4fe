"""Whether an environment is what a file of pins says: every package in it, at that version.

    python tests/pinned.py constraints.txt

A file of constraints alone would not notice what it leaves out: pip then takes the newest. Prints a
line for each package that is another one or has no pin, and exits with 1 if there is one.
"""

import sys
from collections.abc import Iterable, Mapping
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def read_pins(lines: Iterable[str]) -> dict[str, Requirement]:
    """The pins that are for this Python and this system, by name."""
    wanted = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    here = [pin for pin in wanted if pin.marker is None or pin.marker.evaluate()]
    return {canonicalize_name(pin.name): pin for pin in here}


def differences(installed: Mapping[str, str], pins: Mapping[str, Requirement]) -> list[str]:
    """A line for each package whose version is not the one that is pinned.

    A local version (torch 2.13.0+cpu) is another build of the same one (2.13.0).
    """
    return [
        f"{name} {version}: " + (f"expected {pins[name].specifier}" if name in pins else "no pin")
        for name, version in sorted(installed.items())
        if name not in pins or not pins[name].specifier.contains(version, prereleases=True)
    ]


def main(path: str) -> int:
    """Compare this environment, without ternarize itself, with the pins in a file."""
    found: dict[str, str] = {canonicalize_name(p.name): p.version for p in distributions()}
    found.pop("ternarize", None)
    lines = differences(found, read_pins(Path(path).read_text().splitlines()))
    if lines:
        print(f"{sys.prefix}: is not what {path} says:", *lines, sep="\n  ")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
