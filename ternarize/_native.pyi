"""The compiled core: the loops over weights and packed bytes, on CPU.

Arrays are torch CPU tensors or numpy arrays, dense and as shaped below; outputs are allocated by
the caller and written in place. Wrong shapes raise ValueError, wrong dtypes or strides TypeError
(weights and dequantized outputs of a wrong dtype: ValueError). Weights of kind BF16 and F16 have
that dtype or are their bits as 16-bit integers.

`group_size`, the layout of packed rows (`width` bytes each) and the number of `groups` are those of
formats/base3.md. `threads` and the CPU never change a result. The interpreter's lock is released.
"""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor

Array: TypeAlias = Tensor | np.ndarray[Any, Any]
Kind: TypeAlias = Literal["F32", "BF16", "F16"]
Form: TypeAlias = Literal["lanes2", "lanes3"]

def pack(trits: Array, group_size: int, out: Array, threads: int) -> int:
    """Pack trits (rows, cols) int8 into out (rows, width) uint8.

    Returns -1, or the flat index of the first value that is not -1, 0 or +1.
    """

def unpack(packed: Array, cols: int, group_size: int, out: Array, threads: int) -> int:
    """Unpack packed (rows, width) uint8 into trits out (rows, cols) int8.

    Returns -1, or the flat index of the first byte that is not a code (243..255) or whose padding
    is not zero trits; the trits are unspecified then.
    """

def check(packed: Array, cols: int, group_size: int, nonzero: Array, threads: int) -> int:
    """Test packed (rows, width) uint8 as `unpack` does, at the speed of memory.

    Sets nonzero (rows, groups) uint8 to 1 where a trit of the group is not 0, else 0. Returns what
    `unpack` returns; `nonzero` is unspecified unless that is -1.
    """

def dequantize(
    packed: Array, scales: Array, cols: int, group_size: int, out: Array, kind: Kind, threads: int
) -> None:
    """Set out (rows, cols) to trit * scale, in float32, rounded to nearest even to `kind`.

    packed  (rows, width) uint8, not checked; bytes that are not codes give some trits
    scales  (scale_rows, groups) float32; scale_rows divides rows, and each serves
            rows / scale_rows consecutive rows
    out     float32, or bfloat16 / float16 (or their bits)
    """

def absmean(
    weights: Array, kind: Kind, group_size: int, trits: Array, scales: Array, threads: int
) -> int:
    """Ternarize weights (rows, cols) as ternarize.methods.absmean does, with the same bits.

    trits   (rows, cols) int8, written
    scales  (rows, groups) float64, written; (1, 1) for group_size 0

    Returns -1, or the flat index of the first weight that is NaN or infinite; the outputs are
    unspecified then.
    """

def twn(
    weights: Array, kind: Kind, group_size: int, trits: Array, scales: Array, threads: int
) -> int:
    """Ternarize as ternarize.methods.twn does; arguments and result as in `absmean`."""

def itf(
    weights: Array, kind: Kind, group_size: int, trits: Array, scales: Array, threads: int
) -> int:
    """Ternarize as ternarize.methods.itf does; arguments and result as in `absmean`."""

def absmean_packed(
    weights: Array, kind: Kind, group_size: int, packed: Array, scales: Array, threads: int
) -> tuple[int, float, float, int]:
    """Set packed (rows, width) uint8 and scales to what `absmean` and `pack` give, group by group.

    scales  (rows, groups) float64, written; group_size is not 0. One that is 0 as a float32 is 0
            here, and its group's trits are.

    Returns -1 and what `distance` does of them; or the flat index of the first weight that is NaN
    or infinite, and nothing else means anything then.
    """

def twn_packed(
    weights: Array, kind: Kind, group_size: int, packed: Array, scales: Array, threads: int
) -> tuple[int, float, float, int]:
    """As `absmean_packed`, by `twn`."""

def itf_packed(
    weights: Array, kind: Kind, group_size: int, packed: Array, scales: Array, threads: int
) -> tuple[int, float, float, int]:
    """As `absmean_packed`, by `itf`."""

def levels(
    weights: Array, kind: Kind, group_size: int, trits: Array, scales: Array, threads: int
) -> int:
    """Represent weights without loss, if all nonzero |w| of each group are equal.

    Arguments as in `absmean`. Returns 1, or 0 (early, outputs unspecified) if they are not, or if
    a weight is not finite. -0.0 counts as 0.
    """

def distance(
    weights: Array, kind: Kind, group_size: int, trits: Array, scales: Array, threads: int
) -> tuple[float, float, int]:
    """Measure how far trits and scales, as `absmean` gave them, are from the weights.

    Arguments as in `absmean`. Returns sum (w - scale trit)^2 and sum w^2, in the fixed order within
    each group (in float32 within its blocks of 128), over the groups of a row and over the rows;
    and the number of trits that are not zero.
    """

def read_latent(
    latent: Array, scales: Array, group_size: int, out: Array, kind: Kind, threads: int
) -> None:
    """Set out (rows, cols), of `kind`, to s t: t = sign(v) where |v| > s / 2, else 0 of that sign.

    latent  (rows, cols) float32, v
    scales  (rows, groups) float32, s; group_size is not 0
    """

def latent_gradients(
    latent: Array,
    scales: Array,
    group_size: int,
    given: Array,
    kind: Kind,
    edge: float,
    to_latent: Array,
    to_scales: Array,
    threads: int,
) -> None:
    """Of the gradient g by `out` of `read_latent`, given (rows, cols) of `kind`: what is below it.

    to_latent  (rows, cols) float32, written: g where |v / s| < edge, else 0
    to_scales  (rows, groups) float32, written: the sum of t g - (v / s) to_latent over a group, in
               16 lanes first
    """

def lanes_shape(form: Form, rows: int, cols: int, group_size: int) -> tuple[int, int, int]:
    """Of a run-time layout (csrc/pack/lanes.h): its bytes, its blocks of rows, the rows of a block.

    ValueError, here and below, if a group has more than 65536 columns: sums could leave 32 bits.
    """

def ask_for_large_pages(bytes: Array) -> None:
    """Have memory that was not used yet in large pages, where the system gives them."""

def to_lanes(
    packed: Array, form: Form, cols: int, group_size: int, out: Array, threads: int
) -> int:
    """Turn packed (rows, width) uint8 into the run-time layout out (bytes,) uint8.

    Returns what `unpack` returns; `out` is unspecified unless that is -1.
    """

def from_lanes(
    lanes: Array, form: Form, cols: int, group_size: int, out: Array, threads: int
) -> int:
    """Turn a run-time layout back into packed bytes out (rows, width) uint8.

    Returns -1, or the flat index of the first weight whose byte `to_lanes` cannot have written;
    `out` is unspecified then.
    """

def products(
    x: int,
    kind: Kind,
    tokens: int,
    cols: int,
    matrices: Sequence[tuple[int, int, int, int, bool, int, int]],
    form: Form,
    group_size: int,
    int8: bool,
    threads: int,
) -> None:
    """Set each out to x W^T, with the bits of ternarize.runtime.kernels.product_of_trits.

    Memory is given by its address, because that is what a call of some microseconds can afford.
    Only ternarize.runtime.kernels.prepared_lanes should call this: it knows that tensors are dense
    and what they hold. Sizes are checked.

    x         (tokens, cols) of `kind`
    matrices  (lanes, lanes_size, scales, scales_size, half, out, rows) of each:
                lanes   (lanes_size,) uint8, of `to_lanes`; bytes that are none of a layout give
                        some result
                scales  (scales_size,) float16 if `half`, else float32: in the order block, group,
                        row of block
                out     (tokens, rows) of `kind`
    form      "lanes2", or "lanes3" where `has_lanes3`
    int8      round inputs to 8 bits for each token; else to 24
    """

def int8_product(
    x: int,
    kind: Kind,
    tokens: int,
    cols: int,
    weights: int,
    weights_size: int,
    scales: int,
    scale_rows: int,
    scales_size: int,
    scale_kind: Kind,
    group_size: int,
    int8: bool,
    out: int,
    rows: int,
    threads: int,
) -> None:
    """Set out to x W^T of int8 weights, with the bits of ternarize.runtime.kernels.product_of_int8.

    Memory by address, as in `products`, and only for that function.

    x        (tokens, cols) of `kind`
    weights  (weights_size,) int8: rows x cols
    scales   (scales_size,) of `scale_kind`: scale_rows x groups; scale_rows divides rows
    int8     round inputs to 8 bits for each token; else to 24
    out      (tokens, rows) of `kind`
    """

def int4_product(
    x: int,
    kind: Kind,
    tokens: int,
    cols: int,
    weights: int,
    weights_size: int,
    scales: int,
    scale_rows: int,
    scales_size: int,
    scale_kind: Kind,
    group_size: int,
    int8: bool,
    out: int,
    rows: int,
    threads: int,
) -> None:
    """Set out to x W^T of int4 weights, with the bits of ternarize.runtime.kernels.product_of_int4.

    As `int8_product`, but

    weights  (weights_size,) uint8: rows x width
    """

def has_lanes3() -> bool:
    """Whether `products` takes "lanes3" with the instruction set in use."""

def rans_count(bytes: Array, classes: Array, counts: Array, threads: int) -> None:
    """Set counts (classes, 256) int64 to how often each byte of (rows, width) uint8 occurs.

    classes  (width,) uint8: of the columns
    """

def rans_encode(
    bytes: Array,
    classes: Array,
    frequencies: Array,
    chunk_rows: int,
    out: Array,
    sizes: Array,
    threads: int,
) -> None:
    """Code rows (rows, width) uint8 in chunks (trits/rans.py), each into its row of `out`.

    frequencies  (classes, 256) uint16, each class adds up to 4096, not 0 where a byte occurs
    out          (chunks, 32 + 2 min(chunk_rows, rows) width) uint8
    sizes        (chunks,) int32: bytes that each has taken
    """

def rans_decode(
    coded: Array,
    ends: Array,
    classes: Array,
    table: Array,
    chunk_rows: int,
    out: Array,
    threads: int,
) -> int:
    """Decode chunks into out (rows, width) uint8; returns the first that is damaged, or -1.

    coded  (n,) uint8; chunk i lies between ends[i] and ends[i + 1] (chunks + 1,) int64
    table  (classes, 4096) uint32: byte, frequency - 1 (from bit 8), place in its range (bit 20)
    """

def can_read_stored() -> bool:
    """Whether `read_stored` can do anything: a CPU with instructions for SHA-256, not Windows."""

def read_stored(
    files: list[bytes],
    tensors: Array,
    checked: bool,
    states: Array,
    digests: Array,
    stop: Array,
    threads: int,
) -> bool:
    """Read tensors of files, each by one thread, in their order; False where it cannot.

    Each byte is read once: hashed, checked and laid out while it is near. Memory is given by its
    address; only ternarize.files.stored should call this, which knows what is there. Sizes are
    checked.

    files    paths; each thread has at most two of them open
    tensors  (n, 17) int64, of each
               file, start, bytes       which of the files, and the bytes in it
               form                     0: bytes as they are; 1: trits as they are;
                                        2 and 3: trits as "lanes2" and "lanes3"
               rows, cols, group size   of trits
               coded                    1: the bytes of trits are those of a stream
               out, its bytes           memory for the bytes (0: none), decoded, or for lanes
               file, start, bytes       of the scales of trits
               kind, coded              of scales: 0 F16, 1 BF16, 2 F32, 3 8-bit codes; a stream
               scales, their bytes      memory for them (0: none); with lanes in their order,
                                        float16 of F16 and codes, else float32
    checked  hash, and check scales; codes are always checked
    states   (n,) uint8: 0 until a tensor is in its memory, then 1; else 2 where the file cannot be
             read, 3 for a byte that is no code, 4 for a scale that does not fit, 5 if it was left
             out, 6 without memory, 7 for a damaged stream, 8 where an exception has ended it
    digests  (n, 32) uint8: SHA-256 of the bytes, followed by those of the scales
    stop     (1,) uint8: not 0 leaves out what has not begun
    """

def apply_steps(
    values: Array,
    first: int,
    limit: int,
    purpose: int,
    seeds: Array,
    fields: Array,
    bounds: Array,
    chosen: Array,
    signs: Array,
    threads: int,
) -> None:
    """Apply steps of a journal (steps/replay.py) to values (n,) int8, in place.

    first    of the values in the flat index
    limit    values stay within -limit and limit
    purpose  what the words are for (steps/generator.py)
    seeds    (steps,) int64, minus 2^63
    fields   (steps, 3) int64: number, bits of a cell, amount
    bounds   (steps + 1,) int64: which of `chosen` and `signs` are a step's
    chosen   (n,) int32, perturbations; signs (n,) int8, 1 or -1
    """

def align(
    up: Array,
    down: Array,
    first: int,
    seed: int,
    number: int,
    bits: int,
    purpose: int,
    out: Array,
    threads: int,
) -> None:
    """Set out (k, 2) float64 to what values gain along each perturbation, and against it.

    up, down  (n,) float32, of the values from `first` on in the flat index: what is gained by one
              more of each, and lost by one less
    """

def unfold(
    images: Array,
    sizes: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    size: int,
    out: Array,
    threads: int,
) -> None:
    """Set out as ternarize.runtime.unfold.patches_of says of images with zeros around them.

    images   (bytes,) uint8: numbers of `size` bytes, 2 or 4, (count, height, width, channels)
    sizes    these four
    kernel, stride, dilation   down, across; padding: above, below, on the left, on the right
    out      (bytes,) uint8: (count, places down, places across, channels * kernel's numbers)
    """

def read_all(bytes: Array, threads: int) -> int:
    """Read bytes (n,) uint8 as fast as memory gives them; returns the exclusive or of its words.

    A yardstick. Words have 64 bits; those after the last whole 512 bytes of a part are left out.
    """

def dot_peak(rounds: int, threads: int) -> int:
    """Do nothing but dot products of 8 bits, `rounds` rounds on each thread.

    Returns the number of multiplications; 0 where the instruction set in use has none.
    """

def rms_norm(
    kind: Kind, rows: int, n: int, x: int, weight: int, epsilon: float, out: int, threads: int
) -> None:
    """Set out as ternarize.runtime.decode.prepared_norm says, for which it is.

    x, out  addresses of (rows, n) of `kind`; weight that of (n,)
    """

def gate(
    kind: Kind,
    activation: Literal["silu", "relu2"],
    n: int,
    gate: int,
    up: int,
    out: int,
    threads: int,
) -> None:
    """Set out as ternarize.runtime.decode.prepared_gate says, for which it is.

    gate, up, out  addresses of n numbers of `kind`
    """

def dense(
    kind: Kind, tokens: int, rows: int, cols: int, x: int, weight: int, out: int, threads: int
) -> None:
    """Set out to x W^T; for `prepared_dense` in ternarize.runtime.decode.

    x, weight, out  addresses of (tokens, cols), (rows, cols) and (tokens, rows) of `kind`
    """

def attend(
    kind: Kind,
    batch: int,
    heads: int,
    kv_heads: int,
    dim: int,
    capacity: int,
    scaling: float,
    memory: Sequence[int],
    threads: int,
) -> None:
    """Set out as ternarize.runtime.decode.prepared_attention says, for which it is.

    memory  the addresses of q, k, v, cosine, sine, keys, values and out, all of `kind`, and of the
            position, int64
    """

def use_openmp(parallel: int) -> None:
    """Run products in parallel regions that the function at this address starts (libgomp's ABI).

    0: in threads of this module, which is the default.
    """

def cpu() -> str:
    """The instruction set in use, one of `product_cpus`."""

def cpus() -> list[str]:
    """The instruction sets that this build and this CPU have for the functions of weights.

    Of 'portable', 'avx2' and 'avx512'; the last one is in use in all that come after it.
    """

def product_cpus() -> list[str]:
    """Those for `products`, which are more: also 'avxvnni', 'amx', 'neon'. The last is in use.

    The environment variable TERNARIZE_CPU chooses another at import.
    """

def use_cpu(name: str) -> None:
    """Use the named instruction set from now on, for tests and benchmarks; ValueError if absent."""
