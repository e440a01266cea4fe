"""Encoders as GGUF, out and in: weights, tokens of WordPiece, and how embeddings are made.

The oracles are the package `gguf`, the packed model that a file is made of, and, where it is
installed, llama.cpp.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import packing
import pytest
import tokenizers
import torch
import transformers
from test_export import EXAMPLE_TEXT, Recorder, read_gguf
from test_import_gguf import dense, write_gguf
from torch import Tensor

import ternarize
from ternarize.convert.run import convert
from ternarize.convert.verify import verify
from ternarize.errors import CheckpointError, FormatError, TernarizeError
from ternarize.files.gguf import read_gguf as read_keys
from ternarize.files.llama_cpp import CONTROL
from ternarize.measure.encoders import embed
from ternarize.plans.recipe import LLAMA_CPP, Recipe
from ternarize.publish.export import export, gguf_keys, vocabulary
from ternarize.publish.export import gguf as gguf_export
from ternarize.publish.export.common import open_verified
from ternarize.sources.imports import open_source
from ternarize.sources.imports.vocabulary import tokenizer_files

Fast: Any = transformers.PreTrainedTokenizerFast
ENDS = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}
TEXTS = [
    "Return the value of 42, it's 100%!",
    "two  spaces,\n\nand tabs\t\u00a0\u3000 end ",
    "na\u00efve caf\u00e9 \u00dcn\u00efc\u00f6de \u2014 e\u0301 \u4f60\u597d \U0001f642 $5 <b> x_y",
    "the [MASK] of the def",
    "zero\u200bwidth \ufffd",
    "",
]
IDS = torch.randint(5, 400, (2, 24), generator=torch.Generator().manual_seed(3))
MEAN = {"word_embedding_dimension": 256, "pooling_mode_mean_tokens": True}


def word_pieces(directory: Path, **normalizer: Any) -> Any:
    """BERT's tokenizer on few words: those of the example text, and every character alone."""
    text = EXAMPLE_TEXT.read_text().lower()
    words = sorted(set(text.split()))[:300]
    letters = sorted(set(text) - set(" \n"))
    vocab = [*ENDS.values(), *letters, *(f"##{letter}" for letter in letters), "[unused0]"]
    vocab += [word for word in words if word not in vocab and word.isalpha()]
    vocab += ["##ing", "##s", "\u4f60", "cafe", "Cafe", "caf\u00e9"]
    numbers = {word: at for at, word in enumerate(dict.fromkeys(vocab))}
    model: Any = tokenizers.models.WordPiece(numbers, unk_token="[UNK]")
    tokenizer: Any = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(**normalizer)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(word, numbers[word]) for word in ("[CLS]", "[SEP]")],
    )
    tokenizer.add_special_tokens(list(ENDS.values()))
    ends = {f"{kind}_token": word for kind, word in ENDS.items()}
    wrapped = Fast(tokenizer_object=tokenizer, **ends)
    wrapped.save_pretrained(directory)
    return wrapped


def put_modules(directory: Path, pooling: dict[str, Any], *others: str) -> None:
    """The files of sentence-transformers around a transformer."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", **{f"{n}_": n for n in others}}
    table = [
        {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for at, (path, kind) in enumerate(kinds.items())
    ]
    (directory / "modules.json").write_text(json.dumps(table))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bert") / "source"
    config = transformers.BertConfig(
        vocab_size=512,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        max_position_embeddings=64,
        architectures=["BertModel"],
    )
    model: Any = transformers.BertModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((1.0 if "Norm.weight" in name else 0.0) + 0.1 * noise)
    model.save_pretrained(directory)
    word_pieces(directory)
    put_modules(directory, MEAN, "Normalize")
    return directory


@pytest.fixture(scope="module")
def packed(source: Path) -> Path:
    convert(source, source.parent / "packed", Recipe("itf", engine=LLAMA_CPP))
    return source.parent / "packed"


@pytest.fixture(scope="module")
def file(packed: Path) -> Path:
    report = export(packed, packed.parent / "m.gguf", "gguf")
    assert report["exact"] and report["type"] == "tq2_0" and not report["lost"]
    assert any("the pooler is left out" in note for note in report["notes"])
    return packed.parent / "m.gguf"


@torch.no_grad()
def hidden(directory: Path) -> Tensor:
    found: Tensor = ternarize.load(directory, dtype="float32")(IDS).last_hidden_state
    return found


def test_a_file_says_what_llama_cpp_asks_for(source: Path, file: Path) -> None:
    fields, tensors = read_gguf(file)
    said = {key.removeprefix("bert."): value for key, value in fields.items()}
    assert said["general.architecture"] == "bert" and said["attention.causal"] is False
    assert said["pooling_type"] == gguf.PoolingType.MEAN and said["context_length"] == 64
    assert said["tokenizer.ggml.token_type_count"] == 2
    assert said["attention.layer_norm_epsilon"] == pytest.approx(1e-12)
    assert (said["block_count"], said["attention.head_count"]) == (2, 4)
    assert (said["embedding_length"], said["feed_forward_length"]) == (256, 512)
    before = packing.read_checkpoint(source)
    for new, name in (
        ("token_types.weight", "embeddings.token_type_embeddings.weight"),
        ("position_embd.weight", "embeddings.position_embeddings.weight"),
        ("token_embd_norm.bias", "embeddings.LayerNorm.bias"),
        ("blk.1.attn_output_norm.weight", "encoder.layer.1.attention.output.LayerNorm.weight"),
        ("blk.1.layer_output_norm.bias", "encoder.layer.1.output.LayerNorm.bias"),
        ("blk.0.attn_k.bias", "encoder.layer.0.attention.self.key.bias"),
    ):
        assert np.array_equal(tensors[new].data, before[name].numpy()), new
    names = {f"blk.0.{each}.weight" for each in ("attn_q", "attn_output", "ffn_up", "ffn_down")}
    assert names <= tensors.keys() and not [name for name in tensors if "pooler" in name]


def test_an_encoder_comes_back(packed: Path, file: Path, tmp_path: Path) -> None:
    """Weights, tokens, and the folder that sentence-transformers reads; a file has no pooler."""
    with pytest.raises(CheckpointError, match=r"lacks pooler.dense.*--allow-missing"):
        convert(file, tmp_path / "back")
    record = convert(file, tmp_path / "back", allow_missing=True)
    before, after = dense(packed), dense(tmp_path / "back")
    assert {name for name in before if "pooler" not in name} == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert {row["method"] for row in record["tensors"].values() if "method" in row} == {"lossless"}
    assert verify(tmp_path / "back", source=file)["source_compared"]
    assert torch.equal(hidden(tmp_path / "back"), hidden(packed))
    ours, theirs = map(transformers.AutoTokenizer.from_pretrained, (packed, tmp_path / "back"))
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours(text)["input_ids"], text
        ids = ours(text)["input_ids"]
        assert theirs.decode(ids) == ours.decode(ids)
    assert theirs("a", "b")["token_type_ids"] == [0, 0, 0, 1, 1]
    assert theirs.mask_token_id == ours.mask_token_id and theirs.cls_token == "[CLS]"
    modules = json.loads((tmp_path / "back/modules.json").read_text())
    assert [each["path"] for each in modules] == ["", "1_Pooling"]
    assert json.loads((tmp_path / "back/1_Pooling/config.json").read_text()) == MEAN


A = "tokenizer.ggml."


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"bert.attention.causal": True}, "attention.causal true; expected false"),
        ({"bert.context_length": 32}, "64 features in its tensors; expected 32, as its context_l"),
        ({"bert.expert_count": 2}, "expert_count 2; expected no such key"),
        ({A + "normalizer.lowercase": 1}, "lowercase is '1'; expected true or false"),
        ({A + "normalizer.strip_accents": "no"}, "strip_accents is 'no'; expected true or false"),
        ({A + "unknown_token_id": 2**20}, "unknown token 1048576; expected one of 512"),
    ],
)
def test_other_files_of_encoders_are_refused(
    file: Path, tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    with pytest.raises(TernarizeError, match=said):
        open_source(_rewritten(file, tmp_path / "m.gguf", changed))


def usual_keys(**more: Any) -> dict[str, Any]:
    """Keys of a file with BERT's own numbers, and few words."""
    tokens, types = [f"\u2581w{number}" for number in range(110)], np.ones(110, np.int32)
    for number, kind in ((0, "pad"), (100, "unk"), (101, "cls"), (102, "sep"), (103, "mask")):
        tokens[number], types[number] = ENDS[kind], CONTROL
    keys = {"model": "bert", "tokens": tokens, "token_type": types, **more}
    return {A + key: value for key, value in keys.items()}


@pytest.mark.parametrize(
    ("more", "first"),
    [
        ({}, "[CLS]"),  # llama.cpp's numbers
        ({"cls_token_id": 5, "seperator_token_id": 102}, "w5"),  # as in 2024
        ({"cls_token_id": 5, "bos_token_id": 101}, "[CLS]"),
    ],
)
def test_special_tokens_that_a_file_does_not_name(more: dict[str, Any], first: str) -> None:
    files, notes = tokenizer_files("m.gguf", usual_keys(**more), 110)
    assert not notes
    tokenizer: Any = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    assert tokenizer.encode("w7 ?").tokens == [first, "w7", "[UNK]", "[SEP]"]
    special = json.loads(files["tokenizer_config.json"])
    assert (special["pad_token"], special["mask_token"]) == ("[PAD]", "[MASK]")


def test_a_number_that_is_named_is_no_other_token() -> None:
    """Neither the first token nor one for unknown words fills texts, or hides words."""
    files, _ = tokenizer_files("m.gguf", usual_keys(bos_token_id=0, unknown_token_id=103), 110)
    special = json.loads(files["tokenizer_config.json"])
    assert (special["cls_token"], special["unk_token"]) == ("[PAD]", "[MASK]")
    assert special["sep_token"] == "[SEP]"
    assert not {"pad_token", "mask_token"} & {key for key, value in special.items() if value}


def test_words_are_not_taken_for_special_tokens() -> None:
    keys = usual_keys(token_type=np.ones(110, np.int32))
    files, notes = tokenizer_files("m.gguf", keys, 110)
    assert not files and "names no bos token: no tokenizer is written" in notes[0]


@pytest.mark.parametrize("text", ["a:b", "$A"])
def test_a_first_token_that_no_template_takes_ends_in_one_line(text: str) -> None:
    keys = usual_keys()
    keys[A + "tokens"][101] = text
    with pytest.raises(FormatError, match=r"^m.gguf: .*(makes no tokenizer|around a text)"):
        tokenizer_files("m.gguf", keys, 110)


def test_a_folder_keeps_what_it_has_of_its_own(packed: Path, file: Path, tmp_path: Path) -> None:
    """Of tokenizer and modules either may be there; the other comes from the file."""
    for name in ("tokens", "modules"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.gguf").symlink_to(file)
    own = tmp_path / "tokens/tokenizer.json"
    own.write_text(json.dumps(json.loads((packed / "tokenizer.json").read_text()), indent=7))
    cls = {"word_embedding_dimension": 256, "pooling_mode_cls_token": True}
    put_modules(tmp_path / "modules", cls, "Normalize")
    for name, pooling in (("tokens", MEAN), ("modules", cls)):
        convert(tmp_path / name, tmp_path / f"{name}-out", allow_missing=True)
        found = json.loads((tmp_path / f"{name}-out/1_Pooling/config.json").read_text())
        assert found == pooling, name
        assert (tmp_path / f"{name}-out/tokenizer.json").is_file()
    assert (tmp_path / "tokens-out/tokenizer.json").read_bytes() == own.read_bytes()
    modules = json.loads((tmp_path / "modules-out/modules.json").read_text())
    assert [each["path"] for each in modules] == ["", "1_Pooling", "Normalize_"]


@pytest.mark.parametrize(
    ("kind", "note"),
    [(1, "Normalize is not written"), (4, "pooling_type 4"), (0, ""), ("x", "pooling_type x")],
)
def test_what_is_lost_of_the_pooling_is_said(
    file: Path, tmp_path: Path, kind: Any, note: str
) -> None:
    path = _rewritten(file, tmp_path / "m.gguf", {"bert.pooling_type": kind})
    found: Any = open_source(path)
    said = [each for each in found.notes if "ooling_type" in each or "Normalize" in each]
    assert len(said) == bool(note) and all(note in each for each in said)


def test_a_word_that_would_be_there_twice_leaves_the_tokenizer_out(
    file: Path, tmp_path: Path
) -> None:
    tokens = read_keys(file)[0][A + "tokens"]
    tokens[tokens.index("\u2581cafe")] = "\u2581[CLS]"
    found: Any = open_source(_rewritten(file, tmp_path / "m.gguf", {A + "tokens": tokens}))
    assert any("has a token twice" in note for note in found.notes)
    assert "tokenizer.json" not in found.made and "modules.json" in found.made


def _rewritten(file: Path, target: Path, changed: dict[str, Any]) -> Path:
    """A GGUF file with other keys; None: without that one."""
    keys, stored = read_keys(file)
    keys = {key: value for key, value in (keys | changed).items() if value is not None}
    tensors = {}
    for tensor in stored:
        data = tensor.read(0, tensor.shape[0] if len(tensor.shape) > 1 else 1)
        tensors[tensor.name] = (tensor.type, tensor.shape, data.numpy().tobytes())
    return write_gguf(target, keys, tensors)


def test_llama_cpp_gives_our_embeddings(packed: Path, file: Path) -> None:
    """It rounds activations to 8 bits; tokens are equal."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(file), embedding=True, n_ctx=64, verbose=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(packed)
    for text in TEXTS:
        found = model.tokenize(text.encode(), add_bos=True, special=True)
        assert found == tokenizer(text)["input_ids"], text
    found = torch.tensor([model.embed(text, normalize=True) for text in TEXTS[:3]])
    model.close()
    expected = embed(ternarize.load(packed, dtype="float32"), tokenizer, TEXTS[:3])
    assert float((found * expected).sum(-1).min()) > 0.999


@pytest.mark.parametrize(
    ("pooling", "others", "said"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, (), "CLS"),
        ({"pooling_mode": "lasttoken", "embedding_dimension": 128}, ("Normalize",), "LAST"),
        ({"pooling_mode_max_tokens": True}, (), "pooling by pooling_mode_max_tokens; expected the"),
        (MEAN | {"pooling_mode_cls_token": True}, (), "pooling by .*mean_tokens, .*cls_token"),
        ({}, (), "pooling by nothing that is said"),
        (MEAN, ("Dense", "Normalize"), "modules Transformer, Pooling, Dense, Normalize; expected"),
    ],
)
def test_embeddings_are_made_as_the_modules_say_or_refused(
    packed: Path, tmp_path: Path, pooling: dict[str, Any], others: tuple[str, ...], said: str
) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in packed.iterdir():
        if path.is_file():
            (changed / path.name).symlink_to(path)
    (changed / "modules.json").unlink()
    put_modules(changed, pooling, *others)
    if said.isupper():
        export(changed, tmp_path / "m.gguf", "gguf")
        assert read_gguf(tmp_path / "m.gguf")[0]["bert.pooling_type"] == gguf.PoolingType[said]
        return
    with pytest.raises(CheckpointError, match=said):
        export(changed, tmp_path / "m.gguf", "gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("[1, 2]", "modules.json: is no list of modules"),
        ("[{", "modules.json: is no list of modules"),
        ('[{"path": ""}]', "modules.json: is no list of modules"),
        (["Transformer", "Pooling"], "pooling by nothing that is said"),  # at "", as the model
        (["Transformer", "Pooling", "Normalize"], "CLS"),
    ],
)
def test_modules_are_read_by_their_own_entries(tmp_path: Path, changed: Any, said: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    text = changed
    if not isinstance(changed, str):
        places = ["", "" if len(changed) == 2 else "1_Pooling", ""]
        kinds = zip(changed, places[: len(changed)], strict=True)
        text = json.dumps([{"type": f"a.{kind}", "path": at} for kind, at in kinds])
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode": "cls"}')
    (tmp_path / "modules.json").write_text(text)
    packed: Any = SimpleNamespace(directory=tmp_path)
    if said.isupper():
        assert gguf_keys.pooling_of(packed) == said
        return
    with pytest.raises(TernarizeError, match=said) as caught:
        gguf_keys.pooling_of(packed)
    assert "\n" not in str(caught.value)


def test_what_sentence_transformers_does_beside_is_said(tmp_path: Path) -> None:
    packed: Any = SimpleNamespace(directory=tmp_path)
    assert gguf_keys.embedding_notes(packed) == []
    put_modules(tmp_path, MEAN, "Normalize")
    (tmp_path / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    prompts = '{"prompts": {"q": "query: "}, "default_prompt_name": "q"}'
    (tmp_path / "config_sentence_transformers.json").write_text(prompts)
    notes = gguf_keys.embedding_notes(packed)
    for note, said in zip(notes, ("(Normalize)", "do_lower_case", "prompt 'q'"), strict=True):
        assert said in note


def test_what_a_file_does_not_have_decides_no_type(packed: Path) -> None:
    """Of a tensor that is left out no block is asked for."""
    opened = open_verified(packed)
    name = next(n for n, r in opened.records.items() if r.kind == "ternary" and "query" in n)
    moved = {name: gguf_export._Moves(columns=torch.arange(512), run=64)}
    for left, kind in (([], "q2_0"), ([name], "tq2_0")):
        assert gguf_export._chosen(opened, gguf_export.DEFAULT_TYPES, False, moved, left)[0] == kind


def test_without_modules_a_file_leaves_the_pooling_open(packed: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in packed.iterdir():
        if path.is_file() and path.name != "modules.json":
            (changed / path.name).symlink_to(path)
    export(changed, tmp_path / "m.gguf", "gguf", tokenizer=False)
    fields, _ = read_gguf(tmp_path / "m.gguf")
    assert "bert.pooling_type" not in fields and fields["tokenizer.ggml.token_type_count"] == 2
    source: Any = open_source(tmp_path / "m.gguf")
    assert "modules.json" not in source.made


@pytest.mark.parametrize(
    ("normalizer", "keys"),
    [
        ({}, None),
        ({"lowercase": False}, (False, False)),
        ({"lowercase": True, "strip_accents": False}, (True, False)),
    ],
)
def test_capitals_and_accents_are_said_where_they_stay(
    tmp_path: Path, normalizer: dict[str, Any], keys: tuple[bool, bool] | None
) -> None:
    word_pieces(tmp_path, **normalizer)
    found: dict[str, bool] = {}
    recorder: Any = Recorder()
    recorder.__dict__["add_bool"] = found.__setitem__
    notes = vocabulary.write(recorder, tmp_path, 512)
    calls = recorder.calls
    assert calls["add_tokenizer_model"] == "bert"
    assert {"[CLS]", "\u2581cafe", "ing", "\u2581[unused0]"} <= set(calls["add_token_list"])
    assert calls["add_bos_token_id"] == 1 and calls["add_sep_token_id"] == 2
    names = [f"tokenizer.ggml.normalizer.{each}" for each in ("lowercase", "strip_accents")]
    assert found == ({} if keys is None else dict(zip(names, keys, strict=True)))
    assert any("normalizer.lowercase" in note for note in notes) is (keys is not None)


def _split_elsewhere(directory: Path) -> None:
    tokenizer = word_pieces(directory)
    tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save_pretrained(directory)


def _found_in_small_letters(directory: Path) -> None:
    tokenizer = word_pieces(directory)
    tokenizer.add_tokens([tokenizers.AddedToken("Cafe", normalized=True)])
    tokenizer.save_pretrained(directory)


def test_unknown_words_are_those_of_the_model(tmp_path: Path) -> None:
    """Also where the tokenizer names none: llama.cpp would take token 100."""
    tokenizer = word_pieces(tmp_path)
    tokenizer.unk_token = None
    tokenizer.save_pretrained(tmp_path)
    recorder: Any = Recorder()
    recorder.__dict__["add_bool"] = {}.__setitem__
    vocabulary.write(recorder, tmp_path, 512)
    assert recorder.calls["add_unk_token_id"] == 0


def test_tokens_that_llama_cpp_takes_to_be_there_are_told(tmp_path: Path) -> None:
    """It has no other way than to name a number: of WordPiece 0 and 103 fill and hide words."""
    tokenizer = word_pieces(tmp_path)
    tokenizer.pad_token = tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path)
    recorder: Any = Recorder()
    recorder.__dict__["add_bool"] = {}.__setitem__
    said = [note for note in vocabulary.write(recorder, tmp_path, 512) if "cannot say" in note]
    assert not {"add_pad_token_id", "add_mask_token_id"} & recorder.calls.keys()
    assert [re.sub("'.*'", "X", note) for note in said] == [
        f"the tokenizer has no {name} token, which a file cannot say: llama.cpp takes X for it, "
        f"its token {number}"
        for name, number in (("pad", 0), ("mask", 103))
    ]


def _without_ends(directory: Path) -> None:
    tokenizer = word_pieces(directory)
    plain = tokenizers.processors.TemplateProcessing(single="$A", special_tokens=[])
    tokenizer.backend_tokenizer.post_processor = plain
    tokenizer.save_pretrained(directory)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_split_elsewhere, "prepares text by .*Whitespace"),
        (lambda folder: word_pieces(folder, handle_chinese_chars=False), "prepares text by .*chin"),
        (_found_in_small_letters, "looks for 'Cafe' in text whose letters"),
        (_without_ends, r"puts \[\] before a text and \[\] behind it"),
    ],
)
def test_other_word_pieces_are_refused(
    make: Callable[[Path], Any], said: str, tmp_path: Path
) -> None:
    make(tmp_path)
    recorder: Any = Recorder()
    with pytest.raises(CheckpointError, match=said):
        vocabulary.write(recorder, tmp_path, 512)


def test_other_encoders_are_refused_before_the_work(source: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in source.iterdir():
        (changed / path.name).symlink_to(path)
    table = json.loads((source / "config.json").read_text()) | {"hidden_act": "relu"}
    (changed / "config.json").unlink()
    (changed / "config.json").write_text(json.dumps(table))
    with pytest.raises(TernarizeError, match="hidden_act 'relu', which no file of llama.cpp says"):
        convert(changed, tmp_path / "out", Recipe("itf", engine=LLAMA_CPP))
