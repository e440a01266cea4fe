"""Embeddings with a packed weight: only the rows that are looked up are dequantized."""

from typing import Any

import torch
from torch import Tensor, nn

from ternarize.runtime.forms import Layout, dense_weight
from ternarize.runtime.modules.matrix import Mixed, mixed_class
from ternarize.runtime.packed import empty_parameters
from ternarize.runtime.products import gather


class PackedEmbedding(Mixed):
    """An embedding with a packed weight; mixed into the model's own class, of nn.EmbeddingBag too.

    The class's forward runs as it was written: Gemma's multiplies the rows by a constant.

    weight         (num_embeddings, width), weight_scale (scale_rows, groups), as in TernaryLinear
    weight_like    empty, of the dtype that the rows have; it follows model.to(dtype)
    """

    # Its class may have buffers of its own to set; the packed weight says itself that it is set
    _is_hf_initialized = False

    class_prefix = "Packed"
    weight: nn.Parameter
    weight_scale: nn.Parameter
    weight_like: Tensor

    def _for_lanes(self) -> list[str]:
        return []  # rows are looked up in the stored form

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layout, dtype = self.layouts["weight"], self.weight_like.dtype
        dense: Any = self.dense_class
        if dense.forward is nn.Embedding.forward and self.__dict__.get("max_norm") is None:
            (ids,) = (*args, *kwargs.values())
            return gather(ids, self.weight, self.weight_scale, layout, dtype)
        return dense.forward(self.stand_in(dtype), *args, **kwargs)

    def extra_repr(self) -> str:
        layout = self.layouts["weight"]
        dense: Any = self.dense_class
        return f"{dense.extra_repr(self)}, codec={layout.codec}, group_size={layout.group_size}"


def packed_embedding(
    module: nn.Embedding | nn.EmbeddingBag,
    layout: Layout,
    scale_rows: int,
    scale_dtype: torch.dtype,
    dtype: torch.dtype | None = None,
) -> None:
    """Turn an embedding into one with a packed weight, in place, still empty.

    dtype  of the rows that are looked up; None: that of the weight
    """
    dense, shape = module.weight, (module.num_embeddings,)
    stored = empty_parameters(shape, layout, scale_rows, scale_dtype, dense.device)
    embedding: Any = module
    embedding.weight, embedding.weight_scale = stored
    for parameter in stored:
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    # on the CPU even of a model on meta: there is nothing to load, and nothing to move
    like = torch.empty(0, dtype=dtype or dense.dtype, device="cpu")
    module.register_buffer("weight_like", like, persistent=False)
    dense_class: type = type(module)
    embedding.__class__ = mixed_class(PackedEmbedding, dense_class)
    embedding.layouts = {"weight": layout}


def dense_embedding(module: PackedEmbedding, dtype: torch.dtype) -> None:
    """The inverse of `packed_embedding`: a dense weight of `dtype`, in place."""
    layout = module.layouts["weight"]
    dense = dense_weight(module.weight, module.weight_scale, layout, dtype)
    del module.weight_scale, module.weight_like, module.layouts
    module.weight = nn.Parameter(dense)
    module.__class__ = module.dense_class  # type: ignore[assignment]
