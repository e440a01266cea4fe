"""What the campaign of architectures asks of one model; each answer is a `Step`.

The twin of a packed model is made without the package: formats/reference.py decodes the packed
files, the values go under the names on disk into a copy of the source, and transformers loads that
copy by itself. So a tensor that the package leads to a wrong place is there in one of the two.
"""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import ternarize
from ternarize.convert.run import convert
from ternarize.convert.verify import verify
from ternarize.errors import LONGEST_MESSAGE, TernarizeError
from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import Recipe

from .architectures_inputs import tensors

sys.path.insert(0, str(Path(__file__).parents[2] / "formats"))
import reference

OK, REFUSED, FAILED, OPEN = "ok", "refused", "failed", "not compared"
TOLERANCE = 1e-4  # of the largest magnitude of an output: float32 sums in another order, amplified
MOVED = 1e-3  # ternary weights change an output at least so much, else the comparison says nothing
HEADS = (
    *({"head": "int8"}, {"head": "int4"}, {"head": "ternary"}),
    *({"embeddings": "int8"}, {"embeddings": "int4"}, {"embeddings": "ternary"}),
)


@dataclass
class Step:
    """One question and its answer: OK, REFUSED, FAILED or OPEN, with the line that says why."""

    name: str
    outcome: str
    line: str = ""


@dataclass
class Case:
    """A model, saved in `folder/source`, and inputs that it takes.

    inputs   None where none could be made
    steps    the answers so far
    saved    the state of the model that was saved
    missing  names in it that transformers itself does not load as they were
    original what the source gives for the inputs
    """

    cls: type[PreTrainedModel]
    folder: Path
    inputs: dict[str, Any] | None
    why_none: str = ""
    steps: list[Step] = field(default_factory=list)
    saved: dict[str, Tensor] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    original: list[Tensor] = field(default_factory=list)

    def add(self, name: str, outcome: str = OK, line: str = "") -> bool:
        """Note an answer; returns whether it is OK."""
        self.steps.append(Step(name, outcome, line))
        return outcome == OK

    def ask(self, name: str, work: Callable[[], Any], may_refuse: bool = False) -> Any:
        """Do something, and note how it went: its result, or None.

        may_refuse  a TernarizeError in good form counts as refused, else it is a failure
        """
        try:
            result = work()
        except TernarizeError as error:
            bad = badly_said(str(error))
            self.add(name, REFUSED if may_refuse and not bad else FAILED, bad + str(error))
            return None
        except AssertionError as error:
            self.add(name, FAILED, " ".join(str(error).split()) or where(error))
            return None
        except Exception as error:
            line = " ".join(str(error).split())[:600]
            self.add(name, FAILED, f"{type(error).__name__}: {line} ({where(error)})")
            return None
        self.add(name)
        return True if result is None else result


def badly_said(line: str) -> str:
    """What is wrong with the form of a refusal; "" where nothing is."""
    if not line.isprintable() or len(line) > LONGEST_MESSAGE + 10:
        return "not one printable line: "
    if ": " not in line or not line.endswith(".") or ". " not in line:
        return "does not say where, what and what to do: "
    return ""


def where(error: BaseException) -> str:
    """The last place in the package, and the last of all, where an exception went through."""
    places, trace = [], error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append((code.co_filename, f"{Path(code.co_filename).name}:{trace.tb_lineno}"))
        trace = trace.tb_next
    ours = [place for name, place in places if "/ternarize/" in name]
    return " < ".join(dict.fromkeys([places[-1][1], *ours[-1:]]))


# ------------------------------------------------------------------------------------ all questions


def ask_all(case: Case, recipe: Recipe) -> None:
    """Every question about the source in `case.folder`."""
    source = case.folder / "source"
    case.ask("plan", lambda: check_plan(source, recipe), may_refuse=True)
    if ask_conversion(case, "", source, recipe) is None:
        return
    for options in HEADS:
        label = " ".join(f"{key} {value}" for key, value in options.items())
        ask_conversion(case, label, source, recipe, **options)
    own = case.folder / "own names"
    if own.exists():
        ask_conversion(case, "own names", own, recipe)


def load_source(case: Case) -> None:
    """What transformers makes of the source: what it does not load as it was, what comes out."""
    loaded: Any = case.cls.from_pretrained(case.folder / "source")
    model = loaded.eval()
    found = state(model)
    case.missing = {n for n, t in case.saved.items() if n not in found or not same(found[n], t)}
    if case.missing:
        first = min(case.missing)
        case.add("source", OPEN, f"{first}: is not loaded as saved ({len(case.missing)} such)")
    if case.inputs is not None:
        case.original = run(model, case.inputs)


def ask_conversion(
    case: Case, label: str, source: Path, recipe: Recipe, **options: str
) -> Path | None:
    """Convert, verify, load, compare; returns the packed folder, or None."""
    name = f"{label}: " if label else ""
    packed = case.folder / f"packed {label}".strip()
    asked = Recipe(recipe.method, recipe.group_size, **options)  # type: ignore[arg-type]
    if not case.ask(f"{name}convert", lambda: convert(source, packed, asked), may_refuse=True):
        return None
    case.ask(f"{name}verify", lambda: verify(packed, source))
    twin = case.ask(f"{name}decode", lambda: dense_twin(case, source, packed))
    model = case.ask(f"{name}load", lambda: ternarize.load(packed))
    if model is None:
        return packed
    if twin is not None:
        ask_outputs(case, name, model, twin)
    if not label:
        case.ask("save again", lambda: check_again(case, model))
        case.ask("dequantized at load", lambda: check_weights(case, packed, twin))
    if options == {"head": "int8"}:
        kept = case.folder / "packed"
        case.ask("head int8 at load", lambda: check_head_at_load(case, kept, model))
    if twin is not None:
        case.ask(f"{name}weights", lambda: same_weights(case, model.dequantize(), twin))
    return packed


def check_plan(source: Path, recipe: Recipe) -> None:
    """Every tensor of the files is in the plan, with a reason, and the numbers add up."""
    work = make_plan(source, recipe)
    stored = sum(tensor.numel() for tensor in read(source).values())
    coverage = work.coverage()
    parts = sum(count for part, count in coverage.items() if part != "total")
    assert coverage["total"] == parts == stored, f"{coverage} of {stored} parameters"
    for row in work.to_dict()["tensors"]:
        assert row["reason"], f"{row['name']}: no reason"


def read(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


# ---------------------------------------------------------------------------------------- the twin


def dense_twin(case: Case, source: Path, packed: Path) -> PreTrainedModel:
    """The source's class with the weights that the reference decodes from the packed files."""
    folder = case.folder / "twin"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    decoded = reference.decode(packed)
    found = {}
    for name, tensor in read(source).items():
        if name in decoded:  # the others are copies, which transformers ties
            found[name] = _dense(name, decoded[name], tensor)
    unknown = sorted(decoded.keys() - found.keys())
    assert not unknown, f"{unknown[0]}: is in the result alone"
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(source / "config.json", folder)
    loaded: Any = case.cls.from_pretrained(folder)
    twin: PreTrainedModel = loaded.eval()
    return twin


def _dense(name: str, decoded: Any, source: Tensor) -> Tensor:
    """One tensor of the twin, as the source has it."""
    if isinstance(decoded, reference.Kept):
        kept = torch.frombuffer(bytearray(decoded.data or b"\0"), dtype=torch.uint8)
        kept = kept[: len(decoded.data)].view(source.dtype).reshape(decoded.shape)
        assert same(kept, source), f"{name}: is kept, and is not what the source has"
        return kept
    dense = torch.from_numpy(decoded.dequantize().copy())
    dense = dense.mT.contiguous() if decoded.transposed else dense
    assert dense.shape == source.shape, f"{name}: {[*dense.shape]}, at the source {[*source.shape]}"
    error = float((dense - source).square().sum() / source.square().sum().clamp_min(1e-30))
    assert error < 0.6, f"{name}: relative error {error:.2f}, as if it were another matrix"
    return dense.to(source.dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal bits, but for NaN and the sign of 0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(torch.nan_to_num(a, 3.25), torch.nan_to_num(b, 3.25))


def state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those included that are not saved."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def check_weights(case: Case, packed: Path, twin: PreTrainedModel | None) -> None:
    """The packed model that is loaded in dense form has the twin's weights."""
    dense = ternarize.load(packed, dequantize=True)
    if twin is not None:
        same_weights(case, dense, twin)


def same_weights(case: Case, model: nn.Module, twin: PreTrainedModel) -> None:
    """All parameters and buffers of a dense model are those of the twin."""
    found, wanted = state(model), state(twin)
    differ = sorted(found.keys() ^ wanted.keys())
    assert not differ, f"{differ[0]} is in one model alone ({len(differ)} such)"
    for name, tensor in wanted.items():
        if name not in case.missing:
            assert same(found[name].detach(), tensor.detach()), f"{name} differs"


# ----------------------------------------------------------------------------------------- outputs


def run(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[Tensor]:
    """All floating tensors that a forward gives, with the same random numbers each time."""
    copies = {k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    torch.manual_seed(0)
    with torch.no_grad():
        return [tensor.detach().clone() for tensor in tensors(model(**copies))]


def ask_outputs(case: Case, name: str, model: PreTrainedModel, twin: PreTrainedModel) -> None:
    """Whether the packed model computes what its twin computes, and that this says something."""
    step = f"{name}outputs"
    if case.inputs is None:
        if not name:
            case.add(step, OPEN, case.why_none)
        return
    inputs = case.inputs

    def work() -> str:
        expected, found = run(twin, inputs), run(model, inputs)
        if TOLERANCE < far(found, expected) < float("inf"):
            jump = far(run(rounded(twin), inputs), expected)
            if jump > TOLERANCE:
                return f"the twin's own jump by {jump:.0e} when its weights change by a rounding"
        compare(found, expected)
        if not all(bool(tensor.isfinite().any()) for tensor in expected if tensor.numel()):
            return "an output has no finite number"
        return "" if far(case.original, expected) > MOVED else "no output depends on packed weights"

    said = case.ask(step, work)
    if said not in ("", None, True):
        case.steps[-1] = Step(step, OPEN, str(said))


def rounded(twin: PreTrainedModel) -> PreTrainedModel:
    """A copy whose weights are changed by about a rounding.

    Where a model picks the nearest code of a book, say, a rounding can pick another.
    """
    generator = torch.Generator().manual_seed(0)
    other = copy.deepcopy(twin)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.is_floating_point():
                sign = torch.randn(parameter.shape, generator=generator).sign()
                parameter.mul_(1 + 2**-22 * sign)
    return other


def compare(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected), f"{len(found)} outputs, of the twin {len(expected)}"
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape, f"output {i}: {[*a.shape]}, of the twin {[*b.shape]}"
        assert torch.equal(a.isfinite(), b.isfinite()), f"output {i}: other NaN or infinite places"
        distance = far([a], [b])
        assert distance <= TOLERANCE, f"output {i} of {len(found)}: differs by {distance:.1e}"


def far(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest magnitude of its tensor."""
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape == b.shape and (finite := a.isfinite() & b.isfinite()).any():
            scale = float(b[finite].abs().max().clamp_min(1e-6))
            worst = max(worst, float((a[finite] - b[finite]).abs().max()) / scale)
        elif a.shape != b.shape:
            return float("inf")
    return worst


# ------------------------------------------------------------------------------- again, and at load


def check_again(case: Case, model: PreTrainedModel) -> None:
    """Saved by save_pretrained and loaded again, a packed model has the same state."""
    again = case.folder / "again"
    model.save_pretrained(again)
    verify(again)
    same_state(ternarize.load(again), model, case.missing)


def check_head_at_load(case: Case, kept: Path, model: PreTrainedModel) -> None:
    """A head that is rounded at load is the head of a conversion."""
    same_state(ternarize.load(kept, head="int8"), model, case.missing)


def same_state(found: nn.Module, wanted: nn.Module, missing: set[str]) -> None:
    a, b = found.state_dict(), wanted.state_dict()
    differ = sorted(a.keys() ^ b.keys())
    assert not differ, f"{differ[0]} is in one model alone ({len(differ)} such)"
    for name in a.keys() - missing:
        assert same(a[name], b[name]), f"{name} differs"
