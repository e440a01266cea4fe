"""`ternarize bench`."""

from typing import Annotated, Any

from rich.table import Table

from ternarize.cli.options import AsJson, Debug, PackedArgument, RunActivations, RunDtype, RunHead
from ternarize.cli.terminal import print_json, stdout
from ternarize.errors import UsageError


def bench_command(
    model: PackedArgument,
    *,
    prompt: Annotated[int, "Tokens to read at once."] = 128,
    decode: Annotated[int, "Tokens to write, one by one."] = 32,
    batch: Annotated[int, "Prompts at once."] = 1,
    repeats: Annotated[int, "Times to measure; medians are shown."] = 5,
    threads: Annotated[int | None, "Of the CPU; default: those of torch."] = None,
    activations: RunActivations = None,
    head: RunHead = None,
    dtype: RunDtype = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure how fast a packed language model runs on this CPU.

    Also how many bytes of weights a token reads, and which share that is of what a plain loop reads
    from memory in the same time.

    Example: ternarize bench packed
    """
    import torch

    from ternarize.measure.bench import bench
    from ternarize.runtime.load import load

    if threads is not None:
        if not 1 <= threads <= 1024:  # with too many the OpenMP run-time ends the process
            raise UsageError("threads", f"{threads}", "1 to 1024")
        torch.set_num_threads(threads)
    loaded = load(model, dtype=dtype, activations=activations, head=head)
    result = bench(loaded, prompt=prompt, decode=decode, batch=batch, repeats=repeats)
    if as_json:
        print_json({"model": model, "dtype": str(loaded.dtype).removeprefix("torch."), **result})
        return
    out = stdout()
    out.print(_table(result))
    out.print(
        f"{prompt} tokens read, {decode} written, medians of {repeats}, {result['threads']} "
        f"threads, {result['cpu'] or 'torch alone'}"
    )


def _table(result: dict[str, Any]) -> Table:
    table = Table(box=None)
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("prompt", f"{result['prompt_tokens_per_second']:.1f} tokens/s")
    table.add_row("decode", f"{result['decode_tokens_per_second']:.1f} tokens/s")
    table.add_row("weights", f"{result['bytes_per_step'] / 1e6:.1f} MB a step")
    table.add_row("weights read", f"{result['bytes_per_second'] / 1e9:.2f} GB/s")
    if result["bandwidth"] is not None:
        table.add_row("memory", f"{result['bandwidth'] / 1e9:.2f} GB/s")
        table.add_row("share of memory", f"{result['share_of_bandwidth']:.1%}")
    return table
