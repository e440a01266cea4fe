"""What transformers calls to load and save a packed checkpoint, registered with it."""

import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ternarize.errors import FormatError, UsageError
from ternarize.files import container, metadata, unmapped
from ternarize.files.checkpoint import open_files
from ternarize.files.headers import stamp
from ternarize.files.json_files import read_json
from ternarize.files.metadata import KEY, SCALE_SUFFIX
from ternarize.files.names import RECORD
from ternarize.runtime import adapters
from ternarize.runtime.packed import use_lanes
from ternarize.trits.int8 import INT8

if TYPE_CHECKING:
    from ternarize.models.places import Place
    from ternarize.runtime.plugin.prepare import Source
    from ternarize.runtime.straight import Straight


class TernarizeConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint, and switches for loading it.

        from_pretrained(packed, quantization_config=TernarizeConfig(activations="int8"))

    activations  "none" or "int8"; None: as the checkpoint says
    verify       check codes, padding, scales and digests before a model is given back (None: yes)
    dequantize   give back an ordinary model with dense weights (None: no)
    head         "int8": round an output head that the checkpoint keeps in floating point, and the
                 token embedding if the two are tied (None: as the checkpoint has it)
    missing      parameters that the source lacked: transformers makes them up, and says so

    What else config.json says (group_size, method, keys of a later version) is kept and saved again
    but not used: the files' headers decide.
    """

    def __init__(
        self,
        activations: str | None = None,
        verify: bool | None = None,
        dequantize: bool | None = None,
        head: str | None = None,
        missing: list[str] | None = None,
        format_version: int = metadata.FORMAT_VERSION,
        **others: Any,
    ) -> None:
        metadata.check_version("config.json", format_version, [])
        self.__dict__.update(others)
        self.quant_method = KEY  # type: ignore[assignment]
        self.format_version = format_version
        self.activations, self.verify, self.dequantize = activations, verify, dequantize
        if head not in (None, INT8):
            raise UsageError("head", f"{head!r}", f"{INT8!r}, or None to leave it as it is")
        names = [] if missing is None else missing
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            found = f"missing is {missing!r:.80}"
            raise FormatError("config.json", found, "a list of names", "Repair it")
        self.head, self.missing = head, missing

    def get_loading_attributes(self) -> dict[str, Any]:
        """What the user's config may change in the checkpoint's."""
        switches = ("activations", "verify", "dequantize", "head")
        return {key: getattr(self, key) for key in switches if getattr(self, key) is not None}

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: not how this model was loaded."""
        table: dict[str, Any] = super().to_dict()
        for key in ("verify", "dequantize", "head", "missing"):  # saved, it lacks nothing
            table.pop(key, None)
        return {key: value for key, value in table.items() if value is not None}


class TernarizeQuantizer(HfQuantizer):
    """Prepares a model of transformers for a packed checkpoint; see the package's docstring."""

    # The scales of a weight go through the same conversions (transformers >= 5.20; the patterns of
    # earlier ones match them by themselves)
    serialized_names = {"weight": ["weight", "weight" + SCALE_SUFFIX]}
    quantization_config: TernarizeConfig
    stamps: dict[Path, list[int]]  # of the files, before they were looked at
    source_transposed: dict[str, bool]
    to_round: set[str]  # parameters of the head that become int8 once they are loaded
    kept_dtypes: dict[str, torch.dtype]  # of the parameters that are not packed
    straight: "Straight | None" = None  # what the core reads while the model is filled
    scale_names: dict[str, str]  # names of scales that transformers' renamings miss -> parameters

    def __init__(self, quantization_config: TernarizeConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise UsageError(
                "quantization_config",
                "the checkpoint is not packed, and from_pretrained does not ternarize",
                "a packed checkpoint",
                "Run `ternarize convert` first",
            )
        super().__init__(quantization_config, **kwargs)

    @property
    def missing(self) -> Sequence[str]:
        """Parameters that the source of the checkpoint lacked."""
        return self.quantization_config.missing or ()

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from ternarize.runtime.plugin.prepare import packed_sources
        from ternarize.runtime.straight import Straight, can_go_straight

        unmapped.install()
        unmapped.drop()
        self.straight = None
        files = [Path(file) for file in checkpoint_files or []]
        if not files or any(file.suffix != ".safetensors" for file in files):
            raise FormatError(
                ", ".join(file.name for file in files) or "no files",
                "a packed checkpoint is stored in safetensors",
                remedy="Load it from its directory",
            )
        self.stamps = {file: stamp(file) for file in files}
        packed = open_files(files[0].parent, [file.name for file in files])
        records = metadata.records_of(packed)
        metadata.check_format(packed)
        listed = (read_json(packed.directory / RECORD) or {}).get("tensors")
        metadata.check_listed(RECORD, listed, records, packed)
        checked, others = self.quantization_config.verify is not False, records
        places = self.prepare(model, packed_sources(packed, records), list(packed.tensors))
        here = can_go_straight(kwargs.get("device_map", "unknown"))
        if here and not self.quantization_config.dequantize:
            self.straight = Straight(model, packed, records, places, checked=checked)
            others = self.straight.others
        if checked:
            container.check_data(packed, others)
        if self.straight is not None:
            self.straight.reading.start()
            unmapped.give(self.straight.given, weakref.WeakMethod(self.straight.reading.end))

    def prepare(
        self, model: Any, sources: "Mapping[str, Source]", names: Sequence[str]
    ) -> "dict[str, Place]":
        """Put empty ternary modules into an empty model, ready to be filled.

        sources  the packed tensors, by name
        names    of all tensors that the files hold, scales included

        Returns where each of them then goes (`ternarize.models.places.locate_tensors`).
        Raises FormatError where the tensors do not fit the model, or do not fill it.
        """
        from ternarize.models.places import locate_tensors, scales_led_astray, ties
        from ternarize.runtime.plugin.finish import dtypes_of_kept
        from ternarize.runtime.plugin.int8_head import head_to_round
        from ternarize.runtime.plugin.prepare import check_beside, check_complete, insert_modules

        places = locate_tensors(model, names)
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        # what a file stores apart is apart: a conversion stores equal tensors once
        model.all_tied_weights_keys = ties(tied, places)
        activations = self.quantization_config.activations or "none"
        self.to_round = head_to_round(model) if self.quantization_config.head else set()
        self.source_transposed = insert_modules(model, sources, places, activations)
        self.to_round -= self.source_transposed.keys()  # packed in the checkpoint already
        self.scale_names = scales_led_astray(model, sources, SCALE_SUFFIX)
        check_beside(model, self.missing)
        # transformers with `get_new_dtype` asks for the dtype of what is kept by itself
        self.kept_dtypes = {} if hasattr(self, "get_new_dtype") else dtypes_of_kept(model)
        filled = locate_tensors(model, names, self)
        check_complete(model, filled, self.missing)
        return filled

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        from ternarize.runtime.plugin import finish
        from ternarize.runtime.plugin.int8_head import round_head

        straight, self.straight = self.straight, None
        try:
            if straight is not None:
                straight.wait()
            for file, before in self.stamps.items():  # what was verified is what was loaded
                if stamp(file) != before:
                    raise FormatError(
                        file.name, "changed while it was loaded", "a file at rest", "Load it again"
                    )
            if straight is not None:
                straight.finish(model)
        finally:
            unmapped.drop()
        if self.to_round:
            round_head(model, self.to_round)
            self.source_transposed |= dict.fromkeys(self.to_round, False)
        finish.cast_kept(model, self.kept_dtypes)
        finish.zero_missing_biases(model, self.missing)
        finish.check_filled(model)
        if self.quantization_config.dequantize:
            finish.make_dense(model)
        else:
            use_lanes(model)
            finish.keep_sizes(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """For save_pretrained: the metadata of the files that it is about to write."""
        from ternarize.runtime.plugin.saving import saved_records

        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapter is saved
        adapters.check_none(model)
        return None, metadata.dump_metadata(saved_records(model, self.source_transposed))

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """For model.dequantize()."""
        from ternarize.runtime.plugin.finish import make_dense

        # save_pretrained leaves a name in config.dtype
        make_dense(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return model

    def update_weight_conversions(self, weight_conversions: Any, *model: Any) -> Any:
        """Send scales through the conversions of tensors that are not called `weight`, too.

        model  given by transformers >= 5.21 alone
        """
        from transformers.core_model_loading import WeightConverter

        from ternarize.models.places import ScaleRenaming, with_dense_turned

        leaves = (getattr(c, "_original_source_patterns", [""])[0] for c in weight_conversions)
        names = {leaf.rpartition(".")[2] for leaf in leaves} | {"weight"}
        self.serialized_names = {n: [n, n + SCALE_SUFFIX] for n in names if n.isidentifier()}
        base: Any = super()
        # of two with one pattern, ours comes first; the other is for scales of another kind
        taken: set[tuple[str | None, str]] = set()
        conversions = []
        for each in base.update_weight_conversions(weight_conversions, *model):
            here = each.source_patterns if isinstance(each, WeightConverter) else ()
            patterns = {(getattr(each, "scope_prefix", None), pattern) for pattern in here}
            if taken.isdisjoint(patterns):
                conversions.append(with_dense_turned(each) if patterns else each)
            taken |= patterns
        missed = getattr(self, "scale_names", None)
        return [*conversions, ScaleRenaming(missed)] if missed else conversions

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top; the packed weights stay as they are

    @property
    def is_compileable(self) -> bool:
        return True


adapters.watch()
if KEY not in auto.AUTO_QUANTIZER_MAPPING:
    auto.register_quantization_config(KEY)(TernarizeConfig)
    auto.register_quantizer(KEY)(TernarizeQuantizer)
    # else from_pretrained(..., quantization_config=TernarizeConfig(...)) ignores its switches
    _types: tuple[Any, ...] = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*_types, TernarizeConfig)
