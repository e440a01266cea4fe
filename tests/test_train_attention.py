"""Attention of narrow heads in float32: where it is used, and that it is attention."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from ternarize.train.attention import NAME, NARROW_HEAD, widen_attention

PADDED = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
IDS = torch.arange(12).view(2, 6)
SIZES = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}


def model_of(kind: str, width: int) -> Any:
    """A random encoder or decoder whose heads have `width` numbers."""
    sizes = {**SIZES, "hidden_size": 2 * width, "intermediate_size": 16}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    auto: Any = transformers.AutoModel
    return auto.from_config(config, attn_implementation="sdpa").eval()


def outputs(model: Any, mask: Tensor | None) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found: Tensor = model(input_ids=IDS, attention_mask=mask).last_hidden_state
    return found.float() if mask is None else found.float() * mask[..., None]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The dtypes in which torch's attention was asked for."""
    dtypes, plain = list[torch.dtype](), F.scaled_dot_product_attention

    def noted(query: Tensor, *args: Any, **options: Any) -> Tensor:
        wide = query.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        dtypes.append(torch.float32 if wide else torch.bfloat16)
        return plain(query, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    return dtypes


@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_narrow_heads_attend_in_float32(
    kind: str, mask: Tensor | None, seen: list[torch.dtype]
) -> None:
    model = model_of(kind, 8)
    before = outputs(model, mask)
    widen_attention(model)
    after = outputs(model, mask)
    assert seen == [torch.bfloat16, torch.float32]
    assert torch.allclose(before, after, rtol=0, atol=0.02 * float(before.abs().max()))
    assert model.config._attn_implementation == "sdpa"  # by which masks are made


def test_wide_heads_and_other_attention_stay(seen: list[torch.dtype]) -> None:
    wide = model_of("llama", 2 * NARROW_HEAD)
    widen_attention(wide)
    outputs(wide, None)
    assert seen == [torch.bfloat16]
    eager = model_of("llama", 8)
    eager.set_attn_implementation("eager")
    widen_attention(eager)
    names = {getattr(m, "config", eager.config)._attn_implementation for m in eager.modules()}
    assert names == {"eager"} and NAME not in names
