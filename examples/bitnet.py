"""BitNet b1.58 in small: a ternary LLaMA and its twin in floating point, trained from nothing.

Both begin with the same weights and read the same tokens in the same order, so that what is between
their validation losses is the price of being ternary, whatever the machine does; two sizes show how
it changes as a model grows. Products are in bfloat16, weights and steps in float32. The ternary one
has one scale for each matrix and inputs in 8 bits, as BitNet b1.58 has them, is packed without
loss, loaded, and measured once more as packed.

    python examples/bitnet.py --output build/bitnet [--text FILE] [--tokens 16000000]

The text is the standard library's documentation, as in train.py, or a file whose documents stand
apart by lines `<|doc|>`. https://arxiv.org/abs/2402.17764
"""

import argparse
import hashlib
import json
import math
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from train import (
    CONTEXT,
    batches,
    corpus,
    encode,
    save_tokenizer,
    train_tokenizer,
    validation_loss,
    windows,
)
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import ternarize
import ternarize.qat as qat

SIZES = {  # hidden size, layers
    "tiny": (128, 4),
    "small": (256, 4),
    "large": (512, 8),
}
RATES = 1e-3, 3e-3  # float, ternary, which takes a higher one
DECAY, WARM = 0.1, 0.03
BATCH = 16  # rows of CONTEXT tokens
VOCABULARY = 4096


def configuration(size: str, vocabulary: int) -> LlamaConfig:
    """A LLaMA whose matrices have a multiple of 128 inputs."""
    hidden, layers = SIZES[size]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def train_for(
    model: Any, kind: str, documents: list[list[int]], most: int, highest: float, seed: int
) -> dict[str, Any]:
    """Train on so many tokens; rates go up at first, then down as a cosine to a fiftieth."""
    groups = qat.parameter_groups(model, highest, weight_decay=DECAY)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    steps, tokens, average, started = 0, 0, 0.0, time.monotonic()
    for batch in batches(documents, BATCH, seed):
        done = tokens / most
        if done >= 1:
            break
        rate = min((done + 1e-4) / WARM, 0.51 + 0.49 * math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = highest * rate
        qat.end_decay(optimizer, done)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps, tokens = steps + 1, tokens + batch.numel()
        average = loss.item() if steps == 1 else 0.95 * average + 0.05 * loss.item()
        if steps % 50 == 0:
            left = (time.monotonic() - started) * (most / tokens - 1) / 60
            print(f"{kind}: step {steps}  loss {average:.3f}  {left:.1f} min left", flush=True)
    seconds = time.monotonic() - started
    return {"steps": steps, "tokens": tokens, "training_loss": average, "seconds": seconds}


def speed(model: Any) -> float:
    """Tokens a second that a model writes, the best of three times 64."""
    ids = torch.zeros(1, 1, dtype=torch.int64)
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)
        best = max(best, 64 / (time.perf_counter() - started))
    return best


def twins(
    size: str, documents: list[list[int]], held_out: torch.Tensor, args: argparse.Namespace
) -> dict[str, Any]:
    """Train both models of a size, pack the ternary one, and measure all three."""
    config = configuration(size, args.vocabulary)
    row: dict[str, Any] = {"size": size}
    for kind, rate in zip(("float", "ternary"), args.rates, strict=True):
        torch.manual_seed(args.seed)
        model: Any = LlamaForCausalLM(config)
        row["parameters"] = model.num_parameters()
        if kind == "ternary":
            qat.prepare(model, group_size=0, scale="absmean", estimator="ste", activations="int8")
        own = [list(document) for document in documents]
        found = train_for(model, kind, own, args.tokens, rate, args.seed)
        loss = validation_loss(model.eval(), held_out)
        row[kind] = found | {"loss": loss, "perplexity": math.exp(loss)}
        if kind == "float":
            row[kind]["tokens_per_second"] = speed(model)
    output = args.output / size
    if output.exists():
        shutil.rmtree(output)
    record = qat.pack(model, output, tokenizer=AutoTokenizer.from_pretrained(args.output))
    packed: Any = ternarize.load(output, dtype=torch.float32)
    loss = validation_loss(packed, held_out)
    row["packed"] = {
        "loss": loss,
        "perplexity": math.exp(loss),
        "tokens_per_second": speed(packed),
        "bytes": sum(file.stat().st_size for file in output.glob("*.safetensors")),
        "methods": sorted({t["method"] for t in record["tensors"].values() if "method" in t}),
    }
    row["gap"] = row["ternary"]["loss"] - row["float"]["loss"]
    return row


def documents_of(text: Path | None) -> tuple[list[str], list[str]]:
    """Documents to train on and, by their digests, one in 32 to validate on."""
    if text is None:
        return corpus()
    every = text.read_text("utf-8").split("\n<|doc|>\n")
    held = [hashlib.sha256(each.encode()).digest()[0] % 32 == 0 for each in every]
    chosen = list(zip(every, held, strict=True))
    return [d for d, apart in chosen if not apart], [d for d, apart in chosen if apart]


def main() -> None:
    """Train twins of each size, print what is between them, and write all figures as JSON."""
    parser = argparse.ArgumentParser(description="BitNet b1.58 and its float twin, in small.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--text", type=Path, help="documents, apart by lines <|doc|>")
    parser.add_argument("--tokens", type=int, default=16_000_000, help="that each model reads")
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--rates", type=float, nargs=2, default=RATES, help="the highest, of float and ternary"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    args.vocabulary = VOCABULARY
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", SyntaxWarning)  # of the library's own source files
    training, validation = documents_of(args.text)
    tokenizer = train_tokenizer(training, VOCABULARY)
    save_tokenizer(tokenizer, args.output)
    documents = encode(tokenizer, training)
    held_out = windows(encode(tokenizer, validation), 0)
    rows = []
    for size in args.sizes:
        row = twins(size, documents, held_out, args)
        rows.append(row)
        print(
            f"{size}, {row['parameters']} parameters: float {row['float']['loss']:.4f}, ternary "
            f"{row['ternary']['loss']:.4f} (packed {row['packed']['loss']:.4f}), "
            f"gap {row['gap']:.4f} nats",
            flush=True,
        )
    figures = {"tokens": args.tokens, "rates": args.rates, "rows": rows}
    (args.output / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
