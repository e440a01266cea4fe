"""Running a model block by block, with one block's weights in memory.

The model's own forward runs, once for every batch of the calibration set, and pauses wherever it
is about to run one of its repeated blocks. When all batches wait at the same block, that block's
weights are loaded, whatever is to be done with it is done, each batch gets its output, and the
weights are dropped again.

A paused forward is a thread that waits: its local variables (masks, rotary embeddings, position
biases, the encoder's output) stay what the model's code made them, so nothing here knows what
blocks of a certain model take or give, which of them differ, or in what order they run. Only one
thread runs at a time, and blocks run in the thread of the caller.

Weights outside the blocks (embeddings, norms, the output head) are loaded when the model's code
looks at them and dropped when all batches wait.
"""

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.initialization import no_init_weights
from transformers.modeling_utils import LoadStateDictConfig

from ternarize.errors import CheckpointError, WeightError
from ternarize.files.checkpoint import Checkpoint
from ternarize.models.configuration import config_from, in_one_line
from ternarize.models.places import locate_tensors, ties
from ternarize.progress import without_bars
from ternarize.threads import signals_held

Batch = dict[str, Tensor]


class _Stop(BaseException):
    """Ends a paused forward; not an Exception, which a model's code might catch."""


@dataclass
class Call:
    """A forward that waits at a block: what the block is called with."""

    block: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Forward:
    """One forward of the model on one batch, that can be paused at every block."""

    current = threading.local()

    def __init__(self, model: nn.Module, batch: Batch, where: object = "the model") -> None:
        self._replies: SimpleQueue[Any] = SimpleQueue()
        self._events: SimpleQueue[Any] = SimpleQueue()
        self._model, self._batch, self._where = model, batch, where
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._started = False

    def resume(self, reply: Any = None) -> Any:
        """Run on with the block's output; returns the next Call, or the model's output.

        Raises CheckpointError where the model's code fails, and TernarizeErrors of what it reads.
        """
        if self._started:
            self._replies.put(reply)
        else:
            self._started = True
            with signals_held():
                self._thread.start()
        event = self._events.get()
        if isinstance(event, BaseException):
            self._thread.join()
            with code_of_the_model(self._where):
                raise event
        return event

    def stop(self) -> None:
        """End a paused forward."""
        if self._started and self._thread.is_alive():
            self._replies.put(_Stop())
            self._thread.join()

    def pause(self, call: Call) -> Any:
        """Wait for the block's output, in the forward's own thread, where the block would run."""
        self._events.put(call)
        reply = self._replies.get()
        if isinstance(reply, _Stop):
            raise reply
        return reply

    def _run(self) -> None:
        Forward.current.forward = self
        try:
            with torch.no_grad():
                self._events.put(self._model(**self._batch))
        except _Stop:
            return
        except BaseException as error:  # goes on in the caller's thread
            self._events.put(error)


def code_of_the_model(where: object) -> AbstractContextManager[None]:
    """Inside, a model's forward runs on the calibration data."""
    return in_one_line(
        where,
        "its forward fails on the calibration data",
        "it to run",
        "Check that the data fit the model, or convert it without --dataset",
        OSError,
    )


class _Parameters(dict[str, Any]):
    """A module's parameters, which come from the source when a model's forward looks at them.

    What looks may be a call of the module, or a line that asks for `embedding.weight.device`, which
    with an empty weight would send the model's input to nowhere.
    """

    def __init__(self, held: Mapping[str, Any], load: Callable[[str], None]) -> None:
        super().__init__(held)
        self._load = load

    def __getitem__(self, leaf: str) -> Any:
        self._need(leaf)
        return super().__getitem__(leaf)

    def items(self) -> Any:
        for leaf in self:
            self._need(leaf)
        return super().items()

    def _need(self, leaf: str) -> None:
        value = self.get(leaf)
        if value is not None and value.is_meta and getattr(Forward.current, "forward", None):
            self._load(leaf)


class Blocks:
    """The skeleton of a model and the means to fill parts of it with the source's weights.

    source   checkpoint with float weights
    tensors  names of tensors of the source; the blocks are those that hold one of them
    device   where blocks run; what is between them runs on the CPU
    """

    def __init__(self, source: Checkpoint, tensors: Sequence[str], device: str = "cpu") -> None:
        assert source.config is not None
        self.source, self.device = source, torch.device(device)
        self.model = skeleton(source.config)
        self.mapping = get_model_conversion_mapping(self.model)
        self.places = locate_tensors(self.model, source.tensors)
        self.tied = ties(self.model.all_tied_weights_keys, self.places, source.equal)
        self.paths = _block_paths(
            self.model, [p for name in tensors for p in self.places[name].parameters]
        )
        for path in self.paths:
            self._make_pause(path)
        self._buffers = {name for name, _ in self.model.named_buffers()}
        self._fill([n for p in self.places.values() for n in p.parameters if n in self._buffers])
        self._outside: set[str] = set()  # modules that forwards have looked at
        self._filling = False
        for name, module in self.model.named_modules():
            if module._parameters:
                self._fill_when_needed(name, module)

    def _make_pause(self, path: str) -> None:
        block: Any = self.model.get_submodule(path)

        def pause(*args: Any, **kwargs: Any) -> Any:
            forward = getattr(Forward.current, "forward", None)
            if forward is None:  # run by `run` below, not by a model's forward
                return type(block).forward(block, *args, **kwargs)
            return forward.pause(Call(path, args, kwargs))

        block.forward = pause

    def _fill_when_needed(self, name: str, module: nn.Module) -> None:
        def load(leaf: str) -> None:
            if not self._filling:
                parameter = f"{name}.{leaf}" if name else leaf
                owner = self.tied.get(parameter, parameter).rpartition(".")[0]
                self._outside |= {name, owner}
                self._fill([parameter])

        module._parameters = _Parameters(module._parameters, load)

    def start(self, batch: Batch) -> Forward:
        """A forward of a batch, not yet begun; several of them can wait beside each other."""
        return Forward(self.model, batch, self.source.directory)

    def run(self, call: Call) -> Any:
        """What the loaded block gives for a call, computed on the device, returned on the CPU."""
        block = self.model.get_submodule(call.block)
        args, kwargs = self.on_device((call.args, call.kwargs))
        with code_of_the_model(self.source.directory):
            output = block(*args, **kwargs)
        return map_tensors(output, lambda tensor: tensor.cpu())

    def on_device(self, value: Any) -> Any:
        """The tensors of a call's arguments, moved to where blocks run."""
        return map_tensors(value, lambda tensor: tensor.to(self.device))

    @contextmanager
    def loaded(self, path: str) -> Iterator[nn.Module]:
        """The block with its source's weights in float32, on the device, while the context lasts.

        Weights outside the blocks, which no forward needs while all of them wait, are dropped.
        """
        for name in self._outside:
            _drop_weights(self.model.get_submodule(name))
        self._outside.clear()
        block = self.model.get_submodule(path)
        self._fill([f"{path}.{name}" for name, _ in block.named_parameters()])
        block.to(self.device)
        try:
            yield block
        finally:
            for module in block.modules():
                _drop_weights(module)

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """The model with all of its source's weights in float32, on the device."""
        self._fill([name for name, _ in self.model.named_parameters(remove_duplicate=False)])
        model: Any = self.model  # whose `to` is annotated for other things
        try:
            yield model.to(self.device)
        finally:
            for module in self.model.modules():
                _drop_weights(module)

    def replaced(self, path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a loaded block's parameters would be with these tensors instead of the source's.

        tensors  on the source's names, float32; only what differs

        Returns parameters of the block (names without its path) that come from `tensors`.
        """
        block = self.model.get_submodule(path)
        names = {p for n in tensors for p in self.places[n].parameters}
        changed = [name for name, _ in block.named_parameters() if f"{path}.{name}" in names]
        kept = {name: block.get_parameter(name) for name in changed}
        self._fill([f"{path}.{name}" for name in changed], tensors)
        result = {name: block.get_parameter(name).data.to(self.device) for name in changed}
        for name, value in kept.items():
            owner, _, leaf = name.rpartition(".")
            block.get_submodule(owner)._parameters[leaf] = value
        return result

    def as_parameters(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What all parameters of the model would be that come from these tensors of the source.

        tensors  on the source's names, float32
        """
        names = list(dict.fromkeys(p for n in tensors for p in self.places[n].parameters))
        self._fill(names, tensors)
        found = {name: self.model.get_parameter(name).data.clone() for name in names}
        for module in self.model.modules():
            _drop_weights(module)
        return found

    def on_disk(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of the model -> the tensors of the source that they come from.

        Operations at loading (stacking experts, joining rows) are undone. Raises CheckpointError
        where they cannot be.
        """
        direct, rest = {}, {}
        sources: dict[str, list[str]] = {}
        for name, place in self.places.items():
            for parameter in place.parameters:
                sources.setdefault(parameter, []).append(name)
        for parameter, value in parameters.items():
            names = sources.get(parameter, [])
            if len(names) == 1 and self.places[names[0]].converter is None:
                direct[names[0]] = value
            else:
                rest[parameter] = value
        if rest:
            model: Any = self.model
            model._weight_conversions = self.mapping
            undone = transformers.core_model_loading.revert_weight_conversion(self.model, rest)
            for name, value in undone.items():
                info = self.source.tensors.get(name)
                if info is None or info.shape != tuple(value.shape):
                    raise CheckpointError(
                        self.source.directory,
                        f"{name} {list(value.shape)} comes from undoing what transformers does at "
                        "loading",
                        "a tensor of the source",
                        "Convert it without --dataset",
                    )
            direct |= undone
        return direct

    def _fill(self, parameters: Sequence[str], instead: Mapping[str, Tensor] = {}) -> None:  # noqa: B006
        """Load parameters of the model from the source (or `instead`), float32, onto the CPU."""
        wanted = {self.tied.get(name, name) for name in parameters}
        names = [n for n, p in self.places.items() if not wanted.isdisjoint(p.parameters)]
        tensors = {n: instead[n] if n in instead else self._read(n) for n in names}
        missing = wanted - {p for n in names for p in self.places[n].parameters}
        if missing:
            raise CheckpointError(
                self.source.directory,
                f"{sorted(missing)[0]} is not among its tensors",
                "every weight of the model",
                "Complete the checkpoint",
            )
        self._filling = True
        try:
            mapping: Any = list(self.mapping)
            settings = LoadStateDictConfig(weight_mapping=mapping, dtype=torch.float32)
            with without_bars():
                convert_and_load_state_dict_in_model(self.model, tensors, settings)
            for name in parameters:
                path, _, leaf = name.rpartition(".")
                module = self.model.get_submodule(path)
                if name in self.tied:
                    setattr(module, leaf, self.model.get_parameter(self.tied[name]))
                value = getattr(module, leaf)
                value.requires_grad_(False)
                if value.untyped_storage().nbytes() != value.nbytes:
                    # cut from a fused tensor; weights are known by their memory, so it gets its own
                    value.data = value.data.clone()
        finally:
            self._filling = False

    def _read(self, name: str) -> Tensor:
        info = self.source.tensors[name]
        value = self.source.read(name, 0, info.numel).reshape(info.shape)
        if not value.is_floating_point():
            return value
        value = value.to(torch.float32)
        bound = self._buffers.issuperset(self.places[name].parameters)  # may be infinite
        if bool(value.isnan().any()) or not (bound or bool(value.isfinite().all())):
            raise WeightError(name, "is not finite")  # the conversion tells the whole story
        return value


def skeleton(config: Mapping[str, Any]) -> PreTrainedModel:
    """A model with its code and buffers, and parameters on the meta device, in eval mode."""
    table = json.loads(json.dumps(config))
    for key in ("quantization_config", "attn_implementation", "_attn_implementation"):
        table.pop(key, None)
    model_class = getattr(transformers, table["architectures"][0])
    settings = config_from(table)
    names = ("", *getattr(settings, "sub_configs", {}))
    for part in (getattr(settings, name) if name else settings for name in names):
        if part is not None:
            part._experts_implementation = "eager"  # one expert after the other, through F.linear
            part.use_cache = False  # a cache would grow each time a block is run on a call
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, value: nn.Parameter | None) -> None:
        if value is not None:
            value = nn.Parameter(value.detach().to("meta"), requires_grad=False)
        register(self, name, value)

    nn.Module.register_parameter = register_on_meta  # type: ignore[assignment,method-assign]
    try:
        with no_init_weights():
            model: Any = model_class(settings).to(torch.float32)
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
    built: PreTrainedModel = model.eval()
    return built


def _block_paths(model: nn.Module, parameters: Sequence[str]) -> list[str]:
    """The repeated blocks that hold these parameters: elements of the outermost nn.ModuleList.

    Returns their paths in the order of the model's modules.
    """
    found: dict[str, None] = {}
    for parameter in parameters:
        steps = parameter.split(".")
        for end in range(1, len(steps)):
            parent = model.get_submodule(".".join(steps[:end]))
            if isinstance(parent, nn.ModuleList):
                found[".".join(steps[: end + 1])] = None
                break
    order = {name: i for i, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return sorted(found, key=order.__getitem__)


@contextmanager
def patched(block: nn.Module, patch: Mapping[str, Tensor]) -> Iterator[None]:
    """The block with some of its parameters replaced."""
    kept = {name: block.get_parameter(name).data for name in patch}
    for name, value in patch.items():
        block.get_parameter(name).data = value
    try:
        yield
    finally:
        for name, value in kept.items():
            block.get_parameter(name).data = value


def _drop_weights(module: nn.Module) -> None:
    """Drop the weights that a module itself holds."""
    for name, value in module._parameters.items():
        if value is not None and not value.is_meta:
            module._parameters[name] = nn.Parameter(value.to("meta"), requires_grad=False)


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        items = [map_tensors(v, function) for v in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [map_tensors(v, function) for v in value]
    if isinstance(value, dict):
        table = {k: map_tensors(v, function) for k, v in value.items()}
        return table if type(value) is dict else type(value)(table)
    return value
