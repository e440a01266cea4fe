"""Reconstruction by gradient: trits, scales and vectors of several matrices trained together.

`gptq` solves one matrix after the other; what it cannot do is trade an error in one matrix against
another, or see what lies between them. Here a window of one to four neighbouring blocks is trained
to give what the float stream gives, from the state that `gptq` left. (The whole model is trained by
`ternarize.train`, after this or without it.)

    weight     W' = s t,   t = clip(round(V / s), -1, 1),   s = s_0 exp(u)
    loss       mean Huber_1((y' - y) / sigma),  sigma = their error at the start

V is a latent weight and u a correction of the scale; gradients go straight through the rounding
(where |V / s| < 1.5), so d W'/d V = 1 and d W'/d s = t - V / s, as in LSQ. With a share of zeros
the edge of t is not at 1/2 but where that share is below it, looked for anew before each look at
the held-out loss. Scales are rounded in
the forward as they will be stored. Vectors of the blocks (biases, norms) are trained with them. V
starts at the float weight, moved into the interval that rounds to the trit `gptq` chose: near its
edge where that choice was a compensation, so a small gradient can undo it. There is no weight
decay, which would pull V to the zero trits.

The state with the least loss on held-out samples is kept; the start is one of the candidates.

Sources: the straight-through estimator, https://arxiv.org/abs/1308.3432; step sizes learned, LSQ,
https://arxiv.org/abs/1902.08153, eq. 3; blocks trained one by one, BRECQ,
https://arxiv.org/abs/2102.05426; sliding windows of ternary blocks, https://arxiv.org/abs/2606.26650.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ternarize.qat.prepare import MARGIN
from ternarize.qat.rounding import FLOOR, RANGES, Form, edge_of, stored_scales, ternarized
from ternarize.trits.rotation import rotate
from ternarize.trits.ternary import largest_of_groups, spread_scales

RATE = 0.004  # of V, in units of the matrix's mean scale, per step
SCALE_RATE = 1e-3  # of u
VECTOR_RATE = 1e-3  # of biases and norms, in units of their root mean square
CHECK_EVERY = 25  # steps between looks at the held-out loss
PATIENCE = 6  # looks without a gain that end the training

# run sample i with these parameters (by full name) -> (output, target), one shape
Run = Callable[[int, Mapping[str, Tensor]], tuple[Tensor, Tensor]]
# the same -> the loss, a scalar
Loss = Callable[[int, Mapping[str, Tensor]], Tensor]


class TernaryWeight:
    """A trainable ternary weight: latent V (..., rows, cols) and log-scales u."""

    def __init__(
        self, weight: Tensor, stored: Tensor, form: Form, zeros: float | None = None
    ) -> None:
        """weight: the parameter in float; stored: as it is ternarized now; zeros: at least."""
        w, q = form.turn(weight), form.turn(stored)
        if form.block:
            w = rotate(w, form.block, form.seed)
        scales = largest_of_groups(q.abs(), form.group_size)
        usual = scales.sum() / (scales > 0).sum().clamp(min=1)
        self.start = torch.where(scales > 0, scales, usual.clamp(min=FLOOR))  # of a group of zeros
        low, high = RANGES[form.scale_dtype]
        within = bool(((self.start >= low) & (self.start <= high)).all())
        self.form = form if within else replace(form, scale_dtype="F32")
        level = spread_scales(self.start, w.shape[-1], form.group_size)
        trits = q.sign()
        self.latent = nn.Parameter(level * (trits + (w / level - trits).clamp(-MARGIN, MARGIN)))
        self.log_scale = nn.Parameter(torch.zeros_like(scales))
        self.zeros, self.threshold = zeros, None if zeros is None else torch.tensor(0.5)
        self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Have the share of zeros with the latent weights of now."""
        if self.zeros is not None:
            level = spread_scales(self.scales(), self.latent.shape[-1], self.form.group_size)
            ratios = (self.latent.abs() / level).flatten()
            rank = math.ceil(self.zeros * len(ratios))
            self.threshold = ratios.new_tensor(max(0.5, edge_of(ratios, rank)))

    def scales(self) -> Tensor:
        """Scales as they will be stored; gradients as if they were not rounded."""
        form = self.form.scale_dtype, self.form.scale_bits
        return stored_scales(self.start * self.log_scale.exp(), *form)

    def stored(self) -> Tensor:
        """s t in the space of the file (rotated, if it is), in the parameter's orientation."""
        threshold = self.threshold
        found = ternarized(self.latent, self.scales(), self.form, threshold=threshold)
        return self.form.turn(found)


def reconstruct(
    weights: Mapping[str, TernaryWeight],
    vectors: Mapping[str, Tensor],
    loss: Loss,
    train: Sequence[int],
    held: Sequence[int],
    steps: int,
    seed: int,
    progress: Callable[[int, str], None] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], float, float]:
    """Train weights and vectors; returns (stored weights, vectors, held-out loss before, after).

    weights   full name of a parameter -> its trainable form
    vectors   full names and values of biases and norms, trained too
    loss      of one sample
    train     samples to train on; held: to choose by
    steps     how many; one sample each
    """
    free = {name: nn.Parameter(value.clone()) for name, value in vectors.items()}
    groups: list[dict[str, Any]] = []
    for weight in weights.values():
        unit = float(weight.start.mean())
        groups.append({"params": [weight.latent], "lr": RATE * unit})
        groups.append({"params": [weight.log_scale], "lr": SCALE_RATE})
    for value in free.values():
        unit = float(value.detach().square().mean().sqrt()) + 1e-4
        groups.append({"params": [value], "lr": VECTOR_RATE * unit})
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    rates = [group["lr"] for group in groups]

    @torch.no_grad()
    def held_loss() -> float:
        for weight in weights.values():
            weight.settle()
        state = parameters(weights, free)
        return float(torch.stack([loss(i, state) for i in held]).mean())

    best = start = held_loss()
    kept = _snapshot(weights, free)
    order: list[int] = []
    shuffle, waited = random.Random(seed), 0
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        if not order:
            order = list(train)
            shuffle.shuffle(order)
        optimizer.zero_grad()
        loss(order.pop(), parameters(weights, free)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (step + 1) % CHECK_EVERY == 0 or step + 1 == steps:
            now = held_loss()
            waited += 1
            if now < best:
                best, kept, waited = now, _snapshot(weights, free), 0
            if progress is not None:
                progress(step + 1, f"held-out loss {now / max(start, 1e-30):.3f} of the start")
            if waited >= PATIENCE:
                break
    return kept[0], kept[1], start, best


def parameters(
    weights: Mapping[str, TernaryWeight], vectors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What a forward runs with."""
    return {name: w.form.parameter(w.stored()) for name, w in weights.items()} | dict(vectors)


def huber(run: Run, start: Mapping[str, Tensor], held: Sequence[int]) -> Loss:
    """Mean Huber_1((output - target) / sigma); sigma is the error with the parameters `start`."""
    with torch.no_grad():
        errors = [F.mse_loss(*run(i, start)) for i in held]
    sigma = max(math.sqrt(float(torch.stack(errors).mean())), 1e-12)

    def loss(sample: int, values: Mapping[str, Tensor]) -> Tensor:
        output, target = run(sample, values)
        return F.huber_loss(output / sigma, target / sigma, delta=1.0)

    return loss


def _snapshot(
    weights: Mapping[str, TernaryWeight], free: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with torch.no_grad():
        stored = {name: weight.stored().clone() for name, weight in weights.items()}
        return stored, {name: value.detach().clone() for name, value in free.items()}
