"""The values of a journal in a module: written into its parameters, and what gradients say of them.

    W = u(s 2^(e / 32) t),    d/dt = s 2^(e / 32) u*(dW),    d/de = ln 2 / 32 sum over the group of
    u*(dW) s 2^(e / 32) t

with s the scales of the base (1 of a start from the seed), as they are stored after the steps, and
u the inverse of the rotation of a matrix that has one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ternarize.qat.prepare import MARGIN
from ternarize.qat.rounding import FLOOR
from ternarize.steps.base import moved_scales
from ternarize.steps.generator import SCALES, TRITS
from ternarize.steps.replay import LIMITS, Part, Values
from ternarize.trits.rotation import rotate, unrotate
from ternarize.trits.scales import scale_values
from ternarize.trits.ternary import group_sums, scaled, spread_scales


@dataclass(frozen=True)
class Placement:
    """Where a tensor of a journal stands in a module.

    part         the tensor
    parameter    name of the parameter that it fills
    stored       scales of the base as stored, (..., rows or 1, groups)
    rotation     (block, seed) of a matrix that meets rotated inputs; block 0: none
    transposed   the parameter is (..., cols, rows)
    """

    part: Part
    parameter: str
    stored: Tensor
    rotation: tuple[int, int] = (0, 0)
    transposed: bool = False

    def turn(self, weight: Tensor) -> Tensor:
        """Between the parameter's orientation and (..., rows, cols)."""
        return weight.transpose(-1, -2) if self.transposed else weight

    def weight(self, values: Tensor) -> Tensor:
        """The parameter, from what is stored (both as they are multiplied by)."""
        block, seed = self.rotation
        return self.turn(unrotate(values, block, seed) if block else values)

    def as_stored(self, weight: Tensor) -> Tensor:
        """What is in the parameter's place, a weight or a gradient, in that of what is stored."""
        block, seed = self.rotation
        wide = self.turn(weight).to("cpu", torch.float32)  # where values are
        return rotate(wide, block, seed) if block else wide


class MovedModule:
    """A module whose parameters follow the values of a journal.

    module  any; other parameters than those of the places stay as they are
    places  of all tensors of the journal
    state   the values
    """

    def __init__(self, module: nn.Module, places: Sequence[Placement], state: Values) -> None:
        self.module, self.places, self.state = module, list(places), state
        own = dict(module.named_parameters(remove_duplicate=False))
        self.parameters = {place.part.name: own[place.parameter] for place in places}
        module.requires_grad_(False)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.write()

    def scales(self, place: Placement, real: Mapping[str, Tensor] | None = None) -> Tensor:
        """The scales after the steps, float32, or with real exponents in the place of theirs."""
        if real is not None:
            moved = scale_values(place.stored) * (real[place.part.name] / 32).exp2().view(
                place.part.scales_shape
            )
            return moved
        exponents = self.state.exponents[place.part.name]
        return scale_values(moved_scales(place.stored, exponents))

    def stored(self, place: Placement, scales: Tensor) -> Tensor:
        """s 2^(e / 32) t, (..., rows, cols) float32."""
        return scaled(self.state.trits[place.part.name], scales, place.part.group_size)

    @torch.no_grad()
    def write(self, real: Mapping[str, Tensor] | None = None) -> None:
        """Bring the parameters to what the values are.

        real  exponents in the place of the values', flat, by name
        """
        for place in self.places:
            parameter = self.parameters[place.part.name]
            stored = self.stored(place, self.scales(place, real))
            parameter.copy_(place.weight(stored).view_as(parameter))

    def slopes(
        self, target: int, grads: Mapping[str, Tensor], real: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The gradient by trits or exponents, flat, float32, of that by the parameters, by name."""
        found = {}
        for place in self.places:
            part, scales = place.part, self.scales(place, real)
            slope = place.as_stored(grads[part.name])
            if target == TRITS:
                slope = slope * spread_scales(scales, part.shape[-1], part.group_size)
            else:
                slope = group_sums(slope * self.stored(place, scales), part.group_size)
                if part.group_size == 0:
                    slope = slope.sum(-2, keepdim=True)
                slope = slope * (math.log(2) / 32)
            found[part.name] = slope.reshape(-1).contiguous()
        return found

    def real(self, place: Placement, weight: Tensor) -> Tensor:
        """A weight in the parameter's shape, in units of the scales: (..., rows, cols) float32."""
        part = place.part
        level = spread_scales(self.scales(place), part.shape[-1], part.group_size).clamp(min=FLOOR)
        return place.as_stored(weight.detach()).view(part.shape) / level

    def latent(self, place: Placement, real: Tensor) -> Tensor:
        """Trits as real numbers, which say how near each is to another: flat, float32.

        real  of the weight that the trits were made of (`real`)
        """
        trits = self.state.trits[place.part.name]
        return (trits + (real - trits).clamp(-MARGIN, MARGIN)).view(-1)

    def room(self, place: Placement, target: int) -> tuple[Tensor, Tensor]:
        """Which values can be one more, and which one less: flat, bool."""
        values = self.state.values(place.part, target).view(-1)
        limit = LIMITS[target]
        up, down = values < limit, values > -limit
        stay = self.state.frozen.get(place.part.name) if target == TRITS else None
        if stay is not None:
            free = ~stay.expand(place.part.shape).reshape(-1)
            up, down = up & free, down & free
        return up, down

    def tangent(self, place: Placement, target: int, moves: Tensor) -> Tensor:
        """How the parameter moves with its values: moves (n,), flat -> of the parameter's shape."""
        part, scales = place.part, self.scales(place)
        if target == TRITS:
            moved = scaled(moves.view(part.shape), scales, part.group_size)
        else:
            slope = moves.view(part.scales_shape) * scales * (math.log(2) / 32)
            moved = scaled(self.state.trits[part.name], slope, part.group_size)
        return place.weight(moved)


def target_of(name: str) -> int:
    """ "trits" or "scales" as a journal has it."""
    return {"trits": TRITS, "scales": SCALES}[name]
