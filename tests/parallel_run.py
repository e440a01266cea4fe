"""Run by torchrun in test_load.py: a packed model cut into two processes equals the whole one.

torchrun --nproc-per-node 2 tests/parallel_run.py PACKED SAVED
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.distributed.configuration_utils import DistributedConfig

import ternarize


def main(packed: Path, saved: Path) -> None:
    ids = torch.arange(3, 15)[None]
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        packed,
        dtype=torch.float32,
        distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"),
    )
    whole: Any = ternarize.load(packed, dtype=torch.float32)
    mlp = model.model.layers[0].mlp
    assert mlp.up_proj.weight.to_local().shape == (64, 14)  # half of the rows
    assert mlp.down_proj.weight.to_local().shape == (64, 14)  # half of the groups of a row
    for gradients in (True, False):  # transformers works with DTensors or with their parts
        with torch.set_grad_enabled(gradients):
            logits = model(ids).logits
        logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
        assert torch.allclose(logits, whole(ids).logits, atol=1e-5)
    model.save_pretrained(saved)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
