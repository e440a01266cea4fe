"""A sample of the campaign of tests/campaigns/architectures.py, and that it can fail."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from campaigns import architectures, architectures_checks
from campaigns.architectures_checks import FAILED, OK, REFUSED
from campaigns.architectures_small import Style, default_config, small

from ternarize.errors import SelectionError
from ternarize.runtime.plugin import quantizer as plugin

ROOT = Path(__file__).parents[1]
# tied Conv1D, fused experts, state space
OFTEN = ("gpt2", "mixtral", "mamba")
# encoder-decoder, image and text; dense, vision, audio; a subclass of nn.Linear, one expert alone,
# a matrix that loading cuts in two, infinite buffers
SELDOM = (
    "t5",
    "qwen2_vl",
    "llama",
    "vit",
    "whisper",
    "falcon",
    "hunyuan_v1_moe",
    "molmo2",
    "gemma4_audio",
)
HEADLESS = ("vit", "mamba", "gemma4_audio")  # or with a head that cannot be packed


@pytest.mark.parametrize("sample", [OFTEN, pytest.param(SELDOM, marks=pytest.mark.slow)])
def test_a_sample_converts_loads_and_computes_the_same(
    sample: tuple[str, ...], tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    found = subprocess.run(
        [sys.executable, "-m", "tests.campaigns.architectures", "--types", *sample]
        + ["--json", str(out)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["type"]: row["outcome"] for row in rows} == dict.fromkeys(sample, "ok")
    for row in rows:
        answers = {step["name"]: step["outcome"] for step in row["steps"]}
        assert answers["outputs"] == answers["weights"] == answers["save again"] == OK, row
        # a head is packed, or it is said why there is none
        heads = {answers[f"head {what}: convert"] for what in ("int8", "int4", "ternary")}
        assert heads == {REFUSED if row["type"] in HEADLESS else OK}, row


def test_every_type_of_the_auto_classes_is_gone_through() -> None:
    found = architectures.types()
    assert len(found) > 600
    assert found["llama"][0] == "LlamaForCausalLM"
    assert found["bart"][0] == "BartForConditionalGeneration"
    assert found["vit"][0] == "ViTForImageClassification"


def examined(folder: Path) -> architectures.Row:
    return architectures.examine("llama", 0, folder)


def answers(row: architectures.Row) -> dict[str, str]:
    return {step.name: step.outcome for step in row.steps}


def test_tensors_in_each_others_places_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(self: Any, model: Any, **kwargs: Any) -> Any:
        done = after(self, model, **kwargs)
        mlp = model.model.layers[0].mlp
        for name in ("weight", "weight_scale"):
            gate, up = getattr(mlp.gate_proj, name, None), getattr(mlp.up_proj, name, None)
            if gate is not None and up is not None:  # dense ones have no scales
                gate.data, up.data = up.data, gate.data
        return done

    after = plugin.TernarizeQuantizer._process_model_after_weight_loading
    name = "_process_model_after_weight_loading"
    monkeypatch.setattr(plugin.TernarizeQuantizer, name, swapped)
    row = examined(tmp_path)
    assert row.outcome == FAILED
    found = answers(row)
    assert found["convert"] == found["verify"] == found["decode"] == found["load"] == OK
    assert found["outputs"] == found["weights"] == found["dequantized at load"] == FAILED
    assert any("gate_proj.weight differs" in step.line for step in row.failures)


def test_a_kept_tensor_that_is_not_the_source_s_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(self: Any, model: Any, **kwargs: Any) -> Any:
        model.model.norm.weight.data[3] += 0.001
        return after(self, model, **kwargs)

    after = plugin.TernarizeQuantizer._process_model_after_weight_loading
    name = "_process_model_after_weight_loading"
    monkeypatch.setattr(plugin.TernarizeQuantizer, name, damaged)
    lines = [step.line for step in examined(tmp_path).failures]
    assert "model.norm.weight differs" in lines


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (SelectionError("a.weight: has 3 parts; 4 are expected. Use --keep."), REFUSED),
        (SelectionError("no idea"), FAILED),  # it does not say where, what and what to do
        (KeyError("a.weight"), FAILED),
    ],
)
def test_a_refusal_is_one_line_and_all_else_a_failure(
    error: Exception, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any) -> None:
        raise error

    monkeypatch.setattr(architectures_checks, "convert", fails)
    row = examined(tmp_path)
    assert row.outcome == outcome
    assert answers(row)["convert"] == outcome
    assert str(error) in row.steps[-1].line


def test_a_type_that_does_not_end_or_kills_its_process_is_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(architectures, "examine", lambda *args: os._exit(3))
    (row,) = architectures.run(["llama"], 0, 1)
    assert row.outcome == FAILED and "ended with 3" in row.steps[0].line
    monkeypatch.setattr(architectures, "examine", lambda *args: time.sleep(60))
    monkeypatch.setattr(architectures, "HANG", 1)
    (row,) = architectures.run(["llama"], 0, 1)
    assert row.outcome == FAILED and "took more than 1 s" in row.steps[0].line


def test_configurations_become_small_by_rule() -> None:
    config: Any = small(default_config("qwen3_next"), Style(0))
    assert config.layer_types == ["linear_attention", "full_attention"]  # each kind once
    assert (config.num_hidden_layers, config.hidden_size, config.num_experts) == (2, 64, 4)
    config = small(default_config("qwen2_vl"), Style(0))
    assert config.image_token_id < config.text_config.vocab_size == 160
    assert len({config.image_token_id, config.video_token_id, config.vision_start_token_id}) == 3
    config = small(default_config("swin"), Style(8))
    assert config.embed_dim == 12 and list(config.num_heads) == [3, 6, 12, 24]
