"""Packed checkpoints taken apart and put together again, damaged: the cases of hostile.py.

Nothing here uses the package: files are bytes, headers are JSON. A case whose damage is in the
data alone is sealed again, so that a reader has to find the damage and not a digest.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).parents[2] / "formats" / "golden"
WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"
SEEDS = ("rows", "tensor", "planes-scale8", "rotation", "transposed", "coded")  # of one file each
ALL = ("load", "verify", "inspect", "export", "reference")
BYTES = ("load", "verify", "export", "reference")  # those that look at the data, too


class Link(str):
    """What a symbolic link points to, in the place of a file's bytes."""


Files = dict[str, "bytes | Link"]


@dataclass(frozen=True)
class Case:
    """One damaged checkpoint, or one source to convert.

    group    its row in the table
    make     gives the files
    refuse   what must refuse it; whatever else looks at it may do so
    accept   what must accept it
    act      all that looks at it
    named    the message has to name a file or a tensor
    """

    group: str
    make: Callable[[], Files]
    refuse: tuple[str, ...] = ALL
    accept: tuple[str, ...] = ()
    act: tuple[str, ...] = ALL
    named: bool = True
    label: str = ""


def golden(name: str) -> Files:
    """A golden checkpoint, without the list of digests: what changes it would be found by that."""
    paths = sorted(path for path in (GOLDEN / name).iterdir() if path.name != "SHA256SUMS")
    return {path.name: path.read_bytes() for path in paths}


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a file and its data section."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: Any, data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def sealed(table: dict[str, Any]) -> str:
    """The metadata with its own digest at the end."""
    table = {key: value for key, value in table.items() if key != "sha256"} | {"sealed": True}
    text = json.dumps(table, separators=(",", ":"))[:-1]
    return f'{text},"sha256":"{hashlib.sha256(text.encode()).hexdigest()}"}}'


@dataclass
class Parts:
    """A file in parts: {name: [dtype, shape, bytes]} in the order of the data, and the metadata."""

    tensors: dict[str, list[Any]]
    table: dict[str, Any]

    @staticmethod
    def of(data: bytes) -> Parts:
        header, body = split(data)
        metadata = header.pop("__metadata__")
        ordered = sorted(header.items(), key=lambda item: int(item[1]["data_offsets"][0]))
        tensors = {
            name: [e["dtype"], e["shape"], body[e["data_offsets"][0] : e["data_offsets"][1]]]
            for name, e in ordered
        }
        return Parts(tensors, json.loads(metadata["ternarize"]))

    def header(self) -> dict[str, Any]:
        header: dict[str, Any] = {"__metadata__": {"format": "pt", "ternarize": sealed(self.table)}}
        at = 0
        for name, (dtype, shape, data) in self.tensors.items():
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
            at += len(data)
        return header

    def bytes(self, seal: bool = True) -> bytes:
        """The file; with `seal`, every record has the digest of the bytes that are there."""
        if seal:
            for name, record in self.table["tensors"].items():
                if name in self.tensors:
                    data = self.tensors[name][2]
                    if "codec" in record:
                        data += self.tensors.get(name + "_scale", [0, 0, b""])[2]
                    record["sha256"] = hashlib.sha256(data).hexdigest()
        return join(self.header(), b"".join(data for _, _, data in self.tensors.values()))

    def packed(self, codec: str = "base3") -> list[str]:
        return [n for n, r in self.table["tensors"].items() if r.get("codec") == codec]


def alone(files: Files) -> Files:
    """Without the record, whose digests tell that a file was sealed again."""
    return {name: data for name, data in files.items() if name != "ternarize.json"}


def weights(seed: str) -> bytes:
    data = golden(seed)[WEIGHTS]
    assert isinstance(data, bytes)
    return data


def rebuilt(seed: str, change: Callable[[Parts], Any], seal: bool = True) -> Files:
    parts = Parts.of(weights(seed))
    change(parts)
    return alone(golden(seed)) | {WEIGHTS: parts.bytes(seal)}


def with_file(seed: str, name: str, data: bytes | Link) -> Files:
    return golden(seed) | {name: data}


def without(seed: str, name: str) -> Files:
    return {file: data for file, data in golden(seed).items() if file != name}


def replaced(seed: str, data: bytes) -> Files:
    return with_file(seed, WEIGHTS, data)


# --- the cases, by the row of the table -------------------------------------------------------


def truncations(rng: random.Random, count: int) -> Iterator[Case]:
    """Every byte of a header if there is time, and offsets of the data."""
    whole = weights("rows")
    start = 8 + int.from_bytes(whole[:8], "little")
    heads = range(start) if count >= 1000 else sorted(rng.sample(range(start), count // 10))
    for at in heads:
        yield Case("cut in the header", partial(replaced, "rows", whole[:at]))
    for _ in range(min(1000, max(10, count // 10))):
        at = rng.randrange(start, len(whole))
        yield Case("cut in the data", partial(replaced, "rows", whole[:at]))
    for size in (1, 7, 4096):
        for fill in (b"\0", b"\xff"):
            tail = fill * size
            yield Case("bytes at the end", partial(replaced, "rows", whole + tail))


def lengths(rng: random.Random, count: int) -> Iterator[Case]:
    whole = weights("rows")
    for length in (0, 1, len(whole), 100_000_001, 2**31, 2**63, 2**64 - 1):
        data = struct.pack("<Q", length) + whole[8:]
        yield Case("length of the header", partial(replaced, "rows", data))


def malformed(rng: random.Random, count: int) -> Iterator[Case]:
    """Headers that are no JSON, or JSON that readers understand in different ways."""
    whole = weights("rows")
    header, body = split(whole)
    text = json.dumps(header).encode()
    deep = b'{"__metadata__":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}"
    first = next(name for name in header if name != "__metadata__")
    entry = json.dumps({first: header[first]})[1:-1].encode()
    strings = json.loads(text)
    strings[first]["shape"] = [str(n) for n in strings[first]["shape"]]
    offsets = json.loads(text)
    offsets[first]["data_offsets"] = [str(n) for n in offsets[first]["data_offsets"]]
    for raw in (
        text.replace(b"weight", b"\xff\xfeight", 1),
        text.replace(b'"shape": [', b'"shape": [NaN, ', 1),
        text.replace(b'"shape": [', b'"shape": [Infinity, ', 1),
        deep,
        b"[" * 100_000 + b"]" * 100_000,
        text[:-1] + b"," + entry + b"}",
        text.replace(b'"dtype"', b'"dtype": "U8", "dtype"', 1),
        text.replace(b'"dtype"', b'"d\\u0074ype": "U8", "dtype"', 1),
        json.dumps(strings).encode(),
        json.dumps(offsets).encode(),
        b"",
        b"null",
        text + b"\0",
        b" " + text,
        text + b" x",
        text.replace(b'"shape": [', b'"shape": [' + b"9" * 5000 + b", ", 1),
        text.replace(b'"shape": [', b'"shape": [1e2, ', 1),
        text.replace(b"weight", b"w\\ud800eight", 1),
    ):
        yield Case("malformed JSON", partial(replaced, "rows", join(raw, body)))


def sizes(rng: random.Random, count: int) -> Iterator[Case]:
    """Dimensions whose product wraps, and places that overlap, are reversed or leave a hole."""
    header, body = split(weights("rows"))
    names = [name for name in header if name != "__metadata__"]
    names.sort(key=lambda name: int(header[name]["data_offsets"][0]))

    def put(group: str, name: str, key: str, value: Any) -> Case:
        changed = json.loads(json.dumps(header))
        changed[name][key] = value
        return Case(group, lambda: replaced("rows", join(changed, body)))

    huge = [2**64, 2**63, 2**32 + 1]
    for shape in (
        [-1, 1],
        [2**63],
        [2**64 + 4],
        [4194305, 4194305, 211106198978564],  # wraps to 4
        [2**32, 2**32],
        [0, 2**62, 2**62],
        huge,
        huge * 100_000,
        [1] * 1_000_000,
        [1.0, 2],
        [True],
        {"0": 1},
        None,
    ):
        yield put("dimensions", names[0], "shape", shape)
    a, b = (header[name]["data_offsets"] for name in names[:2])
    for name, offsets in (
        (names[1], [b[0] - 1, b[1] - 1]),
        (names[1], a),
        (names[1], [b[0] + 1, b[1] + 1]),
        (names[0], [a[1], a[0]]),
        (names[0], [-1, a[1]]),
        (names[0], [a[0], 2**64 + a[1]]),
        (names[0], [0]),
        (names[0], [0, 1, 2]),
        (names[-1], [len(body), len(body)]),
        (names[0], None),
    ):
        yield put("offsets", name, "data_offsets", offsets)


def streams(rng: random.Random, count: int) -> Iterator[Case]:
    """Rows that a stream of a few bytes is to hold."""

    def promised(parts: Parts, shape: list[int]) -> None:
        parts.table["tensors"][parts.packed()[0]]["shape"] = shape

    for shape in ([2**31, 1280], [2**33, 5], [2**51, 5], [2**40, 2**20]):
        make = partial(rebuilt, "coded", partial(promised, shape=shape))
        yield Case("rows of streams", make, refuse=BYTES)


def many(rng: random.Random, count: int) -> Iterator[Case]:
    """Headers that take time and memory: each is read in 2 s and 1 GB, or refused."""

    def tensors(number: int, size: int, length: int) -> Files:
        body = b"\0" * number * size
        header: dict[str, Any] = {
            f"t{i}".ljust(length, "x"): {
                "dtype": "U8",
                "shape": [size],
                "data_offsets": [i * size, i * size + size],
            }
            for i in range(number)
        }
        digest = hashlib.sha256(b"\0" * size).hexdigest()
        table = {
            "format_version": 1,
            "features": [],
            "tensors": {each: {"sha256": digest} for each in header},
        }
        header["__metadata__"] = {"format": "pt", "ternarize": sealed(table)}
        return golden("rows") | {WEIGHTS: join(header, body)}

    # in the order of cost; the last is above the limit of a header by itself
    for number, size, length in (
        (100_000, 1, 0),
        (200, 1, 65536),
        (300_000, 0, 0),
        (1_000_000, 0, 0),
    ):
        yield Case(
            f"{number:,} tensors"
            + (" with names of 64 kB" if length else " of no bytes" * (not size)),
            partial(tensors, number, size, length),
            refuse=("load",),
            named=False,
        )
    plain, body = split(weights("rows"))
    longest = json.dumps(plain)[:-1] + "".join(
        f',"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(1_000_000)
    )
    yield Case(
        "1,000,000 tensors without record",
        lambda: replaced("rows", join((longest + "}").encode(), body)),
    )


HOSTILE_NAMES = (
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "nul\0.weight",
    "line\nbreak",
    "\x1b[2J\x1b]0;title\x07",
    "\u202eright to left",
    "CON",
    "",
    "x" * 65536,
    "__class__",
    "a.__dict__.b",
    "{0.__class__}",
    "[red]markup[/]",
)


def names(rng: random.Random, count: int) -> Iterator[Case]:
    for name in HOSTILE_NAMES:

        def renamed(parts: Parts, name: str = name) -> None:
            old = next(n for n, r in parts.table["tensors"].items() if "codec" not in r)
            parts.tensors = {name if n == old else n: t for n, t in parts.tensors.items()}
            parts.table["tensors"][name] = parts.table["tensors"].pop(old)

        make = partial(rebuilt, "rows", renamed)
        yield Case("hostile names", make, refuse=("load",), named=False)


def bytes_of_trits(rng: random.Random, count: int) -> Iterator[Case]:
    """The 13 bytes that are no code, at each end and inside; padding that is not zero trits."""

    def put(parts: Parts, name: str, at: int, value: int) -> None:
        data = bytearray(parts.tensors[name][2])
        data[at] = value
        parts.tensors[name][2] = bytes(data)

    for seed in ("rows", "planes-scale8"):
        name = Parts.of(weights(seed)).packed()[0]
        last = len(Parts.of(weights(seed)).tensors[name][2]) - 1
        for at in (0, last // 2, last):
            for value in range(243, 256):
                make = partial(rebuilt, seed, partial(put, name=name, at=at, value=value))
                yield Case("byte codes", make, refuse=BYTES)

    def wide(parts: Parts, cols: int, digit: int, value: int) -> None:
        """A matrix [1, cols] whose last byte has a padding digit other than 1."""
        parts.tensors, parts.table["tensors"] = {}, {}
        trits = [1] * cols + [0] * (-cols % 5)
        trits[digit] = value
        codes = [sum((trits[a + i] + 1) * 3**i for i in range(5)) for a in range(0, len(trits), 5)]
        parts.tensors["w"] = ["U8", [1, len(codes)], bytes(codes)]
        parts.tensors["w_scale"] = ["F16", [1, 1], b"\0\x3c"]
        parts.table["features"] = []
        parts.table["tensors"]["w"] = {"shape": [1, cols], "group_size": -1, "codec": "base3"}

    for cols in (6, 7, 8, 9):
        for value in (1, -1):
            for digit in (cols, 9):
                make = partial(rebuilt, "rows", partial(wide, cols=cols, digit=digit, value=value))
                yield Case("padding", make, refuse=BYTES)


def scales(rng: random.Random, count: int) -> Iterator[Case]:
    bad = {  # as bits of a float16
        "NaN": 0x7E00,
        "signalling NaN": 0x7C01,
        "infinity": 0x7C00,
        "-infinity": 0xFC00,
        "negative": 0xBC00,
        "-0": 0x8000,
        "zero over trits": 0x0000,
    }

    def value(parts: Parts, bits: int, at: int) -> None:
        entry = parts.tensors[parts.packed()[0] + "_scale"]
        data = bytearray(entry[2])
        data[2 * at : 2 * at + 2] = struct.pack("<H", bits)
        entry[2] = bytes(data)

    def form(parts: Parts, dtype: str, shape: list[int], size: int) -> None:
        entry = parts.tensors[parts.packed()[0] + "_scale"]
        entry[0], entry[1] = dtype, shape
        entry[2] = (entry[2] * 8)[:size]

    def missing(parts: Parts) -> None:
        del parts.tensors[parts.packed()[0] + "_scale"]

    assert (
        Parts.of(weights("rows")).tensors[Parts.of(weights("rows")).packed()[0] + "_scale"][0]
        == "F16"
    )
    rows = Parts.of(weights("rows")).table["tensors"][Parts.of(weights("rows")).packed()[0]][
        "shape"
    ][0]
    for bits in bad.values():
        for at in (0, rows - 1):
            make = partial(rebuilt, "rows", partial(value, bits=bits, at=at))
            yield Case("scales", make, refuse=BYTES)
    for dtype, shape, size in (
        ("F64", [rows, 1], 8 * rows),
        ("I16", [rows, 1], 2 * rows),
        ("U8", [rows, 1], rows),
        ("F8_E4M3", [rows, 1], rows),
        ("F16", [rows - 1, 1], 2 * rows - 2),
        ("F16", [rows, 2], 4 * rows),
        ("F16", [1, rows], 2 * rows),
        ("F16", [rows], 2 * rows),
        ("F16", [0, 1], 0),
    ):
        make = partial(rebuilt, "rows", partial(form, dtype=dtype, shape=shape, size=size))
        yield Case("scales", make)
    yield Case("scales", lambda: rebuilt("rows", missing))


def flips(rng: random.Random, count: int, seeds: Sequence[str] = SEEDS) -> Iterator[Case]:
    """Single flipped bits anywhere in a file; both loading and verifying must find each."""
    for i in range(count):
        seed = seeds[i % len(seeds)]
        whole = bytearray(weights(seed))
        bit = rng.randrange(8 * len(whole))
        whole[bit // 8] ^= 1 << bit % 8
        data = bytes(whole)
        yield Case(
            "flipped bits",
            partial(replaced, seed, data),
            refuse=("load", "verify"),
            act=("load", "verify") if i % 10 else ALL,
            label=f"{seed}, bit {bit}",
        )


def swaps(rng: random.Random, count: int) -> Iterator[Case]:
    """Tensors of one shape in each other's place, and shards that are not there or not ours."""

    def pair(parts: Parts) -> tuple[str, str] | None:
        shapes: dict[str, str] = {}
        for name in parts.packed():
            key = json.dumps(parts.tensors[name][1])
            if key in shapes:
                return shapes[key], name
            shapes[key] = name
        return None

    def data(parts: Parts) -> None:
        a, b = pair(parts) or ("", "")
        for end in ("", "_scale"):
            one, two = parts.tensors[a + end], parts.tensors[b + end]
            one[2], two[2] = two[2], one[2]

    def records(parts: Parts) -> None:
        a, b = pair(parts) or ("", "")
        table = parts.table["tensors"]
        table[a], table[b] = table[b], table[a]

    def both(parts: Parts) -> None:
        data(parts)
        records(parts)

    def consistent(seed: str) -> Files:
        return golden(seed) | rebuilt(seed, both, seal=False)

    for seed in (each for each in SEEDS if pair(Parts.of(weights(each)))):
        for change in (data, records):
            make = partial(rebuilt, seed, change, seal=False)
            yield Case("swapped tensors", make, refuse=BYTES)
        # consistent by itself: what tells is the record of the conversion, and the source
        whole = partial(consistent, seed)
        yield Case("swapped with records", whole, ("load", "verify"))

    def shards(change: Callable[[Files], None], name: str = "groups") -> Files:
        files = golden(name)
        change(files)
        return files

    for file in [name for name in golden("experts") if name.endswith(".safetensors")]:
        yield Case("shards", partial(without, "experts", file))

    def foreign(files: Files, seal: bool) -> None:
        """A shard of another conversion: one weight is another, and all digests are right."""
        file = min(name for name in files if name.endswith(".safetensors"))
        old = files[file]
        assert isinstance(old, bytes)
        parts = Parts.of(old)
        table = parts.table["tensors"]
        name = next(n for n in parts.tensors if n in table and "codec" not in table[n])
        parts.tensors[name][2] = parts.tensors[name][2][::-1]
        files[file] = parts.bytes(seal)

    yield Case("shards", lambda: shards(lambda f: foreign(f, False)), refuse=BYTES)
    yield Case(
        "shards of another conversion",
        lambda: shards(lambda f: foreign(f, True)),
        ("load", "verify"),
    )
    yield Case(
        "shards", lambda: golden("groups") | {"model-00001-of-00002.safetensors": weights("rows")}
    )


def index_paths(rng: random.Random, count: int) -> Iterator[Case]:
    files = golden("groups")
    index = files[INDEX]
    assert isinstance(index, bytes)
    for path in (
        "../model-00001-of-00002.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        ".",
        "",
        "c:\\x.safetensors",
        "\\\\host\\share\\x.safetensors",
        "nul\0.safetensors",
        "a" * 5000,
        "http://example.com/x.safetensors",
        5,
        None,
        ["model-00001-of-00002.safetensors"],
    ):
        table = json.loads(index)
        table["weight_map"][next(iter(table["weight_map"]))] = path
        raw = json.dumps(table).encode()
        yield Case("paths of the index", partial(with_file, "groups", INDEX, raw))
    for raw in (b"{}", b"[]", b"", b'{"weight_map":{}}', b'{"weight_map":[]}', b"[" * 100_000):
        yield Case("paths of the index", partial(with_file, "groups", INDEX, raw))
    for link in (
        Link("/etc/passwd"),
        Link("/dev/zero"),
        Link("/dev/null"),
        Link("nowhere"),
        Link(WEIGHTS),
    ):
        yield Case("links out of the directory", partial(with_file, "rows", WEIGHTS, link))


def versions(rng: random.Random, count: int) -> Iterator[Case]:
    def put(key: str, value: Any) -> Callable[[], Files]:
        return lambda: rebuilt("rows", lambda parts: parts.table.update({key: value}))

    for version in (0, 2, 1.0, "1", True, None, 2**64, [1]):
        yield Case("versions and features", put("format_version", version))
    for features in (["later"], ["rotation", "later"], "rotation", None, [1], {"rotation": 1}):
        yield Case("versions and features", put("features", features))

    def record(key: str, value: Any) -> Callable[[], Files]:
        def change(parts: Parts) -> None:
            parts.table["tensors"][parts.packed()[0]][key] = value

        return lambda: rebuilt("rows", change)

    for key, value in (
        ("codec", "base4"),
        ("codec", None),
        ("planes", 3),
        ("planes", 2),
        ("rotation", {"block": 16, "seed": 0}),
        ("group_size", -2),
        ("shape", [2**62, 2**62]),
        ("shape", [0, 0]),
        ("transposed", 1),
    ):
        yield Case("versions and features", record(key, value))
    long = record("group_size", 2**70)  # longer than any row, and so the row
    yield Case("versions and features", long, refuse=(), accept=ALL)
    config = json.loads(bytes(golden("rows")["config.json"]))  # type: ignore[arg-type]
    for version in (2, "1", None):
        config["quantization_config"]["format_version"] = version
        raw = json.dumps(config).encode()
        make = partial(with_file, "rows", "config.json", raw)
        yield Case("versions and features", make, ("load", "verify", "inspect", "export"))


def configurations(rng: random.Random, count: int) -> Iterator[Case]:
    """What a configuration can promise: sizes that do not fit, and types that are wrong."""
    for key, value in (
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", "many"),
        ("hidden_size", 10**12),
        ("hidden_size", 0),
        ("vocab_size", 10**15),
        ("intermediate_size", 2**63),
        ("head_dim", 10**12),
        ("num_attention_heads", 0),
        ("num_attention_heads", 10**9),
        ("num_key_value_heads", 7),
        ("max_position_embeddings", 10**15),
        ("rope_theta", "x"),
        ("rope_parameters", {"rope_type": "evil"}),
        ("hidden_act", "__import__"),
        ("architectures", ["os"]),
        ("architectures", ["PreTrainedModel"]),
        ("architectures", ["AutoModel"]),
        ("architectures", ["pipeline"]),
        ("architectures", ["__class__"]),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", [7]),
        ("architectures", None),
        ("model_type", "../evil"),
        ("model_type", None),
        ("dtype", "float8"),
        ("dtype", "__class__"),
        ("quantization_config", []),
        ("quantization_config", {"quant_method": "ternarize", "activations": "int3"}),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("pad_token_id", 10**9),
        ("pad_token_id", -5),
    ):
        config = json.loads(bytes(golden("rows")["config.json"]))  # type: ignore[arg-type]
        config[key] = value
        raw = json.dumps(config).encode()
        make = partial(with_file, "rows", "config.json", raw)
        yield Case("values of config.json", make, refuse=(), act=("load", "verify", "export"))
    config = json.loads(bytes(golden("rows")["config.json"]))  # type: ignore[arg-type]
    for key in ("attn_implementation", "_attn_implementation", "_experts_implementation"):
        for value in ("evil/kernel", "flash|evil/kernel:f", {"": "evil/kernel"}, ["evil/kernel"]):
            raw = json.dumps(config | {key: value}).encode()
            make = partial(with_file, "rows", "config.json", raw)
            yield Case(
                "code of the Hub in config.json", make, ("load", "verify", "inspect", "export")
            )
    for raw in (b"", b"[]", b"\xff", b"[" * 100_000, b"{" * 10, b"null"):
        make = partial(with_file, "rows", "config.json", raw)
        yield Case("values of config.json", make, ("load", "verify", "inspect", "export"))


def conversions(rng: random.Random, count: int) -> Iterator[Case]:
    """Records of a conversion with anything in the place of anything."""
    said = json.loads(bytes(golden("rotation")["ternarize.json"]))  # type: ignore[arg-type]

    def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        yield path
        if isinstance(value, dict):
            for key in list(value)[:6]:
                yield from places(value[key], (*path, key))
        elif isinstance(value, list):
            for at in range(min(2, len(value))):
                yield from places(value[at], (*path, at))

    paths = [path for path in places(said) if path]
    for path in rng.sample(paths, min(len(paths), max(5, count // 100))):
        values: tuple[Any, ...] = (None, [], {}, "x", -1, 1e308, "\x1b[2J\n")
        for value in values:
            table = json.loads(json.dumps(said))
            place = table
            for step in path[:-1]:
                place = place[step]
            place[path[-1]] = value
            raw = json.dumps(table).encode()
            make = partial(with_file, "rotation", "ternarize.json", raw)
            yield Case(
                "values of ternarize.json", make, (), act=("load", "verify", "inspect", "cli")
            )


def cases(seed: int, count: int, flipped: Sequence[str] = SEEDS) -> Iterator[Case]:
    """All cases of loading; `count` bits are flipped, of these files; the rest is in proportion."""
    rng = random.Random(seed)
    for each in (
        truncations,
        lengths,
        malformed,
        sizes,
        streams,
        many,
        names,
        bytes_of_trits,
        scales,
        swaps,
        index_paths,
        versions,
        configurations,
        conversions,
        partial(flips, seeds=flipped),
    ):
        yield from each(rng, count)
