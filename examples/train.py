"""Train the example checkpoint: a LLaMA of 1.8 million weights that writes library documentation.

The demo and the tests need a real FP16 checkpoint: one whose text shows at a glance whether a
conversion kept its knowledge, small enough to live in the repository, and ours to give away.
So the text is what every Python installation carries: the docstrings and comments of the
standard library and the topics of `help()`. It is read, never committed, and no module is
imported for it: source files are parsed with `ast` and `tokenize`. (The built-in modules have
no source; they are part of the interpreter that runs this script.)

All matrices are 256 or 512 wide, so that every group size up to 256 divides them and formats
with blocks of 256 can hold them. Nothing is done to make the weights easier to ternarize.

    python examples/train.py --output examples/tiny-llama

The result depends on the Python version, whose text it learns, and on the CPU's arithmetic.
"""

import argparse
import ast
import copy
import hashlib
import importlib
import inspect
import io
import json
import math
import random
import re
import sys
import sysconfig
import time
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

END = "<|endoftext|>"  # between documents: the end of one is the beginning of the next
CONTEXT = 256
Model = Any  # transformers' annotations do not describe its own models' methods
SKIPPED = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages"}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def comments(source: bytes) -> Iterator[str]:
    """Blocks of two or more full-line comments, without their number signs."""
    block: list[str] = []
    last = 0
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            if token.start[0] != last + 1:
                yield "\n".join(block) if len(block) > 1 else ""
                block = []
            block.append(token.string.lstrip("#").removeprefix(" "))
            last = token.start[0]
    yield "\n".join(block) if len(block) > 1 else ""


def raw_documents() -> Iterator[str]:
    """Docstrings and comments of the standard library, built-in docstrings, help topics."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if SKIPPED.intersection(path.relative_to(library).parts):
            continue
        source = path.read_bytes()
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue  # templates and deliberately broken files
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED):
                yield ast.get_docstring(node) or ""
        yield from comments(source)
    for name in sorted(sys.builtin_module_names):
        for item in vars(importlib.import_module(name)).values():
            for member in (item, *(vars(item).values() if inspect.isclass(item) else ())):
                text = getattr(member, "__doc__", None)
                yield inspect.cleandoc(text) if isinstance(text, str) else ""
    yield from (topics[name] for name in sorted(topics))


def clean(text: str, seen: set[bytes]) -> str:
    """One document as prose: paragraphs unwrapped, rulers and paragraphs already seen dropped."""
    text = re.sub(r"(?m)^\W*\n", "\n", text + "\n")  # rulers such as ===== and blank lines
    text = re.sub(r"(?m)^([\w(\"'`*.].{45,}?) *\n(?=[\w(\"'`*.])", r"\1 ", text)
    text = re.sub(r"(?<=[.:;,?!\w)]) {2,}(?=\w)", " ", text)
    kept = []
    for paragraph in re.split(r"\n{2,}", text.strip()):
        key = hashlib.sha256(re.sub(r"\W+", "", paragraph).encode()).digest()
        if len(paragraph) < 40 or key not in seen:
            kept.append(paragraph)
        seen.add(key)
    return "\n\n".join(kept)


def is_prose(text: str) -> bool:
    """Whether a document is neither tiny nor mostly examples, tables or code."""
    letters = sum(char.isalpha() or char == " " for char in text)
    return len(text) >= 60 and text.count(">>>") <= len(text) / 400 and letters > 0.8 * len(text)


def corpus() -> tuple[list[str], list[str]]:
    """Documents to train on and, chosen by hash, about 3 % of them to validate on."""
    seen: set[bytes] = set()
    documents = [text for text in (clean(raw, seen) for raw in raw_documents()) if is_prose(text)]
    documents = sorted(set(documents), key=lambda text: hashlib.sha256(text.encode()).digest())
    held_out = len(documents) * 3 // 100
    return documents[held_out:], documents[:held_out]


def train_tokenizer(documents: list[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE that puts END before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, 0)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, output: Path) -> None:
    """Write tokenizer.json without white space and the few settings transformers needs."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT}
    settings |= {"bos_token": END, "eos_token": END, "pad_token": END}
    output.mkdir(parents=True, exist_ok=True)
    (output / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def save(model: Model, output: Path) -> None:
    """Write the model as it is now, in FP16."""
    half: Model = copy.deepcopy(model).to(torch.float16)
    assert all(weight.isfinite().all() for weight in half.parameters()), "overflow in FP16"
    half.save_pretrained(output)


def encode(tokenizer: Tokenizer, documents: list[str]) -> list[list[int]]:
    """Token ids of each document, END first."""
    return [encoding.ids for encoding in tokenizer.encode_batch(documents)]


def windows(documents: list[list[int]], offset: int) -> torch.Tensor:
    """All documents end to end, cut into rows of CONTEXT tokens: (rows, CONTEXT) int64."""
    stream = torch.tensor([token for document in documents for token in document][offset:])
    return stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def batches(documents: list[list[int]], rows: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches; every epoch has the documents in a new order and cuts them elsewhere."""
    rng = random.Random(seed)
    while True:
        rng.shuffle(documents)
        epoch = windows(documents, rng.randrange(CONTEXT))
        yield from epoch[: len(epoch) // rows * rows].view(-1, rows, CONTEXT)


@torch.inference_mode()
def validation_loss(model: Model, rows: torch.Tensor) -> float:
    """Mean negative log-likelihood per token in nats, in windows of CONTEXT tokens."""
    total = 0.0
    for part in torch.split(rows, 16):
        total += float(model(input_ids=part, labels=part).loss) * len(part)
    return total / len(rows)


def train(
    model: Model, documents: list[list[int]], held_out: torch.Tensor, args: argparse.Namespace
) -> None:
    """AdamW with a linear warm-up over 5 % of the steps and a cosine down to 2 % of the rate."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    forward: Model = torch.compile(model) if args.fast else model
    warm_up = max(1, args.steps // 20)
    start, average = time.monotonic(), 0.0
    for step, batch in enumerate(batches(documents, args.batch, args.seed), 1):
        cosine = 0.51 + 0.49 * math.cos(math.pi * step / args.steps)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(step / warm_up, cosine)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.fast):
            loss = forward(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average = loss.item() if step == 1 else 0.95 * average + 0.05 * loss.item()
        if step % 50 == 0 or step == args.steps:
            left = (time.monotonic() - start) / step * (args.steps - step)
            line = f"step {step}/{args.steps}  loss {average:.3f}  {left / 60:.1f} min left"
            if step % 500 == 0:
                line += f"  validation loss {validation_loss(model, held_out):.3f}"
                save(model, args.output)
            print(line, flush=True)
        if step == args.steps:
            return


def main() -> None:
    """Collect the text, train, save in FP16, then measure and show what was saved."""
    parser = argparse.ArgumentParser(description="Train the example checkpoint.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16, help=f"rows of {CONTEXT} tokens a step")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--fast", action="store_true", help="BF16 and torch.compile, where CPU and compiler allow"
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", SyntaxWarning)  # of the library's own source files

    training, validation = corpus()
    tokenizer = train_tokenizer(training, vocabulary=2048)
    documents = encode(tokenizer, training)
    held_out = windows(encode(tokenizer, validation), 0)
    print(
        f"{len(training)} documents, {sum(map(len, training))} characters, "
        f"{sum(map(len, documents))} tokens; held out: {len(validation)} documents, "
        f"{held_out.numel()} tokens",
        flush=True,
    )

    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model: Model = LlamaForCausalLM(config)
    print(f"{model.num_parameters()} parameters")
    save_tokenizer(tokenizer, args.output)
    train(model, documents, held_out, args)

    save(model, args.output)

    saved: Model = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    loss = validation_loss(saved, held_out)
    print(f"validation: loss {loss:.4f}, perplexity {math.exp(loss):.2f}")
    inputs = AutoTokenizer.from_pretrained(args.output)("The function returns", return_tensors="pt")
    sample = saved.generate(
        inputs["input_ids"], max_new_tokens=80, do_sample=True, temperature=0.7, top_k=40
    )
    print(tokenizer.decode(sample[0].tolist()))


if __name__ == "__main__":
    main()
