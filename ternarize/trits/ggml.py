"""Blocks of ggml: trits and scales as llama.cpp stores them, written and read.

A block holds `block` weights of a row and one float16 scale d; weight = d * trit.

    TQ2_0   256 weights, 66 bytes, 2.0625 bits each
            qs[64]: byte m of half h (0, 1) has weights 128 h + m + {0, 32, 64, 96} in bits
            0-1, 2-3, 4-5, 6-7, as trit + 1; then d
    TQ1_0   256 weights, 54 bytes, 1.6875 bits each
            qs[0..31]: byte m has weights m + {0, 32, 64, 96, 128}
            qs[32..47]: byte 32 + m has weights 160 + m + {0, 16, 32, 48, 64}
            qh[0..3]: byte m has weights 240 + m + {0, 4, 8, 12}, as four trits and a fifth of -1
            each as ceil(v * 256 / 243) with v = sum of (trit_n + 1) * 3^(4 - n); then d
    Q2_0    64 weights, 18 bytes, 2.25 bits each
            d; then qs[16]: byte m has weights 4 m + {0, 1, 2, 3} from the low bits, as trit + 1
    Q2_K    256 weights, 84 bytes, 2.625 bits each: 16 bytes, one for each 16 weights, whose low
            bits have their part of the first d and the high ones that of the second, here 1 and
            1; qs[64] as of TQ2_0; d; and again d, since weight = d * digit - d
    Q8_0    32 weights, 34 bytes, 8.5 bits each: d; then 32 int8
    Q4_0    32 weights, 18 bytes, 4.5 bits each: d, which can be negative; then qs[16]: byte m has
            weights m and m + 16 from the low bits, as integers + 8

Q2_K and Q4_0 hold more than trits, and are not read as ternary ones. Described in ggml-common.h and
ggml-quants.c of llama.cpp; all numbers are little-endian.

I2_S of bitnet.cpp, which is read only, has one float32 scale d behind all weights of a matrix and
32 bytes there for it. What lies before depends on the machine that wrote it, and the file does not
say which (quantize_i2_s in src/ggml-bitnet-mad.cpp of microsoft/BitNet). A byte has four weights in
its bits 7-6, 5-4, 3-2 and 1-0, as trit + 1:

    x86     128 weights of a row in 32 bytes: byte m has weights m + {0, 32, 64, 96}
    arm     64 weights of a row in 16 bytes: byte m has weights m + {0, 16, 32, 48}
    rows    four rows in one: byte m of rows 4 r + {0, 1, 2, 3} has their weights m
            (x86, built without ACT_PARALLEL)
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ternarize.trits.ternary import Ternary


@dataclass(frozen=True)
class BlockType:
    """A type of ggml that holds ternary weights.

    id         ggml's number of the type
    file_type  general.file_type of a model that is mostly of this type
    block      weights in a block
    nbytes     bytes of a block
    ternary    whether all that it can hold is trits
    """

    id: int
    file_type: int
    block: int
    nbytes: int
    ternary: bool = True


TYPES = {
    "tq1_0": BlockType(34, 36, 256, 54),
    "tq2_0": BlockType(35, 37, 256, 66),
    "q2_0": BlockType(42, 41, 64, 18),
    "q2_k": BlockType(10, 10, 256, 84, ternary=False),
    "q4_0": BlockType(2, 2, 32, 18, ternary=False),
}
FLOATS = {"F32": 0, "F16": 1, "BF16": 30}  # ggml's numbers of floating-point types
Q8_0 = 8
Q8_0_BLOCK, Q8_0_NBYTES = 32, 34  # weights, of Q4_0 as well; bytes


def encode_blocks(ternary: Ternary, kind: str) -> Tensor:
    """The bytes of a matrix in blocks of a ternary type.

    ternary  trits (rows, cols), scales (rows, cols / block), float16 numbers
    kind     a name of TYPES

    Returns (rows, cols / block * nbytes) uint8.
    """
    rows = ternary.trits.shape[0]
    if kind == "q4_0":
        return encode_q4_0(ternary.trits, ternary.scales)
    digits = (ternary.trits + 1).to(torch.uint8).reshape(-1, TYPES[kind].block)
    d = _scale_bytes(ternary.scales)

    def halves() -> Tensor:
        return two_bits(digits.view(-1, 2, 4, 32), 2).flatten(1)

    parts = {
        "tq1_0": lambda: [_base3(digits), d],
        "tq2_0": lambda: [halves(), d],
        "q2_0": lambda: [d, two_bits(digits.view(-1, 16, 4), 2)],
        "q2_k": lambda: [digits.new_full((len(d), 16), 0x11), halves(), d, d],
    }[kind]()
    return torch.cat(parts, 1).view(rows, -1)


def decode_blocks(data: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The weights that blocks of a ternary type hold, as they are stored.

    data  (blocks, nbytes) uint8
    kind  a name of TYPES, of a type that holds nothing else

    Returns digits (blocks, block) uint8, trit + 1, or 3 where a type of two bits has more than
    trits; and d (blocks,) float16.
    """
    blocks, block = data.shape[0], TYPES[kind].block
    d = (data[:, :2] if kind == "q2_0" else data[:, -2:]).contiguous().view(torch.float16)
    digits = {
        "tq1_0": lambda: torch.cat(
            [
                _of_fifths(data[:, :32]).flatten(1),
                _of_fifths(data[:, 32:48]).flatten(1),
                _of_fifths(data[:, 48:52])[:, :4].flatten(1),
            ],
            1,
        ),
        "tq2_0": lambda: _of_two_bits(data[:, :64].reshape(blocks, 2, 1, 32), 2),
        "q2_0": lambda: _of_two_bits(data[:, 2:].reshape(blocks, 16, 1), 2),
    }[kind]()
    return digits.reshape(blocks, block), d.flatten()


# what bitnet.cpp calls by one name -> the weights that share bytes: (of a row, rows)
I2_S = {"x86": (128, 1), "arm": (64, 1), "rows": (1, 4)}
I2_S_TYPE = 36
I2_S_TAIL = 32  # bytes behind the weights, the first four of which are the scale


def decode_i2_s(data: Tensor, layout: str, cols: int) -> Tensor:
    """Digits (rows, cols) uint8 of rows of I2_S; 3 is none that it may have.

    data    (rows * cols / 4) uint8; in the layout "rows" a multiple of four rows
    layout  a name of I2_S
    """
    block, _ = I2_S[layout]
    quarter = data.view(-1, 1, cols) if layout == "rows" else data.view(-1, 1, block // 4)
    return _of_two_bits(quarter, 1, (6, 4, 2, 0)).reshape(-1, cols)


def encode_q8_0(values: Tensor, scales: Tensor) -> Tensor:
    """The bytes of int8 weights in Q8_0.

    values  (rows, cols) int8, cols a multiple of 32
    scales  (rows, cols / 32) float64, float16 numbers

    Returns (rows, cols / 32 * 34) uint8.
    """
    blocks = values.contiguous().view(torch.uint8).reshape(-1, Q8_0_BLOCK)
    return torch.cat([_scale_bytes(scales), blocks], 1).view(values.shape[0], -1)


def encode_q4_0(values: Tensor, scales: Tensor) -> Tensor:
    """The bytes of int4 weights, -8 to 7, in Q4_0; arguments as of `encode_q8_0`.

    Returns (rows, cols / 32 * 18) uint8.
    """
    codes = (values + 8).view(torch.uint8).reshape(-1, Q8_0_BLOCK)
    low, high = codes.chunk(2, 1)
    return torch.cat([_scale_bytes(scales), low | high << 4], 1).view(values.shape[0], -1)


def _scale_bytes(scales: Tensor) -> Tensor:
    return scales.to(torch.float16).reshape(-1, 1).contiguous().view(torch.uint8)


def two_bits(digits: Tensor, dim: int) -> Tensor:
    """Four digits in a byte, the first in the low bits.

    digits  uint8 of 0 to 3, four along `dim`

    Returns uint8 without `dim`.
    """
    a, b, c, d = digits.unbind(dim)
    return a | b << 2 | c << 4 | d << 6


def _of_two_bits(data: Tensor, dim: int, shifts: tuple[int, ...] = (0, 2, 4, 6)) -> Tensor:
    """Bytes, with one place along `dim` -> digits of 0 to 3, four along it."""
    size = [1] * data.ndim
    size[dim] = 4
    return data >> torch.tensor(shifts, dtype=torch.uint8).view(size) & 3


def _of_fifths(data: Tensor) -> Tensor:
    """(blocks, n) bytes -> (blocks, 5, n) digits: the upper digit of the fraction, times powers."""
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.int32).view(1, 5, 1)
    fractions = data.unsqueeze(1).to(torch.int32) * powers & 255
    return (fractions * 3 >> 8).to(torch.uint8)


def _base3(digits: Tensor) -> Tensor:
    """(blocks, 256) digits -> the 48 + 4 bytes of TQ1_0."""
    long, short, rest = digits[:, :160], digits[:, 160:240], digits[:, 240:]
    padded = torch.nn.functional.pad(rest.reshape(-1, 4, 4), (0, 0, 0, 1))
    return torch.cat(
        [_fifths(long.reshape(-1, 5, 32)), _fifths(short.reshape(-1, 5, 16)), _fifths(padded)], 1
    )


def _fifths(digits: Tensor) -> Tensor:
    """(blocks, 5, n) digits -> (blocks, n) bytes, the first digit the most significant."""
    powers = torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32)
    values = (digits.to(torch.int32) * powers.view(5, 1)).sum(1)
    return ((values * 256 + 242) // 243).to(torch.uint8)
