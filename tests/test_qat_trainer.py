"""Models of `ternarize.qat` in the hands of others: Trainer, accelerate, FSDP2, compilers, PEFT."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import qat_processes
import tiny_models
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Trainer, TrainingArguments

import ternarize
import ternarize.qat as qat
from ternarize.errors import UsageError
from ternarize.qat.modules import LOG_SCALE, latent_modules

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TEXTS = torch.randint(3, 160, (24, 16), generator=torch.Generator().manual_seed(0))
STEPS = 6


def prepared(name: str = "llama", **options: Any) -> Any:
    return qat.prepare(tiny_models.build(name, torch.float32), **options)


def trainer(model: Any, folder: Path, schedule: dict[str, Any], **options: Any) -> Trainer:
    """Some steps of Trainer, with a checkpoint in the middle."""
    told: dict[str, Any] = {
        "max_steps": STEPS,
        "save_steps": STEPS // 2,
        "report_to": [],
        "seed": 3,
    }
    told |= {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 2}
    optimizer = torch.optim.AdamW(qat.parameter_groups(model, 2e-3, weight_decay=0.1))
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **(told | options)),
        train_dataset=[{"input_ids": ids, "labels": ids} for ids in TEXTS],
        callbacks=[qat.Schedule(model, **schedule)],
        optimizers=(optimizer, None),
    )


def differing(a: nn.Module, b: nn.Module) -> list[str]:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    return [name for name in ours if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize(
    "name, options, schedule, told",
    [
        ("llama", {}, {"warmup": 0.6, "zeros": 0.7, "ramp": 0.9}, {}),
        ("llama", {}, {}, {"bf16": True}),
        ("llama_tied", {"embeddings": "ternary"}, {}, {"gradient_checkpointing": True}),
        ("gpt2", {"estimator": "tanh", "scale": "least-squares"}, {}, {}),
    ],
)
def test_trainer_trains_saves_and_resumes_with_equal_results(
    name: str,
    options: dict[str, Any],
    schedule: dict[str, Any],
    told: dict[str, Any],
    tmp_path: Path,
) -> None:
    whole, start = prepared(name, **options), prepared(name, **options)
    trainer(whole, tmp_path, schedule, **told).train()
    assert len(differing(whole, start)) > 10
    assert all(m.blend is None and m.sharpness is None for _, m in latent_modules(whole))
    again = prepared(name, **options)
    middle = str(tmp_path / f"checkpoint-{STEPS // 2}")
    trainer(again, tmp_path, schedule, **told).train(resume_from_checkpoint=middle)
    assert not differing(whole, again)
    for (_, a), (_, b) in zip(latent_modules(whole), latent_modules(again), strict=True):
        assert all(torch.equal(a.rounded(leaf), b.rounded(leaf)) for leaf in a.forms)


def test_the_schedule_ends_weight_decay_half_way(tmp_path: Path) -> None:
    model, seen = prepared(), []
    work = trainer(model, tmp_path, {})
    step = work.optimizer.step  # type: ignore[union-attr]

    def watched(*args: Any) -> Any:
        seen.append({group["weight_decay"] for group in work.optimizer.param_groups})  # type: ignore[union-attr]
        return step(*args)

    work.optimizer.step = watched  # type: ignore[union-attr,method-assign]
    work.train()
    assert seen == [{0.0, 0.1}] * 3 + [{0.0}] * 3


def test_parameter_groups_have_each_parameter_once_and_no_decay_of_scales() -> None:
    model = prepared("llama_tied", embeddings="ternary")
    names = {id(p): n for n, p in model.named_parameters()}
    for relative in (False, True):
        groups = qat.parameter_groups(model, 0.01, relative=relative, weight_decay=0.1)
        found = [names[id(p)] for group in groups for p in group["params"]]
        assert sorted(found) == sorted(names.values())
        for group in groups:
            for parameter in group["params"]:
                name = names[id(parameter)]
                matrix = parameter.ndim > 1 and not name.endswith(LOG_SCALE)
                assert group["weight_decay"] == (0.1 if matrix else 0.0), name
    scales = model.model.layers[0].mlp.up_proj.scales("weight")
    weight = model.model.layers[0].mlp.up_proj.weight
    rate = next(g["lr"] for g in groups if any(p is weight for p in g["params"]))
    assert rate == pytest.approx(0.01 * float(scales.detach().mean()))


def test_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for checkpointing in (False, True):
        model = prepared("mixtral").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.autograd.backward(model(input_ids=TEXTS[:2], labels=TEXTS[:2]).loss)
        found.append([p.grad for p in model.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize(
    "name, options, schedule, graphs",
    [
        ("llama", {}, {"warmup": 0.6, "zeros": 0.7}, 2),
        ("llama", {"scale": "absmean", "group_size": 0, "activations": "int8"}, {}, 1),
        ("llama_tied", {"embeddings": "ternary", "group_size": 7, "estimator": "tanh"}, {}, 2),
        ("mixtral", {"scale": "least-squares"}, {}, 1),
    ],
)
def test_a_compiler_sees_one_graph_whatever_the_schedule_says(
    name: str, options: dict[str, Any], schedule: dict[str, Any], graphs: int
) -> None:
    """Two graphs where something ends: one while it goes on, whatever its value, and one after."""
    torch.compiler.reset()
    model: Any = tiny_models.build(name, torch.float32, num_hidden_layers=1)
    qat.prepare(model, **options).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    schedules = qat.Schedule(model, **schedule)
    for done in (0.0, 0.2, 0.5, 0.95, 1.0):
        schedules.at(done)
        losses, gradients = [], []
        for run in (compiled, model):
            model.zero_grad()
            loss = run(input_ids=TEXTS[:2], labels=TEXTS[:2]).loss
            torch.autograd.backward(loss)
            losses.append(loss.detach())
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        torch.testing.assert_close(losses[0], losses[1])
        torch.testing.assert_close(gradients[0], gradients[1])
    assert counter.frame_count == graphs
    torch.compiler.reset()


def test_a_compiled_model_is_packed(tmp_path: Path) -> None:
    model = prepared()
    qat.pack(torch.compile(model, backend="eager"), tmp_path / "packed")
    own = dict(ternarize.load(tmp_path / "packed", dequantize=True).named_parameters())
    layer = model.model.layers[0].mlp.up_proj
    assert torch.equal(own["model.layers.0.mlp.up_proj.weight"], layer.rounded("weight"))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_prepared_model_is_copied_and_pickled(copied: Any) -> None:
    model = prepared("llama_tied", embeddings="ternary")
    again = copied(model)
    assert not differing(model, again)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    places = again.lm_head.sharing["weight"]
    assert {id(module) for module, _ in places} == {id(again.lm_head), id(again.model.embed_tokens)}


def test_adapters_train_on_top_while_latents_stay(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = prepared()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=TEXTS[:4], labels=TEXTS[:4]).loss
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    with pytest.raises(UsageError, match="has adapters.*unload"):
        qat.pack(adapted, tmp_path / "packed")
    with pytest.raises(UsageError, match="has adapters.*before get_peft_model"):
        qat.prepare(peft.get_peft_model(tiny_models.build("llama"), peft.LoraConfig()))
    adapted.save_pretrained(tmp_path / "adapter")
    plain = adapted.unload()
    after = dict(plain.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    qat.pack(plain, tmp_path / "packed")
    again = peft.PeftModel.from_pretrained(
        ternarize.load(tmp_path / "packed"), tmp_path / "adapter"
    )
    ids = TEXTS[:2]
    restored = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    torch.testing.assert_close(again(input_ids=ids).logits, restored(input_ids=ids).logits)


def test_sft_trainer_of_trl_trains_a_prepared_model(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    folder = ROOT / "examples" / "tiny-llama"
    model: Any = qat.prepare(
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    )
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    told = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": []}
    told |= {"disable_tqdm": True, "save_strategy": "no", "bf16": False, "max_length": 32}
    texts = (ROOT / "examples" / "eval.txt").read_text("utf-8").split("\n\n")[:8]
    work = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(output_dir=str(tmp_path / "runs"), learning_rate=1e-3, **told),
        train_dataset=datasets.Dataset.from_list([{"text": text} for text in texts]),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        callbacks=[qat.Schedule(model, warmup=0.5)],
    )
    work.train()
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    qat.pack(model, tmp_path / "packed")
    assert ternarize.load(tmp_path / "packed").get_input_embeddings() is not None


# --- more than one process ---


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "accelerate-fsdp2"])
def test_two_processes_train_as_one_does(kind: str, tmp_path: Path) -> None:
    if kind != "fsdp2":
        pytest.importorskip("accelerate")
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", qat_processes.__file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), *sys.path])
    done = subprocess.run(
        [sys.executable, *launch, kind, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    alone: dict[str, Tensor] = qat_processes.train_alone().state_dict()
    first, second = (torch.load(tmp_path / f"state-{rank}.pt") for rank in (0, 1))
    assert first.keys() == alone.keys()
    for name, value in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6)
    dense = ternarize.load(tmp_path / "packed", dequantize=True)
    model = qat_processes.prepared()
    model.load_state_dict(first)
    qat.Schedule(model, zeros=0.6).at(1)
    for path, module in latent_modules(model):
        assert torch.equal(module.rounded("weight"), dense.get_parameter(f"{path}.weight")), path


def test_a_model_that_was_cast_says_that_it_cannot_train() -> None:
    model = prepared().to(torch.bfloat16)
    with pytest.raises(UsageError, match="is bfloat16; expected float32.*autocast"):
        model(input_ids=TEXTS[:1])
