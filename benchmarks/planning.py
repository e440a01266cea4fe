"""The plan of very large models, from their configuration alone.

    python benchmarks/planning.py WORK_DIRECTORY [--json F]

Writes the full-size config.json of two mixtures of experts (shapes of DeepSeek-V3, 671 B, and of
gpt-oss, 117 B) and times make_plan() on each, in a process that has imported transformers.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import transformers

from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import Recipe

CONFIGS = {
    "DeepSeek-V3": transformers.DeepseekV3Config(architectures=["DeepseekV3ForCausalLM"]),
    "gpt-oss-120b": transformers.GptOssConfig(
        num_hidden_layers=36, num_local_experts=128, architectures=["GptOssForCausalLM"]
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    print("| model | parameters | tensors | packed, GB | seconds | peak memory, MB |")
    print("|---|---|---|---|---|---|")
    for name, config in CONFIGS.items():
        directory = options.work / name
        config.save_pretrained(directory)
        start = time.perf_counter()
        work = make_plan(directory, Recipe(), config_only=True)
        packed, coverage = work.packed_bytes(), work.coverage()
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        results[name] = {"seconds": seconds, "packed_bytes": packed, **coverage}
        print(
            f"| {name} | {coverage['total'] / 1e9:.0f} B | {len(work.tensors)} | "
            f"{packed / 1e9:.0f} | {seconds:.1f} | {peak:.0f} |"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
