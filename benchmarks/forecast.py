"""What `convert --dry-run --parts N --bandwidth GB/s` foretells of models past one machine.

    python benchmarks/forecast.py [--bandwidth 2] [--threads 32] [--counts 1 8 32] [--json FIGURES]

Two mixtures of experts, of 400 B and of 1 T parameters, are planned from configurations alone, in
the form of Qwen3-MoE: of 64 layers with 128 experts, and of 60 with 384, 8 of which a token meets.
Times are of so many threads like one here, in each process; how fast one is is measured once.
"""

import json
import time
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from common import parser, write_figures

from ternarize.convert.forecast import forecast, pace_of
from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import Calibrate, Recipe

MODELS: dict[str, dict[str, Any]] = {
    "400 B": {
        "hidden_size": 6144,
        "moe_intermediate_size": 2560,
        "num_hidden_layers": 64,
        "num_experts": 128,
    },
    "1 T": {
        "hidden_size": 7168,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 60,
        "num_experts": 384,
    },
}
BOTH: dict[str, Any] = {
    "num_experts_per_tok": 8,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "architectures": ["Qwen3MoeForCausalLM"],
}
RECIPES = {"gptq": Recipe("gptq", calibrate=Calibrate()), "itf": Recipe("itf")}


def in_time(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds > 60 else f"{seconds:.1f} s"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--bandwidth", type=float, default=2.0)
    arguments.add_argument("--threads", type=int, default=32)
    arguments.add_argument("--counts", type=int, nargs="+", default=[1, 8, 32])
    options = arguments.parse_args()
    figures: dict[str, Any] = {}
    paces: dict[str, float] = {}  # measured once, so that rows differ in what they are of
    titles = ["model, method", "processes", "reads", "writes", "memory", "of which sums", "sends"]
    print("|", " | ".join([*titles, "processors", "transfers"]), "|")
    print("|---" * 9 + "|")
    for model, sizes in MODELS.items():
        for method, recipe in RECIPES.items():
            with TemporaryDirectory() as folder:
                transformers.Qwen3MoeConfig(**sizes, **BOTH).save_pretrained(folder)
                began = time.perf_counter()
                plan = make_plan(folder, recipe, config_only=True)
            planned = time.perf_counter() - began
            total = sum(t.info.numel for t in plan.tensors)
            if method not in paces:
                paces[method] = pace_of(plan)
            for count in options.counts:
                bandwidth = 1e9 * options.bandwidth
                how: dict[str, Any] = {"bandwidth": bandwidth, "threads": options.threads}
                found = forecast(plan, count, pace=paces[method], **how)
                most = {k: max(row[k] for row in found["ranks"]) for k in found["ranks"][0]}
                figures[f"{model} {method} {count}"] = {**most, "planned_seconds": planned}
                sizes_in_gb = [
                    f"{most[f'{kind}_bytes'] / 1e9:,.1f} GB"
                    for kind in ("read", "written", "memory", "sums", "sent")
                ]
                times = [in_time(most[f"{kind}_seconds"]) for kind in ("processor", "transfer")]
                cells = [f"{model} ({total / 1e9:,.0f} B), {method}", str(count), *sizes_in_gb]
                print("|", " | ".join([*cells, *times]), "|")
    print(json.dumps({name: each["planned_seconds"] for name, each in figures.items()}))
    write_figures(options.json, __file__, figures)


if __name__ == "__main__":
    main()
