"""Convolutions as rows of kernels: chosen, packed, multiplied, calibrated, trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import ternarize
from ternarize.calibrate.tracing import Trace, sequential_groups
from ternarize.convert.run import convert
from ternarize.convert.verify import verify
from ternarize.errors import CheckpointError, FormatError, SelectionError
from ternarize.files import container
from ternarize.files.json_files import read_json
from ternarize.measure.report import inspect
from ternarize.native import lib
from ternarize.plans.plan import make_plan
from ternarize.plans.recipe import Calibrate, Recipe
from ternarize.publish.export import export
from ternarize.qat.modules import latent_modules
from ternarize.runtime import unfold
from ternarize.runtime.forms import Layout
from ternarize.runtime.modules import convolution
from ternarize.runtime.modules.convolution import TernaryConv2d, dense_convolution
from ternarize.runtime.packed import use_lanes
from ternarize.runtime.products import rounded_linear
from ternarize.runtime.unfold import patches_for, patches_of
from ternarize.trits.methods import itf

transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

KERNEL = "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"padding": 1},
    "strided": {"stride": 2, "padding": (2, 1)},
    "dilated": {"dilation": (2, 1), "padding": 2},
    "same": {"padding": "same", "kernel_size": (2, 3)},
    "reflected": {"padding": 1, "padding_mode": "reflect"},
    "of one place": {"kernel_size": 1},
    "of one place, strided": {"kernel_size": 1, "stride": 2, "padding": 1},
    "without bias": {"bias": False},
}


def a_convolution(**options: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(5, 7, **{"kernel_size": 3, **options})


def packed(dense: nn.Conv2d, group_size: int = 8, activations: str = "none") -> TernaryConv2d:
    """A packed convolution with the weight that `itf` gives, in lanes where there are kernels.

    With scales in float16, or in float32 where that does not hold them.
    """
    kernel = tuple(dense.weight.shape[1:])
    layout = Layout(dense.weight[0].numel(), group_size, activations=activations, kernel=kernel)
    rows = 1 if group_size == 0 else dense.out_channels
    codes, scales = container.encode(itf(dense.weight.detach().flatten(1), group_size))
    made = TernaryConv2d(dense, layout, rows, scales.dtype)
    state = {"weight": codes, "weight_scale": scales}
    if dense.bias is not None:
        state["bias"] = dense.bias.detach()
    made.load_state_dict(state)
    use_lanes(made)
    return made


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group_size", [8, 0, -1])
def test_a_packed_convolution_is_the_one_of_its_dense_weight(shape: str, group_size: int) -> None:
    dense = a_convolution(**SHAPES[shape])
    ours = packed(dense, group_size)
    torch.manual_seed(1)
    x = torch.randn(2, 5, 9, 8)
    theirs = dense_convolution(ours, torch.float32)
    assert theirs.weight.shape == dense.weight.shape
    assert not torch.equal(theirs.weight, dense.weight)
    with torch.no_grad():
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)
        assert torch.allclose(ours(x[0]), theirs(x[0]), atol=1e-5)
        last = x.to(memory_format=torch.channels_last)
        assert torch.allclose(ours(last), theirs(x), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_of_many_places_and_few_kernels_the_weight_is_dense_for_one_convolution(
    shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = packed(a_convolution(**SHAPES[shape]))
    theirs = dense_convolution(ours, torch.float32)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    torch.manual_seed(1)
    x = torch.randn(2, 5, 40, 30)
    few = x[:1, :, :4, :4]
    monkeypatch.setattr(convolution, "_CALL", 1000)
    with torch.no_grad():
        by_patches = ours(few)
        monkeypatch.setattr(convolution, "product", None)
        y = ours(x.to(dtype))
        with pytest.raises(TypeError):
            ours(few)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        near = 1e-5 if dtype == torch.float32 else 0.03
        assert torch.allclose(y.float(), theirs(x), atol=near, rtol=near)
        monkeypatch.setattr(convolution, "_CALL", -(1 << 17))
        assert torch.allclose(ours(few), by_patches, atol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.state_dict().items())


def test_what_is_rounded_or_learned_is_never_made_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "_CALL", 0)
    monkeypatch.setattr(convolution, "_WEIGHT", 0)
    monkeypatch.setattr(TernaryConv2d, "dequantized", None)
    x = torch.randn(1, 5, 9, 9)
    assert packed(a_convolution())(x.clone().requires_grad_()).requires_grad
    with torch.no_grad():
        assert packed(a_convolution(), activations="int8")(x).shape == (1, 7, 7, 7)
        with pytest.raises(TypeError):
            packed(a_convolution())(x)


@pytest.mark.skipif(lib is None, reason="needs the compiled core")
@pytest.mark.parametrize(("of_weight", "of_input"), [(-22, 13), (0, 0), (22, -13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_is_not_dense_in_float16_where_that_does_not_hold_it(
    of_weight: int, of_input: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = a_convolution(bias=False)
    dense.weight.data *= 2.0**of_weight
    ours, x = packed(dense), torch.randn(1, 5, 9, 9) * 2.0**of_input
    monkeypatch.setattr(convolution, "_CALL", 0)
    monkeypatch.setattr(convolution, "_WEIGHT", 0)
    assert ours._rather_dense(x.to(dtype)) == (of_weight == 0 or dtype != torch.float16)
    with torch.no_grad():
        expected = dense_convolution(ours, torch.float32)(x)
        assert (ours(x.to(dtype)) - expected).abs().max() < 0.03 * expected.abs().max()


@pytest.mark.skipif(lib is None, reason="needs the compiled core")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_core_copies_the_patches_that_torch_does(
    shape: str, threads: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = a_convolution(**SHAPES[shape])
    x = torch.randn(3, 5, 33, 21).to(dtype)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    ours = patches_for(x, dense)
    monkeypatch.setattr(unfold, "lib", None)
    assert torch.equal(ours, patches_for(x, dense))


@pytest.mark.skipif(lib is None, reason="needs the compiled core")
@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (1, 1, 8, 8), (1, 3, 3, 3)])
def test_the_core_takes_sizes_of_one(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, x = nn.Conv2d(shape[1], 1, 3, padding=0 if shape[1] > 1 else 1), torch.randn(shape)
    ours = patches_for(x, dense)
    monkeypatch.setattr(unfold, "lib", None)
    assert torch.equal(ours, patches_for(x, dense))


@pytest.mark.skipif(lib is None, reason="needs the compiled core")
def test_the_core_refuses_sizes_that_do_not_fit_the_memory() -> None:
    assert lib is not None
    images, out = (torch.zeros(n, dtype=torch.uint8) for n in (4 * 75, 4 * 9 * 27))
    given = [images, (1, 5, 5, 3), (3, 3), (1, 1), (1, 1), (0, 0, 0, 0), 4, out, 1]
    lib.unfold(*given)
    for at, wrong in (
        (1, (1, 5, 5, 4)),
        (1, (2**30, 2**30, 2**30, 3)),
        (1, (-1, 5, 5, 3)),
        (2, (0, 3)),
        (2, (6, 3)),
        (3, (0, 1)),
        (4, (1, 2**40)),
        (5, (1, 0, 0, 0)),
        (6, 3),
        (7, out[1:]),
    ):
        with pytest.raises(ValueError, match=r"expected|larger than|do not fit"):
            lib.unfold(*given[:at], wrong, *given[at + 1 :])


def test_its_gradient_goes_through() -> None:
    ours = packed(a_convolution(padding=1, stride=2))
    theirs = dense_convolution(ours, torch.float32)
    gradients = []
    for module in (ours, theirs):
        x = torch.linspace(-1, 1, 5 * 9 * 8).view(1, 5, 9, 8).requires_grad_()
        module(x).square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)


def test_each_patch_is_rounded_to_8_bits_by_itself() -> None:
    ours = packed(a_convolution(padding=1), activations="int8")
    torch.manual_seed(1)
    x = torch.randn(2, 5, 6, 6)
    patches = patches_of(nn.functional.pad(x, (1, 1, 1, 1)), (3, 3))
    assert ours.bias is not None
    rows = rounded_linear(patches, ours.dequantized(torch.float32).flatten(1)) + ours.bias
    with torch.no_grad():
        assert torch.allclose(ours(x), rows.permute(0, 3, 1, 2), atol=1e-5)


def test_it_is_copied_moved_and_printed_as_a_module_of_torch() -> None:
    ours = packed(a_convolution())
    state = ours.state_dict()
    assert state["weight"].shape == (7, 11) and state["weight"].dtype == torch.uint8
    again = packed(a_convolution(bias=True))
    again.load_state_dict(state)
    x = torch.ones(1, 5, 4, 4)
    with torch.no_grad():
        assert torch.equal(again(x), ours(x))
        assert ours(x.to(torch.bfloat16)).dtype == torch.bfloat16
    assert "TernaryConv2d(5, 7, kernel_size=(3, 3)" in str(ours)


# --- models of transformers ----------------------------------------------------------------------


def resnet(folder: Path, **sizes: Any) -> Any:
    """A tiny ResNet with random weights, saved."""
    config = transformers.ResNetConfig(
        **{
            "num_channels": 3,
            "embedding_size": 8,
            "hidden_sizes": [8, 12],
            "depths": [1, 1],
            "layer_type": "basic",
            "num_labels": 3,
            **sizes,
        }
    )
    torch.manual_seed(0)
    model: Any = transformers.ResNetForImageClassification(config)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as it is after a training
            mean, variance = module.running_mean, module.running_var
            assert mean is not None and variance is not None
            nn.init.uniform_(variance, 0.5, 2)
            nn.init.normal_(mean, 0, 0.2)
    model.save_pretrained(folder)
    return model


def images(count: int = 20, size: int = 24) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resnet") / "source"
    resnet(folder)
    return folder


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    folder = source.parent / "packed"
    convert(source, folder, Recipe("itf"))
    return folder


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(pixel_values=images()).logits
        return found


def test_what_becomes_of_a_resnet(converted: Path) -> None:
    rows = read_json(converted / "ternarize.json")
    assert rows is not None
    ternary = {n: row for n, row in rows["tensors"].items() if row["becomes"] == "ternary"}
    assert set(ternary) == {
        n for n in rows["tensors"] if "stages" in n and n.endswith("convolution.weight")
    }
    assert {row["reason"] for row in ternary.values()} == {"convolution in a repeated block"}
    assert ternary[KERNEL]["source_shape"] == [8, 8, 3, 3]
    stem = rows["tensors"]["resnet.embedder.embedder.convolution.weight"]
    assert stem["reason"] == "outside the repeated blocks"
    assert rows["tensors"]["classifier.1.weight"]["becomes"] == "kept"


def test_a_resnet_is_packed_verified_loaded_and_exported(
    source: Path, converted: Path, tmp_path: Path
) -> None:
    assert verify(converted, source)["compared"]["by_error"] == 0
    (row,) = (r for r in inspect(converted)["tensors"] if r["name"] == KERNEL)
    assert row["shape"] == [8, 72] and row["kind"] == "ternary"
    model: Any = ternarize.load(converted)
    ours = logits(model)
    assert isinstance(model.get_submodule(KERNEL.removesuffix(".weight")), TernaryConv2d)
    dense: Any = ternarize.load(converted, dequantize=True)
    assert torch.allclose(ours, logits(dense), atol=1e-5)
    export(converted, tmp_path / "dense", "dense")
    plain: Any = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    assert torch.allclose(ours, logits(plain), atol=1e-5)
    weight = load_file(tmp_path / "dense" / "model.safetensors")[KERNEL]
    assert weight.shape == (8, 8, 3, 3)
    assert torch.equal(weight, dense.get_parameter(KERNEL))
    model.save_pretrained(tmp_path / "again")
    assert verify(tmp_path / "again")["ternary"] == verify(converted)["ternary"]
    assert torch.equal(logits(ternarize.load(tmp_path / "again")), ours)


def test_engines_without_convolutions_refuse_them(tmp_path: Path) -> None:
    resnet(tmp_path / "source", embedding_size=32, hidden_sizes=[32], depths=[1])
    convert(tmp_path / "source", tmp_path / "packed", Recipe("itf", 32))
    for target, why in (
        ("gguf", "ResNetForImageClassification"),
        ("mlx", "convolutions in 2 tensors"),
        ("compressed-tensors", "convolutions in 2 tensors"),
        ("bitnet", "outside linear layers"),
    ):
        with pytest.raises(CheckpointError, match=why) as told:
            export(tmp_path / "packed", tmp_path / target, target)
        assert "\n" not in str(told.value)
        assert not (tmp_path / target).exists()


def test_a_file_whose_kernels_are_not_the_models_is_refused(
    converted: Path, tmp_path: Path
) -> None:
    resnet(tmp_path / "other", hidden_sizes=[8, 8])
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    theirs = json.loads((converted / "config.json").read_text())["quantization_config"]
    shutil.copy(converted / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": theirs}))
    with pytest.raises(FormatError, match=r"is \[12, 8, .*is \[8, 8, .* which it does not fit"):
        ternarize.load(tmp_path)


def test_convolutions_beside_more_linear_weights_are_kept_unless_named(tmp_path: Path) -> None:
    config = transformers.ConvNextConfig(
        hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32
    )
    config.num_labels = 3
    torch.manual_seed(0)
    model: Any = transformers.ConvNextForImageClassification(config)
    model.eval()
    model.save_pretrained(tmp_path / "source")
    plan = make_plan(tmp_path / "source", Recipe("itf"))
    reasons = {t.name: (t.becomes, t.choice.reason) for t in plan.tensors}
    down = "convnext.encoder.stages.1.downsampling_layer.1.weight"
    depthwise = "convnext.encoder.stages.0.layers.0.dwconv.weight"
    assert reasons[down] == reasons[depthwise] == ("kept", "convolution")
    assert reasons["convnext.encoder.stages.0.layers.0.pwconv1.weight"][0] == "ternary"
    with pytest.raises(SelectionError, match="cannot be one: convolution"):
        make_plan(tmp_path / "source", Recipe("itf", include=(depthwise,)))
    convert(tmp_path / "source", tmp_path / "packed", Recipe("itf", include=(down,)))
    packed_model: Any = ternarize.load(tmp_path / "packed")
    assert isinstance(packed_model.get_submodule(down.removesuffix(".weight")), TernaryConv2d)
    dense = ternarize.load(tmp_path / "packed", dequantize=True)
    ours = packed_model(pixel_values=images(2, 32)).logits
    assert torch.allclose(ours, dense(pixel_values=images(2, 32)).logits, atol=1e-5)


# --- calibration ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")  # torch's, once a process
@pytest.mark.parametrize("shape", ["padded", "strided", "dilated", "same", "of one place"])
def test_a_trace_sees_a_convolution_as_the_product_of_its_patches(shape: str) -> None:
    dense = a_convolution(**SHAPES[shape])
    trace = Trace({"weight": dense.weight})
    y = trace.run(lambda: dense(torch.randn(2, 5, 9, 8)))
    (product,) = trace.products
    assert product.bias is not None and product.bias is dense.bias
    again = product.x @ dense.weight.flatten(1).T + product.bias
    assert torch.allclose(product.y, again, atol=1e-5)
    assert torch.equal(product.y, y.movedim(1, -1))


def test_convolutions_of_inputs_that_are_gone_by_then_are_not_alike() -> None:
    weights = {str(n): torch.randn(4, 3, 3, 3) for n in range(8)}
    trace = Trace(weights)

    def forward() -> None:
        for n, weight in enumerate(weights.values()):  # each input is freed before the next
            nn.functional.conv2d(torch.full((2, 3, 8, 8), float(n)), weight, padding=1)

    trace.run(forward)
    groups = sequential_groups(trace, weights)
    assert [each.names for each in groups] == [(name,) for name in weights]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")  # torch's, once a process
def test_convolutions_of_the_same_patches_are_alike_and_of_others_are_not() -> None:
    x = torch.randn(2, 3, 8, 8)
    given: dict[str, tuple[Tensor, dict[str, Any]]] = {
        "same": (x, {"padding": "same"}),
        "again": (x, {"padding": "same"}),
        "padded": (x, {"padding": 1}),
        "valid": (x, {"padding": 0}),
        "dilated": (x, {"dilation": 3, "padding": 1}),
        "turned": (x.mT, {"padding": "same"}),
    }
    weights = {name: torch.randn(4, 3, 2, 2) for name in given}
    trace = Trace(weights)
    trace.run(
        lambda: [
            nn.functional.conv2d(images, weights[name], **options)
            for name, (images, options) in given.items()
        ]
    )
    groups = [each.names for each in sequential_groups(trace, weights)]
    assert groups == [("same", "again"), ("padded",), ("valid",), ("dilated",), ("turned",)]


@pytest.mark.parametrize("how", [{}, {"reconstruct": 25}, {"distill": 4}, {"target_bpw": 2.6}])
def test_a_resnet_is_calibrated_on_images(
    source: Path, converted: Path, tmp_path: Path, how: dict[str, Any]
) -> None:
    save_file({"pixel_values": images(40)}, tmp_path / "images.safetensors")
    data = str(tmp_path / "images.safetensors")
    recipe = Recipe("gptq", calibrate=Calibrate(data, num_samples=24, **how))
    record = convert(source, tmp_path / "packed", recipe)
    blocks = record["calibration"]["blocks"]
    assert [block["block"] for block in blocks] == [f"resnet.encoder.stages.{n}" for n in (0, 1)]
    assert all(block["after"] < block["before"] for block in blocks)
    assert verify(tmp_path / "packed", source)["compared"]["by_error"] == 5
    wanted = logits(transformers.AutoModelForImageClassification.from_pretrained(source))
    errors = [
        float((logits(ternarize.load(each)) - wanted).norm())
        for each in (converted, tmp_path / "packed")
    ]
    assert errors[1] < errors[0]
    row = record["tensors"][KERNEL]
    assert row["method"] == "gptq" and "rotation" not in row
    assert ("training" in record) == ("distill" in how)
    if "target_bpw" in how:  # of rows of 72 weights, not of three
        assert {"groups of 64", "groups of 32"} & record["calibration"]["forms"].keys()


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["none", "int8"])
def test_a_resnet_is_trained_and_packed_as_its_forward_was(
    source: Path, tmp_path: Path, activations: str
) -> None:
    model: Any = transformers.AutoModelForImageClassification.from_pretrained(source)
    model = ternarize.qat.prepare(model, group_size=24, activations=activations)
    names = {path for path, _ in latent_modules(model)}
    assert KERNEL.removesuffix(".weight") in names and len(names) == 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    before = model.get_parameter(KERNEL).detach().clone()
    for _ in range(2):
        labels = torch.arange(20) % 3
        loss = model(pixel_values=images(), labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert not torch.equal(model.get_parameter(KERNEL), before)
    wanted = logits(model.eval())
    ternarize.qat.pack(model, tmp_path / "packed")
    assert torch.allclose(logits(ternarize.load(tmp_path / "packed")), wanted, atol=1e-4)
    begun: Any = transformers.AutoModelForImageClassification.from_pretrained(source)
    again = ternarize.qat.prepare(begun, start=tmp_path / "packed", activations=activations)
    assert torch.allclose(logits(again.eval()), wanted, atol=1e-4)


# --- any module ----------------------------------------------------------------------------------


def network(channels: int = 24) -> nn.Sequential:
    """Convolutions, one of them depthwise, and a head."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, groups=channels),
        nn.Conv2d(channels, 2 * channels, 3, stride=2, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * channels, 5),
    )


def test_any_module_with_convolutions_is_packed_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = network().eval()
    record = ternarize.pack_module(module, tmp_path / "packed", smallest=1000)
    told = {n: (t["becomes"], t["reason"]) for n, t in record["tensors"].items() if "weight" in n}
    assert told["0.weight"] == ("kept", "the first convolution")
    assert told["3.weight"] == ("kept", "weight of a Conv2d")
    assert told["4.weight"] == ("ternary", "convolution")
    assert told["7.weight"] == ("kept", "fewer than 1000 weights")
    with torch.device("meta"):
        empty = network()
    loaded = ternarize.load_module(tmp_path / "packed", empty).eval()
    assert isinstance(loaded[4], TernaryConv2d)
    x = torch.randn(2, 3, 12, 12)
    dense = network().eval()
    dense.load_state_dict(module.state_dict())
    dense[4] = dense_convolution(loaded[4], torch.float32)
    with torch.no_grad():
        assert torch.allclose(loaded(x), dense(x), atol=1e-5)
    ternarize.pack_module(loaded, tmp_path / "again")
    files = [tmp_path / each / "model.safetensors" for each in ("packed", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    save_file(dict(module.state_dict()), tmp_path / "model.safetensors")
    assert verify(tmp_path / "packed", tmp_path)["compared"]["converted_again"] > 0


def test_a_convolution_in_the_place_of_a_linear_layer_is_refused(tmp_path: Path) -> None:
    ternarize.pack_module(nn.Sequential(nn.ReLU(), network()), tmp_path / "p", smallest=1000)

    def other() -> nn.Module:
        module = network()
        module[4] = nn.Conv2d(24, 48, (3, 3), groups=1, stride=2, bias=True)
        return nn.Sequential(nn.ReLU(), module)

    with pytest.raises(FormatError, match="lacks"):
        ternarize.load_module(tmp_path / "p", other())
    linear = network()
    linear[4] = nn.Linear(216, 48, bias=False)
    with pytest.raises(FormatError, match="expected a weight of a convolution"):
        ternarize.load_module(tmp_path / "p", nn.Sequential(nn.ReLU(), linear))
    wrong = network()
    wrong[4] = nn.Conv2d(72, 48, (1, 3), bias=False)
    with pytest.raises(FormatError, match=r"is \[48, 24, 3, 3\]; in Sequential it is"):
        ternarize.load_module(tmp_path / "p", nn.Sequential(nn.ReLU(), wrong))


def test_any_module_with_convolutions_is_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = ternarize.qat.prepare(network(32), group_size=27, keep=["7.weight"]).eval()
    assert [path for path, _ in latent_modules(module)] == ["4"]
    x = torch.randn(2, 3, 12, 12)
    wanted = module(x)
    wanted.sum().backward()
    assert module.get_parameter("4.weight").grad is not None
    ternarize.pack_module(module, tmp_path / "packed")
    loaded = ternarize.load_module(tmp_path / "packed", network(32)).eval()
    assert torch.allclose(loaded(x), wanted, atol=1e-5)
