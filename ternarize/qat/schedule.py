"""What changes while a model is trained, and what an optimizer is told of its parameters."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ternarize.errors import UsageError
from ternarize.qat.modules import LOG_SCALE, SCHEDULED, latent_modules

SHARP = 60.0  # k of the soft rounding at its end, from where on it is hard
SAMPLED = 1 << 16  # latent weights that the threshold for a share of zeros is taken from


class Schedule(TrainerCallback):
    """From dense to ternary, from soft to hard, and to a share of zeros, as training goes on.

        Trainer(model, ..., callbacks=[Schedule(model, warmup=0.1)])

    or, in a loop of one's own, `at(done)` before each step and `at(1)` at the end.

    model   prepared
    warmup  share of the steps in which W goes from dense to ternary, linearly (blend)
    sharpen share of the steps in which tanh gets sharper, k from 1 to 60 as a geometric series;
            None: 0.9 for a model prepared with the estimator "tanh", else nothing
    zeros   share of zero trits, or None: what rounding gives
    ramp    share of the steps in which it gets there from what rounding gives
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        warmup: float = 0.0,
        sharpen: float | None = None,
        zeros: float | None = None,
        ramp: float = 0.3,
    ) -> None:
        shares = {"warmup": warmup, "sharpen": sharpen, "ramp": ramp, "zeros": zeros}
        for what, value in shares.items():
            if value is not None and not 0 <= value <= 1 or value == 1 == zeros:
                raise UsageError(what, f"{value}", "a share, from 0 to 1")
        self.modules = [module for _, module in latent_modules(model)]
        soft = any(f.estimator == "tanh" for m in self.modules for f in m.forms.values())
        self.warmup, self.zeros, self.ramp = warmup, zeros, ramp
        self.sharpen = (0.9 if soft else 0.0) if sharpen is None else sharpen
        self.natural: dict[int, float] = {}

    def at(self, done: float) -> None:
        """Set what holds after a share of the steps, from 0 to 1."""
        blend = done / self.warmup if done < self.warmup else None
        sharpness = SHARP ** (done / self.sharpen) if done < self.sharpen else None
        for index, module in enumerate(self.modules):
            threshold = None if self.zeros is None else self._threshold(index, done)
            for name, value in zip(SCHEDULED, (blend, sharpness, threshold), strict=True):
                _put(module, name, value)

    def _threshold(self, index: int, done: float) -> float:
        """|V / s| that a share of the module's weights lies below: of a sample, and at the end all."""
        module = self.modules[index]
        with torch.no_grad():
            ratios = torch.cat([_ratios(module, name, done >= 1) for name in module.forms])
        if index not in self.natural:
            self.natural[index] = float((ratios <= 0.5).float().mean())
        start, part = self.natural[index], min(1.0, done / self.ramp) if self.ramp else 1.0
        assert self.zeros is not None
        share = start + part * (self.zeros - start)
        rank = max(1, min(len(ratios), round(share * len(ratios))))
        return float(ratios.kthvalue(rank).values)

    # --- what transformers' Trainer calls ---

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = state.global_step / max(1, state.max_steps)
        self.at(done)
        if kwargs.get("optimizer") is not None:
            end_decay(kwargs["optimizer"], done)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at(1.0)


def _ratios(module: Any, name: str, all_of_them: bool) -> Tensor:
    from ternarize.qat.rounding import _ratio

    latent = module.latent(name)
    ratios = _ratio(latent, module.scales(name), module.forms[name].group_size)
    ratios = ratios.flatten(-2)[..., : latent.shape[-1]].abs().flatten()
    return ratios if all_of_them else ratios[:: max(1, len(ratios) // SAMPLED)]


def _put(module: Any, name: str, value: float | None) -> None:
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
    model: nn.Module,
    lr: float,
    *,
    scale_lr: float | None = None,
    other_lr: float | None = None,
    relative: bool = False,
    weight_decay: float = 0.0,
    decay_until: float = 0.5,
) -> list[dict[str, Any]]:
    """Groups for an optimizer: latent weights, their scales, and all others that are trained.

    lr        of latent weights; with `relative` in units of a weight's mean scale (0.005: a trit
              takes some hundred steps of Adam), for which each weight gets a group of its own
    scale_lr  of log-scales, None: lr / 4 with `relative`, else lr
    other_lr  of norms, biases and what else is trained, None: the same as of scales; with
              `relative` in units of a parameter's root mean square
    weight_decay  of latent weights (and of other matrices) until a share `decay_until` of the
              steps, as BitNet has it (a `Schedule` among the callbacks ends it, or `end_decay`);
              never of scales, norms and biases. 0 to fine-tune: it pulls towards zero trits
    """
    scale_lr = (lr / 4 if relative else lr) if scale_lr is None else scale_lr
    other_lr = scale_lr if other_lr is None else other_lr
    latents: dict[int, float] = {}
    with torch.no_grad():
        for _, module in latent_modules(model):
            for name in module.forms:
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
            rate, decay = scale_lr, 0.0
        else:
            unit = float(parameter.detach().float().square().mean().sqrt()) + 1e-4
            rate = other_lr * (unit if relative else 1.0)
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
        group |= {"decay_until": decay_until} if decay else {}
    return list(groups.values())


def end_decay(optimizer: Any, done: float) -> None:
    """Set weight decay to 0 in the groups of `parameter_groups` whose share of steps is over."""
    for group in optimizer.param_groups:
        if done >= group.get("decay_until", 2):
            group["weight_decay"] = 0.0
