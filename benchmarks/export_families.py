"""Families of models that are exported to GGUF: what they compute here and in llama.cpp.

    python benchmarks/export_families.py DATA [--steps 60] [--only NAME ...] [--positions 1024]
        [--packed FOLDER --text FILE] [--encoder FOLDER] [--json OUT.json]

DATA holds the checkpoint `lm` (a LLaMA) and the texts `text/calibration.txt` and `text/eval.txt`.
The other families are small models with lm's tokenizer that are trained here for some steps on
calibration.txt, so that their weights are no noise. Each is packed by `itf`, as `convert --for
llama.cpp` chooses, exported in every type, and read by llama.cpp (llama-cpp-python) on windows of
256 tokens of eval.txt. llama.cpp rounds the inputs of ternary products to 8 bits, ternarize does
not. With --packed a packed language model is measured alone, on --text; with --encoder a folder of
sentence-transformers of BERT's kind, on the sentences of DATA/sts/stsb-en-test.csv.
"""

import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from common import hide_bars, parser, write_figures
from export_llama_cpp import SEQ_LEN, engine_logits, llama_cpp, open_engine, same_tokens
from quality_minilm import read_pairs, spearman
from torch import Tensor, nn

import ternarize
from ternarize.convert.run import convert
from ternarize.errors import CheckpointError
from ternarize.measure.documents import cut_windows, read_documents
from ternarize.measure.encoders import embed
from ternarize.models.reads import open_tokenizer
from ternarize.plans.recipe import LLAMA_CPP, Recipe
from ternarize.publish.export import export
from ternarize.trits import ggml

TYPES = tuple(ggml.TYPES)
TRAINED_ON = (16, 128)  # windows of a step, and their tokens
RATE = 2e-3
THREADS = 2
SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2}


def _of(kind: str, **more: Any) -> Callable[[int], Any]:
    def make(vocab_size: int) -> Any:
        names = {"architectures": [f"{kind.removesuffix('Text')}ForCausalLM"]}
        options = {**SIZES, "vocab_size": vocab_size, **names, **more}
        return getattr(transformers, f"{kind}Config")(**options)

    return make


def _gpt2(vocab_size: int) -> Any:
    return transformers.GPT2Config(
        vocab_size=vocab_size,
        n_embd=256,
        n_layer=4,
        n_head=4,
        n_positions=512,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["GPT2LMHeadModel"],
    )


FAMILIES: dict[str, Callable[[int], Any]] = {
    "Mistral": _of("Mistral", head_dim=64),
    "Mixtral": _of("Mixtral", head_dim=64, num_local_experts=4, **EXPERTS),
    "Qwen2": _of("Qwen2"),
    "Qwen3": _of("Qwen3", head_dim=64),
    "Qwen3-MoE": _of(
        "Qwen3Moe",
        head_dim=64,
        num_experts=4,
        moe_intermediate_size=256,
        norm_topk_prob=True,
        **EXPERTS,
    ),
    "Qwen 3.5": _of(
        "Qwen3_5Text",
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=64,
    ),
    "Phi-3": _of("Phi3", pad_token_id=0),
    "GPT-2": _gpt2,
    "Gemma 3": _of(
        "Gemma3Text",
        head_dim=64,
        query_pre_attn_scalar=64,
        num_hidden_layers=6,
        sliding_window=128,
        pad_token_id=0,
    ),
}


def train(config: Any, source: Path, text: Path, steps: int, folder: Path) -> None:
    """A model of a family, trained for some steps on a text, with the tokenizer of `source`."""
    torch.manual_seed(0)
    model: Any = getattr(transformers, config.architectures[0])(config)
    tokenizer, (rows, length) = open_tokenizer(source), TRAINED_ON
    windows = cut_windows(read_documents(text), tokenizer, length, steps * rows * length)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for batch in torch.split(windows, rows)[:steps]:
        loss = model(batch, labels=batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)


def losses_of(logits: Tensor, window: Tensor) -> float:
    """Summed nats of all tokens of a window but the first."""
    return float(nn.functional.cross_entropy(logits[:-1], window[1:], reduction="sum"))


@torch.no_grad()
def compare(model: Any, engine: Any, windows: Tensor) -> dict[str, float]:
    """Perplexities of both, and how alike they are, a window at a time."""
    ours = theirs = divergence = 0.0
    same = 0
    for window in windows:
        mine, other = model(window[None]).logits[0].float(), engine_logits(engine, window)
        ours, theirs = ours + losses_of(mine, window), theirs + losses_of(other, window)
        same += int((mine.argmax(-1) == other.argmax(-1)).sum())
        p, q = other.log_softmax(-1), mine.log_softmax(-1)
        divergence += float((p.exp() * (p - q)).sum())
    count = windows.numel() - len(windows)
    return {
        "perplexity_here": math.exp(ours / count),
        "perplexity_llama_cpp": math.exp(theirs / count),
        "ratio": math.exp((theirs - ours) / count),
        "kl_divergence": divergence / windows.numel(),
        "top1_agreement": same / windows.numel(),
    }


def measure(
    name: str, packed: Path, text: Path, positions: int, types: tuple[str, ...], folder: Path
) -> Iterator[dict[str, Any]]:
    """A row for each type that holds what is packed."""
    tokenizer, documents = open_tokenizer(packed), read_documents(text)
    windows = cut_windows(documents, tokenizer, SEQ_LEN, positions)
    model = ternarize.load(packed, dtype="float32", activations="none")
    for kind in types:
        path = folder / f"{kind}.gguf"
        try:
            report = export(packed, path, "gguf", kind=kind)
        except CheckpointError as error:
            print(f"{name}, {kind.upper()}: {error}", flush=True)
            continue
        engine = open_engine(path, THREADS)
        row = {"name": name, "type": kind, "bytes": report["bytes"], "lost": report["lost"]}
        row |= compare(model, engine, windows)
        row["equal_tokens"] = same_tokens(engine, tokenizer, documents[:50])
        engine.close()
        path.unlink()
        show(row)
        yield row


def show(row: dict[str, Any]) -> None:
    cells = [row["name"], row["type"].upper(), f"{row['bytes'] / 1e6:.2f}"]
    cells += [f"{row[key]:.2f}" for key in ("perplexity_here", "perplexity_llama_cpp")]
    cells += [f"{row['ratio']:.4f}", f"{row['kl_divergence']:.5f}"]
    cells += [f"{row['top1_agreement']:.4f}", row["equal_tokens"]]
    print(f"| {' | '.join(cells)} |", flush=True)


def encoder(source: Path, sts: Path, folder: Path) -> dict[str, Any]:
    """An encoder: tokens, cosines of embeddings, and the rank correlation with people's scores."""
    convert(source, folder / "packed", Recipe("itf", engine=LLAMA_CPP))
    report = export(folder / "packed", folder / "m.gguf", "gguf")
    firsts, seconds, scores = read_pairs(sts)
    lines = sorted({*firsts, *seconds})
    tokenizer = open_tokenizer(folder / "packed")
    engine = llama_cpp.Llama(
        str(folder / "m.gguf"), embedding=True, n_ctx=512, n_threads=THREADS, verbose=False
    )
    same = sum(
        engine.tokenize(line.encode(), add_bos=True, special=True) == tokenizer(line)["input_ids"]
        for line in lines
    )
    theirs = torch.tensor([engine.embed(line, normalize=True) for line in lines])
    engine.close()
    ours = embed(ternarize.load(folder / "packed", dtype="float32"), tokenizer, lines)
    cosines, at = (theirs * ours).sum(-1), {line: n for n, line in enumerate(lines)}
    left, right = ([at[line] for line in column] for column in (firsts, seconds))
    found = {
        where: spearman((each[left] * each[right]).sum(-1), scores)
        for where, each in (("here", ours), ("llama.cpp", theirs))
    }
    row = {
        "type": report["type"],
        "bytes": report["bytes"],
        "equal_tokens": f"{same} of {len(lines)} sentences",
        "cosine_mean": float(cosines.mean()),
        "cosine_least": float(cosines.min()),
        "spearman": found,
    }
    print(row)
    return row


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("data", type=Path, help="directory with lm and text")
    arguments.add_argument("--steps", type=int, default=60, help="of training, of each family")
    arguments.add_argument("--only", nargs="*", help="names of families; nothing behind it: none")
    arguments.add_argument("--positions", type=int, default=1024)
    arguments.add_argument("--packed", type=Path, help="a packed language model")
    arguments.add_argument("--text", type=Path, help="to measure it on")
    arguments.add_argument("--encoder", type=Path, help="a folder of sentence-transformers")
    given = arguments.parse_args()
    hide_bars()
    torch.set_num_threads(THREADS)
    text, rows, encoders = given.data / "text", list[dict[str, Any]](), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as top:
        work, held = Path(top), text / "eval.txt"
        # some families' tokenizers have tokens of their own, whatever a file says
        vocab_size = len(open_tokenizer(given.data / "lm")) + 64
        for number, name in enumerate(["Llama", *FAMILIES]):
            if given.only is not None and name not in given.only:
                continue
            # numbers: of names llama.cpp draws conclusions
            folder = work / f"model{number}"
            folder.mkdir()
            if name == "Llama":
                source = given.data / "lm"
            else:
                source, config = folder / "source", FAMILIES[name](vocab_size)
                train(config, given.data / "lm", text / "calibration.txt", given.steps, source)
            convert(source, folder / "packed", Recipe("itf", engine=LLAMA_CPP))
            rows += measure(name, folder / "packed", held, given.positions, TYPES, folder)
            shutil.rmtree(folder)
        if given.packed is not None:
            of_it = given.packed.name, given.packed, given.text, given.positions, ("q2_0",)
            rows += measure(*of_it, work)
        if given.encoder is not None:
            encoders.append(encoder(given.encoder, given.data / "sts" / "stsb-en-test.csv", work))
    write_figures(given.json, __file__, {"rows": rows, "encoders": encoders})


if __name__ == "__main__":
    main()
