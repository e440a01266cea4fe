"""Rows of bytes in as many bits as their frequencies allow, in chunks that stand by themselves.

    chunk rows, a table for each class of columns, sizes of the chunks; the chunks

Range asymmetric numeral systems (Duda 2013, https://arxiv.org/abs/1311.2540) with eight states of
32 bits that take turns, words of 16 bits and frequencies in 1/4096 (formats/rans.md). The compiled
core does what the torch code here does, with the same bytes.
"""

import itertools
import math
import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ternarize.errors import FormatError, damaged
from ternarize.native import lib
from ternarize.threads import THREADS
from ternarize.trits.ternary import group_length

_LANES, _BITS = 8, 12
_TOTAL = 1 << _BITS
_LEAST = 1 << 16  # of a state; one below it takes a word
_HEAD = 4 * _LANES  # bytes of a chunk in front of its words
CHUNK = 1 << 16  # bytes of the rows in a chunk, at most
_TOGETHER = 64  # chunks that are coded before they are put behind each other

# reads bytes of a stream: from, how many
ReadBytes = Callable[[int, int], Tensor]


def classes_of_trits(cols: int, group_size: int, planes: int = 1) -> Tensor:
    """The classes of the columns of packed rows (codec base3), (width,) uint8.

    Bytes with as many trits are of one class; those with the most are of class 0.
    """
    held = _held_trits(cols, group_size, planes)
    order = sorted(set(held.tolist()), reverse=True)
    return torch.stack([held == count for count in order]).byte().argmax(0).to(torch.uint8)


def _held_trits(cols: int, group_size: int, planes: int) -> Tensor:
    """How many trits each byte of a packed row holds, (width,) int64."""
    length = group_length(cols, group_size)
    whole, rest = divmod(cols, length)
    group, last = (torch.arange(n, 0, -5).clamp(max=5) for n in (length, rest))
    return torch.cat([group.repeat(whole), last]).repeat(planes)


def expected_bytes(rows: int, cols: int, group_size: int, zeros: float, planes: int = 1) -> int:
    """Bytes of a stream of packed rows, about: trits drawn one by one, 0 with the share `zeros`.

    Those of weights have more in common, and take no more. Arguments as of `classes_of_trits`.
    """
    held = _held_trits(cols, group_size, planes)
    if not rows:
        return 0
    bits, head = 0.0, 4
    sign = (1 - zeros) / 2
    for count in sorted(set(held.tolist())):
        chances = one = torch.tensor([sign, zeros, sign], dtype=torch.float64)
        for _ in range(count - 1):
            chances = torch.kron(chances, one)
        drawn = rows * int((held == count).sum())
        often = (chances * drawn).round().to(torch.int64)
        often[chances.argmax()] += not bool(often.any())
        found = torch.tensor(_frequencies([*often.tolist(), *[0] * (256 - len(often))]))
        used = often > 0
        rare = drawn * float(chances[~used].sum())  # bytes that occur once, if they do
        entropy = -(chances[used] * (found[: len(often)][used] / _TOTAL).log2()).sum()
        bits += drawn * float(entropy) + _BITS * rare
        head += 32 + 2 * (int(used.sum()) + round(rare))
    chunks = -(-rows // max(1, CHUNK // len(held)))
    return head + chunks * (4 + _HEAD) + math.ceil(bits / 8)


def classes_of_items(count: int, size: int) -> Tensor:
    """The classes of rows of `count` numbers of `size` bytes: first bytes, second bytes, ..."""
    return torch.arange(size, dtype=torch.uint8).repeat(count)


def encode_rows(rows: Tensor, classes: Tensor, threads: int = THREADS) -> Tensor:
    """Code rows (n, width) uint8; returns a stream (bytes,) uint8.

    rows     of CHUNK bytes each at most
    classes  (width,) uint8, from 0 on without a gap
    """
    if not rows.numel():
        return torch.empty(0, dtype=torch.uint8)
    rows = rows.contiguous()
    frequencies = [_frequencies(each) for each in _counts(rows, classes, threads).tolist()]
    chunk_rows = CHUNK // rows.shape[-1]
    parts, sizes = list[Tensor](), list[int]()
    table = torch.tensor(frequencies, dtype=torch.uint16)
    for at in range(0, len(rows), chunk_rows * _TOGETHER):
        chunks = _encoded(
            rows[at : at + chunk_rows * _TOGETHER], classes, table, chunk_rows, threads
        )
        parts += chunks
        sizes += [len(chunk) for chunk in chunks]
    head = chunk_rows.to_bytes(4, "little")
    for each in frequencies:
        head += sum(1 << i for i, f in enumerate(each) if f).to_bytes(32, "little")
        head += b"".join(f.to_bytes(2, "little") for f in each if f)
    head += b"".join(size.to_bytes(4, "little") for size in sizes)
    return torch.cat([torch.frombuffer(bytearray(head), dtype=torch.uint8), *parts])


def decode_rows(
    read: ReadBytes,
    nbytes: int,
    shape: tuple[int, int],
    classes: Tensor,
    first: int = 0,
    stop: int | None = None,
    threads: int = THREADS,
) -> Tensor:
    """Rows [first, stop) of what a stream holds, (stop - first, width) uint8.

    read    bytes of the stream; only those are read that these rows need
    nbytes  of the stream
    shape   (rows, width) of all that it holds

    Raises FormatError where it is damaged.
    """
    count, width = shape
    stop = count if stop is None else stop
    if not count:
        if nbytes:
            raise _broken(f"{nbytes} bytes for no rows")
        return torch.empty(0, width, dtype=torch.uint8)
    chunk_rows, table, ends = _read_head(read, nbytes, count, width, classes)
    if first >= stop:
        return torch.empty(0, width, dtype=torch.uint8)
    begin, end = first // chunk_rows, -(-stop // chunk_rows)
    body = read(ends[begin], ends[end] - ends[begin])
    places = [place - ends[begin] for place in ends[begin : end + 1]]
    rows = torch.empty(min(count, end * chunk_rows) - begin * chunk_rows, width, dtype=torch.uint8)
    bad = _decoded(body, places, classes, table, chunk_rows, rows, threads)
    if bad >= 0:
        raise _broken(f"chunk {begin + bad} is damaged")
    return rows[first - begin * chunk_rows : stop - begin * chunk_rows]


def least_bytes(rows: int, width: int) -> int:
    """Bytes that a stream of so many rows has at least."""
    return -(-rows // max(1, CHUNK // max(1, width))) * (4 + _HEAD)


def _broken(found: str) -> FormatError:
    return damaged("its stream", found, "what formats/rans.md describes")


def _counts(rows: Tensor, classes: Tensor, threads: int) -> Tensor:
    """How often each byte occurs in each class, (classes, 256) int64."""
    kinds = int(classes.max()) + 1
    if lib is not None:
        counts = torch.empty(kinds, 256, dtype=torch.int64)
        lib.rans_count(rows, classes, counts, threads)
        return counts
    of_each = (rows[:, classes == kind].flatten().int() for kind in range(kinds))
    return torch.stack([torch.bincount(each, minlength=256) for each in of_each])


def _frequencies(counts: Sequence[int]) -> list[int]:
    """Frequencies of 256 bytes that add up to _TOTAL, at least 1 where a byte occurs.

    Rounded down, then up again where most was lost; what bytes that hardly occur take beyond their
    share comes from the most frequent ones. In integers, so that all machines choose alike.
    """
    whole = sum(counts)
    found = [max(1, each * _TOTAL // whole) if each else 0 for each in counts]
    missing = _TOTAL - sum(found)
    lost = sorted(range(256), key=lambda i: (-(counts[i] * _TOTAL % whole), i))
    for i in lost[: max(0, missing)]:
        found[i] += 1
    for _ in range(-missing):
        found[max(range(256), key=lambda i: (found[i], -i))] -= 1
    return found


def _read_head(
    read: ReadBytes, nbytes: int, count: int, width: int, classes: Tensor
) -> tuple[int, Tensor, list[int]]:
    """Rows of a chunk, tables for decoding (classes, _TOTAL), where chunks begin and end."""
    kinds = int(classes.max()) + 1
    at = 4 + kinds * 544  # of the largest tables
    head = read(0, min(nbytes, at)).numpy().tobytes()
    if len(head) < 4:
        raise _broken(f"it has {nbytes} bytes")
    chunk_rows = int.from_bytes(head[:4], "little")
    most = CHUNK // width
    if not 1 <= chunk_rows <= most or (chunk_rows >= count and chunk_rows != most):
        raise _broken(f"chunks of {chunk_rows} rows of {width} bytes")
    at, tables = 4, []
    for _ in range(kinds):
        mask = int.from_bytes(head[at : at + 32], "little")
        bytes_ = [i for i in range(256) if mask >> i & 1]
        ended = at + 32 + 2 * len(bytes_)
        if ended > len(head):
            raise _broken("it ends within its tables")
        numbers = head[at + 32 : ended]
        found = [int.from_bytes(numbers[i : i + 2], "little") for i in range(0, len(numbers), 2)]
        if not all(found) or sum(found) != _TOTAL:
            raise _broken(f"frequencies that add up to {sum(found)}, and not to {_TOTAL}, or are 0")
        tables.append(_slots(bytes_, found))
        at = ended
    chunks = -(-count // chunk_rows)
    if at + 4 * chunks > nbytes:
        raise _broken(f"{nbytes} bytes for {chunks} chunks")
    sizes = struct.unpack(f"<{chunks}I", read(at, 4 * chunks).numpy().tobytes())
    if min(sizes) < _HEAD:  # before there is memory for what they would hold
        raise _broken(f"a chunk of {min(sizes)} bytes")
    if max(sizes) > _HEAD + 2 * chunk_rows * width:
        raise _broken(f"a chunk of {max(sizes)} bytes for {chunk_rows * width}")
    ends = list(itertools.accumulate(sizes, initial=at + 4 * chunks))
    if ends[-1] != nbytes:
        raise _broken(f"chunks up to byte {ends[-1]} of {nbytes}")
    return chunk_rows, torch.stack(tables), ends


def _slots(bytes_: Sequence[int], frequencies: Sequence[int]) -> Tensor:
    """For each slot its byte, frequency - 1 and place in the byte's range, (_TOTAL,) uint32."""
    often = torch.tensor(frequencies)
    starts = often.cumsum(0) - often
    entry = torch.tensor(bytes_) | (often - 1) << 8
    own = torch.arange(_TOTAL) - starts.repeat_interleave(often)
    return (entry.repeat_interleave(often) | own << 20).to(torch.uint32)


# --- chunks ---


def _encoded(
    rows: Tensor, classes: Tensor, frequencies: Tensor, chunk_rows: int, threads: int
) -> list[Tensor]:
    """Each chunk of some rows, coded."""
    if lib is None:
        starts = range(0, len(rows), chunk_rows)
        return [_encode_plain(rows[at : at + chunk_rows], classes, frequencies) for at in starts]
    chunks = -(-len(rows) // chunk_rows)
    slot = _HEAD + 2 * min(chunk_rows, len(rows)) * rows.shape[-1]
    out = torch.empty(chunks, slot, dtype=torch.uint8)
    sizes = torch.empty(chunks, dtype=torch.int32)
    lib.rans_encode(rows, classes, frequencies, chunk_rows, out, sizes, threads)
    return [each[:size] for each, size in zip(out, sizes.tolist(), strict=True)]


def _decoded(
    body: Tensor,
    ends: Sequence[int],
    classes: Tensor,
    table: Tensor,
    chunk_rows: int,
    rows: Tensor,
    threads: int,
) -> int:
    """Decode chunks into `rows`; the first that is damaged, or -1."""
    if lib is not None:
        places = torch.tensor(ends, dtype=torch.int64)
        return int(lib.rans_decode(body, places, classes, table, chunk_rows, rows, threads))
    for i, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        if not _decode_plain(
            body[begin:end], classes, table, rows[i * chunk_rows : (i + 1) * chunk_rows]
        ):
            return i
    return -1


def _order(classes: Tensor, chunk_rows: int) -> tuple[Tensor, Tensor]:
    """Of a chunk's bytes, row-major: in which order they are coded, and the class of each then."""
    of_all = classes.repeat(chunk_rows).to(torch.int64)
    order = of_all.argsort(stable=True)
    return order, of_all[order]


def _encode_plain(rows: Tensor, classes: Tensor, frequencies: Tensor) -> Tensor:
    """The twin of the compiled core, for one chunk."""
    order, kinds = _order(classes, len(rows))
    often = frequencies.to(torch.int64)
    starts = often.cumsum(1) - often
    coded = rows.flatten().to(torch.int64)[order]
    rounds = -(-len(coded) // _LANES)
    states = torch.full((_LANES,), _LEAST)
    words = torch.zeros(rounds, _LANES, dtype=torch.int64)
    taken = torch.zeros_like(words, dtype=torch.bool)
    for turn in range(rounds - 1, -1, -1):
        part = slice(turn * _LANES, min(len(coded), (turn + 1) * _LANES))
        width = part.stop - part.start
        f, start = often[kinds[part], coded[part]], starts[kinds[part], coded[part]]
        x = states[:width]
        full = x >= f << (32 - _BITS)
        words[turn, :width], taken[turn, :width] = x & (_LEAST - 1), full
        x = torch.where(full, x >> 16, x)
        states[:width] = (x // f << _BITS) + x % f + start
    head = torch.stack([states >> shift & 255 for shift in (0, 8, 16, 24)], 1)
    tail = torch.stack([words[taken] & 255, words[taken] >> 8], 1)
    return torch.cat([head.flatten(), tail.flatten()]).to(torch.uint8)


def _decode_plain(chunk: Tensor, classes: Tensor, table: Tensor, rows: Tensor) -> bool:
    """The twin of the compiled core, for one chunk; False where it is damaged."""
    if len(chunk) < _HEAD or (len(chunk) - _HEAD) % 2:
        return False
    order, kinds = _order(classes, len(rows))
    wide = chunk.to(torch.int64)
    weights = torch.tensor([1, 1 << 8, 1 << 16, 1 << 24])
    states = (wide[:_HEAD].view(_LANES, 4) * weights).sum(1)
    if bool((states < _LEAST).any()):
        return False
    words = (wide[_HEAD:].view(-1, 2) * weights[:2]).sum(1)
    entries, at = table.to(torch.int64), 0
    found = torch.empty(len(order), dtype=torch.int64)
    for begin in range(0, len(order), _LANES):
        part = slice(begin, min(len(order), begin + _LANES))
        x = states[: part.stop - begin]
        entry = entries[kinds[part], x & (_TOTAL - 1)]
        found[part] = entry & 255
        x = ((entry >> 8 & (_TOTAL - 1)) + 1) * (x >> _BITS) + (entry >> 20)
        low = x < _LEAST
        count = int(low.sum())
        if at + count > len(words):
            return False
        x[low] = x[low] << 16 | words[at : at + count]
        states[: part.stop - begin] = x
        at += count
    rows.view(-1)[order] = found.to(torch.uint8)
    return at == len(words) and bool((states == _LEAST).all())
