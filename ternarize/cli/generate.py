"""`ternarize generate`."""

from dataclasses import asdict
from typing import Annotated

from ternarize.cli.options import (
    AsJson,
    Debug,
    Device,
    PackedArgument,
    Quiet,
    RunActivations,
    RunDtype,
    RunHead,
    RunSteps,
    SamplingSeed,
    Temperature,
    TopK,
    TopP,
)
from ternarize.cli.terminal import advise, print_json


def generate_command(
    model: PackedArgument,
    *,
    prompt: Annotated[str, "Text to continue."] = "",
    max_new_tokens: Annotated[
        int | None, "Stop after these; default: 128, or the room there is."
    ] = None,
    temperature: Temperature = 0.0,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: SamplingSeed = None,
    chat: Annotated[bool, "Put the prompt into the chat template."] = False,
    activations: RunActivations = None,
    head: RunHead = None,
    steps: RunSteps = None,
    device: Device = None,
    dtype: RunDtype = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Continue a text with a packed language model, printed as it comes.

    Example: ternarize generate packed --prompt "The function returns" --max-new-tokens 40
    """
    from ternarize.models.reads import open_tokenizer
    from ternarize.runtime.generate import generate
    from ternarize.runtime.load import load
    from ternarize.sources.checkpoint import locate

    directory = locate(model)
    tokenizer = open_tokenizer(directory)
    loaded = load(
        directory, device=device, dtype=dtype, activations=activations, head=head, steps=steps
    )

    def stream(piece: str) -> None:
        print(piece, end="", flush=True)

    if not as_json:
        stream(prompt)
    result = generate(
        loaded,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        chat=chat,
        stream=None if as_json else stream,
    )
    if as_json:
        numbers = {**asdict(result), "tokens_per_second": round(result.tokens_per_second, 3)}
        print_json({"model": model, "prompt": prompt, **numbers})
        return
    print()
    if not quiet:
        advise(f"{result.new_tokens} tokens, {result.tokens_per_second:.1f} per second")
