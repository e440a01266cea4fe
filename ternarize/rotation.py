"""Rotation of a matrix's inputs by signs and a block Hadamard transform.

A few inputs of a layer are often much larger than the others, and the weights that meet them
cannot be rounded well. An orthogonal R spreads them evenly: W x = (W R) (R^T x), where W R is
ternarized instead of W, and R^T x is computed when the model runs. R is

    R = diag(s) (I (x) H_b / sqrt(b)),      H_b the Sylvester Hadamard matrix of size b

with signs s drawn from a seed, so that only b and the seed are stored. b is a power of four, which
makes 1 / sqrt(b) exact. R^T R = I.

Rotations for quantization: QuIP#, https://arxiv.org/abs/2402.04396, and QuaRot,
https://arxiv.org/abs/2404.00456.
"""

from functools import lru_cache

import torch
from torch import Tensor

BLOCKS = (4, 16, 64, 256, 1024)  # sizes of Hadamard matrices


def block_size(cols: int, largest: int = 256) -> int:
    """The largest block that divides `cols`, 0 if none does."""
    return max((b for b in BLOCKS if b <= largest and cols % b == 0), default=0)


def rotate(x: Tensor, block: int, seed: int) -> Tensor:
    """R^T x for vectors x (..., cols); of a matrix (rows, cols), its rows: W R."""
    signs, hadamard = _parts(x.shape[-1], block, seed, x.dtype, x.device)
    return (torch.unflatten(x * signs, -1, (-1, block)) @ hadamard).flatten(-2)


def unrotate(x: Tensor, block: int, seed: int) -> Tensor:
    """The inverse of `rotate`."""
    signs, hadamard = _parts(x.shape[-1], block, seed, x.dtype, x.device)
    return (torch.unflatten(x, -1, (-1, block)) @ hadamard).flatten(-2) * signs


@lru_cache(maxsize=64)
def _parts(
    cols: int, block: int, seed: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix = matrix / block**0.5
    return signs(cols, seed).to(device, dtype), matrix.to(device, dtype)


def signs(cols: int, seed: int) -> Tensor:
    """The signs s (cols,) of a seed: bit 63 of SplitMix64's outputs, set for -1.

    SplitMix64: https://doi.org/10.1145/2660193.2660195
    """
    values, state, mask = [], seed, 2**64 - 1
    for _ in range(cols):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        values.append(-1.0 if (z ^ (z >> 31)) >> 63 else 1.0)
    return torch.tensor(values, dtype=torch.float64)
