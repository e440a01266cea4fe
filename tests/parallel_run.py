"""Run by torchrun in test_load.py: packed models cut into two processes equal the whole ones.

torchrun --nproc-per-node 2 tests/parallel_run.py FOLDER

FOLDER has packed checkpoints: those in RUN are saved again beside themselves, those in REFUSED
cannot be cut.
"""

import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.distributed.configuration_utils import DistributedConfig

import ternarize
from ternarize.errors import UsageError
from ternarize.runtime.plugin.quantizer import TernarizeConfig

RUN = ("plain", "int8_head", "rotated_rows")
REFUSED = {
    "rows_of_one_group": "columns with group_size -1 cannot be cut for 2 processes",
    "rotated": "columns with rotation 64 cannot be cut for 2 processes",
    "int8": "columns with int8 activations cannot be cut for 2 processes",
}


def cut(packed: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        packed,
        dtype=torch.float32,
        distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"),
        **options,
    )


def compare(packed: Path) -> None:
    ids = torch.arange(3, 15)[None]
    model = cut(packed)
    whole: Any = ternarize.load(packed, dtype=torch.float32)
    mlp = model.model.layers[0].mlp
    assert mlp.up_proj.weight.to_local().shape == (64, 14)  # half of the rows
    assert mlp.down_proj.weight.to_local().shape == (64, 14)  # half of the groups of a row
    if packed.name == "int8_head":
        assert model.lm_head.weight.dtype == torch.int8
    for gradients in (True, False):  # transformers works with DTensors or with their parts
        with torch.set_grad_enabled(gradients):
            logits = model(ids).logits
        logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
        assert torch.allclose(logits, whole(ids).logits, atol=1e-5)
    model.save_pretrained(packed.with_name(f"{packed.name}_saved"))


def refused(message: str, packed: Path, **options: Any) -> None:
    try:
        cut(packed, **options)
    except UsageError as error:
        assert message in str(error) and "\n" not in str(error), error
    else:
        raise AssertionError(f"{packed.name}: {message!r} was expected.")


def main(folder: Path) -> None:
    for name in RUN:
        compare(folder / name)
    for name, message in REFUSED.items():
        refused(message, folder / name)
    head = TernarizeConfig(head="int8")
    refused("spread over processes", folder / "plain", quantization_config=head)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
