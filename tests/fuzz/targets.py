"""What is fuzzed in Python, and what must hold: each target takes bytes and raises if it does not.

    header      read_header of a safetensors file
    json        strict_json and read_json of any text
    file        a packed file alone: header, records, payload, decoded
    directory   a packed directory: config, index, shards, ternarize.json, through `verify`
    gguf        the head of a GGUF file, and what is made of it
    record      ternarize.json and config.json of a valid checkpoint: verify, inspect, the card
    steps       a journal of steps; a small one that starts from its seed is replayed

In each: only a TernarizeError may come out; what formats/reference.py refuses is refused and the
reverse; what both accept is the same; at most MOST_SECONDS, and MEMORY more than twice the input.
"""

import contextlib
import io
import json
import math
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [path for path in (str(HERE.parents[1] / "formats"),) if path not in sys.path]

import reference  # noqa: E402
import reference_steps  # noqa: E402

from ternarize.cli.inspect_command import inspect_command  # noqa: E402
from ternarize.convert.verify import verify  # noqa: E402
from ternarize.errors import TernarizeError  # noqa: E402
from ternarize.files import container, metadata  # noqa: E402
from ternarize.files.checkpoint import Checkpoint, open_files  # noqa: E402
from ternarize.files.gguf import read_gguf  # noqa: E402
from ternarize.files.headers import byte_view, read_header  # noqa: E402
from ternarize.files.json_files import read_json, strict_json  # noqa: E402
from ternarize.measure.report import inspect  # noqa: E402
from ternarize.plans.recipe_files import read_recipe  # noqa: E402
from ternarize.publish.card import make_card  # noqa: E402
from ternarize.sources.imports.gguf import open_gguf  # noqa: E402
from ternarize.sources.packed import check_record, open_packed  # noqa: E402
from ternarize.steps.base import opened_state  # noqa: E402
from ternarize.steps.journal import parse_journal  # noqa: E402
from ternarize.trits.base3 import BASE3  # noqa: E402
from ternarize.trits.int4 import INT4, unpack_int4  # noqa: E402
from ternarize.trits.scales import scale_values  # noqa: E402

from . import gguf_files, journals, structure  # noqa: E402

VECTORS = Path(reference.__file__).resolve().parent / "vectors"
FINDINGS = HERE / "findings"
MOST_SECONDS = 5.0
MEMORY = 256 << 20  # bytes, beside twice the input
Mutation = Callable[[bytes, random.Random], bytes]


class Finding(AssertionError):
    """Something that must hold does not."""


def require(holds: bool, what: str) -> None:
    """Raise Finding unless it holds."""
    if not holds:
        raise Finding(what)


class Folder:
    """A directory in `place` that holds what is fuzzed now."""

    def __init__(self, place: Path) -> None:
        self.path = Path(tempfile.mkdtemp(dir=place))
        self.names: set[str] = set()

    def write(self, files: dict[str, bytes]) -> Path:
        """Put exactly these files there."""
        for name in self.names - files.keys():
            (self.path / name).unlink()
        for name, data in files.items():
            (self.path / name).write_bytes(data)
        self.names = set(files)
        return self.path


def outcome(call: Callable[[], Any], *refusals: type[Exception]) -> tuple[Any, str | None]:
    """Result and None, or None and the text of a refusal; other exceptions pass."""
    try:
        return call(), None
    except refusals as error:
        text = str(error)
        ours = isinstance(error, TernarizeError)
        require(text.isprintable() or not ours, f"an error of more than one line: {text!r}")
        return None, text


def agree(ours: str | None, theirs: str | None) -> bool:
    """Whether both accept; raises Finding where one does."""
    require((ours is None) == (theirs is None), f"ternarize: {ours}; reference: {theirs}")
    return ours is None


def fuzz_header(data: bytes, folder: Folder) -> None:
    path = folder.write({"model.safetensors": data}) / "model.safetensors"
    ours, our_error = outcome(lambda: read_header(path), TernarizeError)
    theirs, error = outcome(
        lambda: reference.read_header(io.BytesIO(data), len(data)), reference.Invalid
    )
    if not agree(our_error, error):
        return
    entries, metadata = theirs
    require(ours.metadata == metadata, "metadata differ")
    start = ours.data_start
    found = {
        name: (e.dtype, e.shape, start + e.start, start + e.start + e.nbytes)
        for name, e in ours.entries.items()
    }
    expected = {name: (e.dtype, e.shape, e.start, e.end) for name, e in entries.items()}
    require(found == expected, "entries differ")


def fuzz_json(data: bytes, folder: Folder) -> None:
    path = folder.write({"x.json": data}) / "x.json"
    outcome(lambda: read_json(path), TernarizeError)
    table, _ = outcome(lambda: read_json(path, strict=True), TernarizeError)
    theirs, error = outcome(
        lambda: reference.parse_object(data, "not-json", "x.json"), reference.Invalid
    )
    require((table is None) == (theirs is None), f"reference: {error}; ternarize: {table!r:.80}")
    # NaN is refused, so that what is equal can be compared
    require(table == theirs, f"{table!r:.80}, not {theirs!r:.80}")
    text = data.decode("utf-8", "replace")
    outcome(lambda: strict_json(text), ValueError, RecursionError)


def decoded(checkpoint: Checkpoint, *, whole: bool) -> dict[str, Any]:
    """Everything of a checkpoint, checked and decoded as loading does it: {name: ...}."""
    records = metadata.records_of(checkpoint, whole=whole)
    container.check_data(checkpoint, records, threads=1)
    found: dict[str, Any] = {}
    for name, record in records.items():
        data = checkpoint.read(name).reshape(checkpoint.tensors[name].shape)
        if record.shape is None:
            found[name] = data
            continue
        scales = checkpoint.read(name + metadata.SCALE_SUFFIX)
        scales = scales.reshape(checkpoint.tensors[name + metadata.SCALE_SUFFIX].shape)
        numbers = data
        if record.codec == BASE3:
            planes = container.decode_planes(data, scales, record)
            numbers = torch.cat([plane.trits for plane in planes], -1)
        elif record.codec == INT4:
            numbers = unpack_int4(data, record.shape[-1], record.group_size)
        plain = container.dequantize(data, scales, replace(record, rotation=(0, 0)))
        turned = container.dequantize(data, scales, record)
        found[name] = (numbers, scale_values(scales), plain, turned, record)
    return found


def compare(ours: dict[str, Any], theirs: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Raise Finding where two decoders have not found the same."""
    require(ours.keys() == theirs.keys(), f"tensors {sorted(ours)}, not {sorted(theirs)}")
    for name, expected in theirs.items():
        if isinstance(expected, reference.Kept):
            info, data = checkpoint.tensors[name], ours[name]
            require((info.dtype, info.shape) == (expected.dtype, expected.shape), f"{name}: kind")
            same = byte_view(data).numpy().tobytes() == expected.data if data.numel() else True
            require(same, f"{name}: kept bytes")
            continue
        numbers, scales, plain, turned, record = ours[name]
        ternary = isinstance(expected, reference.Ternary)
        what = expected.trits if ternary else expected.weights
        require(numbers.shape == what.shape, f"{name}: shape")
        require(np.array_equal(numbers.numpy(), what), f"{name}: numbers")
        require(scales.shape == expected.scales.shape, f"{name}: shape of scales")
        require(np.array_equal(scales.numpy(), expected.scales), f"{name}: scales")
        group_size = min(expected.group_size, 2**63 - 1)  # longer than any row
        require(record.group_size == group_size, f"{name}: group size")
        require(record.transposed == expected.transposed, f"{name}: transposed")
        stored = expected.stored() if ternary else expected.dequantize()
        same = plain.numpy().tobytes() == stored.tobytes()
        require(same, f"{name}: weights")
        if ternary and expected.rotation is not None and stored.size:
            block = expected.rotation[0]
            norms = np.linalg.norm(stored.reshape(-1, block).astype(np.float64), axis=-1)
            with np.errstate(over="ignore", invalid="ignore"):
                back = expected.dequantize().reshape(tuple(turned.shape))  # kernels as rows
                far = np.abs(turned.numpy().astype(np.float64) - back)
                limit = 2.0**-20 * np.repeat(norms, block).reshape(far.shape)
            require(bool(((far <= limit) | (limit > 1e38)).all()), f"{name}: rotation")


def fuzz_file(data: bytes, folder: Folder) -> None:
    path = folder.write({"model.safetensors": data})
    checkpoint: list[Checkpoint] = []

    def ours() -> dict[str, Any]:
        checkpoint.append(open_files(path, ["model.safetensors"]))
        return decoded(checkpoint[0], whole=False)

    found, error = outcome(ours, TernarizeError)
    expected, their_error = outcome(
        lambda: reference.decode(path / "model.safetensors"), reference.Invalid
    )
    if agree(error, their_error):
        compare(found, expected, checkpoint[0])


def fuzz_directory(data: bytes, folder: Folder) -> None:
    path = folder.write(structure.split_files(data))
    expected, their_error = outcome(lambda: reference.decode(path), reference.Invalid, OSError)
    result, error = outcome(lambda: verify(path, threads=1), TernarizeError)
    # config.json and ternarize.json are nothing to the reference
    if error is not None and ("config.json" in error or "ternarize.json" in error):
        return
    if agree(error, their_error):
        kinds = ("ternary", "int8", "int4", "kept")
        require(sum(result[kind] for kind in kinds) == len(expected), "count")
        packed, _ = open_packed(path)
        compare(decoded(packed, whole=True), expected, packed)


def fuzz_record(data: bytes, folder: Folder) -> None:
    files = structure.split_files(data)
    path = folder.write({"model.safetensors": MODEL.read_bytes(), **files})

    def all_of_it() -> None:
        packed, records = open_packed(path)
        record = check_record(packed, records)
        if record is not None:
            outcome(lambda: read_recipe(record), TernarizeError)
        json.dumps(inspect(path))
        make_card(path, "user/name")
        with contextlib.redirect_stdout(io.StringIO()):
            inspect_command(model=str(path), debug=True)

    outcome(lambda: verify(path, threads=1), TernarizeError)
    outcome(all_of_it, TernarizeError)


def fuzz_gguf(data: bytes, folder: Folder) -> None:
    path = folder.write({"model-00001-of-00001.gguf": data}) / "model-00001-of-00001.gguf"
    found, _ = outcome(lambda: read_gguf(path), TernarizeError)
    if found is not None:
        for tensor in found[1]:
            require(tensor.start + tensor.nbytes <= len(data), f"{tensor.name} ends outside")
        # what the package gguf reads as well, it reads alike (it has rules of its own)
        other, _ = outcome(lambda: gguf.GGUFReader(path), Exception)
        if other is not None:
            listed = {t.name: (int(t.tensor_type), tuple(map(int, t.shape))) for t in other.tensors}
            ours = {t.name: (t.type, t.shape[::-1]) for t in found[1]}
            require(ours == listed, f"{ours}, not {listed}")
    outcome(lambda: open_gguf(path), TernarizeError)


MOST_WORK = 20_000  # words and values of a journal that is replayed


def fuzz_steps(data: bytes, folder: Folder) -> None:
    ours, error = outcome(lambda: parse_journal(data), TernarizeError)
    theirs, their_error = outcome(lambda: reference_steps.read_journal(data), reference.Invalid)
    if not agree(error, their_error):
        return
    journals.assert_same_journal(ours, theirs)
    count = sum(math.prod(shape) for _, shape, _ in theirs.tensors)
    work = sum(len(step.chosen) * (1 + (count >> step.bits)) for step in theirs.steps())
    if theirs.base is not None or count + 50 * work > MOST_WORK:
        return
    state, other = opened_state(ours.header, None, {}), reference_steps.State(theirs)
    state.apply(ours.effective())
    other.apply(theirs.effective())
    require(state.digest() == other.digest(), "values differ")


def _journals() -> list[bytes]:
    paths = [*(VECTORS / "steps" / "valid").glob("*.steps")]
    paths += (VECTORS.parent / "golden").glob("*.steps")
    return [path.read_bytes() for path in sorted(paths)]


MODEL = VECTORS / "valid" / "all-features.safetensors"


@dataclass(frozen=True)
class Target:
    """A function that is fuzzed, how its inputs are mutated, and where they begin.

    seeds    valid and invalid inputs
    modules  of the package, whose coverage is reported
    """

    run: Callable[[bytes, Folder], None]
    mutate: Mutation
    seeds: Callable[[], list[bytes]]
    modules: tuple[str, ...]


def _files(*folders: str) -> list[bytes]:
    paths = [p for folder in folders for p in sorted((VECTORS / folder).glob("*.safetensors"))]
    return [p.read_bytes() for p in paths]


def _directories() -> list[bytes]:
    folders = [
        path
        for kind in ("valid-directories", "invalid-directories")
        for path in sorted((VECTORS / kind).iterdir())
        if path.is_dir()
    ]
    config = (VECTORS / "valid-directories" / "single" / "config.json").read_bytes()
    found = []
    for folder in folders:
        files = {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}
        found.append(structure.join_files({"config.json": config, **files}))
    return found


def _records() -> list[bytes]:
    """config.json and ternarize.json that fit MODEL: of a plain and of a calibrated conversion."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "quantization_config": {
            "quant_method": "ternarize",
            "format_version": 1,
            "group_size": 6,
            "method": "gptq",
            "activations": "none",
        },
    }
    packed = {"reason": "linear in a repeated block", "source_dtype": "F16", "stored_bytes": 10}
    said = {"method": "gptq", "bpw": 1.75, "sparsity": 0.46, "relative_error": 0.19}
    tensors: dict[str, Any] = {
        name: {"becomes": "ternary", **packed, **said}
        for name in ("w.weight", "a.weight", "b.weight")
    }
    tensors["c.weight"] = {"becomes": "int8", **packed}
    tensors["norm.weight"] = {"becomes": "kept", "reason": "norm", "fitted": True}
    tensors["head.weight"] = {"becomes": "tied"}
    recipe = {"method": "itf", "group_size": 6, "keep": ["*.head"], "dtype": None, "head": "keep"}
    plain = {
        "format_version": 1,
        "tool": {"name": "ternarize", "version": "0.1.0"},
        "source": {
            "bytes": 4000,
            "card": {"license": "mit"},
            "hub": {"id": "a/b", "commit": "0" * 40},
        },
        "recipe": {**recipe, "calibrate": None},
        "tensors": tensors,
    }
    measure = {"value": 0.1, "standard_error": 0.01}
    block = {"block": "layers.0", "before": 0.2, "after": 0.1, "uncalibrated": {"a.weight": 3}}
    calibrated = {
        **plain,
        "recipe": {**recipe, "method": "gptq", "calibrate": {"dataset": "default", "seed": 1}},
        "calibration": {
            "data": {"dataset": "default", "samples": 8, "tokens": 90, "notes": ["one"]},
            "quality": {"perplexity": measure, "kl_divergence": {**measure, "value": None}},
            "forms": {"plain": 2, "planes": 1},
            "uncalibrated": 1,
            "blocks": [{**block, "matrices": {"w.weight": [0.2, 0.1]}}],
        },
    }
    return [
        structure.join_files(
            {"config.json": structure.dump(config), "ternarize.json": structure.dump(record)}
        )
        for record in (plain, calibrated)
    ]


def _texts() -> list[bytes]:
    texts = [
        structure.TEXTS[i].encode("utf-8", "surrogatepass") for i in range(len(structure.TEXTS))
    ]
    for data in _directories():
        texts += [v for k, v in structure.split_files(data).items() if k.endswith(".json")]
    return texts


TARGETS: dict[str, Target] = {
    "header": Target(
        fuzz_header,
        structure.change_file,
        lambda: _files("valid", "invalid"),
        ("files.headers", "files.json_files"),
    ),
    "json": Target(fuzz_json, structure.change_text, _texts, ("files.json_files",)),
    "file": Target(
        fuzz_file,
        structure.change_file,
        lambda: _files("valid", "invalid"),
        (
            "files.headers",
            "files.metadata",
            "files.container",
            "trits.base3",
            "trits.int8",
            "trits.int4",
        ),
    ),
    "directory": Target(
        fuzz_directory,
        structure.change_directory,
        _directories,
        ("sources.checkpoint", "sources.packed", "files.metadata", "convert.verify"),
    ),
    "gguf": Target(
        fuzz_gguf,
        gguf_files.change,
        gguf_files.seeds,
        ("files.gguf", "sources.imports.gguf", "sources.imports.gguf_config"),
    ),
    "record": Target(
        fuzz_record,
        structure.change_directory,
        _records,
        ("sources.packed", "convert.verify", "measure.report", "publish.card"),
    ),
    "steps": Target(
        fuzz_steps, journals.change, _journals, ("steps.journal", "steps.coding", "steps.replay")
    ),
}


@dataclass
class Limits:
    """What the slowest and the hungriest input took so far."""

    seconds: float = 0.0
    slowest: bytes = b""
    peak: int = 0  # bytes, of the process


def run_one(target: Target, data: bytes, folder: Folder, limits: Limits) -> None:
    """Run a target on an input; raises Finding, or what the target let out."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    start = time.process_time()  # not disturbed by others on the machine
    target.run(data, folder)
    seconds = time.process_time() - start
    limits.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    if seconds > limits.seconds:
        limits.seconds, limits.slowest = seconds, data
    require(seconds <= MOST_SECONDS, f"{seconds:.1f} s")
    grown = limits.peak - before
    require(grown <= 2 * len(data) + MEMORY, f"{grown >> 20} MB for {len(data)} bytes")
