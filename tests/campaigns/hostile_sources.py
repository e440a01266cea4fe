"""Hostile sources for `convert`, code that must not run, and files that change while they are read.

The cases of hostile.py that need more than bytes: numbers of every kind, pickles, templates, and
files that shrink or are replaced at a moment that is chosen here.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import reference
import torch
from safetensors.torch import save
from torch import Tensor

import ternarize
from ternarize.convert.run import convert
from ternarize.convert.verify import verify
from ternarize.errors import TernarizeError
from ternarize.files import container, stored
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.headers import read_bytes
from ternarize.measure.evaluate import evaluate
from ternarize.measure.report import inspect
from ternarize.models.reads import open_tokenizer
from ternarize.plans.recipe import Recipe
from ternarize.runtime.generate import generate
from ternarize.sources.checkpoint import open_checkpoint

from .hostile_files import SEEDS, WEIGHTS, Case, Files, golden

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-llama"  # it has a tokenizer
NAME = "model.layers.0.mlp.up_proj.weight"
UNKNOWN = {"model_type": "unheard_of", "architectures": ["NoSuchModel"]}


def source(tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Files:
    """A checkpoint whose tensors are chosen by their names."""
    data = save(tensors, metadata={"format": "pt"})
    return {WEIGHTS: data, "config.json": json.dumps(config or UNKNOWN).encode()}


# --- conversion -------------------------------------------------------------------------------


def run_convert(folder: Path, include: tuple[str, ...] = ()) -> None:
    """Convert by every method; what comes out is whole, and nowhere further away than nothing."""
    output = folder.parent / "converted"
    for method, group_size in (("absmean", 128), ("twn", -1), ("itf", 0)):
        try:
            convert(folder, output, Recipe(method, group_size, include=include), threads=1)
            verify(output, folder)
            compare(folder, output)
        finally:
            assert not list(folder.parent.glob("*.partial*")), "something unfinished is left"
            shutil.rmtree(output, ignore_errors=True)


def compare(folder: Path, output: Path) -> None:
    """The weights that are read back are at most as far from the source's as zeros would be."""
    before = open_checkpoint(folder)
    for name, found in reference.decode(output).items():
        weight = before.read(name).reshape(before.tensors[name].shape)
        if isinstance(found, reference.Kept):
            continue
        if found.transposed:
            weight = weight.transpose(-1, -2)
        exact = weight.double().numpy()
        back = found.dequantize().astype(np.float64)
        assert np.isfinite(back).all(), f"{name}: not finite"
        missed, energy = np.square(exact - back).sum(), np.square(exact).sum()
        assert missed <= 1.001 * energy, f"{name}: further away than zero"
        assert (back[exact == 0] == 0).all() or found.group_size == 0, f"{name}: a zero is not zero"


def numbers(rng: random.Random, count: int) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def case(group: str, weight: Tensor, good: bool, name: str = NAME) -> Case:
        files = source({name: weight.contiguous()})
        what = ("convert",)
        return Case(group, lambda: files, () if good else what, what if good else (), what)

    for value in (float("nan"), float("inf"), float("-inf")):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for name in (NAME, "model.norm.weight"):
                for at in (0, 77, -1):
                    weight = normal(8, 40) if name == NAME else normal(320)
                    weight.view(-1)[at] = value
                    yield case("not finite", weight.to(dtype), False, name)
    group = normal(4, 300)
    group[1, 128:256] = 0
    row = normal(4, 300)
    row[2] = 0
    outlier = 1e-3 * normal(4, 300)
    outlier[1, 7] = 1e4
    ties = normal(4, 300).sign() * torch.tensor([1.0, 0.5]).repeat(150)
    constant = torch.tensor([[0.7], [-3.0], [0.0], [1e-3]]).expand(4, 300)
    for weight in (
        torch.zeros(4, 300),
        -torch.zeros(4, 300),
        group,
        row,
        outlier,
        ties,
        constant,
        torch.where(normal(4, 300) > 0, 0.0, -0.0) + 0 * group,
        normal(4, 300) * 1e30,
        normal(4, 300) * 1e-30,
        normal(4, 300) * (3e38 / 8),
        normal(4, 300) * 1e-40,  # subnormal in float32
        (normal(4, 300) * 1e-7).half(),
        (normal(4, 300) * 1e-39).bfloat16(),
        torch.full((4, 300), 65504.0).half(),
        torch.full((4, 300), 3.3e38).bfloat16(),
    ):
        yield case("numbers", weight, True)
    sizes = [(rows, cols) for rows in (1, 2, 17) for cols in range(1, 18)]
    sizes += [(1, 300), (300, 1), (0, 300), (130, 130), (3, 3200), (3, 8640), (1, 1)]
    for rows, cols in sizes:
        yield case("shapes", normal(rows, cols), rows > 0)  # nothing is left to be ternary
    expert = "model.layers.0.mlp.experts.gate_up_proj"
    for shape in ((3, 16, 40), (1, 1, 1), (2, 3, 130)):
        # of no known architecture: which way round they are, nothing shows
        files, act = source({expert: normal(*shape)}), ("convert experts",)
        yield Case("shapes", partial(dict, files), refuse=act, act=act)
    for dtype in (torch.float64, torch.bool, torch.int8, torch.float8_e4m3fn, torch.complex64):
        yield case("types that are no weights", normal(8, 40).to(dtype), False)
    for method in (
        "fp8",
        "gptq",
        "awq",
        "bitsandbytes",
        "compressed-tensors",
        "ternarize",
        "x" * 9999,
    ):
        files = source(
            {NAME: normal(8, 40)}, UNKNOWN | {"quantization_config": {"quant_method": method}}
        )
        yield Case(
            "quantized sources", partial(dict, files), ("convert",), (), ("convert",), named=False
        )
    packed = "model.layers.0.mlp.up_proj."
    for parts in (
        {packed + "qweight": torch.ones(8, 8, dtype=torch.int32), packed + "scales": normal(1, 8)},
        {
            packed + "weight": normal(8, 8).to(torch.float8_e4m3fn),
            packed + "weight_scale_inv": normal(1, 1),
        },
        {packed + "weight_packed": torch.ones(8, 8, dtype=torch.int32)},
    ):
        yield Case("quantized sources", partial(source, parts), (), (), ("convert",), named=False)


# --- code that comes with a checkpoint --------------------------------------------------------

MARK = "executed"


class _Code:
    """Unpickled, it makes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def evil(files: Files, mark: Path) -> Files:
    """With a template, a tokenizer and a model that make a file when they are run."""
    touch = f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n"
    command = "{{ cycler.__init__.__globals__.os.system('touch " + str(mark) + "') }}"
    table = json.loads(bytes(files["config.json"]))  # type: ignore[arg-type]
    table |= {
        "trust_remote_code": True,
        "auto_map": {
            "AutoConfig": "evil.EvilConfig",
            "AutoModelForCausalLM": "evil.Evil",
            "AutoTokenizer": ["evil.Evil", "evil.Evil"],
        },
    }
    tokenizer: dict[str, Any] = {"chat_template": command, "auto_map": table["auto_map"]}
    if "tokenizer_config.json" in files:
        tokenizer = json.loads(bytes(files["tokenizer_config.json"])) | tokenizer  # type: ignore[arg-type]
    return files | {
        "config.json": json.dumps(table).encode(),
        "evil.py": (touch + "class Evil: pass\nclass EvilConfig: pass\n").encode(),
        "modeling_llama.py": touch.encode(),
        "setup.py": touch.encode(),
        "conftest.py": touch.encode(),
        "tokenizer_config.json": json.dumps(tokenizer).encode(),
        "chat_template.jinja": command.encode(),
        "custom_generate/generate.py": touch.encode(),
    }


def with_code(use: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Use a model with code everywhere, and see that none of it has run."""

    def run(folder: Path) -> None:
        place = folder.parent / "with-code"
        mark = folder.parent / MARK
        files: Files = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
        try:
            for name, data in evil(files, mark).items():
                assert isinstance(data, bytes)
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(data)
            use(place)
        finally:
            assert not mark.exists(), "code of the checkpoint was executed"
            shutil.rmtree(place, ignore_errors=True)

    return run


def convert_alone(folder: Path) -> None:
    output = folder.parent / "converted"
    try:
        convert(folder, output, threads=1)
        verify(output)
    finally:
        shutil.rmtree(output, ignore_errors=True)


def measure(folder: Path) -> None:
    """Convert, evaluate against the source, load, and fill in its template; code is in both."""
    output, text = folder.parent / "converted", folder.parent / "text.txt"
    text.write_text("The function returns the first of them. " * 40)
    try:
        convert(folder, output, threads=1)
        evaluate(output, source=folder, text=text, seq_len=32, max_tokens=64)
        model, tokenizer = ternarize.load(output), open_tokenizer(output)
        try:
            generate(model, tokenizer, "Hello", chat=True)
        except TernarizeError as error:
            assert "chat template fails (SecurityError" in str(error), error
        else:
            raise AssertionError("the template was filled in")
    finally:
        shutil.rmtree(output, ignore_errors=True)


def pickled(folder: Path) -> None:
    """A repository of pickles: with code refused, and the code not run."""
    mark = folder / MARK
    for protocol in (2, 4):
        with (folder / "pytorch_model.bin").open("wb") as file:
            pickle.dump({NAME: _Code(str(mark))}, file, protocol)
        try:
            convert(folder, folder.parent / "converted")
        except TernarizeError:
            continue
        finally:
            assert not mark.exists(), "a pickle was executed"
        raise AssertionError("a pickle with code was converted")


def code(rng: random.Random, count: int) -> Iterator[Case]:
    example = {p.name: p.read_bytes() for p in EXAMPLE.iterdir()}
    for action in ("code: convert", "code: eval"):
        yield Case("code and templates", lambda: dict(example), (), (action,), (action,))
    loads = tuple(f"code: {what}" for what in ("load", "verify", "inspect"))
    for seed in SEEDS[:3]:
        yield Case("code and templates", partial(golden, seed), (), loads, loads)
    empty: Files = {"config.json": json.dumps(UNKNOWN).encode()}
    yield Case("pickles", lambda: empty, (), ("code: pickle",), ("code: pickle",))
    pickles = golden("rows") | {"pytorch_model.bin": golden("rows")[WEIGHTS]}
    del pickles[WEIGHTS]
    yield Case("pickles", lambda: pickles, ("load", "verify"), (), ("load", "verify"))


# --- files in motion --------------------------------------------------------------------------


def damage(folder: Path, how: str) -> None:
    """Shrink, change in place, or replace every weight file of a checkpoint."""
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        if how == "shrink":
            os.truncate(path, len(data) // 2)
        elif how == "empty":
            os.truncate(path, 0)
        elif how == "change":
            with path.open("r+b") as file:
                file.seek(len(data) - 9)
                file.write(bytes([data[-9] ^ 1]))
        elif how == "remove":
            path.unlink()
        else:
            other = path.with_name("other")
            other.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
            other.replace(path)


HOW = ("shrink", "empty", "change", "replace", "remove")


def after_loading(folder: Path) -> None:
    """What happens to the files of a loaded model is nothing to it."""
    for how in HOW:
        copy = Path(shutil.copytree(folder, folder.parent / how))
        model = ternarize.load(copy, dtype="float32")
        tokens = torch.arange(1, 9).unsqueeze(0)
        before = model(input_ids=tokens).logits
        damage(copy, how)
        assert torch.equal(model(input_ids=tokens).logits, before), how
        saved = {name: tensor.sum() for name, tensor in model.state_dict().items()}
        assert saved
        shutil.rmtree(copy)


def while_loading(folder: Path) -> None:
    """Files that change between their verification and their loading are refused."""
    for how in HOW:
        copy = Path(shutil.copytree(folder, folder.parent / how))

        def check(*args: Any, how: str = how, copy: Path = copy, **kwargs: Any) -> None:
            container.check_data(*args, **kwargs)
            damage(copy, how)

        with patched(check):
            expect_refusal(partial(ternarize.load, copy), how)
        shutil.rmtree(copy)


def patched(check: Callable[..., None]) -> Any:
    """In the place of `container.check_data` as the plug-in calls it."""
    original = container.check_data

    def once(*args: Any, **kwargs: Any) -> None:
        with mock.patch.object(container, "check_data", original):
            check(*args, **kwargs)

    return mock.patch.object(container, "check_data", once)


def while_verifying(folder: Path) -> None:
    """Files that change while they are verified are refused."""
    for how in ("shrink", "empty", "change"):
        copy = Path(shutil.copytree(folder, folder.parent / how))
        calls, ran = iter(range(10**6)), vars(stored)["_run"]

        def read(*args: Any, how: str = how, copy: Path = copy, calls: Any = calls) -> Tensor:
            if next(calls) == 1:  # after the first tensor
                damage(copy, how)
            return read_bytes(*args)

        def run(
            *args: Any, how: str = how, copy: Path = copy, calls: Any = calls, ran: Any = ran
        ) -> None:
            damage(copy, how)  # the core would have read it all before anybody knew of a tensor
            for _ in range(2):
                next(calls)
            ran(*args)

        by_core = mock.patch.object(stored, "_run", run)
        with mock.patch.object(container, "read_bytes", read), by_core:
            expect_refusal(partial(verify, copy, threads=1), how)
        shutil.rmtree(copy)


def while_converting(folder: Path) -> None:
    """Sources that change while they are converted give no result, pickles as well."""
    original = Checkpoint.read
    for kind in ("safetensors", "pickle"):
        for how in ("shrink", "empty", "change"):
            copy = Path(shutil.copytree(folder, folder.parent / how))
            if kind == "pickle":
                tensors = {
                    name: torch.randn(64, 300) for name in (NAME, NAME.replace("up", "down"))
                }
                torch.save(tensors, copy / "pytorch_model.bin")
                (copy / WEIGHTS).unlink()
                (copy / "config.json").write_text(json.dumps(UNKNOWN))
            calls = iter(range(10**6))

            def progress(
                *args: Any, how: str = how, copy: Path = copy, calls: Iterator[int] = calls
            ) -> None:
                if next(calls) == 0:
                    damage(copy, how)
                    for path in copy.glob("*.bin"):
                        os.truncate(path, 100 if how != "empty" else 0)

            output = folder.parent / "converted"
            reads = iter(range(10**6))

            def read(*args: Any, tell: Any = progress, reads: Iterator[int] = reads) -> Tensor:
                if next(reads) == 3:  # pickles are mapped: between two pieces, not in one
                    tell()
                return original(*args)

            act = partial(convert, copy, output, threads=1)
            if kind == "pickle":
                with mock.patch.object(Checkpoint, "read", read):
                    expect_refusal(act, f"{kind}: {how}")
            else:
                expect_refusal(partial(act, progress=progress), f"{kind}: {how}")
            assert not output.exists()
            shutil.rmtree(folder.parent / "converted.partial", ignore_errors=True)
            shutil.rmtree(copy)


def expect_refusal(act: Callable[[], Any], how: str) -> None:
    try:
        act()
    except TernarizeError as error:
        assert str(error).isprintable()
    else:
        raise AssertionError(f"accepted ({how})")


def motion(rng: random.Random, count: int) -> Iterator[Case]:
    acts = ("motion: loaded", "motion: load", "motion: verify")
    for seed in ("rows", "tensor", "groups", "experts", "rotation"):
        yield Case("files in motion", partial(golden, seed), (), acts, acts)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.{i}.mlp.up_proj.weight": torch.randn(64, 300, generator=generator)
        for i in range(4)
    }
    files = source(tensors)
    last = ("motion: convert",)
    yield Case("files in motion", lambda: files, (), last, last)


ACTIONS: dict[str, Callable[[Path], Any]] = {
    "convert": run_convert,
    "convert experts": lambda folder: run_convert(folder, ("*experts*",)),
    "code: convert": with_code(convert_alone),
    "code: eval": with_code(measure),
    "code: load": with_code(ternarize.load),
    "code: verify": with_code(verify),
    "code: inspect": with_code(inspect),
    "code: pickle": pickled,
    "motion: loaded": after_loading,
    "motion: load": while_loading,
    "motion: verify": while_verifying,
    "motion: convert": while_converting,
}


def damaged(rng: random.Random, count: int) -> Iterator[Case]:
    """Sources whose files are cut, spoiled or lead elsewhere, for the conversion."""
    tensors = {NAME: torch.ones(8, 40), "model.norm.weight": torch.ones(8)}
    whole = source(tensors)
    data = whole[WEIGHTS]
    assert isinstance(data, bytes)
    for at in rng.sample(range(len(data)), min(len(data), max(10, count // 50))):
        yield Case(
            "damaged sources",
            partial(dict, whole | {WEIGHTS: data[:at]}),
            ("convert",),
            (),
            ("convert",),
        )
    for tail in (b"\0", b"\0" * 7, b"\0" * 4096):
        make: Callable[[], Files] = partial(dict, whole | {WEIGHTS: data + tail})
        yield Case("damaged sources", make, ("convert",), (), ("convert",))
    for raw in (b"", b"[]", b"\xff", b"[" * 100_000):
        make = partial(dict, whole | {"config.json": raw})
        yield Case("damaged sources", make, ("convert",), (), ("convert",))
    config = json.loads(bytes(golden("rows")["config.json"]))  # type: ignore[arg-type]
    del config["quantization_config"]
    for key, value in (("num_hidden_layers", 10**9), ("hidden_size", -5), ("vocab_size", "x")):
        make = partial(source, tensors, config | {key: value})
        yield Case("damaged sources", make, ("convert",), (), ("convert",))


def cases(seed: int, count: int) -> Iterator[Case]:
    """All cases of conversion, code and motion."""
    rng = random.Random(seed)
    for each in (numbers, damaged, code, motion):
        yield from each(rng, count)
