"""Speed of a packed model on the CPU, beside torch with the same model in BF16.

    python benchmarks/inference.py --threads 2 --json inference.json

A LLaMA-shaped model of 1 B parameters (16 layers of synthetic.py) with random weights, in groups of
128, with inputs rounded to 8 bits and not. The runs of all models take turns, so that noise of the
machine meets all of them.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import common
import synthetic
import torch
import transformers

import ternarize
from ternarize.bench import bytes_per_step, read_bandwidth, run
from ternarize.convert import convert
from ternarize.plan import Recipe


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    common.hide_bars()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        source, packed = Path(folder) / "source", Path(folder) / "packed"
        synthetic.write_llama(source, args.layers)
        convert(source, packed, Recipe(method="absmean"))
        models: dict[str, Any] = {
            "packed, int8 activations": ternarize.load(packed, activations="int8"),
            "packed": ternarize.load(packed),
            "torch bf16": transformers.AutoModelForCausalLM.from_pretrained(source),
        }
        figures = _measure(models, args.prompt, args.decode, args.batch, args.repeats)
    bandwidth = read_bandwidth(args.repeats)
    memory = "not measured" if bandwidth is None else f"{bandwidth / 1e9:.2f} GB/s"
    print(f"{args.threads} threads, memory {memory}")
    print(f"{'':26}{'prompt':>10}{'decode':>10} tokens/s{'weights':>10} GB/s")
    for name, each in figures.items():
        print(
            f"{name:26}{each['prompt']:10.2f}{each['decode']:10.2f}"
            f"{each['bytes_per_second'] / 1e9:19.2f}"
        )
    options = {key: value for key, value in vars(args).items() if key != "json"}
    common.write_figures(
        args.json, __file__, {"options": options, "bandwidth": bandwidth, "models": figures}
    )


def _measure(
    models: dict[str, Any], prompt: int, decode: int, batch: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Tokens per second of each model, medians; the first run of each is not counted."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(repeats + 1):
        for name, model in models.items():
            times[name].append(run(model, prompt, decode, batch))
    figures = {}
    for name, model in models.items():
        seconds = [statistics.median(t) for t in zip(*times[name][1:], strict=True)]
        figures[name] = {
            "prompt": batch * prompt / seconds[0],
            "decode": batch * decode / seconds[1],
            "bytes_per_second": bytes_per_step(model, batch) * decode / seconds[1],
        }
    return figures


if __name__ == "__main__":
    main()
