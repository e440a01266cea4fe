"""What a journal begins from, a packed checkpoint or its seed, and stored bytes after steps.

    scale' = round(scale 2^(e / 32)),    2^(e / 32) = FACTORS[e mod 32] / 4096 2^(e div 32)

in float32: with thirteen bits of a factor the product of a float16 is exact, so that all machines
round the same number.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ternarize.errors import UsageError
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.container import decode
from ternarize.files.metadata import SCALE_SUFFIX, Record
from ternarize.steps.generator import SCALES, TRITS
from ternarize.steps.journal import JournalHeader, Step
from ternarize.steps.replay import Moves, Part, Values, parts_in_order, parts_of_seed, start_of
from ternarize.trits.base3 import BASE3, pack
from ternarize.trits.scales import scale_codes, scale_values
from ternarize.trits.ternary import largest_of_groups, spread_scales

FACTORS = tuple(round(4096 * 2 ** (f / 32)) for f in range(32))
# the scales that a file of a dtype holds with all digits
_RANGES = {torch.float16: (2.0**-14, 65504.0), torch.uint8: (2.0**-14, 61440.0)}
_WIDE = (2.0**-126, torch.finfo(torch.bfloat16).max)


def parts_of_base(records: Mapping[str, Record]) -> list[Part]:
    """The tensors that steps move: ternary ones of one plane, in the order of their names.

    Raises UsageError where there are none.
    """
    found = [
        (name, record.shape, record.group_size)
        for name, record in sorted(records.items())
        if record.shape is not None and record.codec == BASE3 and record.planes == 1
    ]
    if not found:
        raise UsageError(
            "the base", "has no ternary tensor of one plane", "some", "Name a packed checkpoint"
        )
    return parts_in_order(found)


def base_digest(records: Mapping[str, Record]) -> str:
    """What names a base in a journal: the SHA-256, in hex, of its tensors' names and digests."""
    sha = hashlib.sha256()
    for part in parts_of_base(records):
        sha.update(part.name.encode() + b"\0" + records[part.name].sha256.encode())
    return sha.hexdigest()


def check_base(where: object, header: JournalHeader, records: Mapping[str, Record] | None) -> None:
    """Raise UsageError where a journal begins otherwise than from the base that is named.

    records  of that packed checkpoint; None: none is named, for a start from the seed
    """
    if records is None:
        if header.base is not None:
            raise UsageError(
                where,
                "begins from a packed checkpoint",
                "that checkpoint beside it",
                "Name it with --base",
            )
        return
    if header.base is None:
        raise UsageError(
            where,
            "begins from a seed, and not from a packed checkpoint",
            "a journal of this checkpoint",
            "Replay it without a base",
        )
    found = base_digest(records)
    if found != header.base:
        raise UsageError(
            where,
            f"begins from the base {header.base[:12]}..., and this one is {found[:12]}...",
            "the same",
            "Name the checkpoint that the journal was made with",
        )


def factors(exponents: Tensor) -> Tensor:
    """2^(e / 32) as journals have it: int8, any shape -> float32."""
    wide = exponents.to(torch.int32)
    table = torch.tensor(FACTORS, dtype=torch.float32, device=exponents.device) / 4096
    return torch.ldexp(table[wide & 31], wide >> 5)


def start_scales(part: Part, rows: int | None = None) -> Tensor:
    """The scales of a tensor that begins from the seed, float32 in the shape of its exponents.

    rows  so many of its rows, (rows, groups); they are all the same
    """
    shape = part.scales_shape if rows is None else (rows, part.scales_shape[-1])
    return factors(torch.full(shape, part.exponent, dtype=torch.int32))


def moved_scales(stored: Tensor, exponents: Tensor) -> Tensor:
    """Stored scales after steps, in the dtype that they have: those of exponent 0 as they are."""
    values = scale_values(stored)
    low, high = _RANGES.get(stored.dtype, _WIDE)
    moved = (values * factors(exponents)).clamp(low, high)
    rounded = scale_codes(moved) if stored.dtype == torch.uint8 else moved.to(stored.dtype)
    return torch.where((exponents == 0) | (values == 0), stored, rounded)


def parts_of_start(header: JournalHeader, records: Mapping[str, Record]) -> list[Part]:
    """The tensors that steps of a journal move, in order.

    records  of its base; not looked at for a start from the seed
    """
    return parts_of_seed(header) if header.base is None else parts_of_base(records)


def read_start(
    header: JournalHeader, packed: Checkpoint | None, records: Mapping[str, Record], part: Part
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A tensor as a journal begins with it.

    packed, records  of its base; not looked at for a start from the seed

    Returns trits (..., rows, cols) int8, scales (..., rows or 1, groups), as stored or float32 from
    the seed, and where trits stay 0 (`frozen`).
    """
    stored = read_scales(header, packed, part)
    if header.base is None:
        return start_of(part, header), stored, None
    assert packed is not None, "check_base refuses it"
    bytes_ = packed.read(part.name).view(records[part.name].stored_shapes()[0])
    return decode(bytes_, stored, records[part.name]).trits, stored, frozen(stored, part)


def read_scales(header: JournalHeader, packed: Checkpoint | None, part: Part) -> Tensor:
    """The second of what `read_start` returns, without the trits, which cost more."""
    if header.base is None:
        return start_scales(part)
    assert packed is not None, "check_base refuses it"
    return packed.read(part.name + SCALE_SUFFIX).view(part.scales_shape)


def frozen(stored: Tensor, part: Part) -> Tensor | None:
    """Where trits stay 0: in groups of scale 0, (..., rows or 1, cols) bool; None: nowhere."""
    empty = scale_values(stored) == 0
    return spread_scales(empty, part.shape[-1], part.group_size) if bool(empty.any()) else None


def stored_after(
    trits: Tensor, exponents: Tensor, stored: Tensor, part: Part
) -> tuple[Tensor, Tensor]:
    """Packed bytes and scales of a tensor after steps; a group of zeros alone has the scale 0."""
    scales = moved_scales(stored, exponents)
    used = largest_of_groups(trits.abs(), part.group_size) > 0
    return pack(trits, part.group_size), torch.where(used, scales, torch.zeros_like(scales))


def replayed(
    packed: Checkpoint | None,
    records: Mapping[str, Record],
    header: JournalHeader,
    steps: Sequence[Step],
) -> Iterator[tuple[Part, Tensor, Tensor, Tensor]]:
    """Tensors of a start after steps, one by one: part, trits, exponents, scales of the start.

    packed, records  as of `read_start`
    """
    moves = {target: Moves(steps, target, header.seed) for target in (TRITS, SCALES)}
    for part in parts_of_start(header, records):
        start, stored, stay = read_start(header, packed, records, part)
        trits = start.contiguous()
        exponents = torch.zeros(part.scales_shape, dtype=torch.int8)
        moves[TRITS].apply(trits.view(-1), part.trits)
        moves[SCALES].apply(exponents.view(-1), part.scales)
        yield part, trits if stay is None else trits.masked_fill(stay, 0), exponents, stored


def opened_state(
    header: JournalHeader, packed: Checkpoint | None, records: Mapping[str, Record]
) -> Values:
    """The values that a journal begins with; packed, records as of `read_start`."""
    parts, start, stay = parts_of_start(header, records), dict[str, Tensor](), dict[str, Tensor]()
    for part in parts:
        start[part.name], _, mask = read_start(header, packed, records, part)
        if mask is not None:
            stay[part.name] = mask
    return Values(header.seed, parts, start, stay)
