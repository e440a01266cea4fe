"""How fast a packed language model runs here, and how near it comes to the speed of memory.

To give one token a model reads all of its weights once, whatever the CPU could compute meanwhile.
So the bytes that a token needs, over the time that it takes, are compared with the bytes per second
that a plain loop reads on the same machine with the same threads.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ternarize.errors import UsageError
from ternarize.models.reads import max_positions
from ternarize.native import lib
from ternarize.plans.recipe import MAX_COUNT
from ternarize.runtime import kernels
from ternarize.runtime.decode import Decoder, cache_of, can_decode
from ternarize.runtime.generate import check_continues
from ternarize.runtime.modules.embedding import PackedEmbedding
from ternarize.runtime.modules.experts import TernaryExperts

READ_BYTES = 1 << 28  # of the loop that measures memory: more than caches hold


def bench(
    model: Any, *, prompt: int = 128, decode: int = 32, batch: int = 1, repeats: int = 5
) -> dict[str, Any]:
    """Measure a causal language model of transformers, packed or not, on the CPU.

    prompt   tokens read at once
    decode   tokens that follow, each from the one before
    batch    prompts at once; tokens per second are those of all
    repeats  of everything, after one more that is not counted

    Returns medians over the repeats:

        prompt_tokens_per_second, decode_tokens_per_second
        bytes_per_step         of weights that one decoded token of each prompt reads, as
                               `bytes_per_step` counts
        bytes_per_second       of weights, while decoding
        bandwidth              bytes per second of a plain read loop; None without the compiled core
        share_of_bandwidth     the last but one over the last
        threads, cpu, form     of the products; None without the compiled core

    Raises UsageError when the model is not on the CPU or does not continue a text, or a number is
    out of range.
    """
    numbers = {"prompt": prompt, "decode": decode, "batch": batch, "repeats": repeats}
    for name, value in numbers.items():
        if not 1 <= value <= MAX_COUNT:
            raise UsageError(name, f"{value}", f"1 to {MAX_COUNT}")
    check_continues(model)
    if model.device.type != "cpu":
        raise UsageError("device", f"{model.device}", "cpu", "Load the model there")
    context = max_positions(model.config)
    if prompt + decode > context:
        raise UsageError(
            "prompt",
            f"{prompt} tokens and {decode} to decode",
            f"at most the model's context of {context} together",
            "Ask for fewer",
        )
    times = [run(model, prompt, decode, batch) for _ in range(repeats + 1)][1:]
    prompt_seconds, decode_seconds = (statistics.median(t) for t in zip(*times, strict=True))
    weights = bytes_per_step(model, batch)
    rate = weights * decode / decode_seconds
    bandwidth = read_bandwidth(repeats)
    return {
        **numbers,
        "threads": torch.get_num_threads(),
        "cpu": None if lib is None else lib.cpu(),
        "form": None if lib is None else kernels.best_form(),
        "prompt_tokens_per_second": batch * prompt / prompt_seconds,
        "decode_tokens_per_second": batch * decode / decode_seconds,
        "bytes_per_step": weights,
        "bytes_per_second": rate,
        "bandwidth": bandwidth,
        "share_of_bandwidth": None if bandwidth is None else rate / bandwidth,
    }


def run(model: Any, prompt: int, decode: int, batch: int = 1) -> tuple[float, float]:
    """Seconds for `batch` prompts, and for the tokens that follow them; arguments as in `bench`.

    As `ternarize generate` does it: by runtime.decode where it can, else by the model's forward.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        began = time.perf_counter()
        if can_decode(model, prompt + decode):
            decoder = Decoder(model, ids, prompt + decode)
            read = time.perf_counter()
            for _ in range(decode):
                decoder.step(decoder.logits.argmax(-1))
        else:
            out = model(ids, use_cache=True, logits_to_keep=1)
            if not cache_of(out):
                raise UsageError(
                    type(model).__name__,
                    "keeps no keys and values from token to token",
                    "a model that does",
                    "Measure another",
                )
            read = time.perf_counter()
            for _ in range(decode):
                token = out.logits[:, -1].argmax(-1, keepdim=True)
                out = model(token, use_cache=True, **cache_of(out))
        done = time.perf_counter()
    return read - began, done - read


def bytes_per_step(model: nn.Module, batch: int = 1) -> int:
    """Bytes of weights, as they are held in memory, that one token of each of `batch` texts reads.

    Every parameter once; of a token embedding that nothing else uses, a row for each text; of
    experts, as many as the model's config says that a token meets, for each text as if none met
    another's, and all at most (all, where it does not say).
    """
    config: Any = model.config
    meets = getattr(config.get_text_config(), "num_experts_per_tok", None)
    shares: dict[int, float] = {}
    sizes: dict[int, int] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            share = 1.0
            if isinstance(module, nn.Embedding) and (
                not isinstance(module, PackedEmbedding) or name.startswith("weight")
            ):
                share = min(1.0, batch / max(1, module.num_embeddings))
            elif (
                isinstance(module, TernaryExperts) and name.removesuffix("_scale") in module.layouts
            ):
                share = 1.0 if meets is None else min(1.0, batch * meets / len(parameter))
            key = id(parameter)
            shares[key] = max(share, shares.get(key, 0.0))
            sizes[key] = parameter.numel() * parameter.element_size()
    return round(sum(size * shares[key] for key, size in sizes.items()))


def read_bandwidth(repeats: int = 5) -> float | None:
    """Bytes per second that the compiled core reads from memory; the median. None without it."""
    if lib is None:
        return None
    memory = torch.ones(READ_BYTES, dtype=torch.uint8)
    read_all: Callable[[torch.Tensor, int], int] = lib.read_all
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        read_all(memory, torch.get_num_threads())
        seconds.append(time.perf_counter() - began)
    return READ_BYTES / statistics.median(seconds[1:])
