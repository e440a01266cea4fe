"""Adapters of PEFT beside packed layers: they train, save, load and unload; merging is refused."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packing
import pytest
import torch
import transformers
from torch import Tensor, nn

import ternarize
from ternarize.errors import UsageError
from ternarize.runtime.adapters import AdaptedLinear
from ternarize.runtime.decode import Decoder, can_decode
from ternarize.runtime.modules.linear import TernaryLinear
from ternarize.runtime.packed import Packed

peft = pytest.importorskip("peft")

Made = Callable[[str], Path]
TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(3, 27).view(2, 12)


def lora(targets: list[str] = TARGETS, **options: Any) -> Any:
    return peft.LoraConfig(target_modules=targets, r=4, lora_alpha=8, **options)


def packed_bytes(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of the model holds, but for the adapters."""
    state = model.state_dict()
    return {
        name.replace("base_model.model.", "").replace(".base_layer", ""): tensor.clone()
        for name, tensor in state.items()
        if "lora_" not in name
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def train(model: Any, steps: int = 5) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


LOADERS: dict[str, Callable[[Path], Any]] = {
    "ternarize": lambda path: ternarize.load(path, dtype=torch.float32),
    "transformers": lambda path: transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32
    ),
}

RELOAD = """
import sys, torch, peft, ternarize
packed, adapter, logits = sys.argv[1:]
model = peft.PeftModel.from_pretrained(ternarize.load(packed, dtype=torch.float32), adapter)
with torch.no_grad():
    assert torch.equal(model(torch.arange(3, 27).view(2, 12)).logits, torch.load(logits))
"""


@pytest.mark.parametrize(("name", "loader"), [("llama", "transformers"), ("mixtral", "ternarize")])
def test_lora_trains_saves_and_loads(made: Made, tmp_path: Path, name: str, loader: str) -> None:
    packed = made(name) / "packed"
    model: Any = peft.get_peft_model(LOADERS[loader](packed), lora()).train()
    before = packed_bytes(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if "lora_" in n
    }
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    assert same(packed_bytes(model), before)
    model.eval().save_pretrained(tmp_path / "adapter")
    expected = packing.output(model)
    again = peft.PeftModel.from_pretrained(LOADERS[loader](packed), tmp_path / "adapter")
    assert torch.equal(packing.output(again), expected)
    base = model.unload()
    assert not any(type(module) is AdaptedLinear for module in base.modules())
    plain = packing.output(ternarize.load(packed, dtype=torch.float32))
    assert torch.equal(packing.output(base), plain)
    base.save_pretrained(tmp_path / "saved")  # as it was packed
    files = [packing.read_checkpoint(folder) for folder in (packed, tmp_path / "saved")]
    assert same(*files)


def test_another_process_loads_the_adapter(made: Made, tmp_path: Path) -> None:
    packed = made("llama") / "packed"
    model = changed(peft.get_peft_model(ternarize.load(packed, dtype=torch.float32), lora()))
    model.save_pretrained(tmp_path / "adapter")
    torch.save(model(IDS).logits.detach(), tmp_path / "logits.pt")
    subprocess.run(
        [sys.executable, "-c", RELOAD, packed, tmp_path / "adapter", tmp_path / "logits.pt"],
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )


def changed(model: Any) -> Any:
    """The model with numbers of its own in every parameter of its adapters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


METHODS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(target_modules=TARGETS, r=4),
    "oft": lambda: peft.OFTConfig(target_modules=TARGETS, oft_block_size=8),
    "hra": lambda: peft.HRAConfig(target_modules=TARGETS, r=4),
}


@pytest.mark.parametrize("method", METHODS)
def test_adapters_compute_what_they_do_beside_dense_weights(made: Made, method: str) -> None:
    """Outputs and gradients, also of those that look at the weight (DoRA, LoHa, HRA)."""
    folder = made("llama")
    results = []
    for base in (
        ternarize.load(folder / "packed", dtype=torch.float32),
        packing.load_dense(folder / "dense", dtype=torch.float32),
    ):
        torch.manual_seed(0)
        plain = base(IDS).logits.detach()
        model = changed(peft.get_peft_model(base, METHODS[method]()))
        out = model(input_ids=IDS, labels=IDS)
        out.loss.backward()
        assert float((out.logits.detach() - plain).abs().max()) > 0.01 * float(plain.abs().max())
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((out.logits.detach(), gradients))
    (ours, our_gradients), (theirs, their_gradients) = results
    packing.assert_near(ours, theirs, 2e-5)
    assert our_gradients.keys() == their_gradients.keys() and our_gradients
    for name, gradient in our_gradients.items():
        largest = max(float(their_gradients[name].abs().max()), 1e-3)
        assert float((gradient - their_gradients[name]).abs().max()) < 1e-4 * largest, name


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "oft"])
def test_merging_is_refused_and_changes_nothing(made: Made, method: str) -> None:
    base = ternarize.load(made("llama") / "packed", dtype=torch.float32)
    model = changed(peft.get_peft_model(base, METHODS[method]()))
    bytes_before, output = packed_bytes(base), model(IDS).logits
    for merge in (
        model.merge_adapter,
        lambda: model.merge_adapter(safe_merge=True),
        model.merge_and_unload,
        lambda: model.merge_and_unload(safe_merge=True),
    ):
        with pytest.raises(UsageError, match="is packed and cannot be .*dequantize=True") as error:
            merge()
        assert "\n" not in str(error.value)
    assert same(packed_bytes(base), bytes_before)
    assert torch.equal(model(IDS).logits, output)


def test_a_dequantized_model_takes_the_adapter_in(made: Made, tmp_path: Path) -> None:
    packed = made("mixtral") / "packed"
    model = changed(peft.get_peft_model(ternarize.load(packed, dtype=torch.float32), lora()))
    expected = model(IDS).logits.detach()
    model.save_pretrained(tmp_path / "adapter")
    dense = ternarize.load(packed, dtype=torch.float32, dequantize=True)
    merged = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").merge_and_unload()
    packing.assert_near(merged(IDS).logits.detach(), expected, 2e-5)
    model.get_base_model().dequantize()  # or the one that is loaded
    merged = model.merge_and_unload()
    packing.assert_near(merged(IDS).logits.detach(), expected, 2e-5)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_initializations_that_change_the_weight_are_refused(made: Made, start: Any) -> None:
    base = ternarize.load(made("llama") / "packed")
    with pytest.raises(UsageError, match="an initialization from the weight"):
        peft.get_peft_model(base, lora(init_lora_weights=start))


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("mixtral", {"target_parameters": ["experts.gate_up_proj"]}, "expected linear layers"),
        ("mixtral", {"target_parameters": ["experts.down_proj"]}, "expected linear layers"),
        ("llama", {"target_parameters": ["q_proj.weight"]}, "expected linear layers"),
        ("llama", {"modules_to_save": ["up_proj"]}, "train a copy of it"),
    ],
)
def test_adapters_that_need_more_than_a_layer_are_refused(
    made: Made, name: str, options: dict[str, Any], match: str
) -> None:
    base = ternarize.load(made(name) / "packed")
    targets = [] if "target_parameters" in options else TARGETS
    with pytest.raises(UsageError, match=match):
        peft.get_peft_model(base, lora(targets, **options))


WRITES: dict[str, Callable[[Any], Any]] = {
    "item": lambda weight: weight.__setitem__((0, 0), 1.0),
    "row": lambda weight: weight[0].zero_(),
    "flat": lambda weight: weight.view(-1).add_(1),
    "part": lambda weight: weight.chunk(2)[1].mul_(2),
    "view of a view": lambda weight: weight.t().detach()[0].fill_(1),
    "out": lambda weight: torch.neg(weight, out=weight.t()),
    "list": lambda weight: torch._foreach_add_([weight], 1),
}


@pytest.mark.parametrize("write", WRITES)
def test_writes_through_a_view_of_the_weight_are_refused(made: Made, write: str) -> None:
    base: Any = ternarize.load(made("llama") / "packed", dtype=torch.float32)
    peft.get_peft_model(base, lora())
    weight = base.model.layers[0].self_attn.q_proj.base_layer.weight
    dense = weight.clone()
    with torch.no_grad(), pytest.raises(UsageError, match="packed and cannot be changed"):
        WRITES[write](weight)
    assert torch.equal(weight.t().contiguous(), dense.t()) and torch.equal(weight[1:], dense[1:])


def test_a_dense_parameter_cannot_take_the_place_of_the_weight(made: Made) -> None:
    base: Any = ternarize.load(made("llama") / "packed", dtype=torch.float32)
    model = peft.get_peft_model(base, lora())
    before, layer = packed_bytes(base), base.model.layers[0].self_attn.q_proj.base_layer
    for weight in (nn.Parameter(torch.zeros(64, 64)), layer.weight, None):
        with pytest.raises(UsageError, match="packed and cannot be changed"):
            layer.weight = weight
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
    assert same(packed_bytes(base), before)


def test_osf_which_would_train_nothing_is_refused(made: Made) -> None:
    base = ternarize.load(made("llama") / "packed")
    with pytest.raises(UsageError, match="^OSF: the model has packed layers"):
        peft.get_peft_model(base, peft.OSFConfig(target_modules=TARGETS, effective_rank=4))


def test_a_base_model_is_not_saved_while_an_adapter_is_on_it(made: Made, tmp_path: Path) -> None:
    model = peft.get_peft_model(ternarize.load(made("llama") / "packed"), lora())
    with pytest.raises(UsageError, match="q_proj.base_layer: an adapter wraps it"):
        model.get_base_model().save_pretrained(tmp_path)


def test_packed_ends_of_a_model(made: Made, tmp_path: Path) -> None:
    """A head in int8 takes an adapter; an embedding in int8, tied to it, does not."""
    folder = made("llama_tied")
    dense = packing.output(ternarize.load(folder / "packed", dtype=torch.float32))
    base: Any = ternarize.load(folder / "packed", dtype=torch.float32, head="int8")
    with pytest.raises(UsageError, match="PackedEmbedding: is packed"):
        peft.get_peft_model(copy.deepcopy(base), lora(["embed_tokens"]))
    model = peft.get_peft_model(base, lora(["lm_head"]))
    packing.assert_near(packing.output(model), dense, 0.02)
    losses = train(model.train())
    assert losses[-1] < losses[0] - 0.05
    with pytest.raises(UsageError, match="is packed and cannot be changed"):
        model.merge_and_unload()


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_layers_of_every_kind_take_adapters(made: Made, name: str) -> None:
    """GPT-2's are transposed; BERT's have biases."""
    folder = made(name)
    base = ternarize.load(folder / "packed", dtype=torch.float32)
    plain = packing.output(base)
    targets = {"gpt2": ["c_attn", "c_proj"], "bert": ["query", "dense"]}[name]
    model = changed(peft.get_peft_model(base, lora(targets)))
    assert any(type(module) is AdaptedLinear for module in model.modules())
    adapted = packing.output(model)
    assert float((adapted - plain).abs().max()) > 0.01 * float(plain.abs().max())
    with model.disable_adapter():
        assert torch.equal(packing.output(model), plain)
    again = copy.deepcopy(model)
    assert torch.equal(packing.output(again), adapted)
    assert torch.equal(packing.output(packing.stored(model)), packing.output(packing.stored(again)))


@pytest.mark.parametrize(("name", "reentrant"), [("llama", True), ("mixtral", False)])
def test_gradient_checkpointing_gives_the_same_gradients(
    made: Made, name: str, reentrant: bool
) -> None:
    gradients = []
    for checkpointed in (False, True):
        base: Any = ternarize.load(made(name) / "packed")
        base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        if checkpointed:
            base.enable_input_require_grads()
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        before = packed_bytes(base)
        torch.manual_seed(0)
        model = changed(peft.get_peft_model(base, lora())).train()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert same(packed_bytes(model), before)
    assert same(*gradients)


def test_trainer_trains_an_adapter(made: Made, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    base = ternarize.load(made("llama") / "packed", dtype=torch.float32)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS]
    with pytest.raises(ValueError, match="quantized"):  # without an adapter there is nothing
        transformers.Trainer(base, arguments, train_dataset=rows)
    model = peft.get_peft_model(base, lora())
    before = packed_bytes(model)
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert same(packed_bytes(model), before)
    assert (tmp_path / "out/checkpoint-4/adapter_model.safetensors").exists()


def test_an_adapter_of_transformers_own(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the newest transformers may ask for a PEFT that is not out yet
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    base: Any = ternarize.load(made("llama") / "packed", dtype=torch.float32)
    base.add_adapter(lora())
    changed(base)
    expected = packing.output(base)
    base.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter/model.safetensors").exists()
    again: Any = ternarize.load(made("llama") / "packed", dtype=torch.float32)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(packing.output(again), expected)
    name = "adapter_config.json"  # which names the base model
    assert str(made("llama") / "packed") in (tmp_path / "adapter" / name).read_text()
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "adapter", dtype=torch.float32
    )
    assert torch.equal(packing.output(whole), expected)


def test_what_decodes_by_itself_sees_the_adapter(made: Made) -> None:
    base: Any = ternarize.load(made("llama") / "packed", dtype=torch.float32)
    model = changed(peft.get_peft_model(base, lora(["q_proj"])))
    inner = model.get_base_model()
    if can_decode(inner, 8):  # else everybody runs the model's own forward
        decoder = Decoder(inner, IDS[:, :4], 8)
        logits = decoder.step(IDS[:, 4])
        packing.assert_near(logits, model(IDS[:, :5]).logits[:, -1].detach(), 2e-5)


def test_only_peft_makes_a_layer_look_dense() -> None:
    layer = TernaryLinear(8, 4, group_size=8)
    parent: Any = nn.Module()
    parent.layer = layer
    assert type(layer) is TernaryLinear and layer.weight.dtype == torch.uint8
    assert isinstance(layer, Packed)
