"""What save_pretrained says of the files that it writes."""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.accelerate import load_offloaded_parameter
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ternarize.errors import UsageError
from ternarize.files import container
from ternarize.files.metadata import SCALE_SUFFIX, Record
from ternarize.models.places import locate_tensors
from ternarize.runtime.packed import packed_modules


def saved_records(model: Any, transposed: Mapping[str, bool]) -> dict[str, Record]:
    """The record of each tensor that save_pretrained writes, under the name in the file.

    transposed  packed parameters, and whether their source is
    """
    tensors = _saved_tensors(model)
    layouts = {
        f"{path}.{name}": layout
        for path, module in packed_modules(model).items()
        for name, layout in module.layouts.items()
    }
    records = {}
    for name, place in locate_tensors(model, tensors).items():
        layout = layouts.get(place.targets[0])
        if layout is not None:
            packed, scale = tensors[name], tensors[name + SCALE_SUFFIX]
            if scale.ndim != packed.ndim:
                raise UsageError(
                    name,
                    f"transformers {transformers.__version__} drops a dimension of its scales as "
                    "it saves them",
                    f"{packed.ndim}",
                    "Install transformers >= 5.23, or copy the packed directory",
                )
            records[name] = Record(
                container.digest(packed, scale),
                (*packed.shape[:-1], layout.cols),
                layout.group_size,
                layout.codec,
                transposed[place.targets[0]],
                layout.planes,
                scale8=scale.dtype == torch.uint8,
                rotation=layout.rotation,
                kernel=layout.kernel,
            )
    scales = {name + SCALE_SUFFIX for name in records}
    kept = tensors.keys() - records.keys() - scales
    return records | {name: Record(container.digest(tensors[name])) for name in sorted(kept)}


def _saved_tensors(model: Any) -> dict[str, Tensor]:
    """What save_pretrained writes, by name: it makes the same from the model right after this."""
    state = model.state_dict()
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    state = {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in state.items()
    }
    state = remove_tied_weights_from_state_dict(state, model)
    state = {
        name: load_offloaded_parameter(model, name) if tensor.is_meta else tensor
        for name, tensor in state.items()
    }
    tensors: dict[str, Tensor] = revert_weight_conversion(model, state)
    return tensors
