"""Continue a text, and give its pieces away as they come.

A token is not a piece of text: a character can be spread over several tokens, and many tokenizers
write the space of a word into the token before or drop it at the start. So each step decodes the
last tokens twice, without and with the new one, and gives away the difference once it is whole
characters. What has been given away, joined, is the text that is returned.
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from ternarize.errors import UsageError, first_line
from ternarize.models.reads import beginning, max_positions
from ternarize.runtime.decode import Decoder, cache_of, can_decode

NEW_TOKENS = 128  # where the model's context has room for them
CONTEXT_TOKENS = 8  # of the prompt, decoded before the first new token
# new ones of a text that goes on, up to which one by one is faster than all anew; a quarter of more
FEW_TOKENS = 64


@dataclass(frozen=True)
class Generation:
    """A generated text and what it took.

    text            without the prompt and without special tokens
    prompt_tokens   of the whole prompt; what was not read before, in `prompt_seconds` (until the
                    first new token was there)
    new_tokens      generated, an end token included; all but the first in `seconds`
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed of generation, without the time for the prompt; 0 when there was one token."""
        return (self.new_tokens - 1) / self.seconds if self.seconds > 0 else 0.0


@dataclass
class Memory:
    """What a model has read of a text that goes on, so that only what is new is read again.

    ids    the tokens that have been read
    state  what the model keeps of them: a `Decoder`, or the argument of transformers' cache
    room   how many times the tokens of a call a decoder has room for, so that the next ones fit
    """

    ids: list[int] = field(default_factory=list)
    state: Decoder | dict[str, Any] = field(default_factory=dict)
    room: int = 2

    def read_of(self, ids: list[int]) -> int:
        """How many of the first of `ids` it holds; of all of them at most all but the last."""
        same = 0
        for old, new in zip(self.ids, ids[:-1], strict=False):
            if old != new:
                break
            same += 1
        return same


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    chat: bool = False,
    stream: Callable[[str], None] | None = None,
    memory: Memory | None = None,
) -> Generation:
    """Let a language model continue a prompt.

    model           a causal language model of transformers, packed or not
    prompt          text; empty: begin a document. Or the messages of a chat, each with "role" and
                    "content", for the tokenizer's chat template
    max_new_tokens  at most; None: 128, or what the model's context has room for
    temperature     0: always the most likely token (greedy); larger: more random
    top_k           sample from the k most likely tokens
    top_p           sample from the fewest tokens that have probability p together
    seed            of the sampling; the caller's random state is left as it was. None: any
    chat            put the prompt as a user's message into the tokenizer's chat template
    stream          called with each new piece of text
    memory          of the call before, if this text goes on with that one's; it is brought up to
                    date, and what `stream` raises leaves it usable

    Raises UsageError when a value cannot be used, the prompt does not fit the model's context, or
    the model does not generate; UnicodeEncodeError for a prompt that is no text.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p, seed)
    check_continues(model)
    ids = _encode(tokenizer, prompt, chat)
    new_tokens = _room(model, len(ids), max_new_tokens)
    settings = _settings(model, new_tokens, temperature, top_k, top_p)
    pieces = _Pieces(tokenizer, ids, stream)
    batch = torch.tensor([ids], device=model.device)
    run = (
        _by_decoder
        if can_decode(model, len(ids) + new_tokens) and _is_simple(settings)
        else _by_model
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices, enabled=seed is not None), torch.inference_mode():
        if seed is not None:
            torch.manual_seed(seed)
        begin = time.perf_counter()
        run(model, batch, settings, pieces, memory or Memory(room=1))
        end = time.perf_counter()
    first = pieces.first if pieces.first is not None else end
    return Generation("".join(pieces.given), len(ids), pieces.new, first - begin, end - first)


def _settings(
    model: Any, new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> GenerationConfig:
    """The model's own settings of a generation, with what is asked for."""
    config: Any = copy.deepcopy(model.generation_config)
    sampled = temperature > 0
    config.update(
        max_new_tokens=new_tokens,
        max_length=None,
        num_beams=1,  # beams cannot be streamed
        do_sample=sampled,
        temperature=temperature if sampled else None,
        top_k=(top_k or 0) if sampled else None,  # 0: all tokens
        top_p=(top_p or 1.0) if sampled else None,
    )
    if config.pad_token_id is None:
        end = config.eos_token_id
        config.pad_token_id = end[0] if isinstance(end, list) else end
    settings: GenerationConfig = config
    return settings


def greedy_settings(model: Any, new_tokens: int) -> GenerationConfig:
    """Settings that take the likeliest token, whatever penalties the model's own ask for."""
    config: Any = _settings(model, new_tokens, 0.0, None, None)
    config.update(**_NEUTRAL)
    settings: GenerationConfig = config
    return settings


def check_continues(model: Any) -> None:
    """Raise UsageError for a model that does not continue a text."""
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise UsageError(
            type(model).__name__,
            "does not continue a text",
            "a causal language model",
            "Use another checkpoint",
        )


# What `_by_decoder` knows of a generation's settings; those that do not say which tokens
# come; and the values with which others say nothing.
_PLAIN = {"max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "eos_token_id"}
_SILENT = {
    "bos_token_id",
    "pad_token_id",
    "transformers_version",
    "use_cache",
    "_from_model_config",
}
_NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "typical_p": 1.0,
    "guidance_scale": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
}


def _is_simple(config: GenerationConfig) -> bool:
    """Whether nothing is asked for but to take the likeliest token, or to sample from the best."""
    return all(
        key in _PLAIN | _SILENT
        or value is None
        or value is False
        or (key in _NEUTRAL and value == _NEUTRAL[key])
        for key, value in config.to_diff_dict().items()
    )


def _by_model(
    model: Any, ids: torch.Tensor, config: GenerationConfig, streamer: "_Pieces", memory: Memory
) -> None:
    """model.generate; a memory's cache is used if this text is what it has read, and more."""
    given: list[int] = ids[0].tolist()
    goes_on = memory.ids and memory.read_of(given) == len(memory.ids)
    held = memory.state if goes_on and not isinstance(memory.state, Decoder) else {}
    memory.ids, memory.state = [], {}  # a cache that is being written is none
    config.return_dict_in_generate = True
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        streamer=streamer,
        **held,
    )
    # a cache that the model's settings ask for is made for one text, and cannot be given
    free = getattr(config, "cache_implementation", None) is None
    kept = cache_of(out) if free and isinstance(out, Mapping) else {}
    for cache in kept.values():
        layers = getattr(cache, "layers", ())
        if layers and all(hasattr(layer, "keys") for layer in layers):  # which say what they read
            read = cache.get_seq_length()
            memory.ids, memory.state = out.sequences[0, :read].tolist(), kept


def _decoder_of(model: Any, ids: torch.Tensor, capacity: int, memory: Memory) -> Decoder:
    """A decoder that has read `ids`: that of the memory where it has room, or one that has more."""
    given: list[int] = ids[0].tolist()
    decoder, same = memory.state, memory.read_of(given)
    few = len(given) - same <= max(FEW_TOKENS, same // 4)
    if not (isinstance(decoder, Decoder) and decoder.capacity >= capacity and few):
        memory.ids, memory.state = [], {}
        capacity = min(max_positions(model.config), memory.room * capacity)
        made = Decoder(model, ids, capacity)
        memory.ids, memory.state = given, made
        return made
    del memory.ids[same:]
    decoder.position.fill_(same)  # what was read after it is written over
    for token in given[same:]:
        decoder.step(torch.tensor([token]))
        memory.ids.append(token)
    return decoder


def _by_decoder(
    model: Any, ids: torch.Tensor, config: GenerationConfig, streamer: "_Pieces", memory: Memory
) -> None:
    """What model.generate does with such a config, by ternarize.runtime.decode: the same tokens."""
    warpers: list[Any] = []
    if config.do_sample:
        if config.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1.0:
            warpers.append(TopPLogitsWarper(config.top_p))
    end = config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    streamer.put(ids)
    decoder = _decoder_of(model, ids, ids.shape[1] + config.max_new_tokens, memory)
    for left in range(config.max_new_tokens, 0, -1):
        scores = decoder.logits.to(torch.float32)
        for warper in warpers:
            scores = warper(ids, scores)
        if config.do_sample:
            token = torch.multinomial(scores.softmax(-1), 1).squeeze(-1)
        else:
            token = scores.argmax(-1)
        streamer.put(token)
        if left == 1 or token.item() in ends:
            break
        decoder.step(token)
        memory.ids.append(int(token))
    streamer.end()


class _Pieces(BaseStreamer):
    """Receives token ids from transformers' generate; gives away whole characters.

    given  the pieces of text so far, each of which `stream` gets, too

    ids[start:done] have been given away and are decoded again as context for what follows.
    """

    def __init__(
        self, tokenizer: Any, prompt: list[int], stream: Callable[[str], None] | None
    ) -> None:
        self.tokenizer, self.stream = tokenizer, stream
        self.given: list[str] = []
        self.ids = list(prompt)
        self.start, self.done = max(0, len(prompt) - CONTEXT_TOKENS), len(prompt)
        self.new = 0
        self.first: float | None = None
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:  # generate sends the prompt first
            self.prompt_seen = True
            return
        if self.first is None:
            self.first = time.perf_counter()
        tokens = value.flatten().tolist()
        self.ids += tokens
        self.new += len(tokens)
        self._emit(whole=True)

    def end(self) -> None:
        self._emit(whole=False)

    def _emit(self, whole: bool) -> None:
        before = self._decode(self.ids[self.start : self.done])
        now = self._decode(self.ids[self.start :])
        if whole and now.endswith("\ufffd"):
            return  # the next tokens may complete the character
        if len(now) > len(before):
            self.given.append(now[len(before) :])
            if self.stream is not None:
                self.stream(self.given[-1])
            self.start, self.done = self.done, len(self.ids)

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


def _encode(tokenizer: Any, prompt: str | Sequence[Mapping[str, str]], chat: bool) -> list[int]:
    """Token ids of a prompt, with what the tokenizer or its chat template puts around it."""
    if not isinstance(prompt, str):
        return encode_chat(tokenizer, list(prompt))
    prompt.encode("utf-8")  # raises where it is no text, which tokenizers do in their own words
    ids: list[int] = (
        encode_chat(tokenizer, [{"role": "user", "content": prompt}])
        if chat
        else tokenizer(prompt, verbose=False)["input_ids"]
    )
    if ids := ids or beginning(tokenizer):
        return ids
    raise UsageError(
        "prompt", "is empty, and the tokenizer has no token to begin with", "some text"
    )


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    where: object = "chat",
    remedy: str = "Generate without --chat",
) -> list[int]:
    """Token ids of a chat in the tokenizer's template, up to where the model's turn begins.

    messages       objects with "role" and "content"
    where, remedy  of the error

    Raises UsageError where there is no template, or it fails; UnicodeEncodeError for what is no
    text.
    """
    for message in messages:
        str(message.get("content")).encode("utf-8")
    if not getattr(tokenizer, "chat_template", None):
        found = "the tokenizer has no chat template"
        raise UsageError(where, found, "a model made for chat", remedy)
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]
    except MemoryError:
        raise
    except Exception as error:  # a template is a program of its own and raises what it likes
        why = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(
            where,
            f"the tokenizer's chat template fails ({why})",
            "one that takes a user's message",
            f"{remedy}, or repair the template",
        ) from error
    return ids


def _room(model: Any, prompt: int, new: int | None) -> int:
    """How many tokens to generate: what is asked for, checked against the model's context."""
    context = max_positions(model.config)
    if prompt + (new or 1) > context:
        asked = f" and {new} new ones" if new else ""
        raise UsageError(
            "prompt",
            f"{prompt} tokens{asked}",
            f"at most the model's context of {context} together",
            "Shorten the prompt or ask for fewer new tokens",
        )
    return new or min(NEW_TOKENS, context - prompt)


def check_sampling(
    max_new_tokens: int | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
) -> None:
    """Raise UsageError for an option of `generate` whose value cannot be used."""
    some = max_new_tokens is None or max_new_tokens > 0
    for name, value, good, expected in (
        ("max-new-tokens", max_new_tokens, some, "at least 1"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "0 (greedy) or more"),
        ("seed", seed, seed is None or 0 <= seed < 2**64, "0 to 2^64 - 1"),
        ("top-k", top_k, top_k is None or top_k > 0, "at least 1"),
        ("top-p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
    ):
        if not good:
            raise UsageError(name, f"{value}", expected)
