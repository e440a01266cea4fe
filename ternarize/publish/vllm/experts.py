"""vLLM's method for a mixture of experts with packed weights: the experts that are hit, one by one.

Each expert is three matrices (gate w1, up w3, down w2), which may be packed in ways of their own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from ternarize.errors import FormatError, UsageError
from ternarize.publish.vllm.layers import LEAVES, Brought, LayerTensor
from ternarize.publish.vllm.matrices import (
    Matrix,
    columns_of,
    for_products,
    joined,
    layout_of_columns,
    multiplied,
)

_ACTIVATIONS: dict[Any, Callable[[Tensor], Tensor]] = {
    MoEActivation.SILU: F.silu,
    MoEActivation.GELU: F.gelu,
    MoEActivation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
}
_HALVES = {"w13": ("w1", "w3"), "w2": ("w2",)}


class PackedExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """Experts whose matrices are packed.

    check   as of `PackedLinearMethod`
    stored  by (expert, "w1", "w2" or "w3"): the tensor of the checkpoint
    """

    def __init__(
        self, check: Callable[[], None], layer: Any, stored: Mapping[tuple[int, str], LayerTensor]
    ) -> None:
        super().__init__(layer.moe_config)
        self.check, self.stored = check, stored
        self.brought: dict[tuple[int, str, str], Tensor] = {}  # by expert, matrix and leaf
        activation = layer.activation
        bias = getattr(layer.moe_config, "has_bias", False)
        found = "biases" if bias else f"the activation {activation.value}"
        if bias or activation not in _ACTIVATIONS:
            known = ", ".join(each.value for each in _ACTIVATIONS)
            raise UsageError(layer.layer_name, f"has {found}", f"experts without, of {known}")
        self.activation = _ACTIVATIONS[activation]

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def create_weights(self, layer: Any, *sizes: Any, **others: Any) -> None:
        self.layer_name = layer.layer_name
        dtypes = next(iter(self.stored.values())).dtypes
        for name in _HALVES:
            for leaf, dtype in zip(LEAVES, dtypes, strict=True):
                take, empty = self._taker(layer, leaf), torch.empty(0, dtype=dtype)
                brought = Brought(data=empty, weight_loader=take)
                layer.register_parameter(f"{name}_{leaf}", brought)

    def _taker(self, layer: Any, leaf: str) -> Callable[..., bool]:
        def take(
            param: Any,
            loaded_weight: Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool:
            local = layer._map_global_expert_id_to_local_expert_id(expert_id)
            if local != -1:
                of = self.stored[expert_id, shard_id]
                _check_brought(of, loaded_weight, leaf)
                part = self._part(layer, of, loaded_weight, shard_id)
                kept = part.to(param.device, copy=True).contiguous()
                self.brought[local, shard_id, leaf] = kept
            return bool(local != -1)

        return take

    def _part(self, layer: Any, of: LayerTensor, loaded: Tensor, shard_id: str) -> Tensor:
        """What this process needs of a tensor: rows of w1 and w3, columns of w2."""
        parallel = layer.moe_config.moe_parallel_config
        part, parts = parallel.tp_rank, parallel.tp_size
        if len(loaded) == 1 != of.rows:
            loaded = loaded.expand(of.rows, -1)
        if shard_id != "w2":
            size = len(loaded) // parts
            return loaded.narrow(0, part * size, size)
        if of.layout is not None:
            layout_of_columns(of.name, of.layout, part, parts)
        return columns_of(loaded, 1 if of.layout is None else of.layout.planes, part, parts)

    def process_weights_after_loading(self, layer: Any) -> None:
        self.check()
        parallel = layer.moe_config.moe_parallel_config
        local = {layer._map_global_expert_id_to_local_expert_id(e): e for e, _ in self.stored}
        experts = []
        for mine in sorted(local.keys() - {-1}):
            halves = {}
            for name, shards in _HALVES.items():
                found = [self._matrix(parallel, mine, local[mine], shard) for shard in shards]
                halves[name] = [for_products(each) for each in joined(found)]
            experts.append(halves)
        self.experts: list[dict[str, list[Matrix]]] = experts
        for name in _HALVES:
            for leaf in LEAVES:
                delattr(layer, f"{name}_{leaf}")
        assert not self.brought, "an expert that no process has"

    def _matrix(self, parallel: Any, mine: int, expert: int, shard: str) -> Matrix:
        of = self.stored[expert, shard]
        if (mine, shard, "weight") not in self.brought:
            raise FormatError(of.name, "was not loaded")
        packed = self.brought.pop((mine, shard, "weight"))
        layout, scale = of.layout, self.brought.pop((mine, shard, "weight_scale"), None)
        if layout is not None:
            if scale is None:
                raise FormatError(of.name, "its scales are missing")
            parts = parallel.tp_size if shard == "w2" else 1
            layout = layout_of_columns(of.name, layout, parallel.tp_rank, parts)
        return Matrix(packed, scale, layout, len(packed))

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Any = None,
    ) -> Tensor:
        """sum over a token's experts of weight * down(act(gate x) * up x), in float32."""
        ids, early = topk_ids, layer.apply_router_weight_on_input
        if layer.expert_map is not None:
            ids = layer.expert_map[topk_ids.long()]  # -1: in another process
        y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in torch.unique(ids).tolist():
            if expert >= 0:
                tokens, place = (ids == expert).nonzero(as_tuple=True)
                weight = topk_weights[tokens, place, None]
                inputs = x[tokens] * weight.to(x.dtype) if early else x[tokens]
                found = self._expert(inputs, self.experts[expert]).to(torch.float32)
                y.index_add_(0, tokens, found if early else found * weight.to(torch.float32))
        return y.to(x.dtype)

    def _expert(self, x: Tensor, halves: Mapping[str, list[Matrix]]) -> Tensor:
        gate, up = multiplied(x, halves["w13"]).chunk(2, -1)
        return multiplied(self.activation(gate) * up, halves["w2"])


def _check_brought(of: LayerTensor, found: Tensor, leaf: str) -> None:
    """Raise UsageError where vLLM's model brings a packed matrix otherwise than it is stored."""
    if of.layout is None:
        return
    weight = leaf == "weight"
    row = of.layout.width() if weight else found.shape[-1]
    rows = {of.rows} if weight else {of.rows, 1}
    if found.dim() != 2 or len(found) not in rows or found.shape[-1] != row:
        raise UsageError(
            of.name,
            f"is brought by the model of vLLM as {list(found.shape)}",
            f"{[of.rows, row]} for each expert, as it is packed",
            "Serve it with --engine transformers",
        )
