"""What a head and an embedding in 4 bits cost a ternary model, and what training gives back.

    python benchmarks/training_ends.py MODEL START TEXT EVAL [--tokens N] [--batch N] [--lr X]
        [--seq-len N] [--max-tokens N] [--json OUT.json]

MODEL is a checkpoint whose head and embedding are tied, with its tokenizer; START a packed one of
it that keeps them (`ternarize train MODEL START ...`); TEXT what is trained on, EVAL a text of
other documents. `ternarize train MODEL OUTPUT --start START --head int4 --embeddings int4` is run
twice for as many tokens: with the scales of the rounded matrix held where rounding has put them,
and as it is, with scales that learn. Both, START, and START whose matrix is rounded and which
nothing trains are compared with MODEL on the same windows of EVAL (float32, by the protocol of
`ternarize eval`).
"""

import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import hide_bars, parser, write_figures
from quality_ends import MEASURES, as_int4, fill, logits_of, shown
from torch import nn

from ternarize.convert.run import convert
from ternarize.files.json_files import read_json
from ternarize.files.names import RECORD
from ternarize.measure.evaluate import open_evaluation
from ternarize.measure.language_models import compare_logits, summarize
from ternarize.plans.recipe import Recipe, Train
from ternarize.qat.modules import LOG_SCALE, latent_modules
from ternarize.runtime.load import load
from ternarize.train import loop, run
from ternarize.train.students import make_pair
from ternarize.trits.base3 import BASE3
from ternarize.trits.int4 import INT4, INT4_GROUP_SIZE

KEPT, ROUNDED = "as it is (head and embedding in 16 bits)", "rounded, not trained"
FIXED, LEARNT = "rounded, its scales fixed, the rest trained", "rounded, its scales trained as well"


def fixed_pair(*given: Any) -> Any:
    """`make_pair`, in which the scales of ends in 4 bits do not move."""
    pair = make_pair(*given)
    for _, module in latent_modules(pair.student):
        for name, form in module.forms.items():
            if form.codec != BASE3:
                scales = module._parameters[name + LOG_SCALE]
                assert scales is not None
                scales.requires_grad_(False)
    return pair


def trained(args: Any, output: Path, fixed: bool) -> dict[str, Any]:
    """Train a variant; returns its row."""
    training = Train(
        texts=(str(args.text),),
        start=str(args.start),
        tokens=args.tokens,
        batch=args.batch,
        lr=args.lr,
    )
    pairs = fixed_pair if fixed else make_pair
    # looks at held-out text cost as much as some steps: one at the start, one at the end
    with patch.object(run, "make_pair", pairs), patch.object(loop, "LOOKS", 1):
        recipe = Recipe("itf", head=INT4, embeddings=INT4, train=training)
        record = convert(args.model, output, recipe)
    found = record["training"]
    return {
        "name": FIXED if fixed else LEARNT,
        "tokens": found["tokens"],
        "tokens_per_second": found["tokens"] / (60 * found["minutes"]),
        "held_out": found["held_out"],
        **size_of(output),
    }


def size_of(packed: Path) -> dict[str, Any]:
    """Bytes of the whole model, and bits for each of its parameters (tied ones once)."""
    record = read_json(packed / RECORD)
    assert record is not None
    size = sum(file.stat().st_size for file in packed.glob("*.safetensors"))
    coverage = record["coverage"]
    return {"bytes": size, "bits": size * 8 / (coverage["total"] - coverage["tied"])}


def rounded(start: Path) -> Any:
    """START with its tied matrix rounded as a conversion does it."""
    model: Any = load(start, dtype=torch.float32)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weight = embedding.weight.detach()
    buffer = torch.empty_like(weight)
    fill(buffer, as_int4(weight, INT4_GROUP_SIZE))
    head.weight = embedding.weight = nn.Parameter(buffer, requires_grad=False)
    return model


def compare(models: dict[str, Any], args: Any) -> dict[str, dict[str, Any]]:
    """The measures of models against the source, on the same windows."""
    work = open_evaluation(args.model, None, args.eval, args.seq_len, args.max_tokens)
    (source,) = work.load("cpu", torch.float32)
    columns: dict[str, list[list[float]]] = {name: [] for name in models}
    for number, window in enumerate(work.ids):
        expected = logits_of(source, window)
        for name, model in models.items():
            both = [logits_of(model, window), expected]
            columns[name].append(compare_logits(both, window, max(1, len(work.prefix))))
        print(f"{number + 1} of {len(work.ids)} windows", file=sys.stderr)
    return {n: summarize(torch.tensor(c, dtype=torch.float64).T) for n, c in columns.items()}


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| | MB, whole model | bits a parameter | perplexity | KL, nats per token "
        "| top-1 agreement |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["name"], f"{row['bytes'] / 1e6:.1f}", f"{row['bits']:.3f}"]
        cells += [shown(row[name], style) for name, style in MEASURES.items()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("model", type=Path, help="checkpoint directory")
    arguments.add_argument("start", type=Path, help="packed checkpoint of it")
    arguments.add_argument("text", type=Path, help="text to train on")
    arguments.add_argument("eval", type=Path, help="text to measure on")
    arguments.add_argument("--tokens", type=int, default=20480, help="of each training")
    arguments.add_argument("--batch", type=int, default=2048, help="tokens of a step")
    arguments.add_argument("--lr", type=float, default=0.002, help="of the trainings")
    arguments.add_argument("--seq-len", type=int, default=512, help="tokens of a window")
    arguments.add_argument("--max-tokens", type=int, default=4096, help="of the text to measure on")
    args = arguments.parse_args()
    hide_bars()
    with tempfile.TemporaryDirectory() as scratch:
        rows = [{"name": KEPT, **size_of(args.start)}, {"name": ROUNDED}]
        models = {KEPT: load(args.start, dtype=torch.float32), ROUNDED: rounded(args.start)}
        for fixed in (True, False):
            output = Path(scratch) / ("fixed" if fixed else "learnt")
            rows.append(trained(args, output, fixed))
            print(rows[-1], file=sys.stderr)
            models[rows[-1]["name"]] = load(output, dtype=torch.float32)
        rows[1] |= {name: rows[2][name] for name in ("bytes", "bits")}
        found = compare(models, args)
    rows = [{**row, **found[row["name"]]} for row in rows]
    print(markdown(rows))
    write_figures(args.json, __file__, {"rows": rows})


if __name__ == "__main__":
    main()
