"""Models run block by block: the same outputs, one block in memory; what a trace sees of one."""

from pathlib import Path
from typing import Any

import calibrating
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternarize.calibrate.blocks import Blocks, Call
from ternarize.calibrate.lanes import Lane
from ternarize.calibrate.tracing import Group, Product, Trace, sequential_groups
from ternarize.errors import CheckpointError, WeightError

pytestmark = pytest.mark.usefixtures("one_thread")


def run_paused(blocks: Blocks, batch: dict[str, Tensor]) -> tuple[list[str], Any]:
    """Run a forward with every block as the source has it: the order of the blocks, the output."""
    forward = blocks.start(batch)
    order, event = [], forward.resume()
    while isinstance(event, Call):
        order.append(event.block)
        with blocks.loaded(event.block) as block:
            assert not any(p.is_meta for p in block.parameters())
            for other in blocks.paths:
                if other != event.block:
                    parameters = blocks.model.get_submodule(other).parameters()
                    assert all(p.is_meta for p in parameters), other
            assert sum(not p.is_meta for p in blocks.model.parameters()) == len(
                list(block.parameters())
            ), "weights outside the blocks are still there"
            output = blocks.run(event)
        event = forward.resume(output)
    return order, event


@pytest.mark.parametrize("name", calibrating.NAMES)
def test_a_model_run_block_by_block_gives_what_it_gives_at_once(name: str, tmp_path: Path) -> None:
    directory = calibrating.save(name, tmp_path / name)
    _, blocks = calibrating.blocks_of(directory)
    batch = calibrating.inputs(name, 2)
    order, output = run_paused(blocks, batch)
    assert set(order) == set(blocks.paths)
    assert len(order) == 2 * (2 if name in ("t5", "whisper") else 1)
    with torch.no_grad():
        expected = calibrating.load_source(directory)(**batch)
    pairs = list(
        zip(calibrating.tensors_of(output), calibrating.tensors_of(expected), strict=False)
    )
    assert pairs
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "bert", "gemma3", "whisper", "mixtral", "deepseek_v3", "gpt_oss"]
)
def test_parameters_go_back_to_the_tensors_that_they_came_from(name: str, tmp_path: Path) -> None:
    work, blocks = calibrating.blocks_of(calibrating.save(name, tmp_path / name))
    path = blocks.paths[-1]
    ternary = {p for t in work.tensors if t.ternary for p in t.choice.parameters}
    with blocks.loaded(path) as block:
        names = [n for n, _ in block.named_parameters() if f"{path}.{n}" in ternary]
        assert names
        on_disk = blocks.on_disk({f"{path}.{n}": block.get_parameter(n).data for n in names})
        for tensor, value in on_disk.items():
            info = work.source.tensors[tensor]
            expected = work.source.read(tensor, 0, info.numel).reshape(info.shape)
            assert torch.equal(value, expected), tensor
        doubled = {tensor: 2 * value for tensor, value in on_disk.items()}
        before = {n: block.get_parameter(n).data.clone() for n in names}
        replaced = blocks.replaced(path, doubled)
        assert set(replaced) == set(names)
        for n in names:
            assert torch.equal(replaced[n], 2 * before[n])
            assert torch.equal(block.get_parameter(n).data, before[n]), "the block has changed"


def test_forwards_of_several_batches_wait_for_each_other(tmp_path: Path) -> None:
    directory = calibrating.save("llama", tmp_path / "llama")
    _, blocks = calibrating.blocks_of(directory)
    batches = [calibrating.inputs("llama", 2, seed=seed) for seed in (1, 2, 3)]
    forwards = [blocks.start(batch) for batch in batches]
    waiting = [forward.resume() for forward in forwards]
    while isinstance(waiting[0], Call):
        assert len({call.block for call in waiting}) == 1
        with blocks.loaded(waiting[0].block):
            outputs = [blocks.run(call) for call in waiting]
        waiting = [f.resume(o) for f, o in zip(forwards, outputs, strict=True)]
    model = calibrating.load_source(directory)
    for batch, output in zip(batches, waiting, strict=True):
        with torch.no_grad():
            assert torch.equal(output.logits, model(**batch).logits)


def test_a_paused_forward_can_be_ended(tmp_path: Path) -> None:
    _, blocks = calibrating.blocks_of(calibrating.save("llama", tmp_path / "llama"))
    forward, unused = (blocks.start(calibrating.inputs("llama", 1)) for _ in range(2))
    forward.resume()
    thread = forward._thread
    forward.stop()
    unused.stop()
    assert not thread.is_alive()


def test_a_model_whose_forward_fails_is_reported_in_one_line(tmp_path: Path) -> None:
    _, blocks = calibrating.blocks_of(calibrating.save("llama", tmp_path / "llama"))
    with pytest.raises(CheckpointError, match="its forward fails on the calibration data") as found:
        blocks.start({"input_ids": torch.full((1, 4), 9999)}).resume()
    assert "\n" not in str(found.value)
    call = calibrating.first_call(blocks, calibrating.inputs("llama", 1))
    wrong = Call(call.block, (torch.zeros(1, 24, 63),), call.kwargs)
    with blocks.loaded(call.block), pytest.raises(CheckpointError, match="its forward fails"):
        blocks.run(wrong)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    directory = calibrating.save("llama", tmp_path / "llama")
    calibrating.change(directory, name, lambda w: w.index_fill(0, torch.tensor(7), torch.nan))
    _, blocks = calibrating.blocks_of(directory)
    with blocks.loaded("model.layers.0"):
        pass
    with pytest.raises(WeightError, match=name), blocks.loaded("model.layers.1"):
        pass


# --- what a trace sees --------------------------------------------------------------------------


def trace_block(name: str, tmp_path: Path, index: int = 0) -> tuple[Trace, list[Group], Any]:
    """Trace a block: what was seen, its groups, and the block's output."""
    work, blocks = calibrating.blocks_of(calibrating.save(name, tmp_path / name))
    forward = blocks.start(calibrating.inputs(name, 3))
    call = forward.resume()
    for _ in range(index):
        with blocks.loaded(call.block):
            output = blocks.run(call)
        call = forward.resume(output)
    parameters = {p for t in work.tensors if t.ternary for p in t.choice.parameters}
    with blocks.loaded(call.block) as block:
        weights = {n: p for n, p in block.named_parameters() if f"{call.block}.{n}" in parameters}
        trace = Trace({n: p.data for n, p in weights.items()})
        output = trace.run(lambda: blocks.run(call))
        groups = sequential_groups(trace, weights)
        # what the trace has seen is what a plain run gives
        assert torch.equal(hidden(blocks.run(call)), hidden(output))
        products = [p.name for p in trace.products]
        assert set(products) == set(weights)
    forward.stop()
    return trace, groups, output


def hidden(output: Any) -> Tensor:
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


def short(groups: list[Group]) -> list[str]:
    """Groups as words: the last name that is not `weight`, `proj` or `dense`."""

    def one(name: str) -> str:
        parts = [p for p in name.split(".") if p not in ("weight", "self", "attention")]
        return parts[-1] if parts[-1] != "dense" else ".".join(parts[-2:])

    return [" ".join(one(n) for n in group.names) for group in groups]


GROUPS = {
    "llama": ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"],
    "qwen3": ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"],
    "gemma3_text": ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "c_proj"],
    "bert": ["query key value", "output.dense", "intermediate.dense", "output.dense"],
    "gptj": ["k_proj q_proj v_proj fc_in", "out_proj", "fc_out"],
    "t5": ["q k v", "o", "wi"],
}


@pytest.mark.parametrize("name", GROUPS)
def test_weights_with_one_input_form_a_group(name: str, tmp_path: Path) -> None:
    _, groups, _ = trace_block(name, tmp_path)
    found = [sorted(group.split()) for group in short(groups)]
    assert found == [sorted(group.split()) for group in GROUPS[name]]
    assert not any(group.stack for group in groups)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4", "deepseek_v3"])
def test_experts_form_a_stack_of_their_own(name: str, tmp_path: Path) -> None:
    trace, groups, _ = trace_block(name, tmp_path, index=1)
    stacks = [group.names for group in groups if group.stack]
    assert [len(names) for names in stacks] == [1, 1]
    assert "gate_up_proj" in stacks[0][0]
    assert "down_proj" in stacks[1][0]
    experts = {p.expert for p in trace.products if p.name == stacks[0][0]}
    assert experts <= set(range(8 if name == "deepseek_v3" else 4))
    assert len(experts) > 1


def test_an_experts_product_is_that_of_its_own_slice(tmp_path: Path) -> None:
    work, blocks = calibrating.blocks_of(calibrating.save("mixtral", tmp_path / "mixtral"))
    call = calibrating.first_call(blocks, calibrating.inputs("mixtral", 3))
    with blocks.loaded(call.block) as block:
        weights = {n: p.data for n, p in block.named_parameters() if p.ndim == 3}
        trace = Trace(weights)
        trace.run(lambda: blocks.run(call))
        for p in trace.products:
            assert torch.equal(p.x @ weights[p.name][p.expert].T, p.y)


def total(product: Product) -> Tensor:
    assert product.terms is not None
    return product.y * product.scale + product.terms


def test_terms_are_what_the_residual_stream_adds(tmp_path: Path) -> None:
    trace, _, output = trace_block("llama", tmp_path)
    by_name = {p.name.split(".")[-2]: p for p in trace.products}
    assert torch.equal(total(by_name["down_proj"]), hidden(output))
    # the sum behind attention is what the next norm and the second sum start from
    behind_attention = total(by_name["o_proj"])
    terms = by_name["down_proj"].terms
    assert terms is not None and torch.equal(behind_attention, terms)
    for name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        assert by_name[name].terms is None


def test_terms_stand_in_front_of_berts_norms(tmp_path: Path) -> None:
    work, blocks = calibrating.blocks_of(calibrating.save("bert", tmp_path / "bert"))
    trace, _, output = trace_block("bert", tmp_path)
    by_name = {p.name: p for p in trace.products}
    with blocks.loaded("encoder.layer.0") as block:
        layer: Any = block
        first = layer.attention.output.LayerNorm(total(by_name["attention.output.dense.weight"]))
        assert torch.equal(first, by_name["intermediate.dense.weight"].x)
        last = layer.output.LayerNorm(total(by_name["output.dense.weight"]))
        assert torch.equal(last, hidden(output))


def test_nothing_is_a_residual_behind_a_norm(tmp_path: Path) -> None:
    # gemma normalises what attention and feed-forward give before it adds them
    trace, _, _ = trace_block("gemma3_text", tmp_path)
    assert all(p.terms is None for p in trace.products)


def test_a_parallel_block_is_one_sum(tmp_path: Path) -> None:
    trace, _, output = trace_block("gptj", tmp_path)
    by_name = {p.name.split(".")[-2]: p for p in trace.products}
    assert torch.allclose(total(by_name["fc_out"]), hidden(output), atol=1e-6)
    assert torch.allclose(total(by_name["out_proj"]), hidden(output), atol=1e-6)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "vit", "neox", "llama4"])
def test_the_last_sum_of_a_block_is_its_output(name: str, tmp_path: Path) -> None:
    trace, _, output = trace_block(name, tmp_path)
    last = trace.products[-1]
    assert torch.allclose(total(last).reshape(hidden(output).shape), hidden(output), atol=1e-6)


def traced(forward: Any, **weights: Tensor) -> list[Product]:
    trace = Trace(weights)
    trace.run(forward)
    return trace.products


def test_a_multiple_of_a_product_is_still_that_product() -> None:
    w, x, r = torch.randn(5, 4), torch.randn(3, 4), torch.randn(3, 5)
    (p,) = traced(lambda: r + F.linear(x, w) * 0.25, w=w)
    assert p.scale == 0.25
    assert torch.equal(total(p), r + (x @ w.T) * 0.25)


def test_products_are_recorded_as_they_were_before_a_change_in_place() -> None:
    w, x, r = torch.randn(5, 4), torch.randn(3, 4), torch.randn(3, 5)
    kept_x, kept_r = x.clone(), r.clone()

    def forward() -> Tensor:
        y = F.linear(x, w)
        y += r
        x.mul_(0)
        r.zero_()
        return y

    (p,) = traced(forward, w=w)
    assert torch.equal(p.x, kept_x)
    assert torch.allclose(p.y, kept_x @ w.T)
    assert torch.allclose(total(p), kept_x @ w.T + kept_r)
    (p,) = traced(lambda: F.relu(F.linear(kept_x, w), inplace=True), w=w)
    assert torch.allclose(p.y, kept_x @ w.T)


def test_an_input_that_has_changed_in_place_begins_another_group() -> None:
    w, v, x = torch.randn(5, 4), torch.randn(5, 4), torch.randn(3, 4)

    def forward() -> None:
        F.linear(x, w)
        x.mul_(2)
        F.linear(x, v)

    trace = Trace({"w": w, "v": v})
    trace.run(forward)
    assert [g.names for g in sequential_groups(trace, {"w": w, "v": v})] == [("w",), ("v",)]


def test_a_sum_that_is_used_elsewhere_is_complete() -> None:
    w, x, r = torch.randn(5, 4), torch.randn(3, 4), torch.randn(3, 5)

    def forward() -> Tensor:
        first = F.linear(x, w) + r
        return F.layer_norm(first, (5,)) + first

    (p,) = traced(forward, w=w)
    assert torch.equal(total(p), x @ w.T + r)


def test_a_bias_that_is_added_by_itself_is_no_residual() -> None:
    w, b, x, r = torch.randn(4, 5), torch.randn(5), torch.randn(3, 4), torch.randn(3, 5)
    (p,) = traced(lambda: (x @ w + b) + r, w=w)
    assert torch.equal(p.terms if p.terms is not None else w, r)
    (p,) = traced(lambda: torch.addmm(b, x, w) + r, w=w)
    assert p.bias is b
    assert torch.allclose(total(p), x @ w + b + r)


def test_operands_may_be_given_by_name() -> None:
    w, b, x = torch.randn(4, 5), torch.randn(5), torch.randn(3, 4)
    for forward in (
        lambda: F.linear(x, weight=w.T, bias=b),
        lambda: torch.matmul(x, other=w),
        lambda: torch.addmm(b, mat1=x, mat2=w),
    ):
        (p,) = traced(forward, w=w)
        assert p.x is x
    batched = torch.randn(2, 3, 4), torch.randn(2, 4, 3)
    assert traced(lambda: torch.zeros(2, 3, 3).baddbmm(batch1=batched[0], batch2=batched[1])) == []


def test_a_part_of_a_weight_is_not_taken_for_the_whole() -> None:
    w, x = torch.randn(6, 4), torch.randn(3, 4)
    assert traced(lambda: [F.linear(x, part) for part in w.chunk(3)], w=w) == []


def test_a_trace_ends_a_forward_when_it_has_seen_enough() -> None:
    layers = nn.ModuleList([nn.Linear(4, 4, bias=False) for _ in range(3)])
    ran = []

    def forward() -> Tensor:
        x = torch.randn(2, 4)
        for index, layer in enumerate(layers):
            ran.append(index)
            x = layer(x)
        return x

    weight: Any = layers[1].weight
    trace = Trace({"1": weight.data}, Group(("1",), 1, 0).seen)
    assert trace.run(forward) is None
    assert ran == [0, 1]


@pytest.mark.parametrize(("longer", "masked"), [(0, False), (4, True)])
def test_padding_of_the_decoder_is_left_out_of_its_blocks_alone(
    longer: int, masked: bool, tmp_path: Path
) -> None:
    """Of two sides of one length no token is taken for the other side's."""
    _, blocks = calibrating.blocks_of(calibrating.save("t5", tmp_path))
    ids = calibrating.inputs("t5", 2, 10 + longer)["input_ids"]
    mask = torch.ones(2, 10, dtype=torch.int64)
    mask[0, 6:] = 0
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": ids[:, :10].clone(),
        "decoder_attention_mask": mask,
    }
    forward = blocks.start(batch)
    call, seen = forward.resume(), {}
    while isinstance(call, Call):
        lane = Lane("train", 0, batch, (forward, forward), [call, call])
        with blocks.loaded(call.block):
            output = blocks.run(call)
        seen[call.block.split(".")[0]] = len(lane.tokens(output))
        call = forward.resume(output)
    assert seen == {"encoder": 20 + 2 * longer, "decoder": 16 if masked else 20}
