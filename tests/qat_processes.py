"""What each of two processes does in the tests of distributed training with `ternarize.qat`.

    python -m torch.distributed.run --nproc-per-node 2 tests/qat_processes.py ddp FOLDER

`train_alone` is the same training in one process. Each process has half of every batch.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tiny_models
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ternarize.qat as qat

STEPS, RATE = 4, 1e-3
IDS = torch.randint(3, 160, (STEPS, 4, 12), generator=torch.Generator().manual_seed(0))


def prepared() -> Any:
    model = tiny_models.build("llama_tied", torch.float32)
    return qat.prepare(model, group_size=32, embeddings="ternary").train()


def train(
    model: Any, schedule: qat.Schedule, optimizer: Any, backward: Any, part: slice
) -> list[float]:
    losses = []
    for step, ids in enumerate(IDS):
        schedule.at(step / STEPS)
        loss = model(input_ids=ids[part], labels=ids[part]).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    schedule.at(1)
    return losses


def begun(model: nn.Module) -> tuple[qat.Schedule, torch.optim.Optimizer]:
    """SGD: of Adam's first steps nothing but signs is left, which rounding decides."""
    schedule = qat.Schedule(model, warmup=0.5, zeros=0.6)
    return schedule, torch.optim.SGD(qat.parameter_groups(model, RATE, relative=True), momentum=0.9)


def train_alone() -> Any:
    model = prepared()
    train(model, *begun(model), torch.autograd.backward, slice(None))
    return model


def ddp() -> Any:
    from accelerate import Accelerator  # type: ignore[import-untyped]

    accelerator, model = Accelerator(cpu=True), prepared()
    schedule, optimizer = begun(model)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    assert isinstance(wrapped, nn.parallel.DistributedDataParallel)
    rank = accelerator.process_index
    train(wrapped, schedule, optimizer, accelerator.backward, slice(2 * rank, 2 * rank + 2))
    return wrapped


def fsdp2() -> Any:
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model = prepared()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    part = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    train(model, *begun(model), torch.autograd.backward, part)
    return model


def accelerate_fsdp2() -> Any:
    """As accelerate cuts a model for FSDP2, which it does on accelerators alone."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model  # type: ignore[import-untyped]

    dist.init_process_group("gloo")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=True,
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        device=torch.device("cpu"),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        process_index=dist.get_rank(),
        torch_device_mesh=dist.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("all",)),
        parallelism_config=SimpleNamespace(fsdp_dim_names=("all",)),
    )
    model = fsdp2_prepare_model(accelerator, prepared())
    part = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    train(model, *begun(model), torch.autograd.backward, part)
    return model


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}


def main(kind: str, folder: Path) -> None:
    model = {"ddp": ddp, "fsdp2": fsdp2, "accelerate-fsdp2": accelerate_fsdp2}[kind]()
    inner = model.module if hasattr(model, "module") else model
    state = whole(inner.state_dict())
    record = qat.pack(model, folder / "packed")
    assert bool(record) == (dist.get_rank() == 0)
    torch.save(state, folder / f"state-{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
