"""Train the example checkpoint to be ternary with transformers' Trainer, and pack it.

    python examples/qat.py --output build/qat

The text is the help of the Python that runs it, which the checkpoint was trained on, too; the
perplexity is that of examples/eval.txt. Needs the extra `train` (accelerate), and 40 seconds of one
core.
"""

import argparse
import math
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import ternarize
import ternarize.qat as qat

HERE = Path(__file__).parent
WINDOW = 128  # tokens


def windows(tokenizer: Any, text: str) -> torch.Tensor:
    """The tokens of a text, (windows, WINDOW)."""
    ids: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids[0]
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


@torch.no_grad()
def perplexity(model: Any, tokens: torch.Tensor) -> float:
    """exp of the mean loss of a next token."""
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) for part in torch.split(tokens, 1)]
    return math.exp(sum(losses) / len(losses))


def main(source: Path, output: Path, steps: int) -> None:
    """Prepare, train, pack, and print the perplexity of each."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    held_out = windows(tokenizer, (HERE / "eval.txt").read_text("utf-8"))
    print(f"dense: perplexity {perplexity(model, held_out):.1f}")
    qat.prepare(model, group_size=128)
    print(f"rounded: perplexity {perplexity(model, held_out):.1f}")
    arguments = TrainingArguments(
        output_dir=f"{output}-runs",
        max_steps=steps,
        per_device_train_batch_size=8,
        warmup_steps=5,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[
            {"input_ids": each, "labels": each}
            for each in windows(tokenizer, "\n\n".join(topics.values()))
        ],
        callbacks=[qat.Schedule(model)],
        optimizers=(torch.optim.AdamW(qat.parameter_groups(model, 0.01, relative=True)), None),
    )
    trainer.train()
    print(f"trained: perplexity {perplexity(model, held_out):.1f}")
    qat.pack(model, output, tokenizer=tokenizer)
    packed = perplexity(ternarize.load(output), held_out)
    size = (output / "model.safetensors").stat().st_size
    print(f"packed: perplexity {packed:.1f}, {size} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", type=Path, default=HERE / "tiny-llama")
    parser.add_argument("--output", type=Path, required=True, help="must not exist yet")
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    main(given.source, given.output, given.steps)
