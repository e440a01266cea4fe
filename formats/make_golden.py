"""Write the golden checkpoints: small models as this version of the package converts them.

    python formats/make_golden.py [--output FOLDER] [--force]

The vectors say what a file means; the golden checkpoints are what users have: whole directories,
with config.json, ternarize.json and an index, of models that load. Each was converted once from
random weights and is never made again: a later version must read these bytes, whatever it would
write itself. Calibration depends on the machine, so that a second run may differ; golden.json has
the digest of every file, and what readers must find in it:

    files       path below golden/: SHA-256
    tensors     checkpoint: {tensor: [kind, logical shape, SHA-256 of the decoded numbers]}, where
                those are trits, or the integers of int8 and int4, row-major, or the bytes of a kept
                tensor
    logits      checkpoint: the first outputs of the loaded model on the tokens 1, 2, ... 8
    journals    journal of steps: [the checkpoint that it begins from, or null; steps; those in
                effect; {tensor: [SHA-256 of the trits, of the exponents, of what its record digests
                after the steps, or null]}]
    patches     patch: [the checkpoint that it begins from, {file of the result: SHA-256}]

Nothing is replaced without --force.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import reference
import reference_patch
import reference_steps
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import ternarize
from ternarize.convert.run import convert
from ternarize.files import container, metadata
from ternarize.files.headers import DTYPES
from ternarize.files.sums import SUMS
from ternarize.plans.recipe import Calibrate, Recipe
from ternarize.publish.patches import diff_packed
from ternarize.publish.recode import recode
from ternarize.sources.packed import open_packed
from ternarize.steps.appender import Appender
from ternarize.steps.base import base_digest, opened_state
from ternarize.steps.generator import SCALES, TRITS
from ternarize.steps.journal import Edit, JournalHeader, Mark, Note, Step, block_bytes
from ternarize.steps.start import StartModel

HERE = Path(__file__).resolve().parent
TABLE = "golden.json"
TOKENS = 8
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 68,  # a multiple of no group size: rows end in a short group
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama(**more: Any) -> Any:
    return transformers.LlamaConfig(**{**SIZES, **more}, architectures=["LlamaForCausalLM"])


def mixtral() -> Any:
    return transformers.MixtralConfig(
        **SIZES, num_local_experts=2, num_experts_per_tok=1, architectures=["MixtralForCausalLM"]
    )


def gpt_oss() -> Any:
    """Experts in one tensor of three dimensions, turned."""
    return transformers.GptOssConfig(
        **{**SIZES, "intermediate_size": 20},
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        architectures=["GptOssForCausalLM"],
    )


def gpt2() -> Any:
    """Matrices that are stored turned."""
    return transformers.GPT2Config(
        vocab_size=48,
        n_embd=32,
        n_inner=68,
        n_layer=1,
        n_head=2,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["GPT2LMHeadModel"],
    )


def resnet() -> Any:
    """Convolutions."""
    return transformers.ResNetConfig(  # type: ignore[call-arg]
        num_channels=1,
        embedding_size=8,
        hidden_sizes=[8],
        depths=[1],
        layer_type="basic",
        num_labels=2,
        architectures=["ResNetForImageClassification"],
    )


def every_scale_type(tensors: dict[str, Tensor]) -> None:
    """Weights that are ternary already, with scales that only F32, or BF16, or F16 holds."""
    for part, scale in (("q", 1 + 2.0**-20), ("k", 1.5 * 2.0**-26), ("v", 0.75)):
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        tensors[name] = tensors[name].float().sign() * scale
    down = "model.layers.0.mlp.down_proj.weight"
    tensors[down] = tensors[down].float() * 2.0**30  # ordinary ones, beyond F16
    tensors["model.layers.0.mlp.up_proj.weight"][:, :16] = 0  # a group of zeros in each row


Change = Callable[[dict[str, Tensor]], None]
CASES: dict[str, tuple[Callable[[], Any], Recipe, str | None, Change | None]] = {
    "groups": (llama, Recipe(group_size=16), "16KB", None),
    "rows": (lambda: llama(tie_word_embeddings=True), Recipe("twn", -1), None, None),
    "tensor": (llama, Recipe("itf", 0, activations="int8"), None, None),
    "scale-types": (llama, Recipe(group_size=16), None, every_scale_type),
    "planes-scale8": (
        llama,
        Recipe("itf", 16, scale_bits=8, planes=("*_proj.weight",), head="int8", embeddings="int8"),
        None,
        None,
    ),
    "rotation": (
        llama,
        Recipe("gptq", 16, embeddings="ternary", calibrate=Calibrate("samples.safetensors")),
        None,
        None,
    ),
    "experts": (mixtral, Recipe(group_size=-1), "16KB", None),
    "stacked-experts": (gpt_oss, Recipe(group_size=16), None, None),
    "int4": (
        lambda: llama(tie_word_embeddings=True),
        Recipe("itf", 16, head="int4", embeddings="int4"),
        None,
        None,
    ),
    "transposed": (gpt2, Recipe(group_size=16, head="ternary", embeddings="ternary"), None, None),
    "kernels": (resnet, Recipe("itf", 16), None, None),
}


def save_source(config: Any, folder: Path, shard: str | None, change: Change | None) -> None:
    """A model of random weights, as save_pretrained writes it."""
    model_class = getattr(transformers, config.architectures[0])
    torch.manual_seed(0)
    model = model_class._from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape) + float(parameter.ndim == 1))
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    if change is not None:
        file = folder / "model.safetensors"
        tensors = {name: t.clone() for name, t in model.state_dict().items()}
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})


def make_models(folder: Path) -> None:
    """Convert every case into a directory of `folder`."""
    for name, (config, recipe, shard, change) in CASES.items():
        with tempfile.TemporaryDirectory() as work:
            source = Path(work) / "source"
            save_source(config(), source, shard, change)
            if recipe.calibrate is not None:
                ids = torch.randint(3, 48, (16, 16), generator=torch.Generator().manual_seed(0))
                samples = Path(work) / recipe.calibrate.dataset
                save_file({"input_ids": ids}, samples)
                how = Calibrate(str(samples), num_samples=12, rotation=16)
                recipe = replace(recipe, calibrate=how)
            convert(source, folder / name, recipe, threads=1)


def wide() -> Any:
    """Matrices that are large enough for tables of frequencies."""
    return llama(hidden_size=64, intermediate_size=200)


def make_coded(folder: Path) -> None:
    """A checkpoint whose ternary tensors are streams, with scales of 16 bits."""
    with tempfile.TemporaryDirectory() as work:
        save_source(wide(), Path(work) / "source", None, None)
        recipe = Recipe("itf", 32, zeros=0.9)
        convert(Path(work) / "source", Path(work) / "packed", recipe, threads=1)
        recode(Path(work) / "packed", folder, threads=1)


def make_kept(path: Path) -> None:
    """A file of kept tensors, one of each type, and none that is packed."""
    tensors = {
        name: torch.arange(1, 1 + 8 * dtype.itemsize, dtype=torch.uint8).view(dtype)
        for name, dtype in DTYPES.items()
        if dtype != torch.bool
    }
    tensors["BOOL"] = torch.tensor([True, False] * 4)
    records = {name: metadata.Record(container.digest(t)) for name, t in tensors.items()}
    save_file(tensors, path, metadata=metadata.dump_metadata(records))


# begins from a checkpoint of CASES, or from its seed
JOURNALS: dict[str, str | None] = {
    "groups.steps": "groups",
    "seed.steps": None,
    "model.steps": None,
}


def make_journal(path: Path, base: Path | None) -> None:
    """A journal with records of every type; its steps are random."""
    packed, records = open_packed(base) if base else (None, {})
    tensors = (("a", (2, 5, 30), 8), ("b", (40, 9), 0))
    header = JournalHeader(7, 1 << 30, tensors)
    if base:
        header = JournalHeader(7, base=base_digest(records))
    elif path.stem == "model":
        ones = (("norm.weight", (30,), 1), ("norm.bias", (30,), 0))
        files = {"tokenizer.json": "5a" * 32}
        model = StartModel((-83, 16), ones, {"model_type": "none", "eps": 1e-06}, files)
        header = replace(header, model=model)
    state = opened_state(header, packed, records)
    rng = random.Random(0)

    def draw(number: int, **foreign: Any) -> Step:
        target = rng.choice((TRITS, SCALES))
        chosen = sorted(rng.sample(range(64), rng.randrange(1, 12)))
        signs = tuple(rng.choice((1, -1)) for _ in chosen)
        bits, amount = rng.randrange(8), rng.randrange(1, 9) if target == SCALES else 1
        return Step(number, target, bits, amount, 64, tuple(chosen), signs, **foreign)

    with Appender(path, header) as appender:
        appender.append(Note({"loss": 2.5}))
        steps = [draw(number) for number in (0, 1, 3, 4, 9)]
        steps.append(draw(10, seed=2**63 + 1, drawn=0))
        for step in steps:
            appender.append(step)
        state.apply(steps)
        appender.append(Mark(11, state.digest()))
    block = [draw(number) for number in range(20, 26)]
    with path.open("ab") as file:
        file.write(block_bytes(block))
    state.apply(block)
    with Appender(path, header) as appender:
        appender.append(Mark(26, state.digest()))
        for edit in (Edit("mask", 1, 9), Edit("negate", 9, 20), Edit("restore", 4, 4)):
            appender.append(edit)


def describe_journal(path: Path, base: Path | None) -> list[Any]:
    """What the reference reader finds in a journal; see above."""
    begun = reference_steps.read_base(base) if base else None
    journal = reference_steps.read_journal(path.read_bytes())
    state = reference_steps.replay(journal, begun)
    found = {}
    for name, trits, exponents, size in state.parts():
        parts = [trits.tobytes(), exponents.tobytes()]
        scales = state.scales(name, exponents, trits)
        if scales is not None:
            parts.append(reference_steps.pack(trits, size) + scales)
        digests: list[str | None] = [hashlib.sha256(part).hexdigest() for part in parts]
        found[name] = [*digests, None][:3]
    return [base and base.name, len(journal.steps()), len(journal.effective()), found]


def nudged(a: Path, b: Path) -> Path:
    """A copy of a packed checkpoint, in its shards, whose trits, integers, scales, norms moved.

    Of each tensor one number does, but for what lies in q_proj. Returns b.
    """
    shutil.copytree(a, b)
    (b / SUMS).unlink()
    packed, records = open_packed(a)
    for number, file in enumerate(packed.files):
        tensors = load_file(a / file)
        here = {name: record for name, record in records.items() if name in tensors}
        for name, record in here.items():
            data = tensors[name].view(-1).view(torch.uint8)
            at = number % max(1, len(data))
            if "q_proj" in name:
                continue
            if record.kind == "ternary":
                at = int((data != 121).nonzero()[0])  # trits -0+ of whatever digits: their opposite
                data[at] = 242 - data[at]
            elif record.kind == "int8":
                data[at] = 1 if data[at] != 1 else 2
            else:
                data[at] ^= 1
            if record.kind == "int4":  # a half of the first group with others beside it
                assert data[at] != 0x88
            scales = tensors.get(f"{name}_scale")
            if scales is not None and record.kind != "kept":
                first = int((scales.flatten() != 0).nonzero()[0])
                scales.view(-1)[first : first + 1].view(torch.uint8)[0] ^= 1
            both = [tensors[name], *([scales] if scales is not None else [])]
            here[name] = replace(record, sha256=container.digest(*both))
        save_file(tensors, b / file, metadata=metadata.dump_metadata(here))
    return b


PATCHES = {"planes-scale8.patch": "planes-scale8", "int4.patch": "int4"}  # and their bases


def make_patch(path: Path, base: Path) -> None:
    """A patch that makes the nudged copy of a golden checkpoint of it."""
    with tempfile.TemporaryDirectory() as work:
        diff_packed(base, nudged(base, Path(work) / "b"), path, threads=1)


def describe_patch(path: Path, base: Path) -> list[Any]:
    """The base, and what the reference reader makes of it: {file: SHA-256}."""
    files = reference_patch.apply(base, path.read_bytes())
    return [base.name, {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}]


def first_outputs(folder: Path) -> list[float]:
    """The first output of a loaded checkpoint for each of the tokens 1 to 8, or of 8 images."""
    model = ternarize.load(folder, dtype="float32", activations="none")
    with torch.inference_mode():
        if model.main_input_name == "pixel_values":
            images = torch.arange(TOKENS * 32 * 32).float().sin().view(TOKENS, 1, 32, 32)
            found: Tensor = model(pixel_values=images).logits[:, 0]
        else:
            found = model(input_ids=torch.arange(1, 1 + TOKENS).unsqueeze(0)).logits[0, :, 0]
    return found.tolist()


def describe(path: Path) -> dict[str, list[Any]]:
    """What the reference decoder finds: {tensor: [kind, shape, SHA-256]}."""
    found: dict[str, list[Any]] = {}
    for name, tensor in reference.decode(path).items():
        words = reference.describe("-", tensor)
        kind, _, rest = words.removeprefix("- ").partition(" ")
        shape, _, rest = rest.partition("]")
        found[name] = [kind, json.loads(shape + "]"), rest.split()[2]]
    return dict(sorted(found.items()))


def make(folder: Path) -> None:
    """Write all golden checkpoints and their table to an empty folder."""
    make_models(folder)
    make_coded(folder / "coded")
    make_kept(folder / "kept-types.safetensors")
    tops = sorted(path.name for path in folder.iterdir())
    bases = {name: folder / base if base else None for name, base in JOURNALS.items()}
    for name, base in bases.items():
        make_journal(folder / name, base)
    for name, start in PATCHES.items():
        make_patch(folder / name, folder / start)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    table = {
        "format_version": metadata.FORMAT_VERSION,
        "files": {
            path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in paths
        },
        "tensors": {name: describe(folder / name) for name in tops},
        "logits": {
            name: [round(value, 5) for value in first_outputs(folder / name)]
            for name in (*CASES, "coded")
        },
        "patches": {n: describe_patch(folder / n, folder / base) for n, base in PATCHES.items()},
        "journals": {name: describe_journal(folder / name, base) for name, base in bases.items()},
    }
    (folder / TABLE).write_text(json.dumps(table, indent=1) + "\n", "utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the golden checkpoints.")
    parser.add_argument("--output", type=Path, default=HERE / "golden")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    arguments = parser.parse_args()
    output: Path = arguments.output
    if output.exists():
        if not arguments.force:
            print(f"{output}: is there; golden files are never made again", file=sys.stderr)
            return 1
        shutil.rmtree(output)
    output.mkdir(parents=True)
    make(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
