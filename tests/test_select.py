"""What is ternarized by default, what is kept and why, and what stops the conversion."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import transformers
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import Chunk, Concatenate, Transpose, WeightConverter

from ternarize.errors import SelectionError
from ternarize.models import places, skeleton, source_code
from ternarize.models.places import locate_tensors
from ternarize.models.skeleton import skeleton_shapes, why_no_skeleton
from ternarize.plans import judge
from ternarize.plans.choose import select
from ternarize.plans.judge import EXPERTS, LINEAR
from ternarize.plans.judge_names import BY_NAME
from ternarize.plans.recipe import Recipe
from ternarize.plans.rules import Choice, Rule, rules_of

Shapes = dict[str, tuple[int, ...]]
Config = dict[str, Any]

# Architecture -> reason -> globs. Every tensor must match the globs of its own reason and no other.
LLAMA_BLOCK = "model.layers.*.self_attn.[qkvo]_proj.weight"
EXPECTED: dict[str, dict[str, str]] = {
    "llama": {
        LINEAR: f"{LLAMA_BLOCK} model.layers.*.mlp.*_proj.weight",
        "norm": "model.layers.*_layernorm.weight model.norm.weight",
        "embedding": "model.embed_tokens.weight",
        "output head": "lm_head.weight",
    },
    "llama_tied": {
        LINEAR: f"{LLAMA_BLOCK} model.layers.*.mlp.*_proj.weight",
        "norm": "model.layers.*_layernorm.weight model.norm.weight",
        "embedding": "model.embed_tokens.weight",
    },
    "qwen3": {
        LINEAR: f"{LLAMA_BLOCK} model.layers.*.mlp.*_proj.weight",
        "norm": "*_layernorm.weight model.norm.weight *.q_norm.weight *.k_norm.weight",
        "embedding": "model.embed_tokens.weight",
        "output head": "lm_head.weight",
    },
    "gemma3_text": {
        LINEAR: f"{LLAMA_BLOCK} model.layers.*.mlp.*_proj.weight",
        "norm": "*_layernorm.weight model.norm.weight *.q_norm.weight *.k_norm.weight",
        "embedding": "model.embed_tokens.weight",
    },
    "gemma3": {  # the releases of transformers differ in the prefixes
        LINEAR: "*language_model*.self_attn.[qkvo]_proj.weight *language_model*.mlp.*.weight",
        "encoder of another modality": "*vision*.self_attn.*.weight *vision*.fc?.weight",
        "norm": "*norm.weight *vision_tower*norm.bias *layer_norm?.*",
        "bias": "*_proj.bias *fc?.bias *in_proj_bias *patch_embedding.bias",
        "convolution": "*patch_embedding.weight",
        "embedding": "*embed_tokens.weight *position_embedding.weight",
        "part of nn.MultiheadAttention": "*.head.attention.*weight",
        "not a linear layer": "*mm_input_projection_weight *head.probe",
    },
    "mixtral": {
        LINEAR: LLAMA_BLOCK,
        EXPERTS: "model.layers.*.block_sparse_moe.experts.*.w?.weight",
        "router": "model.layers.*.block_sparse_moe.gate.weight",
        "norm": "*_layernorm.weight model.norm.weight",
        "embedding": "model.embed_tokens.weight",
        "output head": "lm_head.weight",
    },
    "qwen3_moe": {
        LINEAR: LLAMA_BLOCK,
        EXPERTS: "model.layers.*.mlp.experts.*_proj.weight",
        "router": "model.layers.*.mlp.gate.weight",
        "norm": "*_layernorm.weight model.norm.weight *.q_norm.weight *.k_norm.weight",
        "embedding": "model.embed_tokens.weight",
        "output head": "lm_head.weight",
    },
    "deepseek_v3": {
        LINEAR: "*.self_attn.*_proj.weight *.kv_a_proj_with_mqa.weight *.mlp.????_proj.weight "
        "*.mlp.up_proj.weight *.shared_experts.*.weight",
        EXPERTS: "model.layers.1.mlp.experts.*_proj.weight",
        "router": "model.layers.1.mlp.gate.weight",
        "buffer": "model.layers.1.mlp.gate.e_score_correction_bias",
        "norm": "*layernorm.weight model.norm.weight",
        "embedding": "model.embed_tokens.weight",
        "output head": "lm_head.weight",
    },
    "phi3": {
        LINEAR: "*.qkv_proj.weight *.o_proj.weight *.gate_up_proj.weight *.down_proj.weight",
        "norm": "*_layernorm.weight model.norm.weight",
        "embedding": "model.embed_tokens.weight",
        "output head": "lm_head.weight",
    },
    "gpt2": {
        LINEAR: "transformer.h.*.attn.c_*.weight transformer.h.*.mlp.c_*.weight",
        "norm": "transformer.h.*.ln_?.* transformer.ln_f.*",
        "bias": "*.c_attn.bias *.c_proj.bias *.c_fc.bias",
        "embedding": "transformer.wte.weight transformer.wpe.weight",
    },
    "bert": {
        LINEAR: "encoder.layer.*.self.*.weight encoder.layer.*.dense.weight",
        "norm": "*LayerNorm.*",
        "bias": "*.query.bias *.key.bias *.value.bias *.dense.bias",
        "embedding": "embeddings.*_embeddings.weight",
        "outside the repeated blocks": "pooler.dense.weight",
    },
    "bert_classifier": {
        LINEAR: "bert.encoder.layer.*.self.*.weight bert.encoder.layer.*.dense.weight",
        "norm": "*LayerNorm.*",
        "bias": "*.query.bias *.key.bias *.value.bias *.dense.bias classifier.bias",
        "embedding": "bert.embeddings.*_embeddings.weight",
        "outside the repeated blocks": "bert.pooler.dense.weight classifier.weight",
    },
    "vit": {
        LINEAR: "vit.encoder.layer.*.attention.attention.*.weight vit.encoder.layer.*.dense.weight",
        "norm": "vit.encoder.layer.*.layernorm_*.* vit.layernorm.*",
        "bias": "*.attention.attention.*.bias *.dense.bias *.projection.bias classifier.bias",
        "convolution": "vit.embeddings.patch_embeddings.projection.weight",
        "embedding": "vit.embeddings.cls_token vit.embeddings.position_embeddings",
        "outside the repeated blocks": "classifier.weight",
    },
    "whisper": {
        LINEAR: "model.??coder.layers.*_proj.weight model.??coder.layers.*.fc?.weight",
        "norm": "*layer_norm.*",
        "bias": "*_proj.bias *.fc?.bias *.conv?.bias",
        "convolution": "model.encoder.conv?.weight",
        "embedding": "*.embed_positions.weight model.decoder.embed_tokens.weight",
    },
    "t5": {
        LINEAR: "??coder.block.*Attention.[qkvo].weight ??coder.block.*.DenseReluDense.wi.weight",
        "weight read directly by T5DenseActDense": "??coder.block.*.DenseReluDense.wo.weight",
        "norm": "*layer_norm.weight",
        "embedding": "shared.weight *.relative_attention_bias.weight",
    },
    "gpt_oss": {
        LINEAR: LLAMA_BLOCK,
        EXPERTS: "*.experts.gate_up_proj *.experts.down_proj",
        "router": "*.router.weight",
        "bias": "*.self_attn.*.bias *_proj_bias *.router.bias",
        "norm": "*_layernorm.weight model.norm.weight",
        "embedding": "model.embed_tokens.weight",
        "output head": "lm_head.weight",
        "not a linear layer": "*.self_attn.sinks",
    },
    "llama4": {
        LINEAR: f"{LLAMA_BLOCK} model.layers.*.feed_forward.????_proj.weight "
        "model.layers.*.feed_forward.up_proj.weight *.shared_expert.*_proj.weight",
        EXPERTS: "*.experts.gate_up_proj *.experts.down_proj",
        "router": "model.layers.1.feed_forward.router.weight",
        "norm": "*_layernorm.weight model.norm.weight",
        "embedding": "model.embed_tokens.weight",
        "output head": "lm_head.weight",
    },
    "mamba": {
        LINEAR: "backbone.layers.*.mixer.in_proj.weight",
        "weight read directly by MambaMixer": "*.x_proj.weight *.dt_proj.weight *.out_proj.weight",
        "norm": "backbone.layers.*.norm.weight backbone.norm_f.weight",
        "bias": "*.conv1d.bias *.dt_proj.bias",
        "convolution": "*.conv1d.weight",
        "embedding": "backbone.embeddings.weight",
        "not a linear layer": "*.A_log *.D",
    },
    "clip": {
        LINEAR: "text_model.*.self_attn.*.weight text_model.*.fc?.weight",
        "encoder of another modality": "vision_*.self_attn.*.weight vision_*.fc?.weight",
        "norm": "*layer_norm*.* *layernorm.* *pre_layrnorm.*",
        "bias": "*_proj.bias *.fc?.bias",
        "convolution": "vision_model.embeddings.patch_embedding.weight",
        "embedding": "*.token_embedding.weight *.position_embedding.weight *.class_embedding",
        "outside the repeated blocks": "*_projection.weight",
        "not a linear layer": "logit_scale",
    },
}


def config_of(name: str) -> Config:
    config: Config = tiny_models.CONFIGS[name]().to_dict()
    return config


def shapes_of(config: Config) -> Shapes:
    return {name: shape for name, (_, shape) in skeleton_shapes(config).items()}


def rules(**options: Any) -> list[Rule]:
    return rules_of(Recipe(**options))


def choose(name: str, **patterns: Any) -> dict[str, Choice]:
    config = config_of(name)
    return {c.name: c for c in select(shapes_of(config), config, rules(**patterns))}


def matching(globs: str, name: str) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs.split())


# ------------------------------------------------------------------------------- architectures


def test_every_tiny_model_has_an_expectation() -> None:
    assert EXPECTED.keys() == tiny_models.CONFIGS.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_each_tensor_gets_the_expected_decision_and_reason(name: str) -> None:
    choices = choose(name)
    wrong = {
        choice.name: (choice.reason, expected)
        for choice in choices.values()
        if (expected := [r for r, globs in EXPECTED[name].items() if matching(globs, choice.name)])
        != [choice.reason]
    }
    assert not wrong
    assert all(c.ternary == (c.reason in (LINEAR, EXPERTS)) for c in choices.values())
    for globs in EXPECTED[name].values():
        for glob in globs.split():
            assert any(fnmatchcase(tensor, glob) for tensor in choices), glob


@pytest.mark.parametrize("name", EXPECTED)
def test_a_saved_checkpoint_is_chosen_from_tensor_by_tensor_in_its_order(
    name: str, tmp_path: Path
) -> None:
    tiny_models.save(name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}
        saved = {key: (s.get_dtype(), tuple(s.get_shape())) for key, s in slices.items()}
    shapes = {key: shape for key, (_, shape) in saved.items()}

    assert skeleton_shapes(config) == saved  # what config.json alone tells
    choices = select(shapes, config)
    assert [(c.name, c.shape) for c in choices] == list(shapes.items())
    assert why_no_skeleton(config) is None


@pytest.mark.parametrize(
    ("name", "globs"),
    [
        ("gpt2", "*.attn.c_attn.weight *.attn.c_proj.weight *.mlp.c_fc.weight *.mlp.c_proj.weight"),
        ("gpt_oss", "*.experts.gate_up_proj *.experts.down_proj"),
        ("llama4", "*.experts.gate_up_proj *.experts.down_proj"),
        ("mixtral", ""),
        ("llama", ""),
    ],
)
def test_weights_stored_as_in_by_out_are_marked(name: str, globs: str) -> None:
    for choice in choose(name).values():
        assert choice.transposed == (choice.ternary and matching(globs, choice.name)), choice.name


def test_the_parameter_is_the_one_in_the_model_not_the_one_on_disk() -> None:
    choices = choose("mixtral")
    expert = choices["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    assert expert.parameters == ("model.layers.1.mlp.experts.down_proj",)
    assert choices["lm_head.weight"].parameters == ("lm_head.weight",)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("llama", {}),
        ("llama_tied", {"lm_head.weight": "model.embed_tokens.weight"}),
        ("gpt2", {"lm_head.weight": "transformer.wte.weight"}),
        ("whisper", {"proj_out.weight": "model.decoder.embed_tokens.weight"}),
        (
            "t5",
            {
                "encoder.embed_tokens.weight": "shared.weight",
                "decoder.embed_tokens.weight": "shared.weight",
                "lm_head.weight": "shared.weight",
            },
        ),
    ],
)
def test_what_is_stored_twice_is_led_to_the_one_to_store(name: str, names: dict[str, str]) -> None:
    config = config_of(name)
    shapes = shapes_of(config)
    both = {**shapes, **{copy: shapes[original] for copy, original in names.items()}}
    assert {c.name: c.copy_of for c in select(both, config) if c.copy_of} == names
    assert not [c for c in select(both, config, equal=lambda *_: False) if c.copy_of]


def test_a_tied_head_that_is_stored_with_other_values_is_a_head() -> None:
    config = config_of("llama_tied")
    shapes = {**shapes_of(config), "lm_head.weight": (160, 64)}
    choices = select(shapes, config, equal=lambda *_: False)
    assert choices[-1].reason == "output head"


def test_a_tied_head_that_is_stored_all_the_same_is_kept() -> None:
    config = config_of("llama_tied")
    choices = select({**shapes_of(config), "lm_head.weight": (160, 64)}, config)
    assert choices[-1].reason == "output head, tied"


def test_an_image_classifier_made_of_clip_is_not_another_modality() -> None:
    config = {**config_of("clip"), "architectures": ["CLIPForImageClassification"]}
    choices = {c.name: c.reason for c in select(shapes_of(config), config)}
    assert choices["vision_model.encoder.layers.0.mlp.fc1.weight"] == LINEAR


def test_a_subclass_of_linear_counts_by_what_it_computes() -> None:
    config = transformers.FalconConfig(
        vocab_size=160,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        architectures=["FalconForCausalLM"],
    ).to_dict()
    reasons = {c.name: c.reason for c in select(shapes_of(config), config)}
    assert reasons["transformer.h.0.self_attention.dense.weight"] == LINEAR  # x @ W.T, by hand
    assert choose("llama4")["model.layers.1.feed_forward.router.weight"].reason == "router"


def _without_wraps(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: method(*args, **kwargs)


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.at_construction = nn.Linear(1, 1)
        nn.init.zeros_(self.at_construction.weight)

    @_without_wraps  # as some releases of transformers wrap the forward of their models
    def forward(self: Any, x: Any, other: Any) -> Any:
        x = x.to(self.called.weight.device)  # self.comment.weight
        return self.called(x) @ self.read.weight + self.blocks[0].inner.weight + other.deep.weight


def test_weights_that_code_reads_are_found_in_its_source() -> None:
    found = {re.compile(pattern) for pattern in source_code.raw_reads(Reader)}
    paths = ["read", "blocks.3.inner", "a.b.deep", "called", "comment", "at_construction", "inner"]
    assert [p for p in paths if any(f.fullmatch(p) for f in found)] == paths[:3]


def test_linear_gates_are_routers_only_with_an_output_per_expert_or_one() -> None:
    config = transformers.Qwen2MoeConfig(
        **{key: value for key, value in tiny_models.TEXT.items() if key != "head_dim"},
        moe_intermediate_size=40,
        shared_expert_intermediate_size=40,
        num_experts=4,
        architectures=["Qwen2MoeForCausalLM"],
    ).to_dict()
    reasons = {c.name: c.reason for c in select(shapes_of(config), config)}
    assert reasons["model.layers.0.mlp.shared_expert_gate.weight"] == "router"
    assert reasons["model.layers.0.mlp.shared_expert.gate_proj.weight"] == LINEAR


# ---------------------------------------------------------------------- other names of the same


def test_gpt2_without_the_base_prefix_is_chosen_alike() -> None:
    config = config_of("gpt2")
    full = shapes_of(config)
    bare = {name.removeprefix("transformer."): shape for name, shape in full.items()}
    bare["h.0.attn.bias"] = (1, 1, 1024, 1024)  # the mask that old checkpoints hold
    choices = {c.name: c for c in select(bare, config)}
    assert choices["h.0.attn.bias"].reason == "ignored by GPT2LMHeadModel"
    for choice in select(full, config):
        other = choices[choice.name.removeprefix("transformer.")]
        assert (other.ternary, other.reason, other.transposed, other.parameters) == (
            choice.ternary,
            choice.reason,
            choice.transposed,
            choice.parameters,
        )


def test_a_bert_with_heads_and_legacy_names_loads_as_the_bare_model() -> None:
    config = config_of("bert")
    shapes = {
        "bert." + name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): shape
        for name, shape in shapes_of(config).items()
    }
    shapes["cls.seq_relationship.weight"] = (2, 64)
    reasons = {c.name: c.reason for c in select(shapes, config)}
    assert reasons["bert.encoder.layer.0.output.LayerNorm.gamma"] == "norm"
    assert reasons["bert.embeddings.LayerNorm.beta"] == "norm"
    assert reasons["bert.encoder.layer.1.intermediate.dense.weight"] == LINEAR
    assert reasons["cls.seq_relationship.weight"] == "not part of the architecture"


def test_layers_that_the_architecture_ignores_are_kept_and_say_so() -> None:
    config = config_of("deepseek_v3")  # its class ignores layer 61, the multi-token prediction
    extra = {
        "model.layers.61.mlp.experts.0.gate_proj.weight": (2048, 7168),
        "model.layers.61.eh_proj.weight": (7168, 14336),
    }
    choices = select({**shapes_of(config), **extra}, config)
    assert {c.reason for c in choices if c.name in extra} == {"ignored by DeepseekV3ForCausalLM"}


def test_buffers_of_old_checkpoints_are_kept_however_large() -> None:
    config = config_of("llama")
    extra: Shapes = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": (8,),
        "model.layers.0.self_attn.causal_mask": (1, 1, 2048, 2048),
    }
    choices = select({**shapes_of(config), **extra}, config)
    assert {c.reason for c in choices if c.name in extra} == {"buffer"}


def test_a_config_with_custom_code_uses_the_native_class_where_there_is_one() -> None:
    config = {**config_of("llama"), "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    assert why_no_skeleton(config) is None


def test_the_quantization_of_the_source_does_not_change_its_skeleton() -> None:
    config = {**config_of("llama"), "quantization_config": {"quant_method": "fp8"}}
    assert skeleton_shapes(config) == skeleton_shapes(config_of("llama"))


# --------------------------------------------------------------------- operations at load time


def qwen3_vl_moe() -> Config:
    text = {**tiny_models.TEXT, "moe_intermediate_size": 40, "num_experts": 4}
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [4, 2, 2]}
    vision: Config = {"depth": 1, "hidden_size": 48, "num_heads": 4, "out_hidden_size": 64}
    vision |= {"intermediate_size": 72, "deepstack_visual_indexes": [0]}
    config: Config = transformers.Qwen3VLMoeConfig(
        text_config=text, vision_config=vision, architectures=["Qwen3VLMoeForConditionalGeneration"]
    ).to_dict()
    return config


def test_experts_that_are_turned_at_load_if_their_shape_differs_are_transposed() -> None:
    config = qwen3_vl_moe()
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    shapes = shapes_of(config)
    shapes[name] = (4, 64, 80)  # [experts, in, out], as its makers store it
    choices = {c.name: c for c in select(shapes, config)}
    assert choices[name].ternary and choices[name].transposed
    shapes[name] = (4, 80, 64)  # [experts, out, in], as transformers saves it
    choices = {c.name: c for c in select(shapes, config)}
    assert choices[name].ternary and not choices[name].transposed


def converted(
    monkeypatch: pytest.MonkeyPatch, source: str, targets: list[str], *operations: Any
) -> Callable[[Shapes], dict[str, Choice]]:
    """Llama, as if transformers converted `source` into `targets` by `operations`."""
    converter = WeightConverter([source], targets, operations=list(operations))
    monkeypatch.setattr(places, "get_model_conversion_mapping", lambda *_: [converter])
    config = config_of("llama")
    shapes = {n: s for n, s in shapes_of(config).items() if not any(t in n for t in targets)}
    return lambda extra: {c.name: c for c in select({**shapes, **extra}, config)}


def test_a_tensor_that_is_split_by_rows_is_as_ternary_as_its_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    targets = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    run = converted(monkeypatch, "mlp.both.weight", targets, Chunk(dim=0))
    names: Shapes = {f"model.layers.{i}.mlp.both.weight": (272, 64) for i in range(2)}
    choices = run(names)
    assert [choices[name].ternary for name in names] == [True, True]
    model = skeleton.empty_model(config_of("llama"))
    places = locate_tensors(model, names)
    assert places["model.layers.1.mlp.both.weight"].parameters == (
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
    )


@pytest.mark.parametrize(
    ("operation", "reason"),
    [
        (Transpose(0, 1), "stored through Transpose"),
        (Concatenate(dim=1), "stored through Concatenate of columns"),
    ],
)
def test_a_conversion_that_packed_rows_cannot_follow_keeps_the_tensor(
    monkeypatch: pytest.MonkeyPatch, operation: Any, reason: str
) -> None:
    targets = ["mlp.up_proj.weight"]
    run = converted(monkeypatch, "mlp.other.weight", targets, operation)
    names: Shapes = {f"model.layers.{i}.mlp.other.weight": (64, 136) for i in range(2)}
    assert {run(names)[name].reason for name in names} == {reason}


def test_experts_whose_code_is_unclear_are_judged_by_their_sizes_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(judge, "reads_transposed", lambda cls, leaf: None)
    assert choose("llama4")["model.layers.1.feed_forward.experts.down_proj"].transposed
    config = {**config_of("llama4"), "intermediate_size": 64}  # down_proj is square
    shapes = shapes_of(config)
    with pytest.raises(SelectionError, match=r"down_proj: .*\[experts, in, out\]; .* --keep"):
        select(shapes, config)
    kept = {c.name: c for c in select(shapes, config, rules(keep=["*.experts.down_proj"]))}
    assert kept["model.layers.1.feed_forward.experts.down_proj"].reason.startswith("--keep")
    assert kept["model.layers.1.feed_forward.experts.gate_up_proj"].ternary


def test_a_matrix_without_elements_is_kept() -> None:
    config = {**config_of("llama"), "intermediate_size": 0}
    reasons = {c.name: c.reason for c in select(shapes_of(config), config)}
    assert reasons["model.layers.0.mlp.up_proj.weight"] == "empty"


# -------------------------------------------------------------------------- --keep and --include


def test_keep_leaves_what_it_matches_in_floating_point_and_names_the_glob() -> None:
    choices = choose("llama", keep=["*.layers.0.*", "*.v_proj.weight"])
    assert choices["model.layers.0.mlp.up_proj.weight"].reason == "--keep *.layers.0.*"
    assert choices["model.layers.1.self_attn.v_proj.weight"].reason == "--keep *.v_proj.weight"
    assert choices["model.layers.0.input_layernorm.weight"].reason == "norm"  # kept anyway
    assert choices["model.layers.1.mlp.up_proj.weight"].ternary


@pytest.mark.parametrize(
    ("name", "glob", "tensor"),
    [
        ("llama", "lm_head.weight", "lm_head.weight"),
        ("bert_classifier", "*pooler*", "bert.pooler.dense.weight"),
        ("clip", "vision_model.*", "vision_model.encoder.layers.0.self_attn.q_proj.weight"),
        ("clip", "*_projection.weight", "text_projection.weight"),
    ],
)
def test_include_makes_ternary_what_is_kept_by_judgement(name: str, glob: str, tensor: str) -> None:
    choice = choose(name, include=[glob])[tensor]
    assert choice.ternary and choice.reason == f"--include {glob}"


def test_include_leaves_the_norms_among_its_matches_as_they_are() -> None:
    choices = choose("clip", include=["vision_model.*"])
    assert choices["vision_model.pre_layrnorm.weight"].reason == "norm"
    assert choices["vision_model.embeddings.patch_embedding.weight"].reason == "convolution"


@pytest.mark.parametrize(
    ("name", "glob", "reason"),
    [
        ("llama", "model.embed_tokens.weight", "embedding"),
        ("llama", "*norm*", "norm"),
        ("gpt_oss", "*.q_proj.bias", "bias"),
        ("mixtral", "*.gate.weight", "router"),
        ("vit", "*.projection.weight", "convolution"),
        ("t5", "*.wo.weight", "weight read directly by T5DenseActDense"),
        ("mamba", "*.A_log", "not a linear layer"),
        ("gemma3", "*head.attention.out_proj.weight", "part of nn.MultiheadAttention"),
    ],
)
def test_include_of_what_cannot_be_ternary_is_refused_with_the_reason(
    name: str, glob: str, reason: str
) -> None:
    with pytest.raises(SelectionError, match=rf"{re.escape(repr(glob))}.*: {reason}\."):
        choose(name, include=[glob])


def test_a_tied_head_cannot_be_included() -> None:
    config = config_of("llama_tied")
    shapes = {**shapes_of(config), "lm_head.weight": (160, 64)}
    with pytest.raises(SelectionError, match="lm_head.weight: .* output head, tied"):
        select(shapes, config, rules(include=["lm_head.weight"]))


def test_a_glob_that_matches_nothing_shows_the_closest_names() -> None:
    with pytest.raises(SelectionError) as error:
        choose("llama", keep=["model.layers.1.mlp.downproj.weight"])
    assert str(error.value).startswith("--keep 'model.layers.1.mlp.downproj.weight': matches no")
    assert "model.layers.0.mlp.down_proj.weight" in str(error.value)
    with pytest.raises(SelectionError, match="--include 'LM_HEAD.weight': matches no tensor"):
        choose("llama", include=["LM_HEAD.weight"])
    # what --head and --embeddings are about is no glob
    for glob in ("head", "embeddings"):
        with pytest.raises(SelectionError, match=f"--keep '{glob}': matches no tensor"):
            choose("llama", keep=[glob])


def test_a_tensor_that_is_kept_and_included_is_refused() -> None:
    with pytest.raises(SelectionError, match=r"lm_head.weight: both --keep 'lm_\*' and --include"):
        choose("llama", keep=["lm_*"], include=["lm_head.weight"])


@pytest.mark.parametrize("part", ["experts.0.w1", "experts.0.*", "experts.*.w3"])
def test_keep_may_not_split_what_loads_into_one_parameter(part: str) -> None:
    with pytest.raises(SelectionError, match=r"kept .* both load into model\.layers\.\d\.mlp\.exp"):
        choose("mixtral", keep=[f"model.layers.0.block_sparse_moe.{part}.weight"])


def test_keep_of_all_experts_of_a_layer_or_of_one_fused_part_is_possible() -> None:
    keep = ["*.layers.0.*.experts.*", "*.layers.1.*.w2.weight"]
    reasons = {c.name: c.reason for c in choose("mixtral", keep=keep).values()}
    assert reasons["model.layers.0.block_sparse_moe.experts.0.w1.weight"] == f"--keep {keep[0]}"
    assert reasons["model.layers.1.block_sparse_moe.experts.0.w2.weight"] == f"--keep {keep[1]}"
    assert reasons["model.layers.1.block_sparse_moe.experts.0.w1.weight"] == EXPERTS


# --------------------------------------------------------------------- what stops the conversion


def test_a_large_weight_without_a_place_stops_unless_it_is_kept() -> None:
    config = config_of("llama")
    shapes = {**shapes_of(config), "model.layers.0.extra.weight": (1024, 1024)}
    with pytest.raises(SelectionError, match=r"layers.0.extra.weight: .*\[1024, 1024\].*--keep"):
        select(shapes, config)
    assert select(shapes, config, rules(keep=["*.extra.*"]))[-1].reason == "--keep *.extra.*"


def test_small_tensors_without_a_place_are_kept_and_say_so() -> None:
    config = config_of("llama")
    extra: Shapes = {"model.extra.weight": (1024, 1023), "model.scales": (2**21,)}
    choices = select({**shapes_of(config), **extra}, config)
    assert {c.reason for c in choices if c.name in extra} == {"not part of the architecture"}


def test_a_shape_that_is_not_the_architectures_stops() -> None:
    config = config_of("llama")
    shapes = {**shapes_of(config), "model.layers.0.mlp.up_proj.weight": (34, 64)}
    with pytest.raises(SelectionError, match=r"up_proj.weight: .*\[34, 64\]; .*\[136, 64\]"):
        select(shapes, config)


def test_a_kept_tensor_may_have_another_shape_but_cannot_be_included() -> None:
    config = config_of("llama")
    shapes = {**shapes_of(config), "lm_head.weight": (161, 64)}
    reasons = {c.name: c.reason for c in select(shapes, config)}
    assert reasons["lm_head.weight"].startswith("output head, of another shape")
    with pytest.raises(SelectionError, match="lm_head.weight: --include .* of another shape"):
        select(shapes, config, rules(include=["lm_head.weight"]))


def test_a_config_that_its_class_cannot_use_stops() -> None:
    config = {**config_of("bert"), "hidden_size": 63}
    with pytest.raises(SelectionError, match="BertModel of transformers .* ValueError: .*hidden"):
        select({}, config)


# ---------------------------------------------------------------------------- without a skeleton

UNKNOWN: Config = {"model_type": "released_tomorrow", "architectures": ["Tomorrow"]}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (None, "there is no config.json"),
        (UNKNOWN, "model_type 'released_tomorrow' is unknown to transformers"),
        ({}, "model_type 'None' is unknown"),
        ({"model_type": "llama"}, "names no architecture"),
        ({"model_type": "llama", "architectures": ["Tomorrow"]}, "no model class Tomorrow"),
        ({"model_type": "llama", "architectures": ["pipeline"]}, "no model class pipeline"),
    ],
)
def test_why_there_is_no_skeleton_is_told(config: Config | None, why: str) -> None:
    assert why in (why_no_skeleton(config) or "")


def test_without_a_skeleton_there_are_no_shapes_to_tell() -> None:
    with pytest.raises(SelectionError, match="model_type 'released_tomorrow' is unknown"):
        skeleton_shapes(UNKNOWN)


def test_without_a_skeleton_names_and_shapes_decide() -> None:
    expected: dict[str, tuple[tuple[int, ...], str]] = {
        "model.embed_tokens.weight": ((160, 64), "embedding"),
        "model.layers.0.attn.q_proj.weight": ((64, 64), BY_NAME),
        "model.layers.0.attn.q_proj.bias": ((64,), "bias"),
        "model.layers.0.attention.output.dense.weight": ((64, 64), BY_NAME),
        "model.layers.0.mlp.experts.3.gate_proj.weight": ((40, 64), BY_NAME),
        "model.layers.0.mlp.gate.weight": ((4, 64), "router"),
        "model.layers.0.mlp.shared_expert_gate.weight": ((1, 64), "router"),
        "model.layers.0.input_layernorm.weight": ((64,), "norm"),
        "model.layers.0.conv1d.weight": ((64, 1, 4), "convolution"),
        "model.layers.0.A_log": ((64,), "not a matrix (no skeleton)"),
        "model.layers.0.table": ((8, 8), "not a linear layer by name and shape (no skeleton)"),
        "model.layers.0.empty.weight": ((0, 64), "empty"),
        "model.projector.weight": ((64, 64), "outside the repeated blocks"),
        "vision_tower.layers.0.fc1.weight": ((64, 64), "encoder of another modality"),
        "pooler.dense.weight": ((64, 64), "outside the repeated blocks"),
        "lm_head.weight": ((160, 64), "output head"),
    }
    choices = select({name: shape for name, (shape, _) in expected.items()}, UNKNOWN)
    assert {c.name: c.reason for c in choices} == {n: reason for n, (_, reason) in expected.items()}
    assert all(c.ternary == (c.reason == BY_NAME) for c in choices)
    assert all(c.parameters == () for c in choices)


def test_without_a_skeleton_a_model_of_vision_alone_is_converted() -> None:
    choices = select({"vision_model.layers.0.fc1.weight": (64, 64)}, None)
    assert choices[0].ternary


def test_without_a_skeleton_include_works_on_matrices_alone() -> None:
    shapes = {"model.projector.weight": (64, 64), "embed.weight": (160, 64)}
    assert select(shapes, None, rules(include=["*projector*"]))[0].ternary
    with pytest.raises(SelectionError, match="embed.weight: .*: embedding"):
        select(shapes, None, rules(include=["embed.*"]))


def test_without_a_skeleton_a_large_tensor_of_unknown_kind_stops_unless_kept() -> None:
    shapes = {"model.layers.0.experts.gate_up_proj": (64, 256, 128)}
    with pytest.raises(SelectionError, match=r"gate_up_proj: .*\[64, 256, 128\].*--keep"):
        select(shapes, None)
    assert not select(shapes, None, rules(keep=["*"]))[0].ternary


@pytest.mark.parametrize(("shape", "transposed"), [((64, 192), True), ((192, 64), False)])
def test_without_a_skeleton_a_bias_tells_which_way_gpt2_names_lie(
    shape: tuple[int, int], transposed: bool
) -> None:
    shapes: Shapes = {
        "h.0.attn.c_attn.weight": shape,
        "h.0.attn.c_attn.bias": (192,),
        "h.0.attn.c_proj.weight": (64, 64),  # square: it lies as the others do
    }
    choices = {c.name: c for c in select(shapes, None)}
    assert choices["h.0.attn.c_attn.weight"].transposed is transposed
    assert choices["h.0.attn.c_proj.weight"].transposed is transposed


def test_without_a_skeleton_gpt2_names_of_unknown_orientation_stop() -> None:
    shapes: Shapes = {"h.0.attn.c_proj.weight": (64, 64), "h.0.attn.c_proj.bias": (64,)}
    with pytest.raises(
        SelectionError, match=r"c_proj.weight: .*\[out, in\] or \[in, out\].*--keep"
    ):
        select(shapes, None)
    assert not select(shapes, None, rules(keep=["*.c_proj.weight"]))[0].ternary
