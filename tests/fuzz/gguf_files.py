"""GGUF files taken apart, changed and put together, as structure.py does with safetensors.

A file: "GGUF", version u32, tensors u64, keys u64; keys: name, type u32, value; tensors: name,
dimensions u32, their sizes u64 (fastest first), type u32, offset u64; then, aligned to 32, the data
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import random
import struct
from dataclasses import dataclass, field
from typing import Any

from .structure import NUMBERS, WORDS, change_bytes

SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
TYPES = {0: (1, 4), 1: (1, 2), 30: (1, 2), 34: (256, 54), 35: (256, 66), 42: (64, 18), 8: (32, 34)}
KEYS = ["general.alignment", "general.architecture", "split.count", "split.no", "llama.block_count"]
KEYS += ["split.tensors.count", "llama.vocab_size", "tokenizer.ggml.tokens", "llama.expert_count"]


@dataclass
class Gguf:
    """keys: name, type, value (arrays: inner type, list); tensors: name, sizes, type, offset."""

    version: int
    keys: list[tuple[str, int, Any]]
    tensors: list[tuple[str, list[int], int, int]] = field(default_factory=list)
    data: bytes = b""


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _scalar(kind: int, value: Any) -> bytes:
    code = SCALARS[kind]
    if code in "fd?":
        return struct.pack(f"<{code}", value)
    size = struct.calcsize(code)
    return int(int(value) % (1 << 8 * size)).to_bytes(size, "little")


def _value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _text(value)
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(
            _value(inner, each) for each in items
        )
    return _scalar(kind, value)


def put_together(file: Gguf) -> bytes:
    """The bytes of a file."""
    head = b"GGUF" + struct.pack("<IQQ", file.version, len(file.tensors), len(file.keys))
    for name, kind, value in file.keys:
        head += _text(name) + struct.pack("<I", kind) + _value(kind, value)
    for name, sizes, kind, offset in file.tensors:
        head += _text(name) + struct.pack("<I", len(sizes))
        head += b"".join(struct.pack("<Q", n % 2**64) for n in sizes)
        head += struct.pack("<IQ", kind, offset % 2**64)
    return head + bytes(-len(head) % 32) + file.data


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.data, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        length = self.take("Q")
        if length > len(self.data):
            raise ValueError(length)
        self.at += length
        return self.data[self.at - length : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.take(SCALARS[kind])
        inner, count = self.take("I"), self.take("Q")
        if count > len(self.data) or inner == ARRAY:
            raise ValueError(count)
        return inner, [self.value(inner) for _ in range(count)]


def take_apart(data: bytes) -> Gguf | None:
    """The inverse, None where the bytes are no such file."""
    reader = _Reader(data)
    reader.at = 4
    try:
        version, tensors, keys = (reader.take(code) for code in "IQQ")
        if max(tensors, keys) > len(data):
            return None
        file = Gguf(version, [])
        for _ in range(keys):
            name, kind = reader.text(), reader.take("I")
            file.keys.append((name, kind, reader.value(kind)))
        for _ in range(tensors):
            name, count = reader.text(), reader.take("I")
            sizes = [reader.take("Q") for _ in range(min(count, 8))]
            file.tensors.append((name, sizes, reader.take("I"), reader.take("Q")))
    except (struct.error, ValueError, KeyError):
        return None
    file.data = data[reader.at + -reader.at % 32 :]
    return file


def change(data: bytes, rng: random.Random) -> bytes:
    """One to three things changed, and perhaps offsets and data made to fit again."""
    file = take_apart(data) if rng.random() < 0.9 else None
    if file is None:
        return change_bytes(data, rng)
    for _ in range(rng.randrange(1, 4)):
        what = rng.randrange(7)
        if what == 0 and file.keys:
            at = rng.randrange(len(file.keys))
            name, kind, value = file.keys[at]
            file.keys[at] = (rng.choice([*KEYS, *WORDS, name]), kind, value)
        elif what == 1:
            kind = rng.choice([*SCALARS, STRING, ARRAY])
            word = rng.choice(WORDS)
            inner = rng.choice([0, 4, 5, 6, STRING])
            items = [rng.choice(WORDS) if inner == STRING else rng.randrange(200) for _ in range(3)]
            number = rng.choice(NUMBERS) if kind not in (6, 7, 12) else rng.random()
            value = word if kind == STRING else (inner, items) if kind == ARRAY else number
            file.keys.append((rng.choice(KEYS), kind, value))
            if rng.random() < 0.7:  # instead of what was there
                last = file.keys[-1][0]
                file.keys = [k for k in file.keys[:-1] if k[0] != last] + file.keys[-1:]
        elif what == 2 and file.tensors:
            at = rng.randrange(len(file.tensors))
            name, sizes, kind, offset = file.tensors[at]
            if rng.random() < 0.5:
                name = rng.choice([*WORDS, "token_embd.weight", "output.weight"])
            elif rng.random() < 0.5:
                kind = rng.choice([*TYPES, 36, 2, 99, 2**32 - 1])
            else:
                sizes = [rng.choice([*NUMBERS, 256, 512]) for _ in range(rng.randrange(6))]
            file.tensors[at] = (name, sizes, kind, offset)
        elif what == 3 and file.tensors:
            file.tensors.append(rng.choice(file.tensors))
        elif what == 4 and file.data:
            file.data = change_bytes(file.data, rng)
        elif what == 5:
            file.version = rng.choice([0, 1, 2, 3, 4, 2**31])
        elif file.tensors:
            at = rng.randrange(len(file.tensors))
            name, sizes, kind, offset = file.tensors[at]
            file.tensors[at] = (name, sizes, kind, offset + rng.choice([-32, -1, 1, 32, 2**63]))
    if rng.random() < 0.5:
        end = 0
        for at, (name, sizes, kind, _) in enumerate(file.tensors):
            file.tensors[at] = (name, sizes, kind, end)
            weights, nbytes = TYPES.get(kind, (1, 4))
            size = nbytes
            for n in sizes:
                size *= max(1, n)
            end += size // weights + -(size // weights) % 32
        if end < 1 << 15:
            file.data = (file.data + bytes(end))[:end]
    out = put_together(file)
    if rng.random() < 0.05:
        out = out[: rng.randrange(len(out))]
    return out


def seeds() -> list[bytes]:
    """A few small files."""
    keys: list[tuple[str, int, Any]] = [
        ("general.architecture", STRING, "llama"),
        ("general.alignment", 4, 32),
        ("llama.block_count", 4, 1),
        ("llama.context_length", 4, 64),
        ("llama.embedding_length", 4, 256),
        ("llama.feed_forward_length", 4, 256),
        ("llama.attention.head_count", 4, 4),
        ("llama.attention.layer_norm_rms_epsilon", 6, 1e-5),
        ("tokenizer.ggml.model", STRING, "gpt2"),
        ("tokenizer.ggml.tokens", ARRAY, (STRING, ["a", "b"])),
        ("tokenizer.ggml.token_type", ARRAY, (5, [1, 1])),
    ]
    files = [Gguf(3, keys), Gguf(2, keys[:1])]
    for kind, (weights, nbytes) in TYPES.items():
        cols = max(weights, 32)
        size = cols // weights * nbytes * 2
        tensors = [
            ("blk.0.attn_q.weight", [cols, 2], kind, 0),
            ("output_norm.weight", [4], 0, 1024),
        ]
        files.append(Gguf(3, keys, tensors, bytes(1024) + bytes(size % 7) + bytes(16)))
    split: list[tuple[str, int, Any]] = [("split.count", 2, 1), ("split.no", 2, 0)]
    files.append(Gguf(3, keys[:2] + split))
    return [put_together(file) for file in files]
