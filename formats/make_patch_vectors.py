"""The vectors of patch.md; make_vectors.py calls this, and writes them.

As there: the plainest possible reading of the document, one value at a time, that shares no code
with reference_patch.py or the package. Its LZMA2 has literals alone, no matches.

    vectors/patches/valid/base/          the checkpoint that these patches begin from
    vectors/patches/valid/CASE.patch     with CASE.json: the files of the result
    vectors/patches/invalid/base/
    vectors/patches/invalid/RULE[-VARIANT].patch    breaks this one rule and no other
"""

import copy
import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from typing import Any

Files = dict[str, bytes]
MAGIC = b"\x89TRIT\r\n\x1a"
BLOCK = 2**18
WIDTHS = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I64": 8}
WEIGHTS = ".safetensors"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


# LZMA2


class Range:
    """The range coder of LZMA, with the probabilities of literals (lc 0, lp 0, pb 0)."""

    def __init__(self) -> None:
        self.low, self.range, self.cache, self.pending = 0, 2**32 - 1, 0, 1
        self.out = bytearray()
        self.literal, self.match = [1024] * 256, [1024]

    def shift(self) -> None:
        if self.low < 0xFF000000 or self.low >= 2**32:
            carry, byte = self.low >> 32, self.cache
            for _ in range(self.pending):
                self.out.append((byte + carry) % 256)
                byte = 0xFF
            self.pending, self.cache = 0, self.low >> 24 & 0xFF
        self.pending += 1
        self.low = self.low % 2**24 << 8

    def bit(self, table: list[int], at: int, value: int) -> None:
        bound = (self.range >> 11) * table[at]
        if value:
            self.low += bound
            self.range -= bound
            table[at] -= table[at] >> 5
        else:
            self.range = bound
            table[at] += 2048 - table[at] >> 5
        while self.range < 2**24:
            self.range = self.range << 8 & 2**32 - 1
            self.shift()

    def byte(self, value: int) -> None:
        self.bit(self.match, 0, 0)
        tree = 1
        for place in range(7, -1, -1):
            digit = value >> place & 1
            self.bit(self.literal, tree, digit)
            tree = 2 * tree + digit

    def end(self) -> bytes:
        for _ in range(5):
            self.shift()
        return bytes(self.out)


def lzma2(data: bytes) -> bytes:
    """One chunk with new properties and dictionary, and the end."""
    coder = Range()
    for value in data:
        coder.byte(value)
    packed = coder.end()
    assert 0 < len(data) <= 2**16 and len(packed) <= 2**16
    sizes = struct.pack(">HH", len(data) - 1, len(packed) - 1)
    return b"\xe0" + sizes + b"\0" + packed + b"\0"


def smaller(data: bytes) -> bytes:
    """Packed, where that is smaller."""
    packed = lzma2(data) if data else data
    return packed if len(packed) < len(data) else data


# Codings


def bits_of(bits: list[int]) -> bytes:
    """Bits, the least significant of a byte first."""
    found = bytearray(-(-len(bits) // 8))
    for place, bit in enumerate(bits):
        found[place // 8] |= bit << place % 8
    return bytes(found)


def put_set(members: list[int]) -> bytes:
    """The form of the fewest bits, of the smallest k."""
    best, fewest = b"", 0
    for k in range(20):
        quotients, remainders, last = [], [], -1
        for member in members:
            quotient, rest = divmod(member - last - 1, 2**k)
            quotients += [0] * quotient + [1]
            remainders += [rest >> place & 1 for place in range(k)]
            last = member
        if not best or len(quotients + remainders) < fewest:
            fewest = len(quotients + remainders)
            head = struct.pack("<IBI", len(members), k, len(quotients))
            best = head + bits_of(quotients) + bits_of(remainders)
    return best


def tell_trits(old: bytes, new: bytes) -> bytes:
    told = b""
    for begin in range(0, len(old), BLOCK):
        moved, up, crossing, others = [], [], [], 0
        for at in range(5 * len(old[begin : begin + BLOCK])):
            before, after = (data[begin + at // 5] // 3 ** (at % 5) % 3 for data in (old, new))
            if before == after:
                continue
            moved.append(at)
            if before == 1:
                up.append(after // 2)
            else:
                crossing += [others] if after != 1 else []
                others += 1
        told += put_set(moved) + bits_of(up) + put_set(crossing)
    return told


def folded(step: int, size: int) -> int:
    """0, 1, 2, 3, ... for steps of 0, -1, 1, -2, ... mod `size`."""
    step %= size
    return 2 * step if step < size // 2 else 2 * (size - step) - 1


def tell_halves(old: bytes, new: bytes) -> bytes:
    return bytes(
        folded(b % 16 - a % 16, 16) + 16 * folded(b // 16 - a // 16, 16)
        for a, b in zip(old, new, strict=True)
    )


def tell_words(old: bytes, new: bytes, width: int) -> bytes:
    told = b""
    for at in range(0, len(old), width):
        a, b = (int.from_bytes(data[at : at + width], "little") for data in (old, new))
        told += folded(b - a, 256**width).to_bytes(width, "little")
    return told


# Patches


def head_of(file: bytes) -> bytes:
    return file[: 8 + int.from_bytes(file[:8], "little")]


def tensors_of(files: Files) -> tuple[dict[str, Any], dict[str, Any]]:
    """{name: (dtype, data)} of the weight files, and the records."""
    tensors: dict[str, Any] = {}
    records: dict[str, Any] = {}
    for name, file in files.items():
        if name.endswith(WEIGHTS):
            head = head_of(file)
            header = json.loads(head[8:])
            records |= json.loads(header.pop("__metadata__")["ternarize"])["tensors"]
            for each, entry in header.items():
                begin, end = entry["data_offsets"]
                tensors[each] = entry["dtype"], file[len(head) + begin : len(head) + end]
    return tensors, records


class Draft:
    """The parts of a patch before they are put together, so that a rule can be broken in one."""

    def __init__(self, base: Files, result: Files, whole: tuple[str, ...] = ()) -> None:
        """whole: tensors whose new bytes are there."""
        before, old = tensors_of(base)
        after, new = tensors_of(result)
        self.header: dict[str, Any] = {"format_version": 1, "features": []}
        self.header["base"] = {
            name: old[name]["sha256"]
            for name, record in new.items()
            if record["sha256"] != old[name]["sha256"]
        }
        self.header["files"] = []
        small = b""
        for name, data in result.items():
            entry = {"name": name, "size": len(data), "sha256": sha256(data), "source": "patch"}
            if name.endswith(WEIGHTS):
                entry |= {"source": "tensors", "head": len(head_of(data))}
                small += head_of(data)
            elif base.get(name) == data:
                entry["source"] = "base"
            else:
                small += data
            self.header["files"].append(entry)
        self.stored = [smaller(small)]
        self.header["small"] = self.sizes(small)
        self.header["parts"] = []
        for name, (dtype, data) in after.items():
            codec = new.get(name, {}).get("codec")
            coding = {"base3": "trits", "int4": "halves"}.get(codec, "words")
            if name in whole:
                coding, told = "bytes", data
            elif before[name][1] == data:
                continue
            elif coding == "trits":
                told = tell_trits(before[name][1], data)
            elif coding == "halves":
                told = tell_halves(before[name][1], data)
            else:
                told = tell_words(before[name][1], data, WIDTHS[dtype])
            self.put(name, coding, told)

    def sizes(self, data: bytes) -> dict[str, Any]:
        stored = smaller(data)
        return {"length": len(data), "size": len(stored), "sha256": sha256(stored)}

    def put(self, name: str, coding: str, told: bytes) -> None:
        self.stored.append(smaller(told))
        self.header["parts"].append({"name": name, "coding": coding, **self.sizes(told)})

    def part(self, name: str) -> int:
        """The place of a tensor's part."""
        return [str(each["name"]) for each in self.header["parts"]].index(name)

    def replace(self, name: str, told: bytes, stored: bytes | None = None) -> None:
        """Give a tensor's part another content (packed in the way of `stored`)."""
        at = self.part(name)
        stored = smaller(told) if stored is None else stored
        self.stored[at + 1] = stored
        new = {"length": len(told), "size": len(stored), "sha256": sha256(stored)}
        self.header["parts"][at] |= new

    def file(self, header: bytes | None = None) -> bytes:
        raw = compact(self.header) if header is None else header
        stored = smaller(raw)
        head = struct.pack("<QQ", len(raw), len(stored)) + hashlib.sha256(stored).digest()
        return MAGIC + head + stored + b"".join(self.stored)


def expected(files: Files) -> bytes:
    table = {name: {"size": len(data), "sha256": sha256(data)} for name, data in files.items()}
    return (json.dumps({"files": table}, indent=1) + "\n").encode()


def build(
    base: Files, results: dict[str, Files], whole: Mapping[str, tuple[str, ...]], small: list[Files]
) -> Files:
    """All vectors: path below vectors/ -> bytes.

    base     the files of the base
    results  case: the files that its patch gives
    whole    case: the tensors that it has as they are
    small    base and results of the invalid ones
    """
    files = {f"patches/valid/base/{name}": data for name, data in base.items()}
    for case, result in results.items():
        patch = Draft(base, result, whole.get(case, ())).file()
        files[f"patches/valid/{case}.patch"] = patch
        files[f"patches/valid/{case}.json"] = expected(result)
    files |= {f"patches/invalid/base/{name}": data for name, data in small[0].items()}
    for rule, patch in invalid(*small).items():
        files[f"patches/invalid/{rule}.patch"] = patch
    return files


def invalid(base: Files, result: Files, wide: Files) -> Files:
    """Patches that break one rule each.

    wide  another result, whose scales of w.trits have another type than in the base
    """
    files: Files = {}
    good = Draft(base, result)
    data = good.file()
    trits, norm, halves = "w.trits", "norm", "w.int4"
    old, _ = tensors_of(base)

    def put(rule: str, change: Callable[[Draft], object]) -> None:
        draft = copy.deepcopy(good)
        change(draft)
        files[rule] = draft.file()

    def header(rule: str, change: Callable[[dict[str, Any]], object]) -> None:
        put(rule, lambda draft: change(draft.header))

    def head(rule: str, at: int, size: int, value: int) -> None:
        files[rule] = data[:at] + value.to_bytes(size, "little") + data[at + size :]

    def rename(name: str) -> Callable[[dict[str, Any]], object]:
        return lambda h: h["files"][-1].update(name=name)

    def packed_as(stored: bytes) -> Callable[[Draft], object]:
        return lambda draft: draft.replace("norm", words, stored)

    # The frame
    files["patch-magic"] = data.replace(b"\r\n", b"\n", 1)
    files["patch-magic-empty"] = b""
    files["patch-too-short"] = data[:55]
    length, size = (int.from_bytes(data[at : at + 8], "little") for at in (8, 16))
    head("patch-header-length-huge", 8, 8, 2**63)
    head("patch-header-length-above-limit", 8, 8, 100_000_001)
    head("patch-header-length-below-size", 8, 8, size - 1)
    head("patch-header-length-zero", 16, 8, 0)
    files["patch-header-length-past-end"] = data[: 56 + size - 1]
    head("part-length-header-more", 8, 8, length + 1)
    head("part-length-header-less", 8, 8, length - 1)
    head("part-digest-header", 24, 1, data[24] ^ 1)
    files["patch-truncated"] = data[:-1]
    files["patch-trailing"] = data + b"\0"
    for variant, text in (
        ("syntax", compact(good.header)[:-1]),
        ("list", b"[]"),
        ("nan", compact(good.header)[:-1] + b',"x":NaN}'),
        ("utf8", compact(good.header)[:-1] + b',"x":"\xff"}'),
    ):
        files[f"patch-header-not-json-{variant}"] = good.file(text)
    files["duplicate-key-patch"] = good.file(compact(good.header)[:-1] + b',"base":{}}')

    # The header
    header("patch-version", lambda h: h.update(format_version=2))
    header("patch-version-float", lambda h: h.update(format_version=1.0))
    header("patch-feature", lambda h: h.update(features=["int9"]))
    header("patch-header-bad-features", lambda h: h.pop("features"))
    header("patch-header-bad-base", lambda h: h.update(base=[]))
    header("patch-header-bad-base-digest", lambda h: h["base"].update({trits: "0"}))
    header("patch-header-bad-files", lambda h: h.pop("files"))
    header("patch-header-bad-parts", lambda h: h.update(parts={}))
    header("patch-header-bad-small", lambda h: h.pop("small"))
    header("patch-header-bad-size", lambda h: h["parts"][0].update(size=-1))
    header("patch-header-bad-part-digest", lambda h: h["parts"][0].pop("sha256"))
    header("patch-header-bad-source", lambda h: h["files"][0].update(source="web"))
    header("coding-unknown", lambda h: h["parts"][0].update(coding="xor"))
    header("part-twice", lambda h: h["parts"][1].update(name=h["parts"][0]["name"]))
    header("part-size-stored-longer", lambda h: h["parts"][0].update(length=1))
    header("part-size-huge", lambda h: h["parts"][0].update(length=2**63))
    header("part-size-small", lambda h: h["files"].pop())
    for variant, name in (
        ("parent", "../x.json"),
        ("absolute", "/x.json"),
        ("backslash", "..\\x.json"),
        ("drive", "c:x.json"),
        ("hidden", "a/.x.json"),
        ("empty", ""),
        ("step", "a//x.json"),
        ("control", "x\n.json"),
    ):
        header(f"file-name-bad-{variant}", rename(name))
    header("file-name-twice", lambda h: h["files"][-1].update(name=h["files"][0]["name"]))
    folder = f"{good.header['files'][0]['name']}/x.json"
    header("file-name-twice-folder", lambda h: h["files"][-1].update(name=folder))
    weights = [file["source"] for file in good.header["files"]].index("tensors")
    header("file-size-head", lambda h: h["files"][weights].update(head=9))
    header("file-size-above-limit", lambda h: h["files"][0].update(size=100_000_001))

    longer = copy.deepcopy(good)
    longer.header["files"][weights]["head"] += 1
    small = b"".join(
        content[: file.get("head", len(content))]
        for file, content in zip(longer.header["files"], result.values(), strict=True)
        if file["source"] != "base"
    )
    longer.stored[0] = smaller(small)
    longer.header["small"] = longer.sizes(small)
    files["file-size-head-long"] = longer.file()
    twice = {**result, "more.safetensors": result["model.safetensors"]}
    files["tensor-twice"] = Draft(base, twice).file()

    # Packing
    for variant, number in (("small", 0), ("trits", good.part(trits) + 1)):
        draft = copy.deepcopy(good)
        draft.stored[number] = draft.stored[number][:-1] + bytes([draft.stored[number][-1] ^ 1])
        files[f"part-digest-{variant}"] = draft.file()
    words = bytes(range(40)) * 2
    for variant, stored in (
        ("not-lzma", b"\x03" + bytes(9)),
        ("no-end", lzma2(bytes(80))[:-1]),
        ("goes-on", lzma2(bytes(80)) + b"\0"),
    ):
        put(f"part-stream-{variant}", packed_as(stored))
    put("part-length-more", lambda d: d.replace("norm", words, lzma2(bytes(81))))
    put("part-length-bomb", lambda d: d.replace("norm", words, lzma2(bytes(400))))
    put("part-length-cut", lambda d: d.replace("norm", words, lzma2(bytes(80))[:-3]))
    put("part-length-less", lambda d: d.replace("norm", words, lzma2(bytes(79))))

    # The base and the result
    other = sha256(b"another")
    header("base-tensor", lambda h: h["base"].update({trits: other}))
    header("base-table-missing", lambda h: h["base"].pop(trits))
    header("base-table-unknown", lambda h: h["base"].update(absent=other))
    copied = [file["source"] for file in good.header["files"]].index("base")
    header("base-file", lambda h: h["files"][copied].update(sha256=other))
    header("base-file-missing", lambda h: h["files"][copied].update(name="absent.json"))
    put("base-table-part", lambda d: d.put("absent", "bytes", b"x"))
    header("coding-wrong", lambda h: h["parts"][good.part(trits)].update(coding="words"))
    header("coding-wrong-trits", lambda h: h["parts"][good.part(norm)].update(coding="trits"))
    header("coding-wrong-halves", lambda h: h["parts"][good.part("w.int8")].update(coding="halves"))
    name = "w.trits_scale"
    draft = Draft(base, wide, (name,))
    draft.header["parts"][draft.part(name)]["coding"] = "words"
    files["layout-differs"] = draft.file()
    put("part-size-words", lambda d: d.replace(norm, b"\0"))
    put("part-size-bytes", lambda d: d.replace(halves, b"\0"))
    header("result-digest", lambda h: h["files"][weights].update(sha256=other))
    put("result-digest-part", lambda d: d.replace(norm, bytes(len(old[norm][1]))))

    # Changes of trits
    count = 5 * len(old[trits][1])
    none = put_set([])

    def changes(variant: str, told: bytes) -> None:
        put(f"changes-bad-{variant}", lambda d: d.replace(trits, told))

    def set_of(members: int, k: int, bits: int, rest: bytes) -> bytes:
        return struct.pack("<IBI", members, k, bits) + rest

    changes("empty", b"")
    changes("short", none[:8])
    changes("long", none + none + b"\0")
    changes("too-many", set_of(count + 1, 0, count + 1, b"\xff" * count))
    changes("number-large", put_set([count]) + none)
    changes("k-large", set_of(1, 32, 1, bytes([1, 0, 0, 0, 0])))
    changes("k-wide", set_of(2, 20, 2, bytes([3, 0, 0, 0, 0, 0])))
    changes("quotients-long", set_of(1, 0, 2**31, b"\1"))
    changes("quotients-none", set_of(0, 0, 1, b"\0"))
    changes("quotients-few", set_of(2, 0, 3, b"\1"))
    changes("quotients-many", set_of(1, 0, 2, b"\3"))
    changes("quotients-end", set_of(1, 0, 2, b"\1"))
    changes("bits-left", set_of(1, 0, 1, b"\3"))
    changes("remainders-left", set_of(1, 1, 1, b"\1\2"))
    changes("crossing", none + put_set([0]))
    return files
