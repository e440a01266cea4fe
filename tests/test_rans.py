"""Rows of bytes coded by their frequencies (trits/rans.py): all comes out, and in few bits."""

import math
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from ternarize.errors import FormatError
from ternarize.native import lib
from ternarize.trits import rans
from ternarize.trits.base3 import pack
from ternarize.trits.rans import (
    classes_of_items,
    classes_of_trits,
    decode_rows,
    encode_rows,
    expected_bytes,
)


def trits(rows: int, cols: int, zeros: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(rows, cols, generator=generator)
    signs = 1 - 2 * torch.randint(0, 2, (rows, cols), generator=generator)
    return torch.where(drawn < zeros, 0, signs).to(torch.int8)


def reader(stream: Tensor, asked: list[tuple[int, int]] | None = None) -> rans.ReadBytes:
    def read(at: int, size: int) -> Tensor:
        assert 0 <= at and at + size <= len(stream)
        if asked is not None:
            asked.append((at, size))
        return stream[at : at + size].clone()

    return read


def decoded(stream: Tensor, rows: Tensor, classes: Tensor, *part: int) -> Tensor:
    return decode_rows(reader(stream), len(stream), (len(rows), rows.shape[1]), classes, *part)


ROWS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "one byte": lambda: (pack(trits(1, 1, 0.5), -1), classes_of_trits(1, -1)),
    "groups of 128": lambda: (pack(trits(40, 512, 0.5), 128), classes_of_trits(512, 128)),
    "a short last group": lambda: (pack(trits(33, 300, 0.7), 64), classes_of_trits(300, 64)),
    "many chunks": lambda: (pack(trits(3000, 333, 0.4), 32), classes_of_trits(333, 32)),
    "one kind of byte": lambda: (
        torch.full((700, 9), 121, dtype=torch.uint8),
        torch.zeros(9).byte(),
    ),
    "numbers of two bytes": lambda: (
        torch.randn(50, 7).half().view(torch.uint8),
        classes_of_items(7, 2),
    ),
    "any bytes": lambda: (
        torch.randint(0, 256, (90, 1000), dtype=torch.uint8),
        torch.zeros(1000).byte(),
    ),
    "no rows": lambda: (torch.empty(0, 5, dtype=torch.uint8), torch.zeros(5).byte()),
}


@pytest.mark.parametrize("name", ROWS)
def test_what_was_coded_comes_out(name: str) -> None:
    rows, classes = ROWS[name]()
    assert torch.equal(decoded(encode_rows(rows, classes), rows, classes), rows)


def test_some_rows_come_out_for_the_bytes_of_their_chunks() -> None:
    rows, classes = ROWS["many chunks"]()
    stream, asked = encode_rows(rows, classes), list[tuple[int, int]]()
    shape = (len(rows), rows.shape[1])
    for first, stop in ((0, 1), (700, 1400), (2999, 3000), (5, 5), (0, 3000)):
        found = decode_rows(reader(stream, asked), len(stream), shape, classes, first, stop)
        assert torch.equal(found, rows[first:stop])
    one = [size for _, size in asked[:3]]
    assert sum(one) < len(stream) / 2


@pytest.mark.parametrize(("zeros", "most"), [(0.46, 1.545), (0.8, 0.93), (0.95, 0.35)])
def test_a_trit_takes_hardly_more_than_its_entropy(zeros: float, most: float) -> None:
    rows = pack(trits(2048, 1280, zeros), 128)
    stream = encode_rows(rows, classes_of_trits(1280, 128))
    bits = 8 * len(stream) / (2048 * 1280)
    entropy = -zeros * math.log2(zeros) - (1 - zeros) * math.log2((1 - zeros) / 2)
    assert entropy - 0.01 < bits < most


@pytest.mark.skipif(lib is None, reason="without the compiled core")
@pytest.mark.parametrize("name", ROWS)
def test_the_core_gives_the_bytes_of_its_twin(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, classes = ROWS[name]()
    rows = rows[:450]
    streams = [encode_rows(rows, classes, threads) for threads in (1, 3)]
    monkeypatch.setattr(rans, "lib", None)
    streams.append(encode_rows(rows, classes))
    assert torch.equal(streams[0], streams[1]) and torch.equal(streams[0], streams[2])
    assert torch.equal(decoded(streams[0], rows, classes), rows)


@pytest.fixture
def every_cpu() -> Iterator[Iterator[str]]:
    """Each instruction set that is here, in use while the loop is at it."""
    if lib is None:
        pytest.skip("without the compiled core")
    core, before = lib, lib.cpu()

    def each() -> Iterator[str]:
        for name in core.cpus():
            core.use_cpu(name)
            yield name

    yield each()
    core.use_cpu(before)


# columns and group sizes; of the first ones the last group ends in short runs of other classes
WIDTHS = [(13, 6), (131, 128), (196, 64), (1028, 64), (516, 128), (130, 128), (640, 128), (97, 32)]


def test_every_cpu_decodes_rows_of_any_width(every_cpu: Iterator[str]) -> None:
    rng, streams = random.Random(0), []
    drawn = [(rng.randint(1, 400), rng.randint(1, 140)) for _ in range(60)]
    for cols, group_size in WIDTHS + drawn:
        rows = pack(trits(rng.randint(1, 70), cols, rng.random(), cols), group_size)
        classes = classes_of_trits(cols, group_size)
        streams.append((cols, group_size, rows, classes, encode_rows(rows, classes)))
    for items, size in ((3, 2), (40, 2), (9, 4), (64, 4), (33, 1)):
        numbers = torch.randint(0, 90, (50, items * size), dtype=torch.uint8)
        classes = classes_of_items(items, size)
        streams.append((items, size, numbers, classes, encode_rows(numbers, classes)))
    for cpu in every_cpu:
        for cols, group_size, rows, classes, stream in streams:
            assert torch.equal(decoded(stream, rows, classes), rows), (cpu, cols, group_size)


@pytest.mark.parametrize(("cols", "group_size"), WIDTHS)
def test_the_twin_decodes_what_the_core_has_coded(
    cols: int, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, classes = pack(trits(9, cols, 0.5), group_size), classes_of_trits(cols, group_size)
    stream = encode_rows(rows, classes)
    monkeypatch.setattr(rans, "lib", None)
    assert torch.equal(decoded(stream, rows, classes), rows)


def test_a_chunk_of_nothing_is_damaged(every_cpu: Iterator[str]) -> None:
    assert lib is not None
    table, ends = torch.zeros(1, 4096, dtype=torch.uint32), torch.zeros(2, dtype=torch.int64)
    coded, classes = torch.empty(0, dtype=torch.uint8), torch.zeros(50, dtype=torch.uint8)
    out = torch.zeros(2, 50, dtype=torch.uint8)
    for _ in every_cpu:
        assert lib.rans_decode(coded, ends, classes, table, 2, out, 1) == 0


@pytest.mark.parametrize("native", [True, False])
def test_no_flip_of_a_stream_goes_by_unseen_or_ends_otherwise(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused, or other bytes: digests are of those (a flip can move bits between two of them)."""
    if not native:
        monkeypatch.setattr(rans, "lib", None)
    rows, classes = pack(trits(12, 150, 0.6), 64), classes_of_trits(150, 64)
    stream, rng = encode_rows(rows, classes), random.Random(0)
    refused = 0
    for _ in range(300):
        bad = stream.clone()
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        bad = bad[: len(bad) - rng.choice((0, 0, 0, 1, 2, 40))]
        try:
            found = decoded(bad, rows, classes)
        except FormatError as error:
            assert "its stream" in str(error)
            refused += 1
        else:
            assert not torch.equal(found, rows)
    assert refused > 200


def with_head(stream: Tensor, height: int) -> Tensor:
    return torch.cat(
        [torch.frombuffer(bytearray(height.to_bytes(4, "little")), dtype=torch.uint8), stream[4:]]
    )


def head_of(stream: Tensor) -> int:
    """Where the sizes of a stream of two classes begin."""
    at = 4
    for _ in range(2):
        at += 32 + 2 * sum(int(byte).bit_count() for byte in stream[at : at + 32])
    return at


def test_another_height_of_chunks_is_seen_unless_it_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of several chunks without a word, as many of another height give the same bytes."""
    monkeypatch.setattr(rans, "CHUNK", 45)  # five rows of nine bytes
    rows, classes = torch.full((8, 9), 121, dtype=torch.uint8), torch.zeros(9).byte()
    several, one = encode_rows(rows, classes), encode_rows(rows[:4], classes)
    assert torch.equal(decoded(with_head(several, 4), rows, classes), rows)
    with pytest.raises(FormatError, match="its stream"):
        decoded(with_head(several, 3), rows, classes)
    with pytest.raises(FormatError, match="chunks of 4 rows"):
        decoded(with_head(one, 4), rows[:4], classes)
    mixed = rows.clone()
    mixed[0, 0] = 120
    with pytest.raises(FormatError, match="its stream"):
        decoded(with_head(encode_rows(mixed, classes), 4), mixed, classes)


def test_streams_that_would_take_much_memory_are_refused_at_once() -> None:
    rows, classes = ROWS["groups of 128"]()
    stream = encode_rows(rows, classes)
    for height in (0, 1 << 31, (1 << 32) - 1):
        with pytest.raises(FormatError, match="chunks of"):
            decoded(with_head(stream, height), rows, classes)
    with pytest.raises(FormatError, match="bytes for .* chunks"):
        decode_rows(reader(stream), len(stream), (1 << 40, rows.shape[1]), classes, 0, 1)
    # sizes of nothing, which would stand for a million chunks
    hollow = torch.cat([stream[: head_of(stream)], torch.zeros(4 << 20, dtype=torch.uint8)])
    with pytest.raises(FormatError, match="a chunk of 0 bytes"):
        height = int.from_bytes(bytes(stream[:4].tolist()), "little")
        shape = height << 20, rows.shape[1]
        decode_rows(reader(hollow), len(hollow), shape, classes)
    # a chunk of more words than any that it stands for can take
    long = torch.cat([stream, torch.zeros(200_000, dtype=torch.uint8)])
    at = head_of(stream)
    size = int.from_bytes(bytes(stream[at : at + 4].tolist()), "little") + 200_000
    long[at : at + 4] = torch.tensor(list(size.to_bytes(4, "little")), dtype=torch.uint8)
    with pytest.raises(FormatError, match=f"a chunk of {size} bytes for"):
        decoded(long, rows, classes)
    with pytest.raises(FormatError, match="bytes for no rows"):
        decode_rows(reader(stream), len(stream), (0, rows.shape[1]), classes)
    with pytest.raises(FormatError, match="it has 2 bytes"):
        decoded(stream[:2], rows, classes)


@pytest.mark.parametrize(("rows", "cols"), [(40, 300), (2000, 512)])
@pytest.mark.parametrize(("group_size", "planes"), [(128, 1), (-1, 1), (32, 2)])
def test_the_size_of_drawn_trits_is_foreseen(
    rows: int, cols: int, group_size: int, planes: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    for zeros in (1 / 3, 0.6, 0.95):
        drawn = torch.rand(planes * rows, cols, generator=generator)
        sign = torch.where(torch.rand(drawn.shape, generator=generator) < 0.5, -1, 1)
        trits = (sign * (drawn >= zeros)).to(torch.int8)
        packed = torch.cat(list(pack(trits, group_size).chunk(planes)), 1)
        found = len(encode_rows(packed, classes_of_trits(cols, group_size, planes)))
        foreseen = expected_bytes(rows, cols, group_size, zeros, planes)
        # of few bytes it is chance which of them occur
        assert foreseen == pytest.approx(found, rel=0.06 if rows < 100 else 0.01)
    assert expected_bytes(0, cols, group_size, 0.5, planes) == 0


def test_every_class_has_its_columns() -> None:
    assert classes_of_trits(12, 6).tolist() == [0, 1, 0, 1]  # 5 and 1, 5 and 1
    assert classes_of_trits(13, 5).tolist() == [0, 0, 1]
    assert classes_of_trits(9, 5, planes=2).tolist() == [0, 1, 0, 1]
    assert classes_of_trits(3, 0).tolist() == [0]
    assert classes_of_items(2, 4).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
