"""What a journal says of tensors that begin from its seed, and of the model that they are.

    length, zlib stream of JSON, CRC     behind the header, with the feature `model`

A model is its tensors of trits, with where their scales begin, tensors of zeros or ones, what
config.json holds, and the digests of the files beside it, which are not in the journal (its
tokenizer). formats/steps.md, 4.10, is the definition; here are its shipped reader and writer.
"""

import json
import math
import re
import struct
import zlib
from dataclasses import dataclass
from typing import Any

from ternarize.errors import UsageError, damaged
from ternarize.files.json_files import strict_json

MODEL = "model"  # the feature
MOST_VALUES = 1 << 58  # trits of all tensors: cells that a word has an address for
MOST_EXPONENT = 1024  # of scales at the start, of either sign
LONGEST_PART = 1 << 24  # bytes of a header, a model, a record
# files beside the weights: paths that lead nowhere else, and no file that a replay writes
_BESIDE = re.compile(r"[0-9A-Za-z_-][0-9A-Za-z_.-]*(/[0-9A-Za-z_-][0-9A-Za-z_.-]*)*")
_OWN = ("config.json", "ternarize.json", "sha256sums")
CODE = "auto_map"  # by which a configuration names code: a journal brings none

TensorShapes = tuple[tuple[str, tuple[int, ...], int], ...]  # name, shape, group size
Constants = tuple[tuple[str, tuple[int, ...], int], ...]  # name, shape, 0 or 1


@dataclass(frozen=True)
class StartModel:
    """The model of a journal that begins from its seed.

    exponents  of each tensor of trits, in order: its scales begin at 2^(exponent / 32)
    constants  tensors that no step moves: (name, shape, 0 or 1)
    config     what config.json holds, without how weights are packed
    files      files beside the weights: name -> SHA-256, in hex
    """

    exponents: tuple[int, ...]
    constants: Constants
    config: dict[str, Any]
    files: dict[str, str]


def summed(data: bytes) -> bytes:
    """Bytes of a journal with their CRC-32 behind them."""
    return data + struct.pack("<I", zlib.crc32(data))


def frame_end(data: bytes, begin: int, at: int, name: str, where: str) -> int:
    """Where what is framed by its length and a CRC-32 ends, in front of the CRC-32.

    begin  first byte that the CRC-32 is of
    at     of the length
    name   of what it is, for the FormatError where it is not whole
    """
    length = int.from_bytes(data[at : at + 4], "little")
    end = at + 4 + length
    if length > LONGEST_PART or end + 4 > len(data):
        raise damaged(where, f"its {name} of {length} bytes is not there")
    if zlib.crc32(data[begin:end]) != int.from_bytes(data[end : end + 4], "little"):
        raise damaged(where, f"its {name} does not fit its checksum")
    return end


def values_in(tensors: TensorShapes | Constants) -> int:
    """How many values tensors have in all."""
    return sum(math.prod(shape) for _, shape, _ in tensors)


def tensors_json(tensors: TensorShapes) -> list[dict[str, Any]]:
    """Tensors as a header lists them."""
    return [{"name": n, "shape": list(s), "group_size": size} for n, s, size in tensors]


def model_bytes(tensors: TensorShapes, model: StartModel) -> bytes:
    """What stands behind the header of a journal with a model; UsageError where it is too large."""
    both = zip(tensors_json(tensors), model.exponents, strict=True)
    table = {
        "tensors": [{**tensor, "exponent": exponent} for tensor, exponent in both],
        "constants": [
            {"name": n, "shape": list(shape), "value": value} for n, shape, value in model.constants
        ],
        "config": model.config,
        "files": model.files,
    }
    form: Any = {"separators": (",", ":"), "allow_nan": False, "ensure_ascii": False}
    text = json.dumps(table, **form).encode()
    stream = zlib.compress(text, 9)
    if max(len(text), len(stream)) > LONGEST_PART:
        found, most = f"takes {len(text)} bytes of JSON", f"at most {LONGEST_PART}"
        raise UsageError("the model of the journal", found, most, "Use `ternarize train`")
    return summed(struct.pack("<I", len(stream)) + stream)


def parse_model(data: bytes, at: int, where: str) -> tuple[TensorShapes, StartModel, int]:
    """The tensors and the model that stand at a byte, and where they end; raises FormatError."""
    end = frame_end(data, at, at, "model", where)
    try:
        table = strict_json(_inflated(data[at + 4 : end]).decode())
    except (ValueError, RecursionError, zlib.error) as error:
        raise damaged(where, f"its model cannot be read ({error})") from None
    if not isinstance(table, dict):
        raise damaged(where, "its model is not an object")
    tensors = parse_tensors(table.get("tensors"), where)
    exponents = tuple(each.get("exponent") for each in table["tensors"])
    if not all(type(e) is int and abs(e) <= MOST_EXPONENT for e in exponents):
        expected = f"an integer up to {MOST_EXPONENT} of each tensor"
        raise damaged(where, "the exponents of its model cannot be read", expected)
    constants = table.get("constants")
    if not isinstance(constants, list) or not all(map(_is_constant, constants)):
        expected = "names, shapes, and 0 or 1"
        raise damaged(where, "the constants of its model cannot be read", expected)
    others = tuple((c["name"], tuple(c["shape"]), c["value"]) for c in constants)
    _check_names([each[0] for each in (*tensors, *others)], where)
    if values_in(others) > MOST_VALUES:
        raise damaged(where, "its constants are too large", "2^58 values at most")
    config, files = table.get("config"), table.get("files")
    if not isinstance(config, dict) or _names_code(config):
        raise damaged(where, "the configuration of its model is no object, or names code to run")
    if not isinstance(files, dict) or not all(map(is_beside, files)):
        raise damaged(where, "the files of its model cannot be read", "names below a folder")
    if not all(isinstance(d, str) and re.fullmatch("[0-9a-f]{64}", d) for d in files.values()):
        raise damaged(where, "the files of its model cannot be read", "a SHA-256 of each")
    return tensors, StartModel(exponents, others, config, files), end + 4


def _inflated(stream: bytes) -> bytes:
    """What a zlib stream holds; ValueError or zlib.error where it is none, or too much."""
    reader = zlib.decompressobj()
    text = reader.decompress(stream, LONGEST_PART + 1)
    if not reader.eof or reader.unused_data or len(text) > LONGEST_PART:
        raise ValueError("no whole zlib stream of so many bytes")
    return text


def parse_tensors(tensors: Any, where: str) -> TensorShapes:
    """A list of tensors from JSON; raises FormatError."""
    if not isinstance(tensors, list) or not tensors or not all(map(_is_tensor, tensors)):
        raise damaged(where, "its tensors cannot be read", "names, shapes and group sizes")
    found = tuple((t["name"], tuple(t["shape"]), t["group_size"]) for t in tensors)
    _check_names([name for name, _, _ in found], where)
    if values_in(found) > MOST_VALUES:
        raise damaged(where, "its tensors are too large", "2^58 trits at most")
    return found


def _check_names(names: list[str], where: str) -> None:
    if len(set(names)) < len(names):
        raise damaged(where, "has a tensor twice")


def _is_tensor(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return False
    size = value.get("group_size")
    return _is_shape(value.get("shape"), 2, 3) and type(size) is int and -1 <= size < 1 << 31


def _is_constant(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return False
    number = value.get("value")
    return _is_shape(value.get("shape"), 0, 4) and type(number) is int and number in (0, 1)


def _is_shape(value: Any, least: int, most: int) -> bool:
    if not isinstance(value, list) or not least <= len(value) <= most:
        return False
    return all(type(n) is int and 1 <= n < 1 << 31 for n in value)


def is_beside(name: str) -> bool:
    """Whether a name can be that of a file beside the weights, whatever the letters' case means."""
    first = name.lower().partition("/")[0]
    own = first in _OWN or first.endswith(".safetensors")
    return len(name) <= 255 and _BESIDE.fullmatch(name) is not None and not own


def _names_code(value: Any) -> bool:
    if isinstance(value, dict):
        return CODE in value or any(map(_names_code, value.values()))
    return isinstance(value, list) and any(map(_names_code, value))
