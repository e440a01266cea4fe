"""Blocks divided among processes, where one does not hold all of a training.

torch's FSDP2 (`fully_shard`) leaves in each process its share of the blocks' weights, gradients
and moments, and has all of a block in memory while that runs. What stands between the blocks (the
embedding, the head) stays whole in each. Gradients of blocks are added up by the library, in an
order of its own: the result is that of one process within rounding.

Source: Zhao et al. 2023, PyTorch FSDP, https://arxiv.org/abs/2304.11277.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ternarize.errors import UsageError, is_no_memory
from ternarize.plans.recipe import Train
from ternarize.ranks import World
from ternarize.train.parallel import Exchange


def check_divided(training: Train, count: int) -> None:
    """Raise UsageError where so many processes cannot have the blocks of a training among them."""
    if not training.shard:
        return
    if count == 1:
        raise UsageError(
            "--shard",
            "one process",
            "several, to have a part each",
            "Start them with torchrun --nproc-per-node N -m ternarize train, or leave it out",
        )
    other = "--optimizer adafactor" if training.optimizer != "adamw" else "--compile"
    if training.optimizer != "adamw" or training.compile:
        raise UsageError("--shard", f"with {other}", "one of the two", f"Leave out {other}")


def shard_blocks(
    models: Sequence[Any], paths: Sequence[str], device: str, exchange: Exchange
) -> None:
    """Divide the blocks of models among the processes, in place; the rest, weights that several
    blocks have among it, goes to the device.

    paths  of the blocks
    """
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise UsageError("--shard", f"torch {torch.__version__}", "2.13 or newer", "Install that")
    if not paths:
        raise UsageError(
            "--shard", "a model without repeated blocks", "blocks to divide", "Leave --shard out"
        )
    kind = torch.device(device).type
    if exchange.place.type != kind:
        raise UsageError(
            "--shard", "processes that share a GPU", "a GPU for each", "Start as many as there are"
        )
    mesh = DeviceMesh.from_group(exchange.group, kind)
    for model in models:
        blocks = [model.get_submodule(path) for path in paths]
        owners = Counter(parameter for block in blocks for parameter in block.parameters())
        shared = {parameter for parameter, count in owners.items() if count > 1}
        for block in blocks:
            fully_shard(block, mesh=mesh, ignored_params=shared)
        rest = {parameter for parameter in model.parameters() if not is_divided(parameter)}
        root: Any = fully_shard(model.base_model, mesh=mesh, ignored_params=rest)
        # what one process did not use would be left out of the sum there, and others get wrong ones
        root.set_reduce_scatter_unused_params(True)
        model.to(device)


def is_divided(tensor: Tensor) -> bool:
    """Whether a process has a part of it alone."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; of a divided one every process has to ask for it."""
    here: Any = tensor.detach()
    found: Tensor = here.full_tensor() if is_divided(here) else here
    return found


@torch.no_grad()
def put(tensor: Tensor, value: Tensor | None) -> None:
    """Put a value into a divided tensor, in all processes.

    value  at the first process, of the whole tensor's shape; None at the others
    """
    from torch.distributed.tensor import distribute_tensor

    divided: Any = tensor
    local = divided.to_local()
    if value is None:
        value = torch.empty(tensor.shape, dtype=tensor.dtype)
    given: Any = distribute_tensor(value.to(local.device), divided.device_mesh, divided.placements)
    local.copy_(given.to_local())


def by_names(
    groups: Iterable[Mapping[str, Any]], parameters: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Groups of an optimizer that have the names of parameters in their place."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in groups]


def regrouped(
    groups: Iterable[Mapping[str, Any]], parameters: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Groups of an optimizer of those of `by_names`: divided parameters and others apart, since
    one operation takes no mixture of them.
    """
    found = list[dict[str, Any]]()
    for group in groups:
        own = [parameters[name] for name in group["params"]]
        for divided in (True, False):
            some = [parameter for parameter in own if is_divided(parameter) == divided]
            if some:
                found.append({**group, "params": some})
    return found


@torch.no_grad()
def clip(parameters: Iterable[Tensor], most: float, world: World) -> None:
    """Scale gradients, some of them divided, to a norm of at most `most` together."""
    divided, others = list[Tensor](), list[Tensor]()
    for parameter in parameters:
        grad: Any = parameter.grad
        if grad is not None:
            (divided if is_divided(grad) else others).append(
                grad.to_local() if is_divided(grad) else grad
            )
    total = math.sqrt(sum(world.all(_squares(divided))) + _squares(others))
    factor = min(1.0, most / (total + 1e-6))
    for grad in (*divided, *others):
        grad.mul_(factor)


def _squares(grads: Iterable[Tensor]) -> float:
    return sum(float(grad.square().sum(dtype=torch.float64)) for grad in grads)


@contextmanager
def watched(world: World) -> Iterator[None]:
    """Inside, where torch itself exchanges what is divided, another process that has ended is a
    RankError."""
    try:
        yield
    except RuntimeError as error:
        if is_no_memory(error) or not _of_exchange(error):
            raise
        with world.others_gone():
            raise


def _of_exchange(error: RuntimeError) -> bool:
    """Whether it is one of torch.distributed, whose errors have no class of their own."""
    known = isinstance(error, dist.DistError)
    return known or any(word in str(error) for word in ("gloo", "NCCL", "onnection"))
