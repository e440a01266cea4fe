"""Which method a layer of vLLM gets, by the headers of a packed checkpoint.

vLLM asks with a layer and its path in vLLM's own model, where layers are fused (`qkv_proj`) and
perhaps renamed; the model says how. What is packed and no layer has asked for would be left out or
taken for something else: it is refused.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from ternarize.errors import FormatError, UsageError
from ternarize.files import container
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.headers import DTYPES
from ternarize.files.metadata import KEY, SCALE_SUFFIX, Record
from ternarize.models.places import filled_alone
from ternarize.models.skeleton import skeleton_of
from ternarize.publish.vllm.experts import PackedExpertsMethod
from ternarize.publish.vllm.layers import LayerTensor, PackedLinearMethod, PackedVocabularyMethod
from ternarize.runtime.plugin.prepare import layout_of
from ternarize.sources.checkpoint import locate
from ternarize.sources.packed import check_uncoded, open_packed

_verified: set[Path] = set()  # in this process


@register_quantization_config(KEY)
class VllmConfiguration(QuantizationConfig):  # type: ignore[misc]
    """`quantization_config` of a packed checkpoint, and what its files say of each tensor.

    stored   by the name that vLLM's model knows it by, every tensor but scales
    unasked  names of packed tensors that no layer has asked for
    """

    def __init__(self, table: Mapping[str, Any]) -> None:
        super().__init__()
        self.activations = str(table.get("activations", "none"))
        self.stored: dict[str, LayerTensor] = {}
        self.embedding = ""
        self.tied = False
        self.unasked: set[str] = set()

    @classmethod
    def get_name(cls) -> str:
        return KEY

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "VllmConfiguration":
        return cls(config)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read the headers, and in the first process all bytes: codes, scales and digests.

        Raises FormatError for a damaged checkpoint, UsageError for one stored in streams.
        """
        packed, records = open_packed(locate(model_name, revision))
        check_uncoded(packed, records)
        if packed.directory not in _verified:
            container.check_data(packed, records)
            _verified.add(packed.directory)
        for name, record in records.items():
            info, scale = packed.tensors[name], packed.tensors.get(name + SCALE_SUFFIX)
            dtypes = DTYPES[info.dtype], DTYPES[(scale or info).dtype]
            shape = record.shape or info.shape
            layout = None if record.shape is None else layout_of(record, self.activations)
            if len(shape) > 1:
                self.stored[name] = LayerTensor(name, shape[-2], layout, dtypes)
        text = None if hf_config is None else hf_config.get_text_config()
        self.tied = bool(getattr(text, "tie_word_embeddings", False))
        self.embedding = _embedding(packed, records)
        self.unasked = {name for name, record in records.items() if record.shape is not None}

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Know tensors by the names that a model of vLLM gives them."""
        self.stored = hf_to_vllm_mapper.apply_dict(self.stored)
        names = hf_to_vllm_mapper.apply_list([self.embedding]) if self.embedding else []
        self.embedding = next(iter(names), "")
        self.unasked = set(hf_to_vllm_mapper.apply_list(sorted(self.unasked)))

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        if isinstance(layer, RoutedExperts):
            return self._of_experts(layer, prefix.removesuffix(".routed_experts"))
        if isinstance(layer, VocabParallelEmbedding):
            return self._of_vocabulary(layer, prefix)
        if isinstance(layer, LinearBase):
            check, found = self.check_all_taken, self._packed(self._names(prefix))
            return PackedLinearMethod(check, found) if found else KeptLinearMethod(check)
        return None

    def get_checkpoint_weight_mapper(self) -> Any:
        """What vLLM asks for once all layers are there and before it loads: the time to check."""
        self.check_all_taken()
        return QuantizationConfig.get_checkpoint_weight_mapper()

    def check_all_taken(self) -> None:
        """Raise UsageError where a packed tensor belongs to no layer of vLLM's model."""
        if self.unasked and get_pp_group().world_size == 1:
            name = min(self.unasked)
            raise UsageError(
                name,
                "is packed, but the model of vLLM has no layer that takes packed weights there",
                "a linear layer, experts, or an embedding or head of a model that takes it",
                "Convert the model with --keep for this tensor (--head keep, --embeddings keep), "
                "or serve it with --engine transformers",
            )

    def _names(self, prefix: str) -> list[str]:
        """The tensors of a linear layer, in the order of their rows."""
        if f"{prefix}.weight" in self.stored:
            return [f"{prefix}.weight"]
        path, _, leaf = prefix.rpartition(".")
        leaves = self.packed_modules_mapping.get(leaf, [leaf])
        return [f"{path}.{each}.weight".removeprefix(".") for each in leaves]

    def _packed(self, names: list[str]) -> list[LayerTensor]:
        """What the checkpoint has of these names, or nothing where none of it is packed."""
        found = [self.stored[name] for name in names if name in self.stored]
        packed = [each.name for each in found if each.layout is not None]
        if packed and len(found) < len(names):
            missing = next(name for name in names if name not in self.stored)
            raise FormatError(missing, f"is missing, but {packed[0]} of the same layer is there")
        self.unasked -= set(names)
        return found if packed else []

    def _of_vocabulary(self, layer: Any, prefix: str) -> Any:
        head, check = isinstance(layer, ParallelLMHead), self.check_all_taken
        own = f"{prefix}.weight"
        # the embedding, whose path not every model tells, and to which heads are tied
        found = self._packed([own if own in self.stored else self.embedding])
        if not found:
            return None
        if head and own not in self.stored:
            return PackedVocabularyMethod(check, None, False, True)
        (stored,) = found
        assert stored.layout is not None
        # inputs of ends stay as they are
        whole = replace(stored, layout=replace(stored.layout, activations="none"))
        return PackedVocabularyMethod(check, whole, not head, head or self.tied)

    def _of_experts(self, layer: Any, path: str) -> Any:
        stacks = self._stacks(layer, path)
        if stacks:
            return PackedExpertsMethod(self.check_all_taken, layer, stacks)
        names = dict(_names_of_experts(layer, path))
        found = {key: self.stored[name] for key, name in names.items() if name in self.stored}
        stacked = [name for name in self.stored if name.startswith(f"{path}.") and not found]
        if any(self.stored[name].layout is not None for name in stacked):
            raise UsageError(
                min(stacked),
                "holds all experts in one tensor, in a way that the plug-in does not take apart",
                "a tensor for each expert",
                "Serve it with --engine transformers",
            )
        if all(each.layout is None for each in found.values()):
            return None
        if len(found) < len(names):
            missing = next(name for key, name in names.items() if key not in found)
            raise FormatError(missing, "is missing, but other experts of the same layer are there")
        self.unasked -= set(names.values())
        return PackedExpertsMethod(self.check_all_taken, layer, found)

    def _stacks(self, layer: Any, path: str) -> dict[tuple[int, str], LayerTensor]:
        """Experts that lie in two tensors, of gates and ups and of downs, by (expert, shard).

        vLLM takes them apart, in `RoutedExperts.load_weights`. Nothing where they lie otherwise (in
        columns, say, of which it would cut bytes, or without a gate), or none is packed.
        """
        both = {"gate_proj": "gate_up_proj", "w1": "w13"}.get(layer.ckpt_gate_proj_name)
        if both is None or layer.ckpt_up_proj_name is None:  # without a gate only ups are in one
            return {}
        names = [f"{path}.{both}", f"{path}.{layer.ckpt_down_proj_name}"]
        found = [self.stored[name] for name in names if name in self.stored]
        if all(each.layout is None for each in found) or layer.is_fused_checkpoint_transposed:
            return {}
        if len(found) < len(names):
            missing = next(name for name in names if name not in self.stored)
            there = f"but {found[0].name} of the same layer is there"
            raise FormatError(missing, f"is missing, {there}")
        gate_up, down = found
        if gate_up.layout is not None and gate_up.layout.group_size == 0:
            raise UsageError(
                gate_up.name,
                "has one scale for the gate and the up projection of an expert, which vLLM parts",
                "scales of rows or of groups",
                "Convert the model with --group-size 128, or serve it with --engine transformers",
            )
        self.unasked -= set(names)
        half = replace(gate_up, rows=gate_up.rows // 2)
        shards = {"w1": half, "w3": half, "w2": down}
        experts = range(layer.moe_config.num_logical_experts)
        return {(expert, shard): each for expert in experts for shard, each in shards.items()}


def _names_of_experts(layer: Any, path: str) -> Iterator[tuple[tuple[int, str], str]]:
    """The tensors of a mixture of experts, by (expert, shard)."""
    leaves = {"w1": layer.ckpt_gate_proj_name, "w2": layer.ckpt_down_proj_name}
    leaves["w3"] = layer.ckpt_up_proj_name
    for expert in range(layer.moe_config.num_logical_experts):
        for shard, leaf in leaves.items():
            if leaf is not None:
                yield (expert, shard), f"{path}.{expert}.{leaf}.weight"


def _embedding(packed: Checkpoint, records: Mapping[str, Record]) -> str:
    """The name of the token embedding in the checkpoint; "" where nobody can say."""
    skeleton = skeleton_of(records, packed.config, lambda a, b: False)
    if isinstance(skeleton, str):
        return ""
    alone = filled_alone(skeleton.places)
    family = skeleton.end_family("embeddings")
    return next((alone[each] for each in sorted(family) if each in alone), "")


@register_weight_loader_v2_supported_method
class KeptLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """A linear layer that is not packed: vLLM's own, which asks whether all that is was taken."""

    def __init__(self, check: Callable[[], None]) -> None:
        super().__init__()
        self.check = check

    def process_weights_after_loading(self, layer: Any) -> None:
        self.check()
        super().process_weights_after_loading(layer)
