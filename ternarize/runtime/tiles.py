"""Ternary weights on a GPU: their run-time layout ("tiles"), and y = x W^T from it.

    word    16 bits: eight fields of 2 bits, the lowest first; a field is a trit as a number of two
            bits with a sign (-1 is 11)
    block   256 columns of all rows: (rows, 32) words. Field j of word i is column 32 j + i

A matrix is its blocks one behind the other, so that what a program reads lies together, padded
with zero trits to whole blocks: 2 bits a weight. Scales lie beside it as (groups, scale_rows), in
the dtype in which they are stored. `to_tiles` makes it from stored bytes, `from_tiles` gives those
back.

The product is triton_kernels.py's, where Triton is installed and a layout is served (`fits_tiles`).
"""

import functools
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

from ternarize.errors import FormatError, first_line, is_no_memory
from ternarize.runtime.kernels import LONGEST_SUM, quantize
from ternarize.trits import base3
from ternarize.trits.ternary import group_count

TILES = "tiles"
_FIELDS, _WORDS = 8, 32  # of a word; of a row of a block
_COLS = _FIELDS * _WORDS  # of a block
_LOOSE = 0.01  # an error that rounding explains: of torch's products, in 10 bits where it may


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; torch brings it where it is built for CUDA."""
    return importlib.util.find_spec("triton") is not None


def fits_tiles(device: torch.device, cols: int, group_size: int, activations: str) -> bool:
    """Whether products from tiles are served: on a GPU with Triton, groups of whole fields.

    Groups of any multiple of 32 weights, or one group in a row. Of activations in 8 bits, whose
    sums are exact for a group, of 32, 64, 128 and 256 weights, or one of at most LONGEST_SUM.
    """
    if device.type != "cuda" or not has_triton() or cols == 0:
        return False
    if torch.cuda.get_device_capability(device) < (8, 0):  # bfloat16
        return False
    one = not 0 < group_size < cols
    if activations == "int8":
        fits = cols <= LONGEST_SUM if one else group_size in (32, 64, 128, 256)
    else:
        fits = one or group_size % _WORDS == 0
    return fits and are_right(device, activations == "int8")


@functools.cache
def are_right(device: torch.device, rounded: bool) -> bool:
    """Whether a device's products from tiles are those of torch: tried once in a process.

    What a compiler makes of kernels for a GPU that they have never run on nobody knows before.
    Where they are not right, a warning says so, and weights go the dense way.
    """
    try:
        worst = max(_error(device, rounded, tokens) for tokens in (1, 40))
        found = "" if worst < _LOOSE else f"are off by {worst:.1%}"
    except Exception as error:  # of a compiler, a driver or a launch: they have no common class
        if is_no_memory(error):
            raise
        found = f"fail ({type(error).__name__}: {first_line(error)})"
    if found:
        warnings.warn(
            f"{torch.cuda.get_device_name(device)}: the kernels for trits {found}; weights are "
            "dequantized for each product instead, which is slower. Please report it.",
            stacklevel=2,
        )
    return not found


def _error(device: torch.device, rounded: bool, tokens: int) -> float:
    """The largest error of a small product in bfloat16, by the largest of its numbers."""
    rows, cols, size = 64, 512, 128
    numbers = torch.arange(rows * cols, device=device).view(rows, cols)
    trits = ((numbers * 7919) % 3 - 1).to(torch.int8)
    scales = 0.5 + (torch.arange(rows * cols // size, device=device) % 7) / 8
    by_group = scales.view(cols // size, rows).to(torch.float16)
    x = torch.sin(numbers.flatten()[: tokens * cols]).view(tokens, cols).to(torch.bfloat16)
    weight = trits * by_group.T.repeat_interleave(size, 1).to(torch.float32)
    tiles = to_tiles(base3.pack(trits, size), cols, size)
    y = product_of_tiles(x, tiles, by_group.flatten(), rows, rows, size, rounded, True)
    inputs, factor = quantize(x, "int8") if rounded else (x, None)
    expected = inputs.to(torch.float32) @ weight.T
    expected = expected if factor is None else expected * factor.unsqueeze(-1)
    return float((y - expected).abs().max() / expected.abs().max())


def tiles_size(rows: int, cols: int) -> int:
    """Bytes of a matrix in tiles."""
    return 2 * -(-cols // _COLS) * rows * _WORDS


def to_tiles(packed: Tensor, cols: int, group_size: int) -> Tensor:
    """The run-time layout of stored bytes.

    packed  (rows, packed_width) uint8, as in base3.unpack

    Returns (`tiles_size`,) uint8 on the same device. Raises FormatError as base3.unpack does.
    """
    rows, blocks = packed.shape[0], -(-cols // _COLS)
    trits = base3.unpack(packed, cols, group_size)
    trits = torch.nn.functional.pad(trits, (0, blocks * _COLS - cols))
    fields = trits.view(rows, blocks, _FIELDS, _WORDS)
    words = torch.zeros((rows, blocks, _WORDS), dtype=torch.int16, device=packed.device)
    for j in range(_FIELDS):
        words |= (fields[:, :, j] & 3).to(torch.int16) << 2 * j
    return words.transpose(0, 1).contiguous().view(torch.uint8).flatten()


def from_tiles(tiles: Tensor, rows: int, cols: int, group_size: int) -> Tensor:
    """The stored bytes (rows, packed_width) of `to_tiles`.

    Raises FormatError on another size or dtype, and on a field that holds no trit.
    """
    size = tiles_size(rows, cols)
    if tiles.dtype != torch.uint8 or tiles.shape != (size,):
        raise FormatError(
            "tiles",
            f"{tuple(tiles.shape)} {tiles.dtype}",
            f"({size},) torch.uint8 for {rows} x {cols} weights",
        )
    trits = trits_of_tiles(tiles, rows, cols)
    if bool((trits == -2).any()):
        raise FormatError(
            "tiles",
            "a field holds no trit",
            remedy="The memory was overwritten: load the model again",
        )
    return base3.pack(trits, group_size)


def trits_of_tiles(tiles: Tensor, rows: int, cols: int) -> Tensor:
    """The trits (rows, cols) int8 of tiles, not checked: nothing waits for a GPU."""
    words = words_of(tiles, rows)
    fields = [(words << 14 - 2 * j) >> 14 for j in range(_FIELDS)]  # signs are shifted in
    trits = torch.stack([field.to(torch.int8) for field in fields], 2)
    return trits.permute(1, 0, 2, 3).reshape(rows, -1)[:, :cols].contiguous()


def words_of(tiles: Tensor, rows: int) -> Tensor:
    """Tiles as words: (blocks, rows, 32) int16."""
    return tiles.view(torch.int16).view(-1, rows, _WORDS)


def product_of_tiles(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    rows: int,
    scale_rows: int,
    group_size: int,
    rounded: bool,
    wide: bool,
) -> Tensor:
    """y = x W^T from tiles.

    x           (..., cols) float32, bfloat16 or float16 on a GPU
    tiles       (bytes,) uint8, of `to_tiles`
    scales      (groups * scale_rows,) float, or uint8 codes; scale_rows divides rows
    group_size  as in ternarize.trits.ternary, of a layout that `fits_tiles`
    rounded     whether each token is rounded to 8 bits: then y is what kernels.product_of_trits
                gives, bit for bit
    wide        y in float32, not in x's dtype

    Returns (..., rows). Sums are in float32 and have one order for a number of tokens.
    """
    from ternarize.runtime.triton_kernels import multiply_tiles

    cols = x.shape[-1]
    y = x.new_empty((*x.shape[:-1], rows), dtype=torch.float32 if wide else x.dtype)
    if y.numel():
        by_group = scales.view(group_count(cols, group_size), scale_rows)
        flat = x.detach().reshape(-1, cols).contiguous()
        with torch.cuda.device(x.device):  # Triton launches on the current one
            words = words_of(tiles, rows)
            multiply_tiles(flat, words, by_group, y.view(-1, rows), group_size, rounded)
    return y


# As products._compiled_multiply: for torch.compile alone, which cannot look into it.
compiled_product_of_tiles: Any = torch.library.custom_op(
    "ternarize::tiles_product", product_of_tiles, mutates_args=(), device_types="cuda"
)


@compiled_product_of_tiles.register_fake  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    tiles: Tensor,
    scales: Tensor,
    rows: int,
    scale_rows: int,
    group_size: int,
    rounded: bool,
    wide: bool,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows), dtype=torch.float32 if wide else x.dtype)
