"""What rounding the output head and the token embedding alone costs a language model.

    python benchmarks/quality_ends.py MODEL TEXT [--packed START] [--calibrate TEXT]
        [--only NAME ...] [--seq-len N] [--max-tokens N] [--sizes] [--json OUT.json]
    python benchmarks/quality_ends.py MODEL --errors

MODEL is a checkpoint in which the two are tied, with its tokenizer; TEXT a file whose documents
stand apart by lines `<|doc|>`. Nothing else of the model is rounded, in float32 on the CPU: the
tensor is encoded and decoded as a conversion does it, and the model compared with itself as it was,
by the protocol of `ternarize eval` (4,096 tokens, windows of 512 that begin with what the tokenizer
puts in front). The rows "head alone" and "embedding alone" give it to one of the two and leave the
other. --packed gives them to a packed checkpoint of MODEL that keeps them, which is then what is
compared with MODEL, in a row of its own too. --calibrate adds rows in which 4 bits are chosen by
what the head meets on another text: H, the second moments of the last hidden states of 16,384
tokens. "weighted": the scale of each group has the least squared error weighted by the diagonal of
H. "compensated": column after column, what the rounding of a weight misses is made up for by the
weights to its right, as in GPTQ
(https://arxiv.org/abs/2210.17323), by H + d I with d its mean diagonal: the embedding, which meets
no such inputs, is to lose nothing. --sizes also prints what the whole model takes with each of the
choices of `--embeddings` (`itf` in groups of 128), as planned: bytes, bits a parameter, times
smaller. --errors reads no text: it prints the relative squared error of a twentieth of the rows by
ways to spend 4 bits.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import hide_bars, parser, write_figures
from torch import Tensor, nn

from ternarize.measure.evaluate import open_evaluation
from ternarize.measure.language_models import compare_logits, summarize
from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import ENDS, Recipe
from ternarize.runtime.load import load
from ternarize.sources.checkpoint import open_checkpoint
from ternarize.trits.base3 import packed_width
from ternarize.trits.int4 import INT4_GROUP_SIZE, dequantize_int4, encode_int4, pack_int4
from ternarize.trits.int8 import dequantize_int8, rows_to_int8
from ternarize.trits.methods import itf
from ternarize.trits.scales import scale_values, store_scales
from ternarize.trits.ternary import scaled, split_groups

CALIBRATED = 16384  # tokens
PIECE = 8192  # rows at a time
BOTH, HEAD, EMBEDDING = "", ", head alone", ", embedding alone"
MEASURES = {"perplexity": ".2f", "kl_divergence": ".4f", "top1_agreement": ".4f"}


@dataclass(frozen=True)
class Rounded:
    """A matrix as it is stored: its bytes, and its rows [first, last) decoded to float32."""

    nbytes: int
    rows: Callable[[int, int], Tensor]


def as_int8(weight: Tensor) -> Rounded:
    q, scales = rows_to_int8(weight)

    def rows(first: int, last: int) -> Tensor:
        return dequantize_int8(q[first:last], scales[first:last], -1, torch.float32)

    return Rounded(q.nbytes + scales.nbytes, rows)


def as_int4(weight: Tensor, group_size: int) -> Rounded:
    pairs = [encode_int4(piece, group_size, torch.float16) for piece in torch.split(weight, PIECE)]
    packed = torch.cat([pack_int4(q, group_size) for q, _ in pairs])
    scales, cols = torch.cat([scales for _, scales in pairs]), weight.shape[1]

    def rows(first: int, last: int) -> Tensor:
        some = packed[first:last], scales[first:last]
        return dequantize_int4(*some, cols, group_size, torch.float32)

    return Rounded(packed.nbytes + scales.nbytes, rows)


def as_ternary(weight: Tensor, group_size: int) -> Rounded:
    found = [itf(piece, group_size) for piece in torch.split(weight, PIECE)]
    trits = torch.cat([each.trits for each in found])
    scales = store_scales(torch.cat([each.scales for each in found]))

    def rows(first: int, last: int) -> Tensor:
        return scaled(trits[first:last], scale_values(scales[first:last]), group_size)

    return Rounded(len(trits) * packed_width(weight.shape[1], group_size) + scales.nbytes, rows)


def as_it_is(weight: Tensor) -> Rounded:
    return Rounded(2 * weight.numel(), partial(_part_of, weight))


KEPT = "16 bits"
CODECS: dict[str, Callable[[Tensor], Rounded]] = {
    "int8": as_int8,
    **{f"int4, groups of {n}": partial(as_int4, group_size=n) for n in (32, 64, 128)},
    **{f"ternary (itf), groups of {n}": partial(as_ternary, group_size=n) for n in (64, 128)},
}
ROWS = {name: (name, BOTH) for name in CODECS} | {
    f"int4, groups of 32{ends}": ("int4, groups of 32", ends) for ends in (HEAD, EMBEDDING)
}


def moments(model: Path, text: Path, seq_len: int, lm: Any) -> Tensor:
    """The mean of h h^T over the last hidden states h of a text, (n, n)."""
    work = open_evaluation(model, None, text, seq_len, CALIBRATED)
    total, count = torch.zeros(()), 0
    with torch.inference_mode():
        for window in torch.split(torch.as_tensor(work.ids), 1):
            hidden: Tensor = lm.base_model(input_ids=window, use_cache=False)[0][0]
            total, count = total + hidden.T @ hidden, count + len(hidden)
    return (total / count).clone()


def best_scales(weight: Tensor, weights: Tensor) -> Tensor:
    """Of thirteen scales of each group the one of the least weighted error, (rows, groups)."""
    groups, by = (split_groups(each, INT4_GROUP_SIZE) for each in (weight, weights))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    most, least = torch.where(high > -low, -high, -low), torch.full_like(low, torch.inf)
    best = torch.zeros_like(low)
    for steps in (6 + n / 4 for n in range(13)):
        scale = (most / steps).half().float()
        exact = groups / torch.where(scale == 0, 1, scale)
        error = ((exact.round().clamp(-8, 7) - exact) * scale).square().mul(by)
        error = error.sum(-1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best.squeeze(-1)


def as_weighted(weight: Tensor, seen: Tensor) -> Rounded:
    """int4 in groups of 32, by scales that `seen`, (n, n), weighs."""

    def rows(first: int, last: int) -> Tensor:
        part = weight[first:last].float()
        scale = best_scales(part, seen.diag()).unsqueeze(-1)
        exact = split_groups(part, INT4_GROUP_SIZE) / torch.where(scale == 0, 1, scale)
        return (exact.round().clamp(-8, 7) * scale).flatten(-2)

    return Rounded(as_int4_bytes(weight), rows)


def as_compensated(weight: Tensor, seen: Tensor) -> Rounded:
    """int4 in groups of 32, its scales as without data, each column's error made up for."""
    cols = weight.shape[1]
    damped = seen.double() + seen.double().diag().mean() * torch.eye(cols, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float()

    def rows(first: int, last: int) -> Tensor:
        left = weight[first:last].float().T.contiguous()  # a column is a row here
        scales = best_scales(left.T.contiguous(), torch.ones(cols)).T
        for at in range(cols):
            scale = scales[at // INT4_GROUP_SIZE]
            exact = left[at] / torch.where(scale == 0, 1, scale)
            rounded = exact.round().clamp(-8, 7) * scale
            off = (left[at] - rounded) / upper[at, at]
            left[at] = rounded
            left[at + 1 :].addr_(upper[at, at + 1 :], off, alpha=-1)
        return left.T

    return Rounded(as_int4_bytes(weight), rows)


def as_int4_bytes(weight: Tensor) -> int:
    """What int4 in groups of 32 takes, of rows that are whole groups."""
    return weight.numel() // 2 + weight.numel() // INT4_GROUP_SIZE * 2


SEEN = {"weighted": as_weighted, "compensated": as_compensated}


def measure(
    model: Path,
    text: Path,
    names: list[str],
    seq_len: int,
    max_tokens: int,
    calibration: Path | None,
    packed: Path | None = None,
) -> list[dict[str, Any]]:
    """The figures of the rows: the source's logits of a window are made once for all of them."""
    work = open_evaluation(model, None, text, seq_len, max_tokens)
    (exact,) = work.load("cpu", torch.float32)
    lm: Any = exact
    if packed is not None:
        CODECS[KEPT], ROWS[KEPT] = as_it_is, (KEPT, BOTH)
        lm, names = load(packed, dtype=torch.float32), [KEPT, *names]
    if calibration is not None:
        seen = moments(model, calibration, seq_len, lm)
        for way, rounding in SEEN.items():
            CODECS[f"int4, groups of 32, {way}"] = partial(rounding, seen=seen)
            added = {f"int4, groups of 32, {way}{ends}": ends for ends in (BOTH, HEAD, EMBEDDING)}
            ROWS.update({n: (f"int4, groups of 32, {way}", ends) for n, ends in added.items()})
            names = [*names, *added]
    head, embedding = lm.get_output_embeddings(), lm.get_input_embeddings()
    source = embedding.weight.detach()
    assert head.weight is embedding.weight, "the head and the embedding are not tied"
    forms = {codec: CODECS[codec](source) for codec in {ROWS[name][0] for name in names}}
    for codec, form in forms.items():  # worked out once, not in every window
        if codec.endswith(tuple(SEEN)):
            whole = torch.empty_like(source)
            fill(whole, form)
            forms[codec] = Rounded(form.nbytes, partial(_part_of, whole))
    buffer = nn.Parameter(torch.empty_like(source), requires_grad=False)
    kept, rows = head.weight, {name: dict[str, Any]() for name in names}
    columns: dict[str, list[list[float]]] = {name: [] for name in names}
    for number, window in enumerate(work.ids):
        expected = logits_of(exact, window)
        for name in names:
            codec, ends = ROWS[name]
            fill(buffer.data, forms[codec])
            if "bits" not in rows[name]:
                rows[name] = {"name": name, **size_and_error(source, buffer.data, forms[codec])}
            head.weight = kept if ends == EMBEDDING else buffer
            embedding.weight = kept if ends == HEAD else buffer
            both = [logits_of(lm, window), expected]
            columns[name].append(compare_logits(both, window, max(1, len(work.prefix))))
            head.weight = embedding.weight = kept
        for name in names:
            figures = summarize(torch.tensor(columns[name], dtype=torch.float64).T)
            rows[name] |= {"windows": number + 1, **figures}
        print(
            f"{number + 1} of {len(work.ids)} windows\n{markdown([*rows.values()])}",
            file=sys.stderr,
        )
    return list(rows.values())


def _part_of(whole: Tensor, first: int, last: int) -> Tensor:
    return whole[first:last]


@torch.inference_mode()
def logits_of(model: Any, window: Tensor) -> Tensor:
    found: Tensor = model(input_ids=window[None], use_cache=False).logits[0, :-1]
    return found


def fill(out: Tensor, form: Rounded) -> None:
    """Decode into `out`, a part at a time."""
    for first in range(0, len(out), PIECE):
        out[first : first + PIECE] = form.rows(first, min(first + PIECE, len(out)))


def size_and_error(source: Tensor, decoded: Tensor, form: Rounded) -> dict[str, float]:
    """Bytes, bits a weight, and the relative squared error of the matrix."""
    squared = sum(float((a - b).double().square().sum()) for a, b in pieces(source, decoded))
    energy = sum(float(a.double().square().sum()) for a, _ in pieces(source, decoded))
    bits = form.nbytes * 8 / source.numel()
    return {"bytes": form.nbytes, "bits": bits, "relative_error": squared / energy}


def pieces(*tensors: Tensor) -> Any:
    return zip(*(torch.split(tensor, PIECE) for tensor in tensors), strict=True)


def sizes(model: Path) -> list[dict[str, Any]]:
    """What the whole model takes with each choice of --embeddings."""
    rows = []
    for choice in ENDS:
        plan = make_plan(model, Recipe("itf", 128, embeddings=choice))
        size, coverage = plan.packed_bytes(), plan.coverage()
        bits = size * 8 / (coverage["total"] - coverage["tied"])
        ratio = plan.source.stored_bytes / size
        rows.append({"embeddings": choice, "bytes": size, "bits": bits, "ratio": ratio})
    return rows


def nearest_levels(groups: Tensor, levels: Tensor, steps: list[float]) -> Tensor:
    """Groups rounded to the nearest of scale times levels, by the best of largest / steps."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    largest = torch.where(high > -low, -high, -low)
    middles, best, found = (levels[1:] + levels[:-1]) / 2, None, groups
    for step in steps:
        scale = (largest / step).half().float()
        exact = groups / torch.where(scale == 0, 1, scale)
        rounded = levels[torch.bucketize(exact, middles)] * scale
        error = (rounded - groups).square().sum(-1, keepdim=True)
        better = error < best if best is not None else torch.ones_like(error, dtype=torch.bool)
        best = error if best is None else torch.where(better, error, best)
        found = torch.where(better, rounded, found)
    return found


def with_offset(groups: Tensor) -> Tensor:
    """Groups rounded to fifteen steps of their own range, by the best of a few narrower ranges."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    middle, best, found = (low + high) / 2, torch.full_like(low, torch.inf), groups
    for share in (1 - n / 32 for n in range(12)):
        first = (middle + (low - middle) * share).half().float()
        scale = ((high - low) * share / 15).half().float()
        exact = (groups - first) / torch.where(scale == 0, 1, scale)
        rounded = exact.round().clamp(0, 15) * scale + first
        error = (rounded - groups).square().sum(-1, keepdim=True)
        found = torch.where(error < best, rounded, found)
        best = torch.minimum(error, best)
    return found


def errors(model: Path) -> None:
    """A table of the relative squared errors of ways to spend 4 bits, by group size."""
    checkpoint = open_checkpoint(model)
    name = next(name for name in checkpoint.tensors if "embed_tokens" in name)
    shape = checkpoint.tensors[name].shape
    weight = checkpoint.read(name).view(shape)[::20].float()
    even, odd = torch.arange(-8, 8.0), torch.arange(-7, 8.0)
    bent = torch.sinh(1.5 * even / 8) / math.sinh(1.5) * 8
    best = [6 + n / 4 for n in range(13)]
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "-7..7, scale = largest / 7": lambda g: nearest_levels(g, odd, [7]),
        "-7..7, best of thirteen": lambda g: nearest_levels(
            g, odd, [5.25 + n / 4 for n in range(13)]
        ),
        "-8..7, scale = largest / 8": lambda g: nearest_levels(g, even, [8]),
        "-8..7, best of thirteen (int4)": lambda g: nearest_levels(g, even, best),
        "0..15 and an offset, 16 bits more a group": with_offset,
        "sixteen levels closer around 0": lambda g: nearest_levels(g, bent, best),
    }
    print("| | groups of 32 | 64 | 128 |\n|---|---|---|---|")
    for way, rounded in ways.items():
        found = []
        for size in (32, 64, 128):
            groups = weight.reshape(-1, size)
            off = (rounded(groups) - groups).double().square().sum()
            found.append(f"{float(off / groups.double().square().sum()):.4f}")
        print(f"| {way} | {' | '.join(found)} |")


def markdown(rows: list[dict[str, Any]]) -> str:
    """A table of sizes and measures with their standard errors."""
    lines = [
        "| head and embedding | MB | bits | relative error | perplexity | KL, nats per token "
        "| top-1 agreement |",
        "|---|---|---|---|---|---|---|",
    ]
    first = rows[0]["source_perplexity"] if rows else None
    if first is not None:
        lines.append(f"| source | | | 0 | {shown(first, '.2f')} | 0 | 1 |")
    for row in rows:
        cells = [row["name"], f"{row['bytes'] / 1e6:.1f}", f"{row['bits']:.3f}"]
        cells.append(f"{row['relative_error']:.4f}")
        cells += [shown(row[name], style) for name, style in MEASURES.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(found: dict[str, Any], style: str) -> str:
    error = found["standard_error"]
    return f"{found['value']:{style}}" + ("" if error is None else f" ± {error:{style}}")


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("model", type=Path, help="checkpoint directory")
    arguments.add_argument("text", type=Path, nargs="?", help="text to measure on")
    arguments.add_argument("--packed", type=Path, help="packed checkpoint of it to give them to")
    arguments.add_argument("--calibrate", type=Path, help="text to round by")
    arguments.add_argument("--errors", action="store_true", help="of 4 bits, and nothing else")
    arguments.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS), help="rows")
    arguments.add_argument("--seq-len", type=int, default=512, help="tokens of a window")
    arguments.add_argument("--max-tokens", type=int, default=4096, help="of the text")
    arguments.add_argument("--sizes", action="store_true", help="convert the model, too")
    args = arguments.parse_args()
    hide_bars()
    if args.errors or args.text is None:
        return errors(args.model)
    rows = []
    if args.only:
        given = (args.seq_len, args.max_tokens, args.calibrate, args.packed)
        rows = measure(args.model, args.text, args.only, *given)
        print(markdown(rows), flush=True)
    found = sizes(args.model) if args.sizes else []
    for row in found:
        print(
            f"| {row['embeddings']} | {row['bytes'] / 1e6:.1f} | {row['bits']:.3f} | "
            f"{row['ratio']:.2f} |"
        )
    write_figures(args.json, __file__, {"rows": rows, "sizes": found})


if __name__ == "__main__":
    main()
