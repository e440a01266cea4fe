"""The conversion end to end on tiny models: what becomes of each tensor, breaks, bad input."""

import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

import packing
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ternarize
from ternarize.convert import limits
from ternarize.convert import run as pipeline
from ternarize.convert.limits import memory_left
from ternarize.convert.record import write_small_files
from ternarize.convert.run import convert
from ternarize.convert.tensor import Change, Result, convert_tensor
from ternarize.convert.verify import verify
from ternarize.convert.workplace import JOURNAL, exclusive
from ternarize.errors import (
    CheckpointError,
    FormatError,
    OutputError,
    SelectionError,
    UsageError,
    WeightError,
)
from ternarize.files import container
from ternarize.files.outputs import write_at, write_whole
from ternarize.plans import layout
from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import Calibrate, Recipe
from ternarize.sources.checkpoint import open_checkpoint
from ternarize.sources.packed import open_packed
from ternarize.trits.methods import METHODS
from ternarize.trits.scales import store_scales

ALL = sorted(tiny_models.CONFIGS)


def digest_of(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a directory."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def weights_of(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name."""
    source = open_checkpoint(directory)
    return {n: source.read(n).reshape(info.shape) for n, info in source.tensors.items()}


def decoded(directory: Path) -> dict[str, Tensor]:
    """All tensors of a packed checkpoint as float32, in the orientation of the source."""
    packed, records = open_packed(directory)
    tensors = {}
    for name, record in records.items():
        tensor = packed.read(name).reshape(packed.tensors[name].shape)
        if record.shape is not None:
            scales = packed.read(name + "_scale").reshape(packed.tensors[name + "_scale"].shape)
            tensor = container.decode(tensor, scales, record).dequantize()
            if record.transposed:
                tensor = tensor.transpose(-1, -2)
        tensors[name] = tensor
    return tensors


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    tiny_models.save("llama", directory)
    return directory


@pytest.fixture
def source(llama: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "source"))


def edit(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a single-file checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


# --- what comes out --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_of_the_source_is_accounted_for_and_verifies(
    name: str, tmp_path: Path
) -> None:
    tiny_models.save(name, tmp_path / "source")
    record = convert(tmp_path / "source", tmp_path / "packed", Recipe(method="itf"))
    before, after = weights_of(tmp_path / "source"), decoded(tmp_path / "packed")
    assert before.keys() == after.keys()
    coverage = record["coverage"]
    assert coverage["total"] == sum(t.numel() for t in before.values())
    assert coverage["total"] == coverage["ternary"] + coverage["kept"] + coverage["tied"]
    assert coverage["ternary"] > 0
    for tensor, row in record["tensors"].items():
        if row["becomes"] == "kept":
            assert torch.equal(after[tensor], before[tensor]), tensor
            assert row["reason"]
            continue
        original = before[tensor].float()
        error = ((original - after[tensor]).square().sum() / original.square().sum()).item()
        assert error == pytest.approx(row["relative_error"], abs=2e-3), tensor
        assert 0.05 < error < 0.35, tensor
    verify(tmp_path / "packed", tmp_path / "source")


@pytest.mark.parametrize("group_size", [128, 0])
@pytest.mark.parametrize("name", ALL)
def test_a_converted_model_computes_what_its_dequantized_weights_do(
    name: str, group_size: int, tmp_path: Path
) -> None:
    """Selection and loading agree on every architecture."""
    tiny_models.save(name, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "packed", Recipe("twn", group_size))
    packing.dense_twin(tmp_path / "packed", tmp_path / "source", tmp_path / "dense")
    model = ternarize.load(tmp_path / "packed", dtype=torch.float32)
    dense = packing.load_dense(tmp_path / "dense", dtype=torch.float32)
    packing.assert_like_dense(model, dense, exact=name != "gpt_oss")  # which computes x @ W


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("group_size", [128, 32, 7, -1, 0])
def test_packed_weights_are_those_of_the_method(
    llama: Path, tmp_path: Path, method: str, group_size: int
) -> None:
    convert(llama, tmp_path / "packed", Recipe(method=method, group_size=group_size))
    before, after = weights_of(llama), decoded(tmp_path / "packed")
    _, records = open_packed(tmp_path / "packed")
    for name, record in records.items():
        if record.shape is not None:
            ternary = METHODS[method](before[name], group_size)
            rounded = store_scales(ternary.scales).double()
            expected = type(ternary)(ternary.trits, rounded, group_size).dequantize()
            assert torch.equal(after[name], expected), name


def test_bits_per_weight_are_those_of_the_stored_bytes(llama: Path, tmp_path: Path) -> None:
    record = convert(llama, tmp_path / "packed")
    packed = open_checkpoint(tmp_path / "packed")
    for name, row in record["tensors"].items():
        if row["becomes"] == "ternary":
            rows, cols = row["source_shape"]
            full, tail = divmod(cols, 128)
            packed_bytes = rows * (full * 26 + -(-tail // 5))
            assert packed.tensors[name].nbytes == packed_bytes
            scale_bytes = rows * -(-cols // 128) * 2
            assert row["stored_bytes"] == packed_bytes + scale_bytes
            assert row["bpw"] == pytest.approx(row["stored_bytes"] * 8 / (rows * cols), abs=1e-4)


def test_the_plan_promises_the_exact_size_of_the_files(llama: Path, tmp_path: Path) -> None:
    promised = make_plan(llama).packed_bytes()
    convert(llama, tmp_path / "packed")
    assert (tmp_path / "packed" / "model.safetensors").stat().st_size == promised


def test_a_header_takes_at_most_500_bytes_for_each_tensor(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "packed")
    packed, records = open_packed(tmp_path / "packed")
    header = min(info.start for info in packed.tensors.values())
    assert header / len(records) <= 500


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [128, -1, 0])
def test_a_source_trained_in_ternary_is_packed_without_loss(
    tmp_path: Path, dtype: torch.dtype, group_size: int
) -> None:
    tiny_models.save("llama", tmp_path / "source", dtype=dtype)

    def ternary(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(1)
        for name, tensor in tensors.items():
            if "proj" in name:
                trits = torch.randint(-1, 2, tensor.shape, generator=generator)
                tensors[name] = (trits * 0.0371).to(dtype)
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = -0.0

    edit(tmp_path / "source", ternary)
    record = convert(tmp_path / "source", tmp_path / "packed", Recipe("twn", group_size))
    before, after = weights_of(tmp_path / "source"), decoded(tmp_path / "packed")
    for name in before:
        assert torch.equal(after[name].to(dtype), before[name]), name
    rows = [row for row in record["tensors"].values() if row["becomes"] == "ternary"]
    assert {row["method"] for row in rows} == {"lossless"} and record["notes"] == []
    if group_size == 128:
        again = convert(tmp_path / "source", tmp_path / "zeros", Recipe("twn", 128, zeros=0.7))
        (said,) = again["notes"]
        assert said.startswith(f"zeros 0.7: not in {len(rows)} tensors that were ternary already")


def test_a_fused_ternary_source_is_lossless_in_smaller_groups_than_asked_for(
    source: Path, tmp_path: Path
) -> None:
    """Two matrices with a scale each, one below the other: one scale per tensor is not enough."""
    name = "model.layers.0.mlp.down_proj.weight"

    def two_scales(tensors: dict[str, Tensor]) -> None:
        trits = torch.randint(-1, 2, tensors[name].shape).to(torch.bfloat16)
        trits[:32] *= 0.5
        tensors[name] = trits

    edit(source, two_scales)
    record = convert(source, tmp_path / "packed", Recipe(group_size=0))
    assert record["tensors"][name]["method"] == "lossless"
    assert record["tensors"][name]["group_size"] == -1
    assert torch.equal(decoded(tmp_path / "packed")[name], weights_of(source)[name].float())
    verify(tmp_path / "packed", source)


def test_scales_that_float16_cannot_hold_are_stored_in_float32(tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path / "source", dtype=torch.float32)
    name = "model.layers.1.mlp.up_proj.weight"
    edit(tmp_path / "source", lambda t: t[name].mul_(1e-7))
    convert(tmp_path / "source", tmp_path / "packed")
    packed, _ = open_packed(tmp_path / "packed")
    assert packed.tensors[name + "_scale"].dtype == "F32"
    verify(tmp_path / "packed", tmp_path / "source")


def test_what_a_tensor_needs_instead_of_what_was_planned_is_returned(tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path / "source", dtype=torch.float32)
    wide, fused, head = "layers.1.mlp.up_proj", "layers.0.mlp.down_proj", "lm_head"

    def change(tensors: dict[str, Tensor]) -> None:
        for name in (f"model.{wide}.weight", f"{head}.weight"):
            tensors[name] *= 1e-7
        trits = torch.randint(-1, 2, tensors[f"model.{fused}.weight"].shape).float()
        trits[:32] *= 0.5
        tensors[f"model.{fused}.weight"] = trits

    edit(tmp_path / "source", change)
    plan = make_plan(tmp_path / "source", Recipe(group_size=0, head="int8"))
    plans = {t.name: t for t in plan.tensors}
    expected = {
        f"model.{wide}.weight": Change(f"model.{wide}.weight", 0, "F32"),
        f"model.{fused}.weight": Change(f"model.{fused}.weight", -1, "F16"),
        f"{head}.weight": Change(f"{head}.weight", -1, "F32"),
    }
    for name, change_of_plan in expected.items():
        tensor = plans[name]
        assert convert_tensor(plan.source, tensor, plan.recipe, _nowhere) == change_of_plan
        size, dtype = change_of_plan.group_size, change_of_plan.scale_dtype
        tensor = replace(tensor, group_size=size, scale_dtype=dtype)
        result = convert_tensor(plan.source, tensor, plan.recipe, _nowhere)
        assert isinstance(result, Result) and result.scale_dtype == dtype


def _nowhere(name: str, offset: int, data: Tensor) -> None:
    pass


def test_many_wide_scales_in_a_shard_cost_one_more_pass_not_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.save("llama", tmp_path / "source", dtype=torch.float32)
    edit(tmp_path / "source", lambda t: [t[n].mul_(1e-7) for n in t if "proj" in n])
    calls: list[str] = []
    real = convert_tensor

    def noting(*args: Any) -> Any:
        calls.append(args[1].name)
        return real(*args)

    monkeypatch.setattr(pipeline, "convert_tensor", noting)
    convert(tmp_path / "source", tmp_path / "packed")
    assert max(calls.count(name) for name in calls) == 2
    verify(tmp_path / "packed", tmp_path / "source")


def test_a_folder_of_the_user_in_the_way_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("precious")
    with pytest.raises(OutputError, match="no unfinished conversion"):
        convert(source, tmp_path / "out")
    assert (tmp_path / "out.partial" / "mine").read_text() == "precious"


def test_tied_copies_are_stored_once(tmp_path: Path) -> None:
    tiny_models.save("llama_tied", tmp_path / "source")
    edit(
        tmp_path / "source",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
    )
    record = convert(tmp_path / "source", tmp_path / "packed")
    assert record["coverage"]["tied"] == 160 * 64
    packed, _ = open_packed(tmp_path / "packed")
    assert "lm_head.weight" not in packed.tensors
    verify(tmp_path / "packed", tmp_path / "source")


def test_pickled_checkpoints_give_the_same_files_as_safetensors(
    llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "pickled").mkdir()
    shutil.copy(llama / "config.json", tmp_path / "pickled")
    torch.save(load_file(llama / "model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    convert(llama, tmp_path / "a")
    convert(tmp_path / "pickled", tmp_path / "b")
    assert weights_of(tmp_path / "a").keys() == weights_of(tmp_path / "b").keys()
    assert {n: t.tolist() for n, t in decoded(tmp_path / "a").items()} == {
        n: t.tolist() for n, t in decoded(tmp_path / "b").items()
    }


def test_config_and_tokenizer_files_are_carried_over(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_bytes(b'{"odd":   "spacing"}\n')
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / "training_args.bin").write_bytes(b"x")
    work = make_plan(source)
    assert "training_args.bin" in work.left_out
    convert(source, tmp_path / "packed", Recipe(activations="int8"))
    assert (tmp_path / "packed/tokenizer.json").read_bytes() == b'{"odd":   "spacing"}\n'
    assert (tmp_path / "packed/1_Pooling/config.json").is_file()
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "packed/config.json").read_text())
    quantization = after.pop("quantization_config")
    assert after == before
    assert quantization["quant_method"] == "ternarize"
    assert quantization["activations"] == "int8"


def test_kept_weights_can_be_stored_in_another_dtype(tmp_path: Path) -> None:
    tiny_models.save("bert", tmp_path / "source", dtype=torch.float32)
    convert(tmp_path / "source", tmp_path / "packed", Recipe(dtype="bfloat16"))
    packed, records = open_packed(tmp_path / "packed")
    kept = {packed.tensors[n].dtype for n, r in records.items() if r.shape is None}
    assert "F32" not in kept and "BF16" in kept
    verify(tmp_path / "packed", tmp_path / "source")


def test_files_follow_the_umask(llama: Path, tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        convert(llama, tmp_path / "packed")
    finally:
        os.umask(old)
    assert (tmp_path / "packed/model.safetensors").stat().st_mode & 0o777 == 0o640


# --- the same bytes, always ------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_bytes_do_not_depend_on_the_number_of_threads(
    tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.save("mixtral", tmp_path / "source", max_shard_size="60KB")
    convert(tmp_path / "source", tmp_path / "one", threads=1)
    convert(tmp_path / "source", tmp_path / "more", threads=threads)
    assert digest_of(tmp_path / "one") == digest_of(tmp_path / "more")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 2


def test_bytes_are_the_same_without_native_code(llama: Path, tmp_path: Path) -> None:
    run_convert(llama, tmp_path / "torch", *METHODS, TERNARIZE_NATIVE="0")
    for method in METHODS:
        convert(llama, tmp_path / method, Recipe(method))
        assert digest_of(tmp_path / method) == digest_of(tmp_path / "torch" / method)


def run_convert(source: Path, output: Path, *methods: str, **env: str) -> None:
    done = command(source, output, *methods)
    subprocess.run(done, env={**os.environ, **env}, check=True)


def command(source: Path, output: Path, *methods: str) -> list[str]:
    """Convert by absmean; or, given methods, by each into a folder of its name in `output`."""
    code = (
        "import sys; from ternarize.convert.run import convert; "
        "from ternarize.plans.recipe import Recipe; "
        "source, output, *methods = sys.argv[1:]; "
        "[convert(source, f'{output}/{m}', Recipe(m)) for m in methods] or convert(source, output)"
    )
    return [sys.executable, "-c", code, str(source), str(output), *methods]


class Break(Exception):
    """Stands for the death of the process."""


@pytest.mark.parametrize("point", range(0, 18, 2))
def test_an_interrupted_conversion_is_resumed_to_the_same_bytes(
    tmp_path: Path, point: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_models.save("llama", tmp_path / "source", max_shard_size="60KB")
    convert(tmp_path / "source", tmp_path / "whole")
    calls = 0
    real = convert_tensor

    def counting(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > point:
            raise Break
        return real(*args)

    monkeypatch.setattr(pipeline, "convert_tensor", counting)
    with pytest.raises(Break):
        convert(tmp_path / "source", tmp_path / "packed", threads=1)
    assert not (tmp_path / "packed").exists()
    done: list[str] = []

    def noting(*args: Any) -> Any:
        done.append(args[1].name)
        return real(*args)

    monkeypatch.setattr(pipeline, "convert_tensor", noting)
    convert(tmp_path / "source", tmp_path / "packed", threads=1)
    assert digest_of(tmp_path / "packed") == digest_of(tmp_path / "whole")
    total = len(weights_of(tmp_path / "source"))
    assert len(done) == total - point
    assert not list(tmp_path.glob("*.partial*"))


def test_a_killed_conversion_is_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL at a random moment; tests/campaigns/kill.py has many."""
    tiny_models.save("mixtral", tmp_path / "source", max_shard_size="60KB")
    convert(tmp_path / "source", tmp_path / "whole")
    process = subprocess.Popen(command(tmp_path / "source", tmp_path / "packed"))
    while process.poll() is None and not (tmp_path / "packed.partial").exists():
        time.sleep(0.002)
    time.sleep(random.uniform(0, 0.1))
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (tmp_path / "packed").exists():
        verify(tmp_path / "packed")
    else:
        convert(tmp_path / "source", tmp_path / "packed")
    assert digest_of(tmp_path / "packed") == digest_of(tmp_path / "whole")


def test_bytes_that_did_not_reach_the_disk_are_written_again(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut the journal may know of tensors whose data was lost."""
    convert(llama, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_small_files", _die)
        with pytest.raises(Break):
            convert(llama, tmp_path / "packed")
    shard = tmp_path / "packed.partial" / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    shard.write_bytes(data)
    convert(llama, tmp_path / "packed")
    assert digest_of(tmp_path / "packed") == digest_of(tmp_path / "whole")


def _die(*_: Any, **__: Any) -> Any:
    raise Break


# --- bad input: one clear line, nothing under the final name, the source untouched -----------


def refused(
    error: type[Exception], match: str, source: Path, output: Path, recipe: Recipe | None = None
) -> None:
    before = digest_of(source) if source.is_dir() else {}
    with pytest.raises(error, match=match) as caught:
        convert(source, output, recipe or Recipe())
    assert "\n" not in str(caught.value)
    assert not output.exists() or output == source or source in output.parents
    assert not list(output.parent.glob("*.partial*"))
    if before:
        assert digest_of(source) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_named(
    source: Path, tmp_path: Path, value: float, name: str
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        flat = tensors[name].view(-1)
        flat[17] = flat[40] = value

    edit(source, spoil)
    index = r"\[0, 17\]" if "proj" in name else r"\[17\]"
    refused(
        WeightError, rf"model.safetensors: {name}: 2 of \d+ .* at {index}", source, tmp_path / "out"
    )


def test_a_missing_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(CheckpointError, "no such directory", tmp_path / "nothing", tmp_path / "out")


def test_a_directory_without_weights_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    refused(CheckpointError, "no weights", source, tmp_path / "out")


@pytest.mark.parametrize("cut", [1, 1000, 20000])
def test_a_truncated_shard_is_refused(source: Path, tmp_path: Path, cut: int) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-cut])
    refused(FormatError, "model.safetensors: .* bytes", source, tmp_path / "out")


@pytest.mark.parametrize("method", ["gptq", "awq", "autobitlinear", "fp8", "ternarize"])
def test_quantized_sources_are_refused_by_name(source: Path, tmp_path: Path, method: str) -> None:
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (source / "config.json").write_text(json.dumps(config))
    refused(CheckpointError, method, source, tmp_path / "out")


def test_integer_weights_are_refused(source: Path, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit(source, lambda t: t.update({name: t[name].to(torch.int8)}))
    refused(CheckpointError, f"{name} is I8", source, tmp_path / "out")


def test_the_output_cannot_be_the_source_or_inside_it(source: Path) -> None:
    refused(OutputError, "is the source", source, source)
    refused(OutputError, "or inside it", source, source / "packed")


@pytest.mark.parametrize("config", [None, {"model_type": "foo", "architectures": ["FooModel"]}])
def test_a_model_that_transformers_does_not_have_is_converted_by_names_but_not_calibrated(
    config: dict[str, Any] | None, source: Path, tmp_path: Path
) -> None:
    (source / "config.json").unlink()
    if config is not None:
        (source / "config.json").write_text(json.dumps(config))
    calibrated = Recipe("gptq", calibrate=Calibrate())
    refused(CheckpointError, "calibration runs the model", source, tmp_path / "out", calibrated)
    record = convert(source, tmp_path / "packed", Recipe("itf"))
    assert record["coverage"]["ternary"] > 0
    assert verify(tmp_path / "packed", source)["compared"]["converted_again"] > 0


@pytest.mark.parametrize(
    ("recipe", "bounds", "words"),
    [
        (Recipe("itf"), {"cosine": 0.9}, "method 'itf' measures nothing"),
        (Recipe("gptq", calibrate=Calibrate()), {"kl": 0.1}, "one of perplexity, "),
        (Recipe("gptq", calibrate=Calibrate()), {"cosine": float("nan")}, "cosine=nan; expected"),
    ],
)
def test_a_bound_on_what_is_not_measured_is_refused_before_the_work(
    recipe: Recipe, bounds: dict[str, float], words: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        convert(source, tmp_path / "out", recipe, min_quality=bounds)
    assert not list(tmp_path.glob("out*"))


def test_an_existing_output_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(OutputError, match="exists already"):
        convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_too_little_disk_is_found_out_before_the_start(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(OutputError, "free; the result needs", source, tmp_path / "out")
    calibrated = Recipe("gptq", calibrate=Calibrate())  # its blocks need room as well
    room = make_plan(source, calibrated).packed_bytes() + (1 << 20) + 4000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=room))
    refused(OutputError, "free; the result needs", source, tmp_path / "out", calibrated)
    convert(source, tmp_path / "out")


def test_too_many_tensors_for_a_header_are_found_out_before_the_start(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = make_plan(llama).shards[0].data_start() - 8
    monkeypatch.setattr(layout, "MAX_HEADER", header)
    convert(llama, tmp_path / "fits")
    monkeypatch.setattr(layout, "MAX_HEADER", header - 1)
    refused(CheckpointError, f"take a header of {header} bytes", llama, tmp_path / "out")


def test_a_full_disk_keeps_what_is_done(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = write_at, 0

    def full(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 9:
            raise OSError(28, "No space left on device")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_at", full)
        with pytest.raises(OutputError, match="No space left on device"):
            convert(source, tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out")
    verify(tmp_path / "out", source)


def test_bytes_that_are_taken_in_parts_are_all_written(tmp_path: Path) -> None:
    class Small(FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:3])

    (tmp_path / "file").touch()
    with Small(tmp_path / "file", "r+b") as file:
        write_at(file, 2, torch.arange(10, dtype=torch.uint8).numpy().data)
    assert (tmp_path / "file").read_bytes() == bytes([0, 0, *range(10)])


def test_an_unfinished_conversion_with_other_options_is_not_touched(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_small_files", _die)
        with pytest.raises(Break):
            convert(source, tmp_path / "out")
    before = digest_of(tmp_path / "out.partial")
    with pytest.raises(OutputError, match="unfinished conversion with other options"):
        convert(source, tmp_path / "out", Recipe("twn"))
    os.utime(source / "model.safetensors", ns=(1, 1))
    with pytest.raises(OutputError, match=r"another source \(model.safetensors differs\); exp"):
        convert(source, tmp_path / "out")
    assert digest_of(tmp_path / "out.partial") == before


def test_a_break_after_the_last_rename_is_tidied_up_by_the_same_command_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = convert(source, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "tidy", _die)
        with pytest.raises(Break):
            convert(source, tmp_path / "out")
    assert (tmp_path / "out" / JOURNAL).is_file()
    with pytest.raises(OutputError, match="exists already"):
        convert(source, tmp_path / "out", Recipe("twn"))
    assert convert(source, tmp_path / "out") == json.loads(json.dumps(record))
    assert digest_of(tmp_path / "out") == digest_of(tmp_path / "whole")
    with pytest.raises(OutputError, match="exists already"):
        convert(source, tmp_path / "out")


def test_a_break_while_a_useless_conversion_is_removed_does_not_make_it_a_strangers(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(*_: Any) -> Any:
        raise WeightError("bad")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "convert_tensor", damage)
        patch.setattr(shutil, "rmtree", _die)  # the last step, when other files are gone
        with pytest.raises(Break):
            convert(source, tmp_path / "out")
    assert os.listdir(tmp_path / "out.partial") == [JOURNAL]
    convert(source, tmp_path / "out")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("x: can't allocate memory: 12")])
def test_too_little_memory_keeps_what_is_done(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "convert_tensor", fail)
        with pytest.raises(OutputError, match="out of memory; 2 threads .* the same command again"):
            convert(source, tmp_path / "out", threads=2)
    convert(source, tmp_path / "out")


def test_the_memory_that_is_left_decides_how_many_threads_convert(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, no_limit = make_plan(llama), float("inf")
    assert limits.threads_that_fit(work, 8) == 8
    for memory, fit in ((work.convert_memory(3), 3), (work.convert_memory(1), 1)):
        monkeypatch.setattr(limits, "memory_left", lambda memory=memory: (memory, no_limit))
        assert limits.threads_that_fit(work, 8) == fit
    for left in ((work.convert_memory(1) - 1, no_limit), (no_limit, work.convert_memory(1))):
        monkeypatch.setattr(limits, "memory_left", lambda left=left: left)
        with pytest.raises(OutputError, match="left to this process; the conversion needs"):
            convert(llama, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_source_that_may_not_be_read_is_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deny(path: Any, target: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "copyfile", deny)
    (source / "vocab.json").write_text("{}")
    with pytest.raises(
        OutputError, match=r"source/\S+: cannot be read \(Permission denied\); what"
    ):
        convert(source, tmp_path / "out")


def test_a_source_that_changes_during_the_conversion_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = write_small_files

    def touch(*args: Any) -> Any:
        os.utime(source / "model.safetensors", ns=(1, 1))
        return real(*args)

    monkeypatch.setattr(pipeline, "write_small_files", touch)
    with pytest.raises(CheckpointError, match=": model.safetensors changed during the conversion"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_source_named_like_the_unfinished_output_is_left_alone(source: Path) -> None:
    partial = source.rename(source.with_name("out.partial"))
    before = digest_of(partial)
    with pytest.raises(OutputError):
        convert(partial, partial.with_name("out"))
    assert digest_of(partial) == before


def test_a_break_before_the_last_rename_can_be_resumed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "journal.jsonl").write_text("{}")  # a file of the source, not ours
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "sync_files", _die)
        with pytest.raises(Break):
            convert(source, tmp_path / "out")
    convert(source, tmp_path / "out")
    verify(tmp_path / "out", source)
    assert (tmp_path / "out" / "journal.jsonl").read_text() == "{}"
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_a_plan_of_a_sharded_model_needs_no_shards(tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path / "source", max_shard_size="60KB")
    total = make_plan(tmp_path / "source").coverage()
    for shard in (tmp_path / "source").glob("*.safetensors"):
        shard.unlink()
    assert make_plan(tmp_path / "source", config_only=True).coverage() == total


def test_a_disk_that_cannot_reserve_space_is_good_enough(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    convert(source, tmp_path / "out")


def test_two_conversions_cannot_write_one_output(source: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    with (
        FileLock(tmp_path / "out.partial.lock"),
        pytest.raises(OutputError, match="another conversion"),
    ):
        convert(source, tmp_path / "out")


@pytest.mark.skipif(sys.platform == "win32", reason="a file that is open keeps its name")
def test_a_lock_whose_name_goes_as_it_is_taken_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older versions of filelock do not look, and two would have it."""
    import fcntl

    partial, path, really = tmp_path / "out.partial", tmp_path / "out.partial.lock", fcntl.flock
    calls: list[int] = []

    def flock(handle: int, operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:  # the process before this one is done
            path.unlink()
        really(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with exclusive(partial, 10):
        assert path.exists()
        with pytest.raises(OutputError, match="another conversion"), exclusive(partial):
            pass


def test_a_small_file_that_is_broken_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "my.steps", b"data")
    assert not list(tmp_path.iterdir())


def test_patterns_that_match_nothing_and_keeping_everything_are_refused(
    source: Path, tmp_path: Path
) -> None:
    refused(SelectionError, "matches no tensor", source, tmp_path / "o", Recipe(keep=("*.qproj*",)))
    refused(SelectionError, "leaves no tensor", source, tmp_path / "o", Recipe(keep=("*",)))


@pytest.mark.parametrize(
    "bad",
    [
        {"method": "magic"},
        {"group_size": -2},
        {"group_size": 2**63},
        {"dtype": "int4"},
        {"activations": "fp8"},
    ],
)
def test_unknown_options_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=str(next(iter(bad.values())))):
        Recipe(**bad)


# --- verification ----------------------------------------------------------------------------


def test_verify_finds_a_flipped_bit_and_names_the_tensor(llama: Path, tmp_path: Path) -> None:
    convert(llama, tmp_path / "packed")
    packed, _ = open_packed(tmp_path / "packed")
    name = "model.layers.1.self_attn.o_proj.weight"
    path = tmp_path / "packed" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[packed.tensors[name].start + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=name):
        verify(tmp_path / "packed")


def test_verify_tells_another_source_from_the_right_one(
    llama: Path, source: Path, tmp_path: Path
) -> None:
    convert(llama, tmp_path / "packed")
    edit(source, lambda t: t["model.layers.0.mlp.up_proj.weight"].mul_(-1))
    with pytest.raises(FormatError, match="model.layers.0.mlp.up_proj.weight: is not what"):
        verify(tmp_path / "packed", source)


def test_a_plan_needs_only_a_config(source: Path) -> None:
    with_weights = make_plan(source)
    (source / "model.safetensors").unlink()
    without = make_plan(source, config_only=True)
    assert without.packed_bytes() == with_weights.packed_bytes()
    assert without.coverage() == with_weights.coverage()


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"memory.max": "1000\n", "memory.stat": "anon 400\nfile 7\n"}, 600),
        ({"memory.max": "max\n"}, math.inf),
        ({"memory.max": "1000\n"}, math.inf),  # a system without statistics
        ({"memory/memory.limit_in_bytes": "1000\n", "memory/memory.stat": "rss 1\n"}, math.inf),
        ({"memory/memory.limit_in_bytes": "900\n", "memory/memory.stat": "total_rss 1\n"}, 899),
    ],
)
def test_the_memory_that_a_container_leaves(
    files: dict[str, str], left: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("ternarize.convert.limits._CGROUP", tmp_path)
    assert memory_left()[0] == left
