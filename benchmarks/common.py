"""What benchmarks have in common: their arguments, timed conversions, the file of their figures."""

import argparse
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import ternarize
from ternarize.convert.run import convert
from ternarize.measure.report import inspect
from ternarize.plans.recipe import Recipe


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Arguments of a script, told by the first line of its docstring, with --json among them."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    made.add_argument("--json", type=Path, help="write all figures to this file")
    return made


def hide_bars() -> None:
    """No progress bars of transformers between our lines."""
    logging: Any = transformers.utils.logging  # has no annotations
    logging.disable_progress_bar()


def timed_convert(source: Path, output: Path, recipe: Recipe) -> dict[str, float]:
    """Convert, and return the bits per ternary weight ("bpw") and the "seconds" that it took."""
    began = time.perf_counter()
    convert(source, output, recipe)
    seconds = time.perf_counter() - began
    return {"bpw": inspect(output)["totals"]["ternary_bpw"], "seconds": seconds}


def save_llama(
    folder: Path, *, words: int, hidden: int, inner: int, layers: int, keys: int, length: int
) -> None:
    """A LLaMA of random weights in BF16, the same each time; heads of 64, `keys` wide for keys."""
    config = transformers.LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=keys // 64,
        max_position_embeddings=length,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config)  # whose `to` is annotated for other things
    model.to(torch.bfloat16).save_pretrained(folder)


def write_figures(path: Path | None, script: str, figures: dict[str, Any]) -> None:
    """Write figures as JSON with the name of the script and the versions of what it measured.

    path    None: nowhere, as nothing was asked for
    script  its `__file__`
    """
    if path is None:
        return
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    versions["ternarize"] = ternarize.__version__
    table = {"benchmark": Path(script).stem, "versions": versions, **figures}
    path.write_text(json.dumps(table, indent=1) + "\n")
