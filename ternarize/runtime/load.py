"""Load a packed checkpoint as a model of transformers.

`load` picks the model class that the checkpoint was made from; the work is done by from_pretrained,
with the plug-in of plugin/. This module imports neither torch nor transformers at its top, so
that `import ternarize` costs nothing.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ternarize.errors import CheckpointError, FormatError, UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

QUANTIZERS = "transformers.quantizers.auto"


def load(
    path: str | Path,
    *,
    device: "str | torch.device | dict[str, Any] | None" = None,
    dtype: "str | torch.dtype | None" = None,
    activations: str | None = None,
    head: str | None = None,
    verify: bool = True,
    dequantize: bool = False,
    steps: str | Path | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> "PreTrainedModel":
    """Load a packed checkpoint: a transformers model in eval mode with ternary layers.

    path         a directory, or a Hub id (user/name[@revision])
    device       "cuda", "cpu", ...; "auto" or a device map spreads the model (needs accelerate)
    dtype        of everything that is not packed; None: as in the checkpoint's config
    activations  "none" or "int8"; None: as in the checkpoint's config
    head         "int8": round an output head that the checkpoint keeps in floating point, and the
                 token embedding if the two are tied, to 8 bits as `convert --head int8` does, from
                 the numbers that they have in `dtype`; None, or packed: as in the checkpoint
    verify       check every code, padding, scale and SHA-256 of what is loaded, before it is given
                 back
    dequantize   give back an ordinary model with dense weights
    steps        journal of steps that begins from this checkpoint, file or Hub id: load what it
                 makes of it
    revision     branch, tag or commit on the Hub
    kwargs       go to from_pretrained of the model's class; subfolder and variant, as there, say
                 which folder and which of its weights

    Raises UsageError on a `head` that cannot be rounded and a journal of another checkpoint,
    CheckpointError when there is nothing to load, FormatError when the checkpoint is not packed, is
    damaged, lacks a weight or needs a newer ternarize.
    """
    from ternarize.sources.checkpoint import locate

    subfolder = kwargs.pop("subfolder", None) or ""
    directory = locate(path, revision, subfolder=subfolder, variant=kwargs.get("variant"))
    if steps is not None:
        if kwargs.get("variant") is not None:
            found = f"{kwargs['variant']!r} beside steps, which begin from the weights themselves"
            raise UsageError("variant", found, "one of the two", "Load the steps without it")
        from ternarize.steps.checkpoint import replayed_directory

        chosen: dict[str, Any] = {"device": device, "dtype": dtype, "activations": activations}
        chosen |= {"head": head, "verify": verify, "dequantize": dequantize}
        with replayed_directory(steps, directory) as replayed:
            return load(replayed, **chosen, **kwargs)
    quantization = _quantization(directory)

    from ternarize.files import unmapped
    from ternarize.models.configuration import usable
    from ternarize.runtime.packed import use_lanes
    from ternarize.trits.ternary import check_device

    if isinstance(device, str) and device != "auto":
        check_device(device)
    config, model_class = _opened(directory, kwargs.get("trust_remote_code") or False)
    switches = {"activations": activations, "head": head, "dequantize": dequantize or None}
    given = {key: value for key, value in switches.items() if value is not None}
    config.quantization_config = quantization | given | {"verify": verify}
    if dtype is not None:
        kwargs["dtype"] = dtype
    if isinstance(device, dict) or device == "auto":
        kwargs["device_map"] = device
    try:
        with usable(directory):
            model: PreTrainedModel = model_class.from_pretrained(directory, config=config, **kwargs)
    finally:
        unmapped.drop()  # where it has failed, something may still be read
    if device is not None and "device_map" not in kwargs:
        model.to(device)  # type: ignore[arg-type]
        use_lanes(model)  # what had none on the CPU
    return model


def _quantization(directory: Path) -> dict[str, Any]:
    """The quantization_config of a packed checkpoint."""
    from ternarize.files.json_files import read_config
    from ternarize.files.names import MODULE

    table, where = read_config(directory), directory / "config.json"
    if table is None:
        raise CheckpointError(
            directory,
            "no config.json",
            "a Hugging Face checkpoint",
            "Copy config.json from the source of the model",
        )
    given = table.get("quantization_config")
    quantization: dict[str, Any] = given if isinstance(given, dict) else {}
    if quantization.get("quant_method") != "ternarize":
        method = f"quant_method {quantization.get('quant_method')!r}"
        raise FormatError(
            where,
            "no quantization_config" if given is None else method,
            "quant_method 'ternarize'",
            "Pack the model with `ternarize convert`, or load it with transformers",
        )
    if (module := table.get(MODULE)) is not None:
        raise FormatError(
            directory,
            f"holds a module {module!r:.80}, which is none of transformers'",
            "a model of transformers",
            "Build the module, and call ternarize.load_module(directory, module)",
        )
    activations = quantization.get("activations", "none")
    if activations not in ("none", "int8"):
        raise FormatError(
            where,
            f"activations {activations!r:.80}",
            "'none' or 'int8'",
            "Repair the file, or install a newer ternarize",
        )
    return quantization


def _opened(directory: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """The configuration of a checkpoint, and the class of its model."""
    import transformers

    from ternarize.files import unmapped
    from ternarize.models.configuration import class_of, usable

    unmapped.install()
    with usable(directory / "config.json"):
        # never asked on the terminal: code that comes with a checkpoint runs on the caller's word
        config = transformers.AutoConfig.from_pretrained(
            directory, trust_remote_code=trust_remote_code
        )
        found: Any = class_of(config)
        # code that comes with the checkpoint; from_pretrained asks for trust_remote_code=True
        for name in getattr(config, "auto_map", None) or {}:
            if found is None and name.startswith("AutoModel"):
                found = getattr(transformers, name, None)
        if found is None:
            raise AttributeError(f"no model class for architectures {config.architectures}")
    return config, found


class _AfterImport(MetaPathFinder):
    """Registers the plug-in right after `transformers.quantizers.auto` has been imported.

    That module holds transformers' table of quantizers, and importing it takes seconds, which only
    a user who loads a model should pay. transformers has no entry points, so the import itself is
    the one event that comes before every use of the table, whoever imports first and in whatever
    order.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != QUANTIZERS:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                _register_after(spec.loader)
                return spec
        return None


def _register_after(loader: Loader) -> None:
    execute = loader.exec_module

    def execute_and_register(module: ModuleType) -> None:
        execute(module)
        _register()

    loader.exec_module = execute_and_register  # type: ignore[method-assign]


def install_hook() -> None:
    """Make transformers' from_pretrained load packed checkpoints from now on."""
    if QUANTIZERS in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    importlib.import_module("ternarize.runtime.plugin.quantizer")  # it registers itself
