"""What changes while a model is trained, and what an optimizer is told of its parameters."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ternarize.errors import UsageError
from ternarize.qat.modules import LOG_SCALE, SCHEDULED, Qat, latent_modules
from ternarize.qat.rounding import edge_of
from ternarize.trits.base3 import BASE3
from ternarize.trits.ternary import split_groups

SHARP = 60.0  # k of the soft rounding at its end, from where on it is hard
SAMPLED = 1 << 16  # latent weights that the threshold for a share of zeros is taken from
DECAYS = 0.5  # share of the steps in which weights decay, as BitNet has it


class Schedule(TrainerCallback):
    """From dense to ternary, from soft to hard, and to a share of zeros, as training goes on.

        Trainer(model, ..., callbacks=[Schedule(model, warmup=0.1)])

    or, in a loop of one's own, `at(done)` before each step and `at(1)` at the end.

    model   prepared
    warmup  share of the steps in which W goes from dense to ternary, linearly (blend)
    sharpen share of the steps in which tanh gets sharper, k from 1 to 60 as a geometric series;
            None: 0.9 for a model prepared with the estimator "tanh", else nothing
    zeros   share of zero trits, or None: what rounding gives. In the end it is that of the weights
            of each module together, to within one weight if no two are equal
    ramp    share of the steps in which it gets there from what rounding gives
    least   at least that share: where rounding gives more zeros, they stay

    What holds follows from the weights and the share that is done, so that a training that was
    broken off goes on as it would have. A state dict knows nothing of it: after loading one, call
    `at(1)` (or what is done) again.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        warmup: float = 0.0,
        sharpen: float | None = None,
        zeros: float | None = None,
        ramp: float = 0.3,
        least: bool = False,
    ) -> None:
        shares = {"warmup": warmup, "sharpen": sharpen or 0.0, "ramp": ramp, "zeros": zeros or 0.0}
        for what, value in shares.items():
            if not 0 <= value <= 1 or (what == "zeros" and value == 1):
                raise UsageError(what, f"{value}", "a share of 1")
        inside = [module for _, module in latent_modules(model)]
        self.modules = [m for m in inside if any(f.codec == BASE3 for f in m.forms.values())]
        if not self.modules:
            raise UsageError(
                type(model).__name__,
                "has no weights that are trained to be ternary",
                "a prepared model",
                "Call ternarize.qat.prepare(model) first",
            )
        soft = any(f.estimator == "tanh" for m in self.modules for f in m.forms.values())
        self.warmup, self.zeros, self.ramp, self.least = warmup, zeros, ramp, least
        self.sharpen = (0.9 if soft else 0.0) if sharpen is None else sharpen

    @torch.no_grad()
    def at(self, done: float, *, exact: bool = False) -> None:
        """Set what holds after a share of the steps, from 0 to 1.

        exact  have the share of zeros of now to within one weight, as at the end; else to within
               a sample, in less time
        """
        blend = done / self.warmup if done < self.warmup else None
        sharpness = SHARP ** (done / self.sharpen) if done < self.sharpen else None
        for module in self.modules:
            threshold = None
            if self.zeros is not None:
                threshold = self._threshold(module, done, exact=exact or done >= 1)
            for name, value in zip(SCHEDULED, (blend, sharpness, threshold), strict=True):
                _put(module, name, value)

    def _threshold(self, module: Qat, done: float, *, exact: bool) -> float:
        """|V / s| that a share of the module's weights is below: of a sample, or of all."""
        sampled = None if exact else SAMPLED
        names = [name for name, form in module.forms.items() if form.codec == BASE3]
        ratios = torch.cat([_ratios(module, name, sampled) for name in names])
        natural = float((ratios <= 0.5).float().mean())
        part = min(1.0, done / self.ramp) if self.ramp else 1.0
        assert self.zeros is not None
        rank = round((natural + part * (self.zeros - natural)) * len(ratios))
        return max(edge_of(ratios, rank), 0.5 if self.least else 0.0)

    # --- what transformers' Trainer calls ---

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step / max(1, state.max_steps)
        self.at(done)
        if kwargs.get("optimizer") is not None:
            end_decay(kwargs["optimizer"], done)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at(1.0)


def _ratios(module: Qat, name: str, sampled: int | None) -> Tensor:
    """|V / s| of a weight, flat: of whole rows that are about `sampled` weights, or of all."""
    latent, scales = module.latent(name), module.scales(name)
    scales = scales.expand(*latent.shape[:-1], scales.shape[-1]).flatten(0, -2)
    latent = latent.flatten(0, -2)
    step = 1 if sampled is None else max(1, latent.numel() // sampled)
    latent, scales = latent[::step].abs(), scales[::step]
    ratios = split_groups(latent, module.forms[name].group_size) / scales.unsqueeze(-1)
    return ratios.flatten(-2)[..., : latent.shape[-1]].flatten()


def _put(module: Qat, name: str, value: float | None) -> None:
    """Set a scalar of a module: a compiler sees a tensor that changes, not another number."""
    there = getattr(module, name)
    if value is None:
        setattr(module, name, None)
    elif there is None:
        device = next(module.parameters()).device
        setattr(module, name, torch.tensor(value, dtype=torch.float32, device=device))
    else:
        there.fill_(value)


def parameter_groups(
    model: nn.Module, lr: float, *, relative: bool = False, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer: latent weights, their scales, and all others that are trained.

    lr            of latent weights; with `relative` in units of a ternary weight's mean scale
                  (0.005: a trit takes some hundred steps of Adam), for which each gets a group of
                  its own. Of log-scales the same, with `relative` a quarter (but lr where the
                  numbers stay, of which nothing else moves); of norms, biases and what else is
                  trained as of scales, with `relative` in units of a parameter's root mean square
    weight_decay  of latent weights (and of other matrices) for half of the steps, as BitNet has it
                  (a `Schedule` among the callbacks ends it, or `end_decay`); never of scales, norms
                  and biases. 0 to fine-tune: it pulls towards zero trits
    """
    scale_lr = lr / 4 if relative else lr
    latents: dict[int, float] = {}
    alone = set[int]()
    with torch.no_grad():
        for _, module in latent_modules(model):
            for name in module.forms:
                weight = module._parameters[name]
                if weight is not None and not weight.is_floating_point():
                    alone.add(id(module._parameters[name + LOG_SCALE]))
                    continue
                if relative and module.forms[name].codec != BASE3:
                    continue  # a step of its numbers is no measure of what it may move
                unit = float(module.scales(name).mean()) if relative else 1.0
                latents[id(module._parameters[name])] = unit
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = weight_decay if parameter.ndim > 1 else 0.0
        if id(parameter) in latents:
            rate = lr * latents[id(parameter)]
        elif name.endswith(LOG_SCALE):
            rate, decay = lr if id(parameter) in alone else scale_lr, 0.0
        else:
            unit = float(parameter.detach().float().square().mean().sqrt()) + 1e-4
            rate = scale_lr * (unit if relative else 1.0)
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
        group |= {"decay_until": DECAYS} if decay else {}
    return list(groups.values())


def end_decay(optimizer: Any, done: float) -> None:
    """Set weight decay to 0 in the groups of `parameter_groups` whose share of steps is over."""
    for group in optimizer.param_groups:
        if done >= group.get("decay_until", 2):
            group["weight_decay"] = 0.0
