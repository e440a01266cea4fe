"""Inputs for a model of any kind, by rules on the names of its forward's arguments.

An argument's name says what it is (token ids, pixels, a spectrogram, a waveform, boxes); its sizes
are entries of the model's configuration. Where a name leaves the form open (`pixel_values` is an
image, several, a video, or patches of one) `candidates` gives one form after the other, and the
first that the model takes is used. Placeholders of images and sounds are put among the token ids
as often as the model's own `get_image_features` (video, audio) says.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

BATCH = 2
TEXT = 9  # tokens
ATTEMPTS = 80  # forms of the inputs that are tried


@dataclass(frozen=True)
class Form:
    """What the names of arguments leave open.

    image   which form pixels have, an index of `_IMAGES`
    audio   which form sound has, an index of `_AUDIO`
    length  of texts
    codes   where numbers of audio codes stand for texts: 1 in rows, 2 in columns, 0 nowhere
    """

    image: int = 0
    audio: int = 0
    length: int = TEXT
    codes: int = 0


def candidates(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Inputs to try in turn; those that use more of the model come first."""
    names = _names(model)
    tried = 0
    for wanted in _wanted(model, names):
        images = range(len(_IMAGES)) if any("pixel" in name for name in wanted) else (0,)
        audio = range(len(_AUDIO)) if _AUDIO_NAMES & {*wanted} else (0,)
        codes = (0, 1, 2) if _codebooks(model) > 1 else (0,)
        for image, sound, length, code in itertools.product(images, audio, (TEXT, 64), codes):
            if tried >= ATTEMPTS:
                return
            made = _made(model, wanted, Form(image, sound, length, code))
            if made is not None:
                tried += 1
                yield made


def _wanted(model: PreTrainedModel, names: list[str]) -> Iterator[list[str]]:
    """Which arguments to give: all that a rule knows; without one kind each; only the needed."""
    known = [name for name in names if name in _MAKERS and name not in _IF_ASKED]
    seen = []
    for left_out in (
        *(set[str](), _VIDEO_NAMES, _VIDEO_NAMES | _AUDIO_NAMES, _VIDEO_NAMES | _IMAGE_NAMES),
        _VIDEO_NAMES | _IMAGE_NAMES | _AUDIO_NAMES,
    ):
        some = [name for name in known if name not in left_out]
        if some and some not in seen:
            seen.append(some)
            yield some
    more = [name for name in names if name in {*known, *_IF_ASKED}]
    if more != known:
        yield [name for name in more if name not in _VIDEO_NAMES]
    main = model.main_input_name
    needed = {*([main] if isinstance(main, str) else main), *_required(model)}
    few = [name for name in known if name in needed]
    if few and few not in seen:
        yield few


def _names(model: PreTrainedModel) -> list[str]:
    return list(inspect.signature(type(model).forward).parameters)


def _required(model: PreTrainedModel) -> set[str]:
    parameters = inspect.signature(type(model).forward).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name for p in parameters if p.default is p.empty and p.kind not in kinds} - {"self"}


# -------------------------------------------------------------------------------- the configuration


def configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """A configuration and all that is nested in it, the outer first."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from configs(value)


def entry(config: PretrainedConfig, names: str, default: int, *, kind: str = "") -> int:
    """The first entry of these names that is a whole number, or the first of a list of such.

    kind  where names are ambiguous, configurations whose class has this in its name come first
    """
    every = list(configs(config))
    every.sort(key=lambda c: kind not in type(c).__name__.lower())
    for name in names.split():
        for each in every:
            value = getattr(each, name, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if type(value) is int and value > 0:
                return value
    return default


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=_generator(len(shape)))


def _numbers(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, max(low + 1, high), shape, generator=_generator(sum(shape)))


# ------------------------------------------------------------------------------------- one argument


def _vocabulary(model: PreTrainedModel) -> int:
    try:
        embeddings: Any = model.get_input_embeddings()
        return int(embeddings.num_embeddings)
    except (AttributeError, NotImplementedError, TypeError):
        return entry(model.config, "vocab_size", 80)


def _codebooks(model: PreTrainedModel) -> int:
    return entry(model.config, "num_codebooks", 0)


def _text(model: PreTrainedModel, form: Form, vocabulary: int, length: int) -> Tensor:
    """Numbers of tokens below those of the special ones."""
    high = min(80, vocabulary)
    low, books = min(3, high - 1), _codebooks(model)
    if form.codes == 1:
        return _numbers(low, high, BATCH * books, length)
    return _numbers(low, high, BATCH, length, *((books,) if form.codes else ()))


def _ids(model: PreTrainedModel, form: Form, made: Mapping[str, Any]) -> Tensor:
    if "decoder_input_ids" in _names(model):  # then it is those that are codes
        form = replace(form, codes=0)
    return _text(model, form, _vocabulary(model), form.length)


def _decoder_ids(model: PreTrainedModel, form: Form, made: Mapping[str, Any]) -> Tensor:
    vocabulary = entry(model.config, "vocab_size", 80, kind="decoder")
    return _text(model, form, vocabulary, form.length - 2)


def _side(model: PreTrainedModel) -> int:
    return entry(model.config, "image_size img_size input_size pretrain_image_size", 64)


def _channels(model: PreTrainedModel) -> int:
    names = "num_channels in_channels in_chans input_channels num_input_channels"
    return entry(model.config, names, 3, kind="vision")


def _patch(model: PreTrainedModel) -> tuple[int, int]:
    """The side of a patch, and frames in it."""
    frames = entry(model.config, "temporal_patch_size patch_temporal", 1, kind="vision")
    return entry(model.config, "patch_size", 16, kind="vision"), frames


GRID = 4  # patches on a side


def _image(model: PreTrainedModel, *lead: int) -> Tensor:
    side = _side(model)
    return _noise(*lead, _channels(model), side, side)


def _patches(model: PreTrainedModel) -> Tensor:
    side, frames = _patch(model)
    return _noise(BATCH * GRID * GRID, _channels(model) * frames * side * side)


def _padded_patches(model: PreTrainedModel) -> Tensor:
    side, _ = _patch(model)
    return _noise(BATCH, GRID * GRID, side * side * _channels(model))


def _patch_images(model: PreTrainedModel) -> Tensor:
    side, _ = _patch(model)
    return _noise(BATCH * GRID * GRID, _channels(model), side, side)


_IMAGES: tuple[Callable[[PreTrainedModel], Tensor], ...] = (
    lambda model: _image(model, BATCH),
    lambda model: _image(model, BATCH, entry(model.config, "num_frames frames", 1)),
    _patches,
    _padded_patches,
    _patch_images,
    lambda model: _image(model, BATCH, 1),
    lambda model: _image(model, BATCH, 2),
    lambda model: _image(model, BATCH, 1, 1),
)


def _pixels(model: PreTrainedModel, form: Form, made: Mapping[str, Any]) -> Tensor:
    return _IMAGES[form.image](model)


def _bands(model: PreTrainedModel) -> int:
    names = "num_mel_bins input_feat_per_channel n_mels num_melspec_bins feature_size input_dim"
    names += " feature_projection_input_dim n_mel_channels mel_bins spectrogram_bins input_size"
    return entry(model.config, names, 80, kind="audio")


def _frames(model: PreTrainedModel) -> int:
    places = entry(model.config, "max_source_positions", 0, kind="audio")
    return 2 * places if places else entry(model.config, "max_length spec_size", 64)


_AUDIO: tuple[Callable[[PreTrainedModel], Tensor], ...] = (
    lambda model: _noise(BATCH, _bands(model), _frames(model)),
    lambda model: _noise(BATCH, 64, _bands(model)),
    lambda model: 0.1 * _noise(BATCH, 7680),
    lambda model: 0.1 * _noise(BATCH, 1, 7680),
    lambda model: _noise(BATCH, 1, _frames(model), _bands(model)),
    lambda model: _noise(BATCH, 1, 1024, 64),
    lambda model: _noise(BATCH, 64, _bands(model) * 2),
    lambda model: _noise(BATCH, _frames(model), _bands(model)),
)


def _sound(model: PreTrainedModel, form: Form, made: Mapping[str, Any]) -> Tensor:
    return _AUDIO[form.audio](model)


def _sound_mask(model: PreTrainedModel, form: Form, made: Mapping[str, Any]) -> Tensor | None:
    for name in ("input_features", "audio_mel", "input_values"):
        if name in made:
            bands = _bands(model)
            sizes = [n for n in made[name].shape[1:] if n not in (1, bands)] or [bands]
            return torch.ones(len(made[name]), sizes[0], dtype=torch.long)
    return None


def _grid(model: PreTrainedModel, form: Form, made: Mapping[str, Any]) -> Tensor | None:
    return torch.tensor([[1, GRID, GRID]] * BATCH)


def _grid_hw(model: PreTrainedModel, form: Form, made: Mapping[str, Any]) -> Tensor | None:
    return torch.tensor([[GRID, GRID]] * BATCH)


def _places(model: PreTrainedModel, form: Form, made: Mapping[str, Any]) -> Tensor:
    rows = torch.arange(GRID)
    return torch.cartesian_prod(rows, rows).repeat(BATCH, 1, 1)


def _sizes(model: PreTrainedModel, form: Form, made: Mapping[str, Any]) -> Tensor:
    return torch.tensor([[_side(model)] * 2] * BATCH)


def _boxes(model: PreTrainedModel, form: Form, made: Mapping[str, Any]) -> Tensor:
    corner = _numbers(0, 50, BATCH, form.length, 2)
    return torch.cat([corner, corner + 10], -1)


def _mask(model: PreTrainedModel, form: Form, made: Mapping[str, Any]) -> Tensor | None:
    """Only where it has no default."""
    return torch.ones(BATCH, form.length, dtype=torch.long)


def _patch_mask(model: PreTrainedModel, form: Form, made: Mapping[str, Any]) -> Tensor:
    return torch.ones(BATCH, GRID * GRID, dtype=torch.long)


def _series(model: PreTrainedModel, *more: int) -> Tensor:
    lags = [
        max(c.lags_sequence) for c in configs(model.config) if getattr(c, "lags_sequence", None)
    ]
    length = entry(model.config, "context_length seq_length", 32) + max(lags, default=0)
    return _noise(BATCH, length, *more)


def _past_values(model: PreTrainedModel, form: Form, made: Mapping[str, Any]) -> Tensor:
    channels = entry(model.config, "num_input_channels", 0)
    return _series(model, channels) if channels else _series(model)


def _past_mask(model: PreTrainedModel, form: Form, made: Mapping[str, Any]) -> Tensor:
    return torch.ones_like(_past_values(model, form, made))


def _past_times(model: PreTrainedModel, form: Form, made: Mapping[str, Any]) -> Tensor:
    return _series(model, model.config.num_time_features)


def _future_times(model: PreTrainedModel, form: Form, made: Mapping[str, Any]) -> Tensor:
    length = entry(model.config, "prediction_length", 8)
    return _noise(BATCH, length, model.config.num_time_features)


def _future_values(model: PreTrainedModel, form: Form, made: Mapping[str, Any]) -> Tensor:
    return _noise(BATCH, entry(model.config, "prediction_length", 8))


def _states(model: PreTrainedModel, *shape: int) -> Tensor:
    return _noise(BATCH, *shape)


def _hidden(model: PreTrainedModel, form: Form, made: Mapping[str, Any]) -> Tensor:
    names = _names(model)
    if any("grid" in name for name in names):
        return _patches(model)
    return _noise(BATCH, form.length, entry(model.config, "hidden_size d_model", 64))


def _type_ids(model: PreTrainedModel, form: Form, made: Mapping[str, Any]) -> Tensor | None:
    return torch.zeros(BATCH, form.length, dtype=torch.long) if "input_ids" in made else None


_Maker = Callable[[PreTrainedModel, Form, Mapping[str, Any]], Any]
# in the order in which they are made
_MAKERS: dict[str, _Maker] = {
    "pixel_values": _pixels,
    "pixel_values_videos": _pixels,
    "pixel_values_images": _pixels,
    "high_res_pixel_values": lambda model, form, made: _image(model, BATCH),
    "image": lambda model, form, made: _image(model, BATCH),
    "hidden_states": _hidden,
    "latents": lambda m, f, made: _noise(
        BATCH, f.length, entry(m.config, "latent_dim d_latents hidden_size", 64)
    ),
    "inputs": lambda m, f, made: _noise(BATCH, f.length, entry(m.config, "d_model", 64)),
    "flattened_patches": lambda m, f, made: torch.cat(
        [_numbers(1, 3, BATCH, 16, 2).float(), _noise(BATCH, 16, _channels(m) * _patch(m)[0] ** 2)],
        -1,
    ),
    "image_grid_thw": _grid,
    "video_grid_thw": _grid,
    "grid_thw": _grid,
    "image_grid_hw": _grid_hw,
    "spatial_shapes": _grid_hw,
    "pixel_position_ids": _places,
    "pixel_attention_mask": _patch_mask,
    "merge_sizes": lambda m, f, made: torch.ones(BATCH, dtype=torch.long),
    "image_sizes": _sizes,
    "input_features": _sound,
    "input_values": _sound,
    "audio_mel": _sound,
    "input_features_mask": _sound_mask,
    "feature_attention_mask": _sound_mask,
    "audio_mel_mask": lambda m, f, made: torch.zeros(BATCH, 64, dtype=torch.bool),
    "input_ids": _ids,
    "decoder_input_ids": _decoder_ids,
    "qformer_input_ids": lambda m, f, made: _numbers(3, 20, BATCH, TEXT),
    "mm_token_type_ids": _type_ids,
    "bbox": _boxes,
    "past_values": _past_values,
    "past_observed_mask": _past_mask,
    "past_time_features": _past_times,
    "future_time_features": _future_times,
    "future_values": _future_values,
    "states": lambda m, f, made: _states(m, 5, entry(m.config, "state_dim", 17)),
    "actions": lambda m, f, made: _states(m, 5, entry(m.config, "act_dim", 4)),
    "rewards": lambda m, f, made: _states(m, 5, 1),
    "returns_to_go": lambda m, f, made: _states(m, 5, 1),
    "timesteps": lambda m, f, made: torch.arange(5).repeat(BATCH, 1),
    "visual_feats": lambda m, f, made: _states(m, 4, entry(m.config, "visual_feat_dim", 2048)),
    "visual_pos": lambda m, f, made: _states(m, 4, entry(m.config, "visual_pos_dim", 4)),
    "inputs_embeds": lambda m, f, made: _states(m, f.length, entry(m.config, "hidden_size", 64)),
    "query_embeds": lambda m, f, made: _states(m, f.length, entry(m.config, "hidden_size", 64)),
    "noise_embeds": lambda m, f, made: _states(m, f.length, entry(m.config, "hidden_size", 64)),
    "context_hidden_states": lambda m, f, made: _states(
        m, f.length, entry(m.config, "hidden_size", 64)
    ),
    "classes_input_ids": _ids,
    "classes_attention_mask": _mask,
    "tasks_input_ids": _ids,
    "tasks_attention_mask": _mask,
    "task_inputs": _ids,
    "encoder_hidden_states": lambda m, f, made: _states(
        m, 7, entry(m.config, "encoder_hidden_size hidden_size", 64)
    ),
    "is_longer": lambda m, f, made: torch.zeros(BATCH, 1, dtype=torch.bool),
    "attention_mask": _mask,
    "use_cache": lambda m, f, made: False,
    "prompt_pixel_values": lambda model, form, made: _image(model, BATCH),
    "prompt_masks": lambda model, form, made: _image(model, BATCH),
    "prompt_depth": lambda model, form, made: _image(model, BATCH)[:, :1],
}
_VIDEO_NAMES = {"pixel_values_videos", "video_grid_thw"}
_IMAGE_NAMES = {"pixel_values", "pixel_values_images", "image_grid_thw", "image_sizes"}
_IMAGE_NAMES |= {"high_res_pixel_values", "mm_token_type_ids", "image_grid_hw"}
_AUDIO_NAMES = {"input_features", "input_values", "audio_mel"}
_AUDIO_NAMES |= {"input_features_mask", "feature_attention_mask"}
# what is given only where a model does not do without
_IF_ASKED = {"encoder_hidden_states", "is_longer", "attention_mask", "use_cache"}
# what is given only where the forward has no default for it
_ONLY_REQUIRED = {"inputs_embeds", "hidden_states", "future_values", "inputs", "latents"}
_ONLY_REQUIRED |= {"pixel_attention_mask", "query_embeds", "image_sizes", "noise_embeds"}


def _made(model: PreTrainedModel, wanted: list[str], form: Form) -> dict[str, Any] | None:
    """The arguments in one form; None where that form makes no sense."""
    made: dict[str, Any] = {}
    required = _required(model)
    grid = any("grid" in n or "target_sizes" in n for n in wanted)
    if _IMAGES[form.image] is _patches and not grid:
        return None
    if form.image == 0 and grid and "pixel_values" in wanted:
        return None
    for name, maker in _MAKERS.items():
        if name in wanted and (name not in _ONLY_REQUIRED or name in required):
            value = maker(model, form, made)
            if value is not None:
                made[name] = value
    if "input_ids" in made:
        try:
            made = _with_placeholders(model, made)
        except Exception:  # these pixels are of another form than the model's
            return None
    return made


# ------------------------------------------------------------------------------------- placeholders

_KINDS = {
    "image": (r"image.*token_(id|index)$|^media.*token_id$|^img.*token_id", ("pixel_values",)),
    "audio": (r"(audio|speech).*token_(id|index)$", ("input_features", "input_values")),
    "video": (r"video.*token_(id|index)$", ("pixel_values_videos",)),
}
_EDGES = re.compile(r"start|end|bos|eos|begin|boi|eoi")


def _with_placeholders(model: PreTrainedModel, made: dict[str, Any]) -> dict[str, Any]:
    """The token ids with placeholders for the features of images, videos and sounds behind them."""
    for kind, (pattern, names) in _KINDS.items():
        method = getattr(model, f"get_{kind}_features", None)
        token = _placeholder(model.config, pattern)
        if method is None or token is None or not any(name in made for name in names):
            continue
        rows = _feature_rows(model, method, made)
        each, rest = divmod(rows, BATCH)
        assert not rest, "features do not belong to texts in equal parts"
        added = torch.full((BATCH, each), token)
        made["input_ids"] = torch.cat([made["input_ids"], added], -1)
        if "mm_token_type_ids" in made:
            number = {"image": 1, "video": 2, "audio": 3}[kind]
            types = torch.full((BATCH, each), number)
            made["mm_token_type_ids"] = torch.cat([made["mm_token_type_ids"], types], -1)
    return made


def _placeholder(config: PretrainedConfig, pattern: str) -> int | None:
    for each in configs(config):
        for key, value in vars(each).items():
            if re.search(pattern, key) and not _EDGES.search(key) and type(value) is int:
                return value
    return None


def _feature_rows(model: PreTrainedModel, method: Any, made: Mapping[str, Any]) -> int:
    """How many places in the text the features take."""
    parameters = inspect.signature(method).parameters
    given = {name: value for name, value in made.items() if name in parameters}
    with torch.no_grad():
        found = method(**given)
    features = found
    for name in ("pooler_output", "last_hidden_state"):
        if getattr(found, name, None) is not None:
            features = getattr(found, name)
            break
    width = int(model.config.get_text_config().hidden_size)
    return sum(tensor.numel() for tensor in tensors(features)) // width


def tensors(value: Any) -> list[Tensor]:
    """All floating tensors in what a forward returns, in order; without caches."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        return [t for key, each in value.items() if "cache" not in key for t in tensors(each)]
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in tensors(each)]
    return []
