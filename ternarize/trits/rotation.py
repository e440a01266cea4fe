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

import math
from functools import lru_cache
from operator import index

import numpy as np
import torch
from torch import Tensor

BLOCKS = (4, 16, 64, 256, 1024)  # sizes of Hadamard matrices
_STEP = 0x9E3779B97F4A7C15  # of SplitMix64's state


def block_size(cols: int, largest: int = 256) -> int:
    """The largest block that divides `cols`, 0 if none does."""
    return max((b for b in BLOCKS if b <= largest and cols % b == 0), default=0)


def rotate(x: Tensor, block: int, seed: int) -> Tensor:
    """R^T x for vectors x (..., cols); of a matrix (rows, cols), its rows: W R."""
    signs, hadamard = _parts(x, block, seed)
    return (torch.unflatten(x * signs, -1, (-1, block)) @ hadamard).flatten(-2)


def unrotate(x: Tensor, block: int, seed: int) -> Tensor:
    """The inverse of `rotate`."""
    signs, hadamard = _parts(x, block, seed)
    return (torch.unflatten(x, -1, (-1, block)) @ hadamard).flatten(-2) * signs


def _parts(x: Tensor, block: int, seed: int) -> tuple[Tensor, Tensor]:
    """The signs s (cols,) and H_b / sqrt(b) (block, block) for x, which many calls share."""
    # index: a compiler that has seen several numbers in one place would take them for variables
    numbers = index(x.shape[-1]), index(block), index(seed)
    parts: tuple[Tensor, Tensor] = _constants(*numbers, x.dtype, x.device)
    return parts


# A compiler takes the tensors as they are, instead of tracing how they are made
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constants(
    cols: int, block: int, seed: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    return _signs(cols, seed, dtype, device), _hadamard(block, dtype, device)


# Not as inference tensors, wherever the first call is made: training may use them later
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _signs(cols: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return signs(cols, seed).to(device, dtype)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _hadamard(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    while len(matrix) < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / math.sqrt(block)).to(device, dtype)


def signs(cols: int, seed: int) -> Tensor:
    """The signs s (cols,) of a seed, float64: -1 where bit 63 of SplitMix64's output is set.

    SplitMix64: https://doi.org/10.1145/2660193.2660195
    """
    # its state goes up by a constant, so that all outputs can be computed at once, modulo 2^64
    state = np.uint64(seed) + np.arange(1, cols + 1, dtype=np.uint64) * np.uint64(_STEP)
    z = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    high = (z ^ (z >> np.uint64(31))) >> np.uint64(63)
    return torch.from_numpy(1.0 - 2.0 * high.astype(np.float64))


def turn(x: Tensor, sign: Tensor, block: int) -> Tensor:
    """R^T x for vectors x (..., cols), float64, with any power of two as the block.

    sign  (cols,) float64

    By sums and differences in one order, which give the same bits on all machines.
    """
    x, step = x * sign, 1
    while step < block:
        first, second = torch.unflatten(x, -1, (-1, 2, step)).unbind(-2)
        x = torch.stack([first + second, first - second], -2).flatten(-3)
        step *= 2
    return x / math.sqrt(block)


def rotation_from(rotation: tuple[int, int], first: int) -> tuple[int, int]:
    """The rotation of the columns from `first` on, as (block, seed): its signs are the later ones.

    The state of SplitMix64 goes up by a constant, so that a later part of its numbers is what
    another seed begins with.
    """
    block, seed = rotation
    return (block, (seed + first * _STEP) % 2**64) if block else rotation
