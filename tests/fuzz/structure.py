"""Mutations that know what they change: safetensors files, records, payload, directories, JSON.

Bytes changed anywhere nearly always end at the first check. Here a file is taken apart, one to four
things in it are changed, and with some probability the rest is made to fit again: lengths, offsets,
stored shapes, scales, digests. So a change also meets the checks behind the first ones, and some
results are valid files of shapes that nobody wrote down.
"""

import hashlib
import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any, TypeGuard

MOST = 1 << 14  # bytes of payload that a repair may make
DTYPES = "F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F8_E8M0 I64 I32 I16 I8 U64 U32 U16 U8 BOOL C64".split()
SIZES = dict(zip(DTYPES, [8, 4, 2, 2, 1, 1, 1, 8, 4, 2, 1, 8, 4, 2, 1, 1, 8], strict=True))
NUMBERS = [-(2**63), -2, -1, 0, 1, 2, 3, 4, 5, 6, 7, 15, 16, 63, 64, 65, 127, 128, 256, 1024]
NUMBERS += [2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**60, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64]
WORDS = ["", "base3", "int8", "U8", "F16", "__metadata__", "weight", "w.weight", "w.weight_scale"]
WORDS += [
    "int4",
    "a_scale",
    "..",
    "../x",
    "/etc/x",
    "a\\b",
    "model.safetensors",
    "é",
    "\x00",
    "\ud800",
    "1",
]
WORDS += ["ternary", "kept", "tied", "scale8", "planes", "rotation", "shape", "sha256", "\n", "C:"]
KEYS = "shape group_size codec planes rotation transposed kernel sha256 block seed features".split()
KEYS += "format_version tensors dtype data_offsets weight_map quantization_config recipe".split()
KEYS += "quant_method calibration becomes data quality forms blocks metadata total_size".split()
TEXTS = [
    '{"a":1,"a":2}',
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "[" * 2000,
    "\\ud800",
    '"\\ud800"',
]
TEXTS += [
    "\ufeff",
    "null",
    "true",
    "{}",
    "[]",
    " ",
    "\n",
    "\t",
    ",",
    ":",
    "}",
    "{",
    "0x1",
    "1.0",
    "-0",
]
TEXTS += ["1E400", "9" * 30, "-1", '"', "\\u0000", "//", "'"]


def grown(rng: random.Random) -> Any:
    """Some JSON value."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(NUMBERS) if rng.random() < 0.8 else rng.randrange(-300, 300)
    if kind == 3:
        return rng.choice(WORDS)
    if kind == 4:
        return rng.choice([None, True, False, 1.0, 0.5, -0.0, 1e300])
    if kind == 5:
        return [grown(rng) for _ in range(rng.randrange(4))]
    if kind == 6:
        return {rng.choice(KEYS): grown(rng) for _ in range(rng.randrange(3))}
    return rng.choice(DTYPES)


def change_json(value: Any, rng: random.Random) -> Any:
    """`value` with one node changed; tables and lists are changed in place."""
    nodes: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, each in items:
            nodes.append((node, key))
            if isinstance(each, (dict, list)):
                walk(each)

    if not isinstance(value, (dict, list)):
        return grown(rng)
    walk(value)
    if not nodes or rng.random() < 0.02:
        return grown(rng)
    parent, key = rng.choice(nodes)
    what = rng.randrange(8)
    if what == 0:
        del parent[key]
    elif what == 1:
        other, place = rng.choice(nodes)
        found = other.get(place) if isinstance(other, dict) else None
        parent[key] = json.loads(json.dumps(found))  # a copy: nothing may hold itself
    elif what == 2 and isinstance(parent, dict):
        parent[rng.choice(KEYS + WORDS)] = parent.pop(key)
    elif what == 3 and isinstance(parent, dict):
        parent[rng.choice(KEYS + WORDS)] = grown(rng)
    elif what == 4 and isinstance(parent[key], int):
        parent[key] += rng.choice([-1, 1])
    elif what == 4 and isinstance(parent[key], str) and parent[key]:
        at = rng.randrange(len(parent[key]))
        parent[key] = (
            parent[key][:at] + rng.choice(["", "0", "/", "\x00", "é"]) + parent[key][at + 1 :]
        )
    else:
        parent[key] = grown(rng)
    return value


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, put in, taken out, doubled; what any fuzzer does."""
    out = bytearray(data)
    at = rng.randrange(len(out) + 1)
    what = rng.randrange(6)
    if what == 0 and at < len(out):
        out[at] ^= 1 << rng.randrange(8)
    elif what == 1 and at < len(out):
        out[at] = rng.randrange(256)
    elif what == 2:
        out[at:at] = rng.randbytes(rng.randrange(1, 9))
    elif what == 3:
        del out[at : at + rng.randrange(1, 9)]
    elif what == 4:
        out[at:at] = out[at : at + rng.randrange(1, 65)]
    else:
        out[at:at] = rng.choice(TEXTS).encode("utf-8", "surrogatepass")
    return bytes(out)


def dump(value: Any) -> bytes:
    """JSON as the files have it; half surrogates stay escaped."""
    try:
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(value, separators=(",", ":")).encode()


def parse(data: bytes) -> Any:
    """JSON, or None."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def change_text(data: bytes, rng: random.Random) -> bytes:
    """A JSON text with nodes changed, or now and then with other letters."""
    value = parse(data) if rng.random() < 0.85 else None
    if value is None:
        return change_bytes(data, rng)
    for _ in range(rng.randrange(1, 4)):
        value = change_json(value, rng)
    return dump(value)


# A safetensors file in parts: its header, its records (in the header's metadata), its payload.


def take_apart(data: bytes) -> tuple[dict[str, Any], dict[str, Any] | None, bytes] | None:
    """Header, ternarize metadata and payload; None where the header is none."""
    if len(data) < 8:
        return None
    length = struct.unpack("<Q", data[:8])[0]
    header = parse(data[8 : 8 + length]) if length <= len(data) else None
    if not isinstance(header, dict):
        return None
    metadata = header.get("__metadata__")
    text = metadata.get("ternarize") if isinstance(metadata, dict) else None
    table = parse(text.encode("utf-8", "replace")) if isinstance(text, str) else None
    return header, table if isinstance(table, dict) else None, data[8 + length :]


def put_together(header: dict[str, Any], table: Any, payload: bytes) -> bytes:
    """The inverse of `take_apart`."""
    metadata = header.get("__metadata__")
    if table is not None and isinstance(metadata, dict):
        text = json.dumps(table, separators=(",", ":"))
        if isinstance(table, dict) and list(table)[-1:] == ["sha256"]:  # of all before it
            text = json.dumps(dict(list(table.items())[:-1]), separators=(",", ":"))[:-1]
            text += f',"sha256":"{hashlib.sha256(text.encode()).hexdigest()}"}}'
        metadata["ternarize"] = text
    raw = dump(header)
    return struct.pack("<Q", len(raw)) + raw + payload


def _sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 40 for n in value)


def _nbytes(entry: Any) -> int | None:
    if not isinstance(entry, dict) or not _sizes(entry.get("shape")):
        return None
    dtype = entry.get("dtype")
    size = SIZES.get(dtype) if isinstance(dtype, str) else None
    count = math.prod(entry["shape"])
    return None if size is None or count * size > MOST else count * size


def _data(entry: Any, payload: bytes) -> bytes:
    """What the payload has of a tensor, cut and filled to its size."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    found = payload[offsets[0] : offsets[1]] if _sizes(offsets) and len(offsets) == 2 else b""
    size = _nbytes(entry) or 0
    return (found[:size] * (1 + size // max(1, len(found))))[:size] if found else b"\x79" * size


def _tensors(header: dict[str, Any]) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def _records(table: Any) -> dict[str, Any]:
    records = table.get("tensors") if isinstance(table, dict) else None
    return records if isinstance(records, dict) else {}


def _places(cols: int, group_size: int, to_byte: int = 5) -> list[tuple[int, int]]:
    """The group and the count of trits of each byte of a row (formats/base3.md).

    to_byte  how many a byte has; 2: of int4 (formats/int4.md)
    """
    length = cols if group_size <= 0 else min(group_size, cols)
    places = []
    for group, first in enumerate(range(0, cols, length)):
        count = min(length, cols - first)
        places += [(group, min(to_byte, count - at)) for at in range(0, count, to_byte)]
    return places


def fit(header: dict[str, Any], table: Any, payload: bytes, rng: random.Random) -> bytes:
    """Make stored shapes, trits and scales what the records ask for; returns a new payload.

    The offsets of the header are made anew, each tensor behind the other. Records that are no
    longer of the form that the format asks for are left as they are.
    """
    parts = {name: _data(header[name], payload) for name in _tensors(header)}
    for name, record in _records(table).items():
        if not isinstance(record, dict) or not isinstance(header.get(name), dict):
            continue
        shape, group_size = record.get("shape"), record.get("group_size")
        scale = header.get(f"{name}_scale")
        if not _sizes(shape) or len(shape) not in (2, 3) or not isinstance(scale, dict):
            continue
        if type(group_size) is not int or not 1 <= shape[-1] <= 4096 or math.prod(shape) > MOST:
            continue
        int4 = record.get("codec") == "int4"
        places = _places(shape[-1], group_size, 2 if int4 else 5)
        planes = record.get("planes", 1)
        planes = 2 if type(planes) is int and planes == 2 else 1
        groups, rows = places[-1][0] + 1, math.prod(shape[:-1])
        int8 = record.get("codec") == "int8"
        width = shape[-1] if int8 else len(places) * planes
        used = bytearray(rows * planes * groups)
        data = bytearray(parts[name][: rows * width].ljust(rows * width, b"\x79"))
        length = shape[-1] if group_size <= 0 else min(group_size, shape[-1])
        for at, byte in enumerate(data):
            if int8:
                data[at] = byte = 127 if byte == 128 else byte
                used[at // width * groups + at % width // length] |= byte != 0
                continue
            group, count = places[at % len(places)]
            if int4:
                data[at] = byte = byte if count == 2 else byte & 15 | 0x80
                used[at // len(places) * groups + group] |= byte != 0x88
                continue
            code = byte % 3**count + sum(3**k for k in range(count, 5))
            data[at] = code
            zero = sum(3**k for k in range(5))
            used[at // len(places) * groups + group] |= code != zero
        stored = [*shape[:-1], width]
        lead = [*shape[:-2], 1] if group_size == 0 else shape[:-1]
        if group_size == 0:
            count = math.prod(shape[:-2])
            per, flags = planes * groups * shape[-2], bytearray()
            for stack in range(count):
                mine = used[stack * per : (stack + 1) * per]
                flags += bytes(any(mine[p :: planes * groups]) for p in range(planes * groups))
            used = flags
        dtype = scale.get("dtype")
        size = SIZES.get(dtype, 2) if isinstance(dtype, str) else 2
        scales = bytearray()
        old = parts.get(f"{name}_scale", b"").ljust(len(used) * size, b"\x38")
        for at, one in enumerate(used):
            value = bytearray(old[at * size : (at + 1) * size])
            value[-1] &= 0x7F
            if size == 1:
                value[0] = 8 + value[0] % 240
            elif value[-1] >= 0x7B or not any(value):  # may be infinite, or 0
                value[-1] = 0x38
            scales += value if one else bytes(size)
        header[name] |= {"dtype": "I8" if int8 else "U8", "shape": stored}
        header[f"{name}_scale"]["shape"] = [*lead, planes * groups]
        parts[name], parts[f"{name}_scale"] = bytes(data), bytes(scales)
    names = list(parts)
    if rng.random() < 0.2:
        rng.shuffle(names)
    joined, at = [], 0
    for name in names:
        entry = header[name]
        part = parts[name] if isinstance(entry, dict) else b""
        if isinstance(entry, dict):
            entry["data_offsets"] = [at, at + len(part)]
        joined.append(part)
        at += len(part)
    return b"".join(joined)


def sign(header: dict[str, Any], table: Any, payload: bytes) -> None:
    """Set the digests of the records to those of the payload."""
    for name, record in _records(table).items():
        if not isinstance(record, dict) or not isinstance(header.get(name), dict):
            continue
        pieces = [name]
        if f"{name}_scale" in header and f"{name}_scale" not in _records(table):
            pieces.append(f"{name}_scale")
        data = b""
        for piece in pieces:
            entry = header[piece]
            offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
            if _sizes(offsets) and len(offsets) == 2:
                data += payload[offsets[0] : offsets[1]]
        record["sha256"] = hashlib.sha256(data).hexdigest()


def _reshape(table: Any, rng: random.Random) -> None:
    """Other shape, group size, planes, rotation, of a record: still of the right form."""
    records = [r for r in _records(table).values() if isinstance(r, dict) and "shape" in r]
    if not records:
        return
    record = rng.choice(records)
    cols = rng.choice([1, 2, 4, 5, 6, 7, 9, 10, 11, 16, 64, 65, 128, 130, 256])
    stack = [rng.randrange(3)] if rng.random() < 0.2 else []
    record["shape"] = [*stack, rng.randrange(4), cols]
    record["group_size"] = rng.choice([-1, 0, 1, 2, 3, 4, 5, 6, 7, 64, cols, cols + 1, 2**62])
    features = []
    for key in ("planes", "rotation", "transposed", "kernel"):
        record.pop(key, None)
    record["codec"] = rng.choice(["base3", "base3", "base3", "int8", "int4"])
    if record["codec"] != "base3":
        features.append(record["codec"])
    elif rng.random() < 0.3:
        record["planes"] = 2
        features.append("planes")
    blocks = [block for block in (4, 16, 64, 256) if cols % block == 0]
    if record["codec"] == "base3" and blocks and rng.random() < 0.3:
        record["rotation"] = {"block": rng.choice(blocks), "seed": rng.randrange(2**32)}
        features.append("rotation")
    if rng.random() < 0.2:
        record["transposed"] = True
    elif record["codec"] == "base3" and not stack and rng.random() < 0.2:
        low = rng.choice([n for n in (1, 2, 3, 5) if cols % n == 0])
        record["kernel"] = [cols // low, low]
        features.append("kernel")
    if isinstance(table, dict) and isinstance(table.get("features"), list):
        table["features"] = sorted({*map(str, table["features"]), *features})


def _change_header(header: dict[str, Any], rng: random.Random) -> None:
    """One field of the header, or a tensor more or less."""
    names = _tensors(header)
    what = rng.randrange(6)
    if not names or what == 0:
        change_json(header, rng)
        return
    name = rng.choice(names)
    entry = header[name]
    if what == 1:
        header[rng.choice([*WORDS, *names, name + "_scale"])] = header.pop(name)
    elif what == 2:
        header[rng.choice([*WORDS, name + "_scale"])] = json.loads(json.dumps(entry))
    elif not isinstance(entry, dict):
        header[name] = grown(rng)
    elif what == 3:
        entry["dtype"] = rng.choice(DTYPES)
    elif what == 4 and _sizes(entry.get("data_offsets")) and entry["data_offsets"]:
        at = rng.randrange(len(entry["data_offsets"]))
        entry["data_offsets"][at] += rng.choice([-4, -1, 1, 2, 4, 2**31, 2**63])
    else:
        entry["shape"] = (
            grown(rng) if rng.random() < 0.3 else [rng.choice(NUMBERS) for _ in range(2)]
        )


def change_file(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file with one to four things changed, and perhaps made whole again."""
    parts = take_apart(data) if rng.random() < 0.95 else None
    if parts is None:
        return change_bytes(data, rng)
    header, table, payload = parts
    changes: list[Callable[[], None]] = [
        lambda: _change_header(header, rng),
        lambda: _change_header(header, rng),
        lambda: None if table is None else void(change_json(table, rng)),
        lambda: None if table is None else void(change_json(_records(table), rng)),
        lambda: _reshape(table, rng),
        lambda: _reshape(table, rng),
    ]
    for _ in range(rng.randrange(5)):
        rng.choice(changes)()
    if rng.random() < 0.6:
        payload = fit(header, table, payload, rng)
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        payload = _change_payload(payload, rng)
    if rng.random() < 0.8:
        sign(header, table, payload)
    out = put_together(header, table, payload)
    what = rng.random()
    if what < 0.05:
        out = change_bytes(out, rng)
    elif what < 0.08:  # the length of the header
        out = struct.pack("<Q", rng.choice(NUMBERS) % 2**64) + out[8:]
    elif what < 0.11:
        out = out[: rng.randrange(len(out) + 1)]
    elif what < 0.14:  # the header's text, its length made to fit
        length = struct.unpack("<Q", out[:8])[0]
        text = change_bytes(out[8 : 8 + length], rng)
        if rng.random() < 0.3:
            text += b" " * rng.randrange(9)
        out = struct.pack("<Q", len(text)) + text + out[8 + length :]
    return out


def void(_: Any) -> None:
    """For a function whose result is not wanted."""


def _change_payload(payload: bytes, rng: random.Random) -> bytes:
    if not payload:
        return rng.randbytes(rng.randrange(4))
    out = bytearray(payload)
    at = rng.randrange(len(out))
    what = rng.randrange(5)
    if what == 0:
        out[at] ^= 1 << rng.randrange(8)
    elif what == 1:
        out[at] = rng.choice([0, 1, 7, 8, 121, 127, 128, 242, 243, 247, 248, 255])
    elif what == 2:  # a scale, perhaps: NaN, infinity, -0, subnormal
        special = [b"\x00\x7e", b"\x00\x7c", b"\x00\x80", b"\x01\x00", b"\x80\x7f", b"\x00\x00"]
        value = rng.choice(special)
        out[at : at + 2] = value
    elif what == 3:
        out += rng.randbytes(rng.randrange(1, 5))
    else:
        del out[at : at + rng.randrange(1, 5)]
    return bytes(out)


# A directory as one input: for each file a line `name size` and its bytes.


def join_files(files: dict[str, bytes]) -> bytes:
    """Files of a directory as one input."""
    return b"".join(f"{name} {len(data)}\n".encode() + data for name, data in files.items())


def split_files(data: bytes) -> dict[str, bytes]:
    """The inverse of `join_files`, of any bytes: stops where there is no more file."""
    files: dict[str, bytes] = {}
    while data:
        line, _, data = data.partition(b"\n")
        name, _, size = line.decode("utf-8", "replace").rpartition(" ")
        if not size.isdigit() or len(size) > 6 or not name or len(name) > 60:
            break
        if "/" in name or "\0" in name or name in (".", ".."):
            break
        files[name], data = data[: int(size)], data[int(size) :]
    return files


def change_directory(data: bytes, rng: random.Random) -> bytes:
    """One or two files changed, or a file more, less or renamed."""
    files = split_files(data)
    if not files:
        return change_bytes(data, rng)
    for _ in range(rng.randrange(1, 3)):
        name = rng.choice(list(files))
        what = rng.randrange(20)
        if what == 0 and len(files) > 1:
            del files[name]
        elif what == 1:
            files[rng.choice(["model.safetensors", "x.safetensors", *files])] = files.pop(name)
        elif what == 2:
            files["model.safetensors"] = files[name]
        elif name.endswith(".json"):
            files[name] = change_text(files[name], rng)
        else:
            files[name] = change_file(files[name], rng)
        if not files:
            break
    if rng.random() < 0.5:
        relist(files)
    return join_files(files)


def relist(files: dict[str, bytes]) -> None:
    """Make the index, if there is one, list the tensors that the files have."""
    index = "model.safetensors.index.json"
    table = parse(files[index]) if index in files else None
    if not isinstance(table, dict) or not isinstance(table.get("weight_map"), dict):
        return
    table["weight_map"] = {}
    for name, data in files.items():
        parts = take_apart(data) if name.endswith(".safetensors") else None
        table["weight_map"] |= dict.fromkeys(_tensors(parts[0]) if parts else [], name)
    files[index] = dump(table)
