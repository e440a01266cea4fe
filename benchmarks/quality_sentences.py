"""Spearman correlation on the STS benchmark by sentence-transformers' own evaluator.

    pip install sentence-transformers
    python benchmarks/quality_sentences.py DATA_DIR MODEL ... [--json OUT.json]

DATA_DIR holds `sts/stsb-en-test.csv` (sentence, sentence, score; no header). MODEL is a folder in
the layout of sentence-transformers (modules.json), a source or a packed one: it is opened by
SentenceTransformer, in float32, and given to EmbeddingSimilarityEvaluator. Embeddings of a packed
one are compared with those of `ternarize.load` and the mean over the attention mask, too.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from common import hide_bars, parser, write_figures
from quality_minilm import read_pairs
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

import ternarize
from ternarize.files.names import RECORD
from ternarize.measure.encoders import embed
from ternarize.models.reads import open_tokenizer

COMPARED = 64  # sentences


def measure(folder: Path, pairs: tuple[list[str], list[str], Any]) -> dict[str, Any]:
    """The evaluator's figure of a folder, its bytes, and how far its embeddings are from ours."""
    first, second, scores = pairs
    model = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    evaluator = EmbeddingSimilarityEvaluator(
        first, second, (scores / 5).tolist(), main_similarity="cosine"
    )
    row = {"name": folder.name, "bytes": (folder / "model.safetensors").stat().st_size}
    row["spearman"] = float(evaluator(model)["spearman_cosine"])
    row["difference"] = None
    if (folder / RECORD).is_file():
        theirs = model.encode(first[:COMPARED], convert_to_tensor=True)
        own = ternarize.load(folder, dtype=torch.float32)
        ours = embed(own, open_tokenizer(folder), first[:COMPARED])
        row["difference"] = float((theirs - ours).abs().max())
    return row


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("data", type=Path, help="directory with sts/stsb-en-test.csv")
    arguments.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    args = arguments.parse_args()
    hide_bars()
    pairs = read_pairs(args.data / "sts" / "stsb-en-test.csv")
    rows = []
    print("| model | bytes | Spearman | largest difference |\n|---|---|---|---|")
    for folder in args.models:
        print(f"{folder} ...", file=sys.stderr)
        rows.append(measure(folder.resolve(), pairs))
        differs = rows[-1]["difference"]
        last = "" if differs is None else f"{differs:.1e}"
        print(
            f"| {rows[-1]['name']} | {rows[-1]['bytes']:,} | {rows[-1]['spearman']:.4f} | {last} |"
        )
    write_figures(args.json, __file__, {"rows": rows})


if __name__ == "__main__":
    main()
