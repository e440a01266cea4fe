"""vLLM's methods for linear layers, token embeddings and output heads with packed weights.

vLLM makes a layer with empty parameters, brings tensors of the checkpoint to them, each with the
place it has in the layer, and then asks to finish. Ours keep what is brought (`Brought`) until the
layer is complete, and only then make of it what products want.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    ReplicatedLinear,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import BasevLLMParameter

from ternarize.errors import FormatError
from ternarize.publish.vllm.matrices import (
    Matrix,
    columns_of,
    for_products,
    joined,
    layout_of_columns,
    multiplied,
)
from ternarize.runtime.forms import Layout
from ternarize.runtime.products import gather
from ternarize.trits.base3 import BASE3

LEAVES = ("weight", "weight_scale")


@dataclass(frozen=True)
class LayerTensor:
    """A tensor of the checkpoint as a layer will meet it.

    name    in the checkpoint
    rows    of the tensor
    layout  None where it is kept in floating point
    dtypes  of it and of its scales in the file
    """

    name: str
    rows: int
    layout: Layout | None
    dtypes: tuple[torch.dtype, torch.dtype]


class Brought(BasevLLMParameter):  # type: ignore[misc]
    """An empty parameter that keeps what vLLM brings to it, cut to what this process needs.

    shards  by the row of the layer where it begins: which tensor it is of, and the rows
    output_dim  rows: vLLM cuts what is fused in the checkpoint along it
    """

    output_dim = 0

    def __init__(self, data: Tensor, weight_loader: Callable[..., Any]) -> None:
        super().__init__(data=data, weight_loader=weight_loader)
        self.shards: dict[int, tuple[LayerTensor, Tensor]] = {}
        self.stored: LayerTensor | None = None  # that which is being brought

    def keep(self, rows: Tensor, at: int = 0) -> None:
        """Keep rows of the tensor that is being brought; its file is not held open for them."""
        assert self.stored is not None
        self.shards[at] = self.stored, rows.to(self.device, copy=True).contiguous()

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        self.keep(_part(loaded_weight, self.tp_rank, loaded_weight.shape[0] // self.tp_size))

    def load_merged_column_weight(self, loaded_weight: Tensor, **place: Any) -> None:
        rows = _part(loaded_weight, self.tp_rank, place["shard_size"])
        self.keep(rows, place["shard_offset"])

    def load_qkv_weight(self, loaded_weight: Tensor, **place: Any) -> None:
        # keys and values that are fewer than the processes are repeated
        copies = 1 if place["shard_id"] == "q" else place["num_heads"]
        rows = _part(loaded_weight, self.tp_rank // copies, place["shard_size"])
        self.keep(rows, place["shard_offset"])

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        assert self.stored is not None
        layout = self.stored.layout
        if layout is not None:
            layout_of_columns(self.stored.name, layout, self.tp_rank, self.tp_size)
        planes = 1 if layout is None else layout.planes
        self.keep(columns_of(loaded_weight, planes, self.tp_rank, self.tp_size))


def _part(rows: Tensor, part: int, size: int) -> Tensor:
    return rows.narrow(0, part * size, size)


def empty_parameters_of(
    layer: nn.Module, stored: Sequence[LayerTensor], loader: Callable[..., Any]
) -> None:
    """Give a layer parameters that take the tensors it consists of.

    stored  in the order of their rows
    loader  vLLM's for this layer: it calls one of the methods of `Brought`
    """

    def take(parameter: Any, loaded: Tensor, *shard: Any) -> None:
        parameter.stored = found = _meant(layer, stored, *shard)
        layout = found.layout
        if layout is not None and layout.transposed and len(loaded) != found.rows:
            loaded = loaded.T  # the model has turned what its source stores the other way round
        if parameter is layer.weight_scale and len(loaded) == 1:
            loaded = loaded.expand(found.rows, -1)  # one scale for the whole matrix
        if isinstance(layer, ReplicatedLinear):
            parameter.keep(loaded)
        else:
            loader(parameter, loaded, *shard)

    # in the dtypes of the file: vLLM warns of others
    for leaf, dtype in zip(LEAVES, stored[0].dtypes, strict=True):
        empty = torch.empty(0, dtype=dtype)
        layer.register_parameter(leaf, Brought(data=empty, weight_loader=take))


def _meant(layer: Any, stored: Sequence[LayerTensor], shard: Any = None) -> LayerTensor:
    """The tensor of which vLLM brings the rows of a shard."""
    if len(stored) == 1 or shard is None:
        return stored[0]
    if isinstance(shard, str):
        return stored["qkv".index(shard)]
    first, row = shard if isinstance(shard, int) else shard[0], 0
    begin = sum(layer.output_sizes[:first])
    for each in stored:
        if row == begin:
            return each
        row += each.rows
    raise FormatError(stored[0].name, f"no tensor begins at row {begin} of the layer")


def taken(layer: Any, stored: Sequence[LayerTensor]) -> list[Matrix]:
    """The matrices of a layer, in the order of their rows; its empty parameters are taken off.

    Raises FormatError where one was not brought.
    """
    weights, scales = layer.weight.shards, layer.weight_scale.shards
    found = []
    for at in sorted(weights):
        of, packed = weights[at]
        layout, scale = of.layout, None
        if layout is not None:
            if at not in scales:
                raise FormatError(of.name, "its scales are missing")
            scale, cut = scales[at][1], layer.weight.tp_size if _cut_columns(layer) else 1
            layout = layout_of_columns(of.name, layout, layer.weight.tp_rank, cut)
        found.append(Matrix(packed, scale, layout, len(packed)))
    for leaf in LEAVES:
        delattr(layer, leaf)
    expected = sum(layer.output_partition_sizes)
    if sum(each.rows for each in found) != expected and not hasattr(layer, "shard_indices"):
        rows = [each.rows for each in found]
        raise FormatError(stored[0].name, f"rows {rows} were brought to its layer", f"{expected}")
    return found


def _cut_columns(layer: Any) -> bool:
    mine = getattr(layer, "input_size_per_partition", layer.input_size)
    return bool(mine != layer.input_size)


def _shown(layer: Any, matrices: Sequence[Matrix]) -> None:
    """What is multiplied, as parameters of the layer: vLLM counts their memory."""
    layer.matrices = list(matrices)
    for number, each in enumerate(matrices):
        end = str(number or "")
        layer.register_parameter(f"weight{end}", nn.Parameter(each.packed, requires_grad=False))
        if each.scale is not None:
            scale = nn.Parameter(each.scale, requires_grad=False)
            layer.register_parameter(f"weight_scale{end}", scale)


@register_weight_loader_v2_supported_method
class PackedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """A linear layer, of one matrix or of several that vLLM fuses, packed and kept in any mixture.

    check   what is asked once all layers are there: whether all that is packed was taken
    stored  the tensors it consists of, in the order of their rows
    """

    def __init__(self, check: Callable[[], None], stored: Sequence[LayerTensor]) -> None:
        self.check, self.stored = check, stored

    def create_weights(self, layer: Any, *sizes: Any, **others: Any) -> None:
        empty_parameters_of(layer, self.stored, others["weight_loader"])

    def process_weights_after_loading(self, layer: Any) -> None:
        self.check()
        _shown(layer, [for_products(each) for each in joined(taken(layer, self.stored))])

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return multiplied(x, layer.matrices, bias)


class PackedVocabularyMethod(LinearMethodBase):  # type: ignore[misc]
    """A token embedding, an output head, or both in one.

    check   as of `PackedLinearMethod`
    stored  the tensor; None of a head that is to be tied to a packed embedding
    looks   whether rows are looked up
    ends    whether it is multiplied
    """

    def __init__(
        self, check: Callable[[], None], stored: LayerTensor | None, looks: bool, ends: bool
    ) -> None:
        self.check, self.stored, self.looks, self.ends = check, stored, looks, ends

    def create_weights(self, layer: Any, *sizes: Any, **others: Any) -> None:
        def bring(parameter: Any, loaded: Tensor) -> None:
            indices = layer.shard_indices
            begin, end = indices.org_vocab_start_index, indices.org_vocab_end_index
            parameter.keep(loaded[begin:end])

        if self.stored is not None:
            empty_parameters_of(layer, [self.stored], bring)

    def process_weights_after_loading(self, layer: Any) -> None:
        self.check()
        if self.stored is None:
            return
        (matrix,) = taken(layer, [self.stored])
        layout = matrix.layout
        assert layout is not None
        # trits are multiplied in lanes and looked up as they are stored; int8 and int4 need one
        multiplies = [for_products(matrix)] if self.ends else []
        layer.table = matrix if self.looks or layout.codec != BASE3 else None
        _shown(layer, multiplies or [matrix])

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        table = layer.table
        return gather(input_, table.packed, table.scale, table.layout, layer.params_dtype)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = multiplied(x, layer.matrices)
        padding = layer.num_embeddings_per_partition - y.shape[-1]
        y = nn.functional.pad(y, (0, padding)) if padding else y
        return y if bias is None else y + bias

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        """The head of a model whose embedding is its head: the embedding itself."""
        return embed_tokens
