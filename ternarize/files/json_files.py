"""JSON of a checkpoint: config.json, indexes, records. Strictly, where we wrote it."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ternarize.errors import CheckpointError, FormatError

MAX_JSON = 100_000_000  # bytes of config.json, an index, a record
MAX_LAYERS = 4096  # more than any model has
# what configurations call the number of layers
_LAYERS = r"(\w+_)?n?layers?|(encoder_|decoder_)?depth|n_blocks"


def read_config(directory: Path) -> dict[str, Any] | None:
    """The config.json of a checkpoint, None without one; FormatError where it would do harm.

    transformers builds as many layers as it says, before it looks at a weight: a number that no
    model has would keep it busy for days. And it fetches and runs compiled code where an
    implementation is the name of a Hub repository, which is not asked about as other code is.
    """
    path = directory / "config.json"
    table = read_json(path)

    def walk(value: dict[str, Any]) -> None:
        for key, each in value.items():
            if key.endswith(("attn_implementation", "experts_implementation")):
                names = each.values() if isinstance(each, dict) else [each]
                if not all(name in (None, "") or re.fullmatch(r"\w+", str(name)) for name in names):
                    raise FormatError(
                        path.name,
                        f"{key} is {each!r:.80}",
                        "one of transformers' own",
                        "It names code of the Hub: do not trust this checkpoint",
                    )
            if isinstance(each, dict):
                walk(each)
            many = isinstance(each, int) and each > MAX_LAYERS
            if many and re.fullmatch(_LAYERS, key):
                raise _unusable(path, f"{key} is {each}", f"at most {MAX_LAYERS}")

    walk(table or {})
    return table


def read_json(path: Path, *, strict: bool = False) -> dict[str, Any] | None:
    """A JSON object, or None where there is no such file; FormatError if it is not an object.

    strict  False for config.json, which is read as transformers reads it: some have Infinity
    """
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_JSON:
        raise _unusable(path, f"{path.stat().st_size} bytes", f"at most {MAX_JSON}")
    try:
        with readable(path):
            text = path.read_text("utf-8")
        table = strict_json(text) if strict else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unusable(path, f"not valid JSON ({error})") from None
    if not isinstance(table, dict):
        raise _unusable(path, f"holds a {type(table).__name__}", "a JSON object")
    return table


def _unusable(path: Path, found: str, expected: str = "") -> FormatError:
    return FormatError(path.name, found, expected, "Repair the file")


def strict_json(text: str) -> Any:
    """Parse JSON, refusing what parsers disagree on: repeated keys, NaN, numbers that are too
    large for a double, half surrogate pairs.

    Raises ValueError or RecursionError.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"repeated key {name!r}")
        return table

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def finite(number: str) -> float:
        value = float(number)
        if math.isinf(value):
            raise ValueError(f"{number:.40} is beyond every double")
        return value

    hooks: dict[str, Any] = {"parse_constant": refuse, "parse_float": finite}
    value = json.loads(text, object_pairs_hook=unique, **hooks)
    if "\\u" in text:  # only an escape can be half a surrogate pair: it is no UTF-8, a ValueError
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """CheckpointError, naming the file, where the system does not let it be read."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            path,
            f"cannot be read ({error.strerror or error})",
            remedy="Check the file, then try again",
        ) from error
