"""Scales in 8 bits, two planes, int8, int4, packed ends: converted, loaded, saved again.

Every test goes the whole way: a tiny model is converted, verified against its source, loaded, and
compared with an ordinary model that holds the dequantized weights.
"""

import copy
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import packing
import pytest
import reference
import tiny_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ternarize
from ternarize.convert.run import convert
from ternarize.convert.verify import verify
from ternarize.errors import SelectionError, UsageError
from ternarize.files import container, metadata
from ternarize.measure.report import inspect
from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import Recipe
from ternarize.runtime import forms
from ternarize.runtime.modules.embedding import PackedEmbedding
from ternarize.runtime.modules.linear import TernaryLinear
from ternarize.runtime.packed import Packed
from ternarize.sources.checkpoint import open_checkpoint
from ternarize.sources.packed import open_packed
from ternarize.trits.int4 import encode_int4, pack_int4
from ternarize.trits.methods import METHODS, with_scale_bits
from ternarize.trits.scales import scale_values

EIGHT = Recipe("itf", 32, scale_bits=8)
TWO = Recipe("itf", 32, planes=("*",))
SOME = ["llama", "llama_tied", "gpt2", "bert", "t5", "gemma3_text", "mixtral"]


def converted(name: str, folder: Path, recipe: Recipe, **options: Any) -> dict[str, Any]:
    """Convert a tiny model, checked in every way there is; returns the record."""
    tiny_models.save(name, folder / "source", **options)
    record = convert(folder / "source", folder / "packed", recipe)
    verify(folder / "packed", folder / "source")
    assert reference.main([str(folder / "packed")]) == 0
    packing.dense_twin(folder / "packed", folder / "source", folder / "dense")
    return record


def assert_like_its_twin(folder: Path) -> Any:
    """The packed model gives the logits of its dense twin, and saves what it was loaded from."""
    model: Any = ternarize.load(folder / "packed", dtype=torch.float32)
    dense = packing.load_dense(folder / "dense", dtype=torch.float32)
    packing.assert_like_dense(model, dense)
    assert model.dtype == torch.float32
    model = ternarize.load(folder / "packed")
    model.save_pretrained(folder / "saved")
    saved, packed = (packing.read_checkpoint(folder / d) for d in ("saved", "packed"))
    assert saved.keys() == packed.keys()
    for name in saved:
        assert saved[name].dtype == packed[name].dtype
        assert torch.equal(saved[name], packed[name]), name
    assert packing.read_records(folder / "saved") == packing.read_records(folder / "packed")
    verify(folder / "saved")
    assert reference.main([str(folder / "saved")]) == 0
    return model


def features(folder: Path) -> list[str]:
    (file,) = open_checkpoint(folder).metadata.values()
    found: list[str] = json.loads(file["ternarize"])["features"]
    return found


# --- scales in 8 bits ------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [64, 0])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "t5"])
def test_8_bit_scales_go_the_whole_way(name: str, group_size: int, tmp_path: Path) -> None:
    converted(name, tmp_path, replace(EIGHT, group_size=group_size))
    assert features(tmp_path / "packed") == ["scale8"]
    assert_like_its_twin(tmp_path)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_8_bit_scales_are_rounded_ones_and_trits_of_itf_nearest_to_them(
    method: str, tmp_path: Path
) -> None:
    converted("llama", tmp_path, Recipe(method, 32, scale_bits=8))
    source = load_file(tmp_path / "source" / "model.safetensors")
    packed, records = open_packed(tmp_path / "packed")
    stored = packing.read_checkpoint(tmp_path / "packed")
    for name, record in records.items():
        if record.shape is not None:
            codes = stored[f"{name}_scale"]
            expected = METHODS[method](source[name], 32)
            rule = with_scale_bits(8) if method == "itf" else METHODS[method]
            found = container.decode(stored[name], codes, record)
            assert codes.dtype == torch.uint8
            assert torch.equal(found.trits, rule(source[name], 32).trits)
            assert torch.equal(found.scales, scale_values(codes, torch.float64))
            error = (found.scales - expected.scales).abs()
            assert bool((error <= expected.scales / 16).all())  # half a step of 1/8


def test_bits_per_weight_of_8_bit_scales_are_counted_from_the_file(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        **{**tiny_models.TEXT, "hidden_size": 128, "head_dim": 32, "intermediate_size": 256},
        architectures=["LlamaForCausalLM"],
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    for group_size, bpw in ((64, 1.75), (128, 1.6875)):
        folder = tmp_path / str(group_size)
        convert(tmp_path / "source", folder, Recipe("itf", group_size, scale_bits=8))
        assert inspect(folder)["totals"]["ternary_bpw"] == bpw


def test_8_bit_scales_are_not_touched_by_casting_a_model(tmp_path: Path) -> None:
    converted("llama", tmp_path, EIGHT)
    model: Any = ternarize.load(tmp_path / "packed")
    up_proj = model.model.layers[0].mlp.up_proj
    for codes in (False, True):  # as they are multiplied, and as they are stored
        before = (packing.stored(up_proj) if codes else up_proj).weight_scale.clone()
        assert before.dtype == torch.uint8 or not codes
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            model.to(dtype)
            assert model.dtype == dtype
            assert up_proj.weight_scale.dtype == before.dtype
            assert torch.equal(up_proj.weight_scale, before)
    (saved,) = {t.dtype for n, t in model.state_dict().items() if n.endswith("_scale")}
    assert saved == torch.uint8


def test_scales_that_8_bits_cannot_hold_take_16_or_32(tmp_path: Path) -> None:
    tiny_models.save("mixtral", tmp_path / "source", dtype=torch.float32)
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    small = "model.layers.1.self_attn.q_proj.weight"
    expert = "model.layers.0.block_sparse_moe.experts.2.w3.weight"
    for name in (small, expert):
        tensors[name] *= 1e-7
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "source", tmp_path / "packed", EIGHT)
    verify(tmp_path / "packed", tmp_path / "source")
    packed, _ = open_packed(tmp_path / "packed")
    dtypes = {n: packed.tensors[n + "_scale"].dtype for n in tensors if "proj" in n or "w3" in n}
    assert dtypes[small] == dtypes[expert] == "F32"
    assert dtypes["model.layers.1.self_attn.k_proj.weight"] == "U8"
    # what loads into one parameter with a 16-bit or 32-bit scale has none of 8 bits
    assert dtypes["model.layers.0.block_sparse_moe.experts.1.w3.weight"] == "F16"
    packing.dense_twin(tmp_path / "packed", tmp_path / "source", tmp_path / "dense")
    model = ternarize.load(tmp_path / "packed", dtype=torch.float32)
    dense = packing.load_dense(tmp_path / "dense", dtype=torch.float32)
    packing.assert_like_dense(model, dense)


def test_a_source_trained_in_ternary_keeps_exact_scales(tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path / "source")
    tensors = load_file(tmp_path / "source" / "model.safetensors")
    for name in tensors:
        if "proj" in name:
            tensors[name] = (tensors[name].sign() * 0.0371).to(torch.bfloat16)
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    record = convert(tmp_path / "source", tmp_path / "packed", replace(EIGHT, planes=("*q_proj*",)))
    verify(tmp_path / "packed", tmp_path / "source")
    assert features(tmp_path / "packed") == ["planes"]
    packing.dense_twin(tmp_path / "packed", tmp_path / "source", tmp_path / "dense")
    dense = packing.read_checkpoint(tmp_path / "dense")
    for name, row in record["tensors"].items():
        if row["becomes"] == "ternary":
            assert row["method"] == "lossless"
            assert torch.equal(dense[name].to(torch.bfloat16), tensors[name])


# --- two planes ------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [32, -1, 0])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma3_text"])
def test_two_planes_go_the_whole_way(name: str, group_size: int, tmp_path: Path) -> None:
    record = converted(name, tmp_path, replace(TWO, group_size=group_size))
    assert features(tmp_path / "packed") == ["planes"]
    for row in record["tensors"].values():
        if row["becomes"] == "ternary":
            assert row["planes"] == 2 and row["relative_error"] < 0.08  # one plane: about 0.2
    assert_like_its_twin(tmp_path)


def test_two_planes_with_8_bit_scales(tmp_path: Path) -> None:
    converted("llama", tmp_path, replace(TWO, scale_bits=8))
    assert features(tmp_path / "packed") == ["planes", "scale8"]
    assert_like_its_twin(tmp_path)


@pytest.mark.parametrize("bits", [16, 8])
def test_the_second_plane_is_the_method_on_what_the_first_leaves(bits: int, tmp_path: Path) -> None:
    converted("llama", tmp_path, replace(TWO, scale_bits=bits))
    source = load_file(tmp_path / "source" / "model.safetensors")
    stored = packing.read_checkpoint(tmp_path / "packed")
    _, records = open_packed(tmp_path / "packed")
    rule = with_scale_bits(bits)
    for name, record in records.items():
        if record.shape is not None:
            first, second = container.decode_planes(stored[name], stored[f"{name}_scale"], record)
            rest = source[name].float() - first.dequantize()
            assert torch.equal(first.trits, rule(source[name], 32).trits)
            assert torch.equal(second.trits, rule(rest, 32).trits)


def test_globs_choose_which_tensors_get_two_planes(tmp_path: Path) -> None:
    record = converted("llama", tmp_path, Recipe("itf", 32, planes=("*down_proj*", "*.v_proj*")))
    two = {name for name, row in record["tensors"].items() if row.get("planes") == 2}
    expected = {n for n in record["tensors"] if "down_proj" in n or "v_proj" in n}
    assert two == expected
    rows = {row["name"]: row for row in inspect(tmp_path / "packed")["tensors"]}
    assert {row["name"] for row in rows.values() if row.get("planes") == 2} == expected
    assert_like_its_twin(tmp_path)


def test_tensors_that_load_into_one_parameter_get_the_same_number_of_planes(tmp_path: Path) -> None:
    tiny_models.save("mixtral", tmp_path)
    with pytest.raises(SelectionError, match="both load into .*Widen --planes"):
        make_plan(tmp_path, Recipe(planes=("*experts.2.w1*",)))
    make_plan(tmp_path, Recipe(planes=("*.w1.weight", "*.w3.weight")))
    with pytest.raises(SelectionError, match="--planes 'lm_head.*': matches no tensor"):
        make_plan(tmp_path, Recipe(planes=("lm_head.*",)))


# --- heads and embeddings --------------------------------------------------------------------


@pytest.mark.parametrize("what", ["int8", "int4", "ternary"])
@pytest.mark.parametrize("name", SOME)
def test_packed_heads_and_embeddings_go_the_whole_way(name: str, what: str, tmp_path: Path) -> None:
    head = what if name != "bert" else "keep"  # BertModel has none
    recipe = Recipe("itf", 32, head=head, embeddings=what, scale_bits=8)
    record = converted(name, tmp_path, recipe)
    assert record["coverage"][what] >= 160 * 64
    model = assert_like_its_twin(tmp_path)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, PackedEmbedding) and isinstance(embedding, nn.Embedding)
    long = [name for name, p in model.named_parameters() if p.shape[0] == 160]
    dense = [name for name in long if model.get_parameter(name).dtype == torch.bfloat16]
    assert long and not [name for name in dense if not (head == "keep" and "lm_head" in name)]
    if head != "keep":
        assert isinstance(model.get_output_embeddings(), TernaryLinear)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "whisper", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_have_the_dtype_of_the_model(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    converted(name, tmp_path, Recipe("itf", 32, embeddings="int8"))
    model: Any = ternarize.load(tmp_path / "packed", dtype=dtype)
    dense = packing.load_dense(tmp_path / "dense", dtype=dtype)
    assert model.dtype == dtype
    ids = torch.tensor([[3, 0, 159, 3]])
    ours, theirs = (m.get_input_embeddings()(ids) for m in (model, dense))
    assert ours.dtype == dtype and torch.equal(ours, theirs)
    model.to(torch.float32)
    assert model.get_input_embeddings()(ids).dtype == torch.float32


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "t5", "gemma3_text"])
def test_tied_weights_stay_one_tensor(name: str, codec: str, tmp_path: Path) -> None:
    record = converted(name, tmp_path, Recipe("itf", 32, head=codec))
    reasons = [row["reason"] for row in record["tensors"].values() if row["becomes"] == codec]
    assert reasons == [f"--head {codec}; the output head and the token embedding are tied"]
    assert any(
        "are tied" in note for note in make_plan(tmp_path / "source", Recipe(head=codec)).notes
    )
    model: Any = ternarize.load(tmp_path / "packed")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for _ in range(2):
        assert head.weight is embedding.weight and head.weight_scale is embedding.weight_scale
        model.to(torch.float32).tie_weights()
    parameters = list(packing.stored(ternarize.load(tmp_path / "packed")).parameters())
    held = {p.data_ptr(): p.numel() * p.element_size() for p in parameters}
    stored = sum(info.nbytes for info in open_checkpoint(tmp_path / "packed").tensors.values())
    assert sum(held.values()) <= stored


def test_a_tied_tensor_may_be_rotated(tmp_path: Path) -> None:
    """As an embedding its rows are turned back; as a head it meets the rotated input."""
    converted("llama_tied", tmp_path, Recipe("itf", 32, embeddings="ternary"))
    records = metadata.records_of(open_checkpoint(tmp_path / "packed"))
    name = "model.embed_tokens.weight"
    records[name] = replace(records[name], rotation=(64, 3))
    tensors = packing.read_checkpoint(tmp_path / "packed")
    packing.write(tmp_path / "rotated", tensors, records, tmp_path / "packed")
    packing.dense_twin(tmp_path / "rotated", tmp_path / "source", tmp_path / "turned")
    model: Any = ternarize.load(tmp_path / "rotated", dtype=torch.float32)
    dense: Any = packing.load_dense(tmp_path / "turned", dtype=torch.float32)
    ids = torch.tensor([[3, 0, 159, 3]])
    ours, theirs = (m.get_input_embeddings()(ids) for m in (model, dense))
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-7)
    assert torch.allclose(packing.output(model), packing.output(dense), rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    saved, stored = (packing.read_records(tmp_path / d) for d in ("saved", "rotated"))
    assert saved[0][name] == stored[0][name]


def test_tied_ends_cannot_become_different_things(tmp_path: Path) -> None:
    tiny_models.save("llama_tied", tmp_path)
    with pytest.raises(UsageError, match="ties the two, so that they are one tensor"):
        make_plan(tmp_path, Recipe(head="int8", embeddings="ternary"))


def test_untied_ends_can(tmp_path: Path) -> None:
    converted("llama", tmp_path, Recipe("itf", 32, head="ternary", embeddings="int8"))
    model = assert_like_its_twin(tmp_path)
    assert (model.lm_head.codec, model.model.embed_tokens.layouts["weight"].codec) == (
        "base3",
        "int8",
    )


def test_a_tied_source_may_store_the_tensor_twice(tmp_path: Path) -> None:
    tiny_models.save("llama_tied", tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    record = convert(tmp_path / "source", tmp_path / "packed", Recipe(embeddings="int8"))
    verify(tmp_path / "packed", tmp_path / "source")
    assert record["tensors"]["lm_head.weight"]["becomes"] == "tied"
    ternarize.load(tmp_path / "packed")


@pytest.mark.parametrize(
    ("head", "embeddings"),
    [("keep", "int8"), ("int8", "keep"), ("ternary", "int4"), ("int4", "int8"), ("keep", "keep")],
)
def test_a_head_with_values_of_its_own_is_not_tied(
    head: str, embeddings: str, tmp_path: Path
) -> None:
    tiny_models.save("llama_tied", tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    own = torch.linspace(-1, 1, 160 * 64).reshape(160, 64)
    save_file({**tensors, "lm_head.weight": own}, file, metadata={"format": "pt"})
    recipe = Recipe("itf", 32, head=head, embeddings=embeddings)
    record = convert(tmp_path / "source", tmp_path / "packed", recipe)
    verify(tmp_path / "packed", tmp_path / "source")
    assert record["coverage"]["tied"] == 0
    model = ternarize.load(tmp_path / "packed", dequantize=True, dtype="float32")
    embedding = tensors["model.embed_tokens.weight"].float()
    ends = {"lm_head": (own, head), "model.embed_tokens": (embedding, embeddings)}
    for name, (value, what) in ends.items():
        weight = model.get_parameter(f"{name}.weight").detach()
        loss = float((weight - value).norm() / value.norm())
        most = {"keep": 0, "int8": 0.01, "int4": 0.1, "ternary": 0.6}[what]
        assert loss <= most and (loss > 0) == (most > 0)
    again = tmp_path / "again"
    ternarize.load(tmp_path / "packed", dtype="float32").save_pretrained(again)
    state = ternarize.load(again, dequantize=True).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_what_has_no_head_or_no_embedding_is_told_so(tmp_path: Path) -> None:
    tiny_models.save("bert", tmp_path / "bert")
    with pytest.raises(SelectionError, match="--head int8: BertModel has no output head"):
        make_plan(tmp_path / "bert", Recipe(head="int8"))
    tiny_models.save("vit", tmp_path / "vit")
    with pytest.raises(SelectionError, match="--embeddings int8: .* has no token embedding"):
        make_plan(tmp_path / "vit", Recipe(embeddings="int8"))
    tiny_models.save("llama", tmp_path / "llama")
    with pytest.raises(SelectionError, match="lm_head.weight: both --head int8 and --keep"):
        make_plan(tmp_path / "llama", Recipe(head="int8", keep=("lm_head.*",)))
    with pytest.raises(UsageError, match="head: 'int2'; expected one of keep, int8, int4, ternary"):
        Recipe(head="int2")


def test_positions_and_types_stay_kept(tmp_path: Path) -> None:
    record = converted("bert", tmp_path, Recipe("itf", 32, embeddings="int8"))
    rows = {n: row["becomes"] for n, row in record["tensors"].items() if "_embeddings.weight" in n}
    assert rows == {
        "embeddings.word_embeddings.weight": "int8",
        "embeddings.position_embeddings.weight": "kept",
        "embeddings.token_type_embeddings.weight": "kept",
    }


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_only_the_rows_that_are_looked_up_are_dequantized(
    codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted("llama", tmp_path, Recipe("itf", 32, embeddings=codec))
    model: Any = ternarize.load(tmp_path / "packed")
    rows: list[int] = []
    module = getattr(ternarize.trits, codec)
    real = getattr(module, f"dequantize_{codec}")

    def counted(q: Tensor, *rest: Any) -> Tensor:
        rows.append(q.shape[0])
        found: Tensor = real(q, *rest)
        return found

    monkeypatch.setattr(module, f"dequantize_{codec}", counted)
    model.get_input_embeddings()(torch.tensor([[1, 2], [2, 5]]))
    assert rows == [4]


def test_a_packed_embedding_cannot_be_resized(tmp_path: Path) -> None:
    converted("llama_tied", tmp_path, Recipe("itf", 32, embeddings="int8"))
    model: Any = ternarize.load(tmp_path / "packed")
    assert model.resize_token_embeddings(160) is model.get_input_embeddings()
    for part in (model, model.model):
        with pytest.raises(UsageError, match="is packed and keeps its 160 rows"):
            part.resize_token_embeddings(161)


def test_rounded_activations_stop_at_the_head_and_at_int8(tmp_path: Path) -> None:
    recipe = Recipe("itf", 32, head="ternary", embeddings="int8", activations="int8")
    converted("llama", tmp_path, recipe)
    model: Any = ternarize.load(tmp_path / "packed")
    assert model.model.layers[0].mlp.up_proj.activations == "int8"
    assert model.lm_head.activations == "none"


@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama_tied", "t5", "gemma3_text"])
def test_a_model_with_a_packed_embedding_can_be_copied_and_dequantized(
    name: str, codec: str, tmp_path: Path
) -> None:
    converted(name, tmp_path, Recipe("itf", 32, embeddings=codec))
    model: Any = ternarize.load(tmp_path / "packed", dtype=torch.float32)
    expected = packing.output(model)
    assert torch.equal(packing.output(copy.deepcopy(model)), expected)
    buffer = io.BytesIO()
    torch.save(model.get_input_embeddings(), buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    ids = torch.tensor([3, 5])
    assert torch.equal(again(ids), model.get_input_embeddings()(ids))
    near, expected = expected, packing.dequantized_output(model)
    packing.assert_near(near, expected)
    dense = model.dequantize()
    assert not any(isinstance(module, Packed) for module in dense.modules())
    assert torch.equal(packing.output(dense), expected)
    head, embedding = dense.get_output_embeddings(), dense.get_input_embeddings()
    assert head.weight is embedding.weight
    dense.save_pretrained(tmp_path / "plain")
    assert torch.equal(packing.output(packing.load_dense(tmp_path / "plain")), expected)
    dense.resize_token_embeddings(170)


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_a_compiled_model_with_packed_ends_is_the_same(codec: str, tmp_path: Path) -> None:
    converted("llama_tied", tmp_path, Recipe("itf", 32, embeddings=codec, planes=("*up_proj*",)))
    model = ternarize.load(tmp_path / "packed", dtype=torch.float32)
    expected = packing.output(model)
    model.compile(fullgraph=True, backend="eager")
    assert torch.equal(packing.output(model), expected)


def test_a_packed_embedding_may_lie_on_the_disk(tmp_path: Path) -> None:
    converted("llama", tmp_path, Recipe("itf", 32, embeddings="int8"))
    expected = packing.output(ternarize.load(tmp_path / "packed"))
    parts = ["model.layers", "model.norm", "model.rotary_emb", "lm_head"]
    model = ternarize.load(
        tmp_path / "packed",
        device=dict.fromkeys(parts, "cpu") | {"model.embed_tokens": "disk"},
        offload_folder=tmp_path / "offload",
    )
    assert torch.equal(packing.output(model), expected)


# --- int8 ------------------------------------------------------------------------------------


def test_int8_weights_are_the_nearest_steps(tmp_path: Path) -> None:
    converted("llama", tmp_path, Recipe("itf", 32, head="int8"))
    weight = load_file(tmp_path / "source" / "model.safetensors")["lm_head.weight"].double()
    stored = packing.read_checkpoint(tmp_path / "packed")
    q, scale = stored["lm_head.weight"], stored["lm_head.weight_scale"]
    _, records = open_packed(tmp_path / "packed")
    assert (q.dtype, scale.dtype, q.shape) == (torch.int8, torch.float16, weight.shape)
    assert scale.shape == (160, 1) and records["lm_head.weight"].group_size == -1
    assert torch.equal(scale.double(), (weight.abs().amax(-1, True) / 127).half().double())
    assert int(q.min()) >= -127
    assert float((weight / scale.double() - q).abs().max()) <= 0.5 + 127 * 2.0**-11


@pytest.mark.parametrize("head", ["int8", "int4"])
def test_scales_that_float16_cannot_hold_are_float32(head: str, tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path / "source", dtype=torch.float32)
    file = tmp_path / "source" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][7] *= 1e-6
    tensors["lm_head.weight"][8] = 0
    save_file(tensors, file, metadata={"format": "pt"})
    convert(tmp_path / "source", tmp_path / "packed", Recipe(head=head))
    verify(tmp_path / "packed", tmp_path / "source")
    packing.dense_twin(tmp_path / "packed", tmp_path / "source", tmp_path / "dense")
    assert open_checkpoint(tmp_path / "packed").tensors["lm_head.weight_scale"].dtype == "F32"
    assert_like_its_twin(tmp_path)


# --- int4 ------------------------------------------------------------------------------------


def test_int4_takes_four_and_a_half_bits_a_weight(tmp_path: Path) -> None:
    record = converted("gemma3_text", tmp_path, Recipe("itf", 32, embeddings="int4"))
    name = "model.embed_tokens.weight"
    assert record["tensors"][name]["bpw"] == 4.5
    (row,) = [row for row in inspect(tmp_path / "packed")["tensors"] if row["name"] == name]
    assert (row["kind"], row["group_size"], row["bpw"]) == ("int4", 32, 4.5)
    assert row["relative_error"] == record["tensors"][name]["relative_error"] < 0.02
    assert features(tmp_path / "packed") == ["int4"]
    weight = load_file(tmp_path / "source" / "model.safetensors")[name]
    stored = packing.read_checkpoint(tmp_path / "packed")
    q, scales = encode_int4(weight, 32, torch.float16)
    assert torch.equal(stored[name], pack_int4(q, 32))
    assert torch.equal(stored[f"{name}_scale"], scales)


def test_an_int4_head_is_never_dense_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted("llama_tied", tmp_path, Recipe("itf", 32, head="int4"))
    model: Any = ternarize.load(tmp_path / "packed", dtype=torch.float32)
    expected = packing.dequantized_output(model)
    monkeypatch.setattr(forms, "_PART", 50 * 64)
    most = 0
    real = ternarize.trits.int4.dequantize_int4

    def counted(packed: Tensor, *rest: Any) -> Tensor:
        nonlocal most
        most = max(most, len(packed))
        dense: Tensor = real(packed, *rest)
        return dense

    monkeypatch.setattr(ternarize.trits.int4, "dequantize_int4", counted)
    in_parts = packing.dequantized_output(model)
    assert 0 < most <= 50  # of 160 rows
    assert torch.allclose(in_parts, expected, rtol=0, atol=1e-6)
