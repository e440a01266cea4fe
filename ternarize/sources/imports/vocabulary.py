"""A tokenizer of transformers from the vocabulary of a GGUF file; export/vocabulary.py is the way
back.

    "gpt2"    byte-level BPE, with the split that the file names, one of llama_cpp.SPLITS
    "llama"   SentencePiece's BPE, as llama.cpp runs it: a space in front if the file says so, the
              two neighbours whose union has the highest score merge first
    "bert"    WordPiece

Any other vocabulary, and one with a token twice, is left out, with a note: a tokenizer that is
nearly right gives wrong tokens without a word.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers

from ternarize.errors import FormatError
from ternarize.files import llama_cpp

# other names of splits that llama.cpp treats like those of llama_cpp.SPLITS, in llama-vocab.cpp
_ALSO = {
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"), "llama-bpe"),
    "deepseek-r1-qwen": "qwen2",
    "phi-2": "gpt-2",
}
_LONGEST_WORD = 100  # characters; BERT takes longer ones for unknown
_LONGEST = 512  # characters of a token; in every place of each a merge is looked for
_NONE = (
    "no tokenizer is written; copy tokenizer.json and tokenizer_config.json from the maker's "
    "checkpoint"
)


def tokenizer_files(
    where: str, keys: Mapping[str, Any], size: int
) -> tuple[dict[str, bytes], list[str]]:
    """The files of the tokenizer that a GGUF file describes, by name, and notes in words.

    where  the file, for errors
    keys   of the file
    size   tokens of the model

    No files where the vocabulary is of a kind that is not known; a note says so. Raises FormatError
    where values have other types than they must, or lists do not belong together.
    """
    kind = keys.get("tokenizer.ggml.model", "none")
    if not isinstance(kind, str):
        raise _bad_vocabulary(where, "the kind of its vocabulary is no string", "one")
    if kind == "none":
        return {}, ["the file has no vocabulary: no tokenizer is written"]
    pre = keys.get("tokenizer.ggml.pre", "default")
    split = _ALSO.get(pre, pre) if isinstance(pre, str) else ""
    if kind not in ("gpt2", "llama", "bert") or (kind == "gpt2" and split not in llama_cpp.SPLITS):
        what = f"split {pre!r:.40}" if kind == "gpt2" else f"kind {kind!r:.40}"
        return {}, [f"its vocabulary is of the {what}, which is not known here: {_NONE}"]
    tokens, types = _read_tokens(where, keys, size)
    if kind == "bert":
        pairs = zip(tokens, types, strict=True)
        tokens = [_word(token) if each == llama_cpp.NORMAL else token for token, each in pairs]
    names, specials = llama_cpp.SPECIALS[kind], _specials(where, keys, tokens, types, kind)
    if kind == "bert":
        missing = [name for name in ("bos", "seperator", "unknown") if name not in specials]
        if missing:
            return {}, [f"its vocabulary names no {missing[0]} token: {_NONE}"]
    if len(set(tokens)) != len(tokens):
        return {}, [f"its vocabulary has a token twice: {_NONE}"]
    if kind == "llama" and max(map(len, tokens)) > _LONGEST:
        return {}, [f"its vocabulary has a token of more than {_LONGEST} characters: {_NONE}"]
    if kind == "bert":
        tokenizer = _pieces(where, keys, tokens, types, specials)
    else:
        tokenizer = (
            _byte_level(where, keys, tokens, types, split)
            if kind == "gpt2"
            else _sentencepiece(where, keys, tokens, types)
        )
        bos_is_usual = kind == "llama" or split in llama_cpp.WHOLE_WORDS  # llama.cpp's defaults
        _add_ends(where, keys, tokenizer, specials, bos_is_usual)
    make: Any = transformers.PreTrainedTokenizerFast
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    wrapped = make(
        tokenizer_object=tokenizer,
        **({"model_input_names": inputs} if kind == "bert" else {}),
        clean_up_tokenization_spaces=False,
        **{f"{names[name]}_token": token for name, token in specials.items()},
    )
    template = keys.get("tokenizer.chat_template")
    if isinstance(template, str):
        wrapped.chat_template = template
    with tempfile.TemporaryDirectory() as folder:
        wrapped.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
    return files, []


def _add_ends(
    where: str,
    keys: Mapping[str, Any],
    tokenizer: tokenizers.Tokenizer,
    specials: Mapping[str, str],
    bos_is_usual: bool,
) -> None:
    """Let a tokenizer put the first and the last token around a text, if the file says so."""
    begin, end = (
        _switch(where, keys, f"add_{name}_token", name == "bos" and bos_is_usual)
        for name in ("bos", "eos")
    )
    for flag, name in ((begin, "bos"), (end, "eos")):
        if flag and name not in specials:
            raise _bad_vocabulary(where, f"adds {name}, but has none", "its number")
    first, last = (
        [specials[name]] if flag else [] for flag, name in ((begin, "bos"), (end, "eos"))
    )
    if first or last:
        _put_around(where, tokenizer, first, last, again=first)


def _put_around(
    where: str, tokenizer: tokenizers.Tokenizer, first: list[str], last: list[str], again: list[str]
) -> None:
    """Let a tokenizer put tokens around a text; of two, `again` comes before the second."""
    words = list(dict.fromkeys(first + last))
    for word in words:
        if word.startswith("$"):  # which stands for a text there
            raise _bad_vocabulary(where, f"puts {word!r:.40} around a text", "a token without $")
    single = [*first, "$A", *last]
    pair = [*single, *(f"{part}:1" for part in [*again, "$B", *last])]
    with _making(where):
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=single,
            pair=pair,
            special_tokens=[(word, tokenizer.token_to_id(word)) for word in words],
        )


def _read_tokens(where: str, keys: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    tokens: Any = keys.get("tokenizer.ggml.tokens")
    if not _are(tokens, str) or not 0 < len(tokens) <= size:
        count = len(tokens) if isinstance(tokens, list) else "no"
        wanted = f"one for each row of the token embedding, {size}"
        raise _bad_vocabulary(where, f"its vocabulary has {count} tokens", wanted)
    types = keys.get("tokenizer.ggml.token_type")
    if types is None:
        return tokens, [llama_cpp.NORMAL] * len(tokens)
    integers = isinstance(types, np.ndarray) and types.dtype.kind in "iu"
    if not integers or len(types) != len(tokens):
        raise _bad_vocabulary(where, "has no type for each token", "that")
    return tokens, [int(kind) for kind in types]


def _are(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(each, kind) for each in value)


def _specials(
    where: str, keys: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], kind: str
) -> dict[str, str]:
    """The special tokens by their keys.

    What a file does not name are llama.cpp's numbers, if these are special and named nothing else;
    of WordPiece the first token is "cls" in files of 2024.
    """
    found: dict[str, int] = {}
    for name in (*llama_cpp.SPECIALS[kind], *(["cls"] if kind == "bert" else [])):
        number = keys.get(f"tokenizer.ggml.{name}_token_id")
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < len(tokens):
            raise _bad_vocabulary(where, f"{name} token {str(number):.20}", f"one of {len(tokens)}")
        found[name] = number
    first = found.pop("cls", None)
    found = found if first is None else {"bos": first, **found}
    usual = {
        name: number
        for name, number in llama_cpp.USUAL[kind].items()
        if number < len(tokens)
        and types[number] in (llama_cpp.CONTROL, llama_cpp.UNKNOWN)
        and number not in found.values()
    }
    return {name: tokens[number] for name, number in {**usual, **found}.items()}


def _switch(where: str, keys: Mapping[str, Any], name: str, default: bool) -> bool:
    """Whether a file says so, or the default where it does not say."""
    value = keys.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise _bad_vocabulary(where, f"{name} is {str(value)!r:.40}", "true or false")
    return value


def _added(
    tokenizer: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]
) -> tokenizers.Tokenizer:
    """The tokens that are found in a text before it is split; they keep their numbers."""
    for kinds, add in (
        ((llama_cpp.CONTROL, llama_cpp.UNKNOWN), tokenizer.add_special_tokens),
        ((llama_cpp.USER_DEFINED,), tokenizer.add_tokens),
    ):
        found = [
            tokenizers.AddedToken(token, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in kinds
        ]
        add(found)
    return tokenizer


def _byte_level(
    where: str, keys: Mapping[str, Any], tokens: list[str], types: list[int], split: str
) -> tokenizers.Tokenizer:
    merges: Any = keys.get("tokenizer.ggml.merges")
    if not _are(merges, str) or any(merge.count(" ") != 1 for merge in merges):
        raise _bad_vocabulary(where, "its merges are no pairs", "pairs")
    vocabulary = {token: number for number, token in enumerate(tokens)}
    for merge in merges:
        if not {*merge.split(" "), merge.replace(" ", "")} <= vocabulary.keys():
            found = f"the merge {merge!r:.80} has parts or a result that are no tokens"
            raise _bad_vocabulary(where, found, "tokens")
    model = {
        "type": "BPE",
        "vocab": vocabulary,
        "merges": [merge.split(" ") for merge in merges],
        "ignore_merges": split in llama_cpp.WHOLE_WORDS,
    }
    steps = [
        {**step, "trim_offsets": True} if step["type"] == "ByteLevel" else step
        for step in llama_cpp.SPLITS[split]
    ]
    tokenizer = _make_tokenizer(where, model, None, {"type": "Sequence", "pretokenizers": steps})
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return _added(tokenizer, tokens, types)


def _sentencepiece(
    where: str, keys: Mapping[str, Any], tokens: list[str], types: list[int]
) -> tokenizers.Tokenizer:
    scores = keys.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        raise _bad_vocabulary(where, "has no score for each token", "that")
    normal = {
        token
        for token, kind in zip(tokens, types, strict=True)
        if kind in (llama_cpp.NORMAL, llama_cpp.USER_DEFINED)
    }
    value = dict(zip(tokens, scores.tolist(), strict=True))
    merges = [
        (made[:cut], made[cut:])
        for made in sorted(normal, key=lambda token: (-value[token], token))
        for cut in range(1, len(made))
        if made[:cut] in normal and made[cut:] in normal
    ]
    unknown = keys.get("tokenizer.ggml.unknown_token_id", 0)
    model = {
        "type": "BPE",
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": merges,
        "byte_fallback": True,
        "fuse_unk": True,
        "unk_token": tokens[unknown] if 0 <= unknown < len(tokens) else None,
    }
    prefix = _switch(where, keys, "add_space_prefix", True)
    steps = llama_cpp.PREPEND * prefix + llama_cpp.REPLACE
    tokenizer = _make_tokenizer(where, model, {"type": "Sequence", "normalizers": steps}, None)
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(llama_cpp.SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    return _added(tokenizer, tokens, types)


def _pieces(
    where: str,
    keys: Mapping[str, Any],
    tokens: list[str],
    types: list[int],
    specials: Mapping[str, str],
) -> tokenizers.Tokenizer:
    lower = _switch(where, keys, "normalizer.lowercase", True)
    normalizer = {
        **llama_cpp.WORDS,
        "strip_accents": _switch(where, keys, "normalizer.strip_accents", lower),
        "lowercase": lower,
    }
    model = {
        "type": "WordPiece",
        "vocab": {token: number for number, token in enumerate(tokens)},
        "unk_token": specials["unknown"],
        "continuing_subword_prefix": llama_cpp.GOES_ON,
        "max_input_chars_per_word": _LONGEST_WORD,
    }
    tokenizer = _make_tokenizer(where, model, normalizer, llama_cpp.WORDS_SPLIT)
    tokenizer.decoder = tokenizers.decoders.WordPiece(prefix=llama_cpp.GOES_ON)
    first, last = specials["bos"], specials["seperator"]
    _put_around(where, tokenizer, [first], [last], again=[])
    return _added(tokenizer, tokens, types)


def _word(token: str) -> str:
    """A token of a file as WordPiece has it."""
    begins = token.startswith(llama_cpp.SPACE)
    return token.removeprefix(llama_cpp.SPACE) if begins else llama_cpp.GOES_ON + token


def _make_tokenizer(
    where: str, model: dict[str, Any], normalizer: Any, pre_tokenizer: Any
) -> tokenizers.Tokenizer:
    definition = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "model": model,
    }
    with _making(where):
        return tokenizers.Tokenizer.from_str(json.dumps(definition))


@contextmanager
def _making(where: str) -> Iterator[None]:
    """FormatError where tokenizers makes nothing of what a file has."""
    try:
        yield
    except Exception as error:  # tokenizers raises nothing narrower
        found = f"its vocabulary makes no tokenizer ({str(error):.120})"
        raise _bad_vocabulary(where, found, "one") from None


def _bad_vocabulary(where: str, found: str, expected: str) -> FormatError:
    return FormatError(where, found, expected, "Fetch it again")
