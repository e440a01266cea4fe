"""An encoder of streams (rans.md) for make_vectors.py: its plainest reading, one symbol at a time.

It shares no code with reference.py or the package.
"""

from collections import Counter
from collections.abc import Sequence

TOTAL = 4096


def frequencies(counts: Counter[int]) -> dict[int, int]:
    """Frequencies by byte that add up to 4096, as 5 of rans.md has them."""
    whole = sum(counts.values())
    found = {byte: max(1, count * TOTAL // whole) for byte, count in sorted(counts.items())}
    lost = sorted(counts, key=lambda byte: (-(counts[byte] * TOTAL % whole), byte))
    for byte in lost[: max(0, TOTAL - sum(found.values()))]:
        found[byte] += 1
    while sum(found.values()) > TOTAL:
        most = max(found.values())
        found[min(byte for byte, often in found.items() if often == most)] -= 1
    return found


def table_bytes(found: dict[int, int]) -> bytes:
    """A table as it is stored."""
    mask = sum(1 << byte for byte in found)
    return mask.to_bytes(32, "little") + b"".join(f.to_bytes(2, "little") for f in found.values())


def chunk(symbols: Sequence[tuple[int, int]], tables: Sequence[dict[int, int]]) -> bytes:
    """A chunk of symbols, (class, byte) each."""
    states, words = [2**16] * 8, list[int]()
    for i in range(len(symbols) - 1, -1, -1):
        which, byte = symbols[i]
        often = tables[which][byte]
        below = sum(f for other, f in tables[which].items() if other < byte)
        x = states[i % 8]
        if x >= 2**20 * often:
            words.insert(0, x % 2**16)
            x //= 2**16
        states[i % 8] = TOTAL * (x // often) + x % often + below
    head = b"".join(x.to_bytes(4, "little") for x in states)
    return head + b"".join(word.to_bytes(2, "little") for word in words)


def stream(rows: Sequence[bytes], classes: Sequence[int], height: int | None = None) -> bytes:
    """The stream of a matrix of bytes; height: the rows of a chunk."""
    if not rows:
        return b""
    height = 65536 // len(classes) if height is None else height
    kinds = range(max(classes) + 1)
    counts = [
        Counter(row[c] for row in rows for c, k in enumerate(classes) if k == j) for j in kinds
    ]
    tables = [frequencies(each) for each in counts]
    chunks = []
    for at in range(0, len(rows), height):
        part = rows[at : at + height]
        symbols = [
            (j, row[c]) for j in kinds for row in part for c, k in enumerate(classes) if k == j
        ]
        chunks.append(chunk(symbols, tables))
    sizes = b"".join(len(each).to_bytes(4, "little") for each in chunks)
    return (
        height.to_bytes(4, "little") + b"".join(map(table_bytes, tables)) + sizes + b"".join(chunks)
    )


def classes_of_row(cols: int, group_size: int, planes: int) -> list[int]:
    """The classes of the bytes of a packed row."""
    length = cols if group_size <= 0 else min(group_size, cols)
    held = []
    for start in range(0, cols, length):
        left = min(length, cols - start)
        while left > 0:
            held.append(min(5, left))
            left -= 5
    order = sorted(set(held), reverse=True)
    return [order.index(count) for count in held] * planes
