"""A packed checkpoint loaded into a module of torch's that is none of transformers'.

The user builds the module, with memory or on meta. Its linear layers and convolutions whose weights
are packed are replaced by ours, embeddings made ours as they stand, and everything is filled by
name: nothing is renamed, and nothing may be missing.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ternarize.errors import FormatError, UsageError, some
from ternarize.files import container
from ternarize.files.checkpoint import Checkpoint
from ternarize.files.headers import DTYPES, stamp
from ternarize.files.metadata import Record
from ternarize.models.skeleton import is_convolution, is_linear
from ternarize.plans.judge_module import TABLES, holders_of, stored_names
from ternarize.runtime.modules.convolution import TernaryConv2d
from ternarize.runtime.modules.embedding import packed_embedding
from ternarize.runtime.modules.linear import TernaryLinear
from ternarize.runtime.packed import use_lanes
from ternarize.runtime.plugin.prepare import layout_of, packed_sources
from ternarize.sources.packed import open_packed

_Module = TypeVar("_Module", bound=nn.Module)
_REMEDY = "Build the module that was packed, with the same options"


def load_module(
    directory: str | Path, module: _Module, *, activations: str | None = None, verify: bool = True
) -> _Module:
    """Load what `ternarize.pack_module` has written into a module of the same class, in place.

    directory    packed, or a Hub id
    module       built as the one that was packed; on meta, or with weights, which are replaced
    activations  "none" or "int8"; None: as on record
    verify       check every code, padding, scale and SHA-256 before anything is loaded

    Linear layers whose weights are packed become `TernaryLinear`, in every place where the module
    has them (hooks on them are not taken over). Of packed embeddings the rows are dequantized that
    are looked up, to the dtype of what is kept, if that is one, else to the module's own. Tensors
    have the dtypes of the file, and lie on the module's own device, of a module on meta on the CPU.
    Returns the module.

    Raises FormatError where a name or a shape is not the module's, or the file is damaged;
    UsageError where a buffer that is stored nowhere is on meta. The module is then as it was.
    """
    packed, records = open_packed(directory)
    _check_fit(module, packed, records)
    if activations is None:
        activations = (packed.config or {})["quantization_config"].get("activations", "none")
    values = container.read_whole(packed, records, checked=verify)
    tensors = [*module.parameters(), *module.buffers()]
    device = next((t.device for t in tensors if not t.is_meta), torch.device("cpu"))
    for file, before in packed.stamps.items():
        if stamp(packed.directory / file) != before:
            found = "changed while it was loaded"
            raise FormatError(file, found, "a file at rest", "Load it again")
    _insert(module, packed, records, activations)
    _fill(module, values)
    module.to(device)
    use_lanes(module)
    return module


def _check_fit(module: nn.Module, packed: Checkpoint, records: Mapping[str, Record]) -> None:
    """Raise FormatError or UsageError unless the records' tensors are those of the module."""
    kind = type(module).__name__
    state = module.state_dict(keep_vars=True)
    stored = {first: state[first] for first in stored_names(module).values()}
    if lacking := [name for name in stored if name not in records]:
        found = f"lacks {some(lacking)}, which {kind} needs"
        raise FormatError(packed.directory, found, "every tensor of the module", _REMEDY)
    if strange := [name for name in records if name not in stored]:
        found = f"holds {some(strange)}, which {kind} does not have"
        raise FormatError(packed.directory, found, "tensors of the module alone", _REMEDY)
    holders, modules = holders_of(module), dict(module.named_modules(remove_duplicate=False))
    for name, tensor in stored.items():
        record, path = records[name], name.rpartition(".")[0]
        shape = record.shape
        if shape is None:
            shape = packed.tensors[name].shape
        else:
            owner = modules.get(path)
            cls: type = type(owner)
            fits, what = is_linear(cls) or issubclass(cls, TABLES), "linear layer or a table"
            if record.kernel:
                fits, what = owner is not None and is_convolution(owner), "convolution"
            if record.transposed or not path or not fits:
                found = f"is packed, and in {kind} it is of a {cls.__name__}"
                raise FormatError(name, found, f"a weight of a {what}", _REMEDY)
            shape = record.dense_shape
            if holders[id(tensor)] != {id(owner)}:
                found = f"is packed, and in {kind} several modules share it"
                raise FormatError(name, found, "a weight of one module", _REMEDY)
        if shape != tuple(tensor.shape):
            found = f"is {list(shape)}; in {kind} it is {list(tensor.shape)}"
            raise FormatError(name, found, "the same shape", _REMEDY)
    for name, buffer in module.named_buffers():
        if buffer.is_meta and name not in state:
            raise UsageError(
                name,
                f"is a buffer of {kind} on meta that is not in its state dict",
                "one that the class has filled",
                "Build the module with memory, or fill the buffer first",
            )


def _insert(
    module: nn.Module, packed: Checkpoint, records: Mapping[str, Record], activations: str
) -> None:
    """Put an empty packed layer wherever the module has one whose weight is packed."""
    kept = {DTYPES[packed.tensors[n].dtype] for n, each in records.items() if each.shape is None}
    floats = {dtype for dtype in kept if dtype.is_floating_point}
    for name, source in packed_sources(packed, records).items():
        old: Any = module.get_submodule(name.rpartition(".")[0])
        layout = layout_of(source.record, activations)
        if isinstance(old, TABLES):
            layout = replace(layout, activations="none")
            rows = 1 if layout.group_size == 0 else old.num_embeddings
            dtype = next(iter(floats)) if len(floats) == 1 else None
            packed_embedding(old, layout, rows, source.scale_dtype, dtype)
            continue
        new: Any
        if layout.kernel:
            rows = 1 if layout.group_size == 0 else old.out_channels
            new = TernaryConv2d(old, layout, rows, source.scale_dtype, "meta")
        else:
            new = TernaryLinear(
                old.in_features,
                old.out_features,
                old.bias is not None,
                scale_dtype=source.scale_dtype,
                device="meta",
                dtype=old.weight.dtype,
                **layout.options,
            )
        if old.bias is not None:
            new.bias = old.bias
        new.train(old.training)
        for parent in list(module.modules()):
            for leaf, child in parent._modules.items():
                if child is old:
                    setattr(parent, leaf, new)


def _fill(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Give a module the tensors that are stored; names of one tensor stay names of one."""
    names = stored_names(module)
    state = module.state_dict(keep_vars=True)
    filled = {
        first: nn.Parameter(values[first], requires_grad=state[first].requires_grad)
        if isinstance(state[first], nn.Parameter)
        else values[first]
        for first in names.values()
    }
    module.load_state_dict({name: filled[first] for name, first in names.items()}, assign=True)
