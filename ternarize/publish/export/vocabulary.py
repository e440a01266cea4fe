"""The vocabulary of a GGUF file: tokens, merges, special tokens, and how text is split.

Two kinds of BPE tokenizers can be carried, and BERT's; any other is refused, since a file that says
something near to it gives wrong tokens without a word:

    "gpt2"    byte-level. A file has no regular expressions, llama.cpp knows splits by name
              (tokenizer.ggml.pre): it must be one of llama_cpp.SPLITS.
    "llama"   SentencePiece's, with spaces as U+2581 and single bytes for unknown characters. A file
              has a score for each token and no merges: any two neighbours merge whose union is a
              token, the one of the highest score first. So the merges must be all that the tokens
              allow, and those of a token must follow each other.
    "bert"    WordPiece, of words between spaces and punctuation. What begins a word has U+2581 in
              front in a file, and what goes on in one is written without "##".

What counts is the tokenizer that transformers runs, not what files say that it overrides. One
difference is told, not refused: LLaMA's tokenizers in transformers put no space before a text that
begins with one, where SentencePiece and llama.cpp do. So are those of BERT's, in _PIECES.
"""

import json
import re
from pathlib import Path
from typing import Any

from ternarize.errors import CheckpointError
from ternarize.files import llama_cpp
from ternarize.models.reads import open_tokenizer

# a Metaspace's prepend_scheme -> which texts get one more space in llama.cpp
_DIFFERENT = {
    "never": [],
    "always": [
        "llama.cpp puts one more space than transformers before text that begins with a space"
    ],
    "first": [
        "llama.cpp puts one more space than transformers before text that begins with a space, "
        "and before text behind a special token"
    ],
}
# where llama.cpp's WordPiece is another than transformers'
_PIECES = [
    "llama.cpp makes other tokens than transformers of Hangul and of vowel signs that take a space "
    "of their own (Devanagari, say), and cuts words of more than 100 characters into pieces"
]
_OWN_CASE = "a llama.cpp that does not know tokenizer.ggml.normalizer.lowercase lower-cases all"


def write(writer: Any, directory: Path, size: int) -> list[str]:
    """Add the vocabulary of a checkpoint to a GGUFWriter.

    size  tokens of the model; where the tokenizer has fewer, the rest is marked as unused

    Returns where llama.cpp takes texts otherwise, in words, if there are such. Raises
    CheckpointError where there is no tokenizer or llama.cpp would split text differently.
    """
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(
            directory,
            "no tokenizer",
            "tokenizer.json",
            "Copy it from the source of the model, or pass --no-tokenizer for a file that takes "
            "token numbers alone",
        )
    tokenizer = open_tokenizer(directory)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown(directory, f"is a {type(tokenizer).__name__}", "a fast tokenizer")
    definition = json.loads(backend.to_str())
    model = definition["model"]
    if model["type"] not in ("BPE", "WordPiece"):
        raise _unknown(directory, f"is {model['type']}", "BPE and WordPiece")
    if model.get("dropout"):
        raise _unknown(directory, "drops merges at random", "none that does")
    tokens, types = _tokens(directory, definition, size)
    if model["type"] == "WordPiece":
        notes = _write_pieces(writer, directory, definition, tokens, types)
        unknown = model["vocab"].get(model.get("unk_token"))
        if unknown is None:  # of which llama.cpp takes token 100
            raise _unknown(directory, "names no token for unknown words", "one that does")
        return notes + _write_specials(writer, directory, tokenizer, "bert", tokens, unknown)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    kind, notes = "llama" if model.get("byte_fallback") else "gpt2", list[str]()
    writer.add_tokenizer_model(kind)
    if kind == "llama":
        prefix, notes = _space_prefix(directory, definition)
        writer.add_add_space_prefix(prefix)
        writer.add_token_scores(_scores(directory, tokens, types, merges))
    else:
        writer.add_tokenizer_pre(_split_name(directory, definition))
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    return notes + _write_specials(writer, directory, tokenizer, kind, tokens)


def _write_pieces(
    writer: Any, directory: Path, definition: dict[str, Any], tokens: list[str], types: list[int]
) -> list[str]:
    """The tokens of a WordPiece, and how text is made ready for it."""
    model, normalizer = definition["model"], definition["normalizer"] or {}
    lower = normalizer.get("lowercase")
    accents = normalizer.get("strip_accents")
    own = {key: normalizer.get(key) for key in llama_cpp.WORDS}
    if own != llama_cpp.WORDS or definition["pre_tokenizer"] != llama_cpp.WORDS_SPLIT:
        shown = json.dumps([normalizer, definition["pre_tokenizer"]], ensure_ascii=False)
        raise _unknown(directory, f"prepares text by {shown:.200}", "the way of BERT")
    if model.get("continuing_subword_prefix") != llama_cpp.GOES_ON:
        raise _unknown(directory, "has no ## before pieces that go on", "that")
    whole = [
        token if kind != llama_cpp.NORMAL else _piece(token)
        for token, kind in zip(tokens, types, strict=True)
    ]
    if len(set(whole)) != len(whole):
        twice = next(token for at, token in enumerate(whole) if token in whole[:at])
        raise _unknown(directory, f"has {twice!r} twice as llama.cpp writes it", "each token once")
    writer.add_tokenizer_model("bert")
    writer.add_token_list(whole)
    writer.add_token_types(types)
    if lower and accents is not False:
        return list(_PIECES)
    # what llama.cpp takes for granted is lower case without accents
    writer.add_bool("tokenizer.ggml.normalizer.lowercase", bool(lower))
    writer.add_bool("tokenizer.ggml.normalizer.strip_accents", bool(accents))
    return [*_PIECES, _OWN_CASE]


def _piece(token: str) -> str:
    """A token of WordPiece as a file has it."""
    goes_on = token.startswith(llama_cpp.GOES_ON)
    return token.removeprefix(llama_cpp.GOES_ON) if goes_on else llama_cpp.SPACE + token


def _space_prefix(directory: Path, definition: dict[str, Any]) -> tuple[bool, list[str]]:
    """Whether a text gets a space in front, and for which texts llama.cpp's rule is another.

    Refuses what does not just write spaces as U+2581.
    """
    normalizer, pre = definition["normalizer"] or {}, definition["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    if pre == llama_cpp.NO_SPLIT and steps == llama_cpp.REPLACE:
        pre = {}  # Gemma's split at spaces, of which none is left
    if not pre and steps in (llama_cpp.PREPEND + llama_cpp.REPLACE, llama_cpp.REPLACE):
        return bool(steps != llama_cpp.REPLACE), []
    plain = pre.get("type") == "Metaspace" and pre.get("split") is False
    scheme = pre.get("prepend_scheme")
    if not steps and plain and pre.get("replacement") == llama_cpp.SPACE and scheme in _DIFFERENT:
        return scheme != "never", _DIFFERENT[scheme]
    shown = json.dumps([normalizer, pre], ensure_ascii=False)
    raise _unknown(directory, f"prepares text by {shown:.200}", "spaces as U+2581, no splits")


def _scores(
    directory: Path, tokens: list[str], types: list[int], merges: list[list[str]]
) -> list[float]:
    """A score for each token by which llama.cpp merges as the merges do; 0 for what none makes."""
    missing = [f"<0x{byte:02X}>" for byte in range(256) if f"<0x{byte:02X}>" not in tokens]
    if missing:
        raise _unknown(directory, f"has no token {missing[0]}", "one for each byte")
    number = {token: at for at, token in enumerate(tokens)}
    scores, made = [0.0] * len(tokens), ""
    for rank, (left, right) in enumerate(merges):
        if left + right != made:
            made = left + right
            if scores[number[made]]:
                raise _unknown(directory, f"merges {made!r} at two places", "one place for each")
            scores[number[made]] = -1.0 - rank
    listed = {(left, right) for left, right in merges}
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == llama_cpp.NORMAL}
    for token in normal:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair not in listed and pair[0] in normal and pair[1] in normal:
                raise _unknown(directory, f"does not merge {pair}", "all merges to be there")
    return scores


def _split_name(directory: Path, definition: dict[str, Any]) -> str:
    """llama.cpp's name of the tokenizer's split."""
    normalizer = (definition["normalizer"] or {}).get("type")
    # llama.cpp never normalizes; Qwen's NFC changes only text that is not composed
    if normalizer not in (None, "NFC"):
        raise _unknown(directory, f"has the normalizer {normalizer}", "none")
    steps = definition["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    steps = [{k: v for k, v in step.items() if k != "trim_offsets"} for step in steps]
    for name, known in llama_cpp.SPLITS.items():
        if steps == known:
            if bool(definition["model"].get("ignore_merges")) != (name in llama_cpp.WHOLE_WORDS):
                continue
            return name
    shown = json.dumps(steps, ensure_ascii=False)
    raise _unknown(
        directory, f"splits text by {shown:.200}", f"one of {', '.join(llama_cpp.SPLITS)}"
    )


def _tokens(directory: Path, definition: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token by its number, and its type."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [llama_cpp.UNUSED] * size
    added = {each["id"]: each for each in definition["added_tokens"]}
    words = {number: word for word, number in definition["model"]["vocab"].items()}
    words |= {number: each["content"] for number, each in added.items()}
    normalizer = definition["normalizer"] or {}
    small = definition["model"]["type"] == "WordPiece" and (
        normalizer.get("lowercase") or normalizer.get("strip_accents")
    )
    for each in added.values():
        for switch in ("lstrip", "rstrip", "single_word"):
            if each.get(switch):
                raise _unknown(
                    directory,
                    f"has {each['content']!r} with {switch}",
                    "added tokens that are found everywhere, and leave the spaces beside them",
                )
        if each.get("normalized") and small:
            raise _unknown(
                directory,
                f"looks for {each['content']!r} in text whose letters it has changed",
                "added tokens that are found in text as it is (normalized false)",
            )
    largest = max(words, default=-1)
    if largest >= size:
        raise _unknown(directory, f"has a token {largest}", f"at most {size - 1}, as the model")
    for number, word in words.items():
        tokens[number], types[number] = word, llama_cpp.NORMAL
        if word == definition["model"].get("unk_token"):
            types[number] = llama_cpp.UNKNOWN
        elif number in added:
            types[number] = (
                llama_cpp.CONTROL if added[number]["special"] else llama_cpp.USER_DEFINED
            )
        elif definition["model"].get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", word):
            types[number] = llama_cpp.BYTE
    return tokens, types


def _write_specials(
    writer: Any,
    directory: Path,
    tokenizer: Any,
    kind: str,
    tokens: list[str],
    unknown: int | None = None,
) -> list[str]:
    """Numbers of special tokens, which of them a text gets, and the template of chats.

    kind     of the vocabulary
    unknown  the token for unknown words; None: the one that the tokenizer names, if any

    Returns which of those that the tokenizer does not have llama.cpp takes to be there, in words.
    """
    names, notes, pieces = llama_cpp.SPECIALS[kind], list[str](), kind == "bert"
    ids = {key: getattr(tokenizer, f"{name}_token_id") for key, name in names.items()}
    ids["unknown"] = ids["unknown"] if unknown is None else unknown
    for key, number in ids.items():
        usual = llama_cpp.USUAL[kind].get(key, len(tokens))
        if number is not None:
            # llama.cpp begins a text with "bos", whatever the model calls it
            getattr(writer, f"add_{'bos' if key == 'bos' else names[key]}_token_id")(number)
        elif key in ("eos", "padding", "mask") and usual < len(tokens):
            notes.append(
                f"the tokenizer has no {names[key]} token, which a file cannot say: llama.cpp "
                f"takes {tokens[usual]!r:.40} for it, its token {usual}"
            )
    first, last = (ids[key] for key in ("bos", "seperator" if pieces else "eos"))
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    front = next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)
    before, after = whole[:front], whole[front + len(plain) :]
    if pieces:  # llama.cpp puts them around a text, whatever a file says
        if first is None or last is None or (before, after) != ([first], [last]):
            around = f"puts {before} before a text and {after} behind it"
            raise _unknown(directory, around, "cls before and sep behind a text of WordPiece")
        return notes
    if before not in ([], [first]) or after not in ([], [last]):
        raise _unknown(
            directory, f"puts {before} before a text and {after} behind it", "bos, eos or nothing"
        )
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    return notes


def _unknown(directory: Path, what: str, expected: str) -> CheckpointError:
    return CheckpointError(
        directory,
        f"its tokenizer {what}; this export to GGUF knows {expected}",
        remedy="Pass --no-tokenizer for a file that takes token numbers alone",
    )
