"""What packed modules have in common: parameters that change their form.

`use_lanes` turns the stored form into lanes, a module at a time, once a model is loaded. Only
`Packed` knows: whatever leaves a module (state_dict, a pickle) is in the stored form, and so is a
state_dict that is loaded. Moved to another device, lanes become those that it has kernels for.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ternarize.errors import FormatError
from ternarize.runtime import kernels
from ternarize.runtime.forms import Layout, fits_lanes, lanes_form, lanes_size, stored_form
from ternarize.trits.ternary import group_count


class Packed(nn.Module):
    """A module with packed parameters: `layouts`, by the name of the parameter.

    The scales of `name` are the parameter `<name>_scale`. Both are parameters rather than buffers,
    because tensor parallel plans and disk offload look at parameters only.
    """

    # A packed weight that is on meta (offloaded to disk) must not be drawn at random
    _is_hf_initialized = True

    layouts: dict[str, Layout]

    def held(self, name: str) -> nn.Parameter:
        """A parameter as it is, also where an attribute shows others something else (adapters)."""
        parameter = self._parameters[name]
        assert parameter is not None
        return parameter

    def pair(self, name: str) -> tuple[Tensor, Tensor]:
        """A packed parameter and its scales."""
        return self.held(name).data, self.held(f"{name}_scale").data

    def lanes_size(self) -> int:
        """Bytes of what `use_lanes` would turn into lanes."""
        return sum(lanes_size(self.held(name), self.layouts[name]) for name in self._for_lanes())

    def use_lanes(self, memory: Tensor | None = None) -> None:
        """Hold in lanes what can be; `use_stored` is the inverse.

        memory  (`lanes_size`,) uint8 for them; None: memory of its own

        Raises FormatError when a byte is no code. Not for a parameter that another module has too:
        this one would not share it any longer. The function of the same name knows.
        """
        memory = kernels.memory(self.lanes_size()) if memory is None else memory
        for name in self._for_lanes():
            layout = self.layouts[name]
            size = lanes_size(self.held(name), layout)
            self.hold(name, *lanes_form(*self.pair(name), layout, memory[:size]))
            memory = memory[size:]

    def _for_lanes(self) -> list[str]:
        """Names of parameters that can be held in lanes but are not."""
        return [
            name
            for name, layout in self.layouts.items()
            if fits_lanes(self.held(name), self.held(f"{name}_scale"), layout)
        ]

    def _lanes(self) -> dict[str, Layout]:
        """Names of parameters that are held in lanes, and their layouts in the stored form."""
        held = {n: layout for n, layout in self.layouts.items() if layout.lanes is not None}
        return {name: replace(layout, lanes=None) for name, layout in held.items()}

    def use_stored(self) -> bool:
        """Hold everything in its stored form; returns whether some of it was not."""
        lanes, stored = self._lanes(), self._stored_parameters()
        for name, layout in lanes.items():
            self.hold(name, stored[name], stored[f"{name}_scale"], layout)
        return bool(lanes)

    def hold(self, name: str, packed: Tensor, scale: Tensor, layout: Layout) -> None:
        """Hold a parameter and its scales in the form that the layout says."""
        # new parameters: the old ones may belong to a state_dict that was loaded with assign
        for leaf, tensor in ((name, packed), (f"{name}_scale", scale)):
            parameter = type(self.held(leaf))
            setattr(self, leaf, parameter(tensor, requires_grad=False))
        self.layouts = {**self.layouts, name: layout}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Packed":
        """Move, but never cast the scales: model.to(bfloat16) would change every weight."""
        here = next((self.held(name).device for name in self.layouts), torch.device("cpu"))
        there = fn(torch.empty(0, dtype=torch.uint8, device=here)).device
        had_lanes = there != here and self.use_stored()
        before = {f"{name}_scale": self.held(f"{name}_scale").data for name in self.layouts}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, scale in before.items():
            after = self.held(name)
            if after.dtype != scale.dtype:
                after.data = scale.to(after.device)
        if had_lanes:
            self.use_lanes()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._stored_parameters().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        leaves = [leaf for name in self.layouts for leaf in (name, f"{name}_scale")]
        given = [leaf for leaf in leaves if prefix + leaf in state_dict]
        before, layouts, had_lanes = dict(self._parameters), self.layouts, False
        if len(given) == len(leaves):
            had_lanes = self._forget_lanes()
        elif given:
            had_lanes = self.use_stored()
        errors = len(args[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)
        if had_lanes and len(args[-1]) > errors:  # what is refused (a size) has filled nothing
            self._parameters.update(before)
            self.layouts = layouts
        elif had_lanes:
            self.use_lanes()

    def _forget_lanes(self) -> bool:
        """As `use_stored`, with nothing in it: for what is about to be overwritten."""
        stored = self._lanes()
        for name, layout in stored.items():
            lanes, held = self.layouts[name].lanes, self.held(name)
            assert lanes is not None
            shape, kind = (*held.shape[:-1], lanes.rows), (lanes.scale_rows, lanes.scale_dtype)
            packed, scale = empty_parameters(shape, layout, *kind, held.device)
            self.hold(name, packed.data, scale.data, layout)
        return bool(stored)

    def _stored_parameters(self) -> dict[str, Tensor]:
        """By name, the stored form of what is held in lanes."""
        found: dict[str, Tensor] = {}
        for name in self._lanes():
            stored = stored_form(*self.pair(name), self.layouts[name])
            found |= dict(zip((name, f"{name}_scale"), stored, strict=True))
        return found

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the stored form, and whether it was in lanes."""
        stored = self._stored_parameters()
        if not stored:
            return self.__dict__
        parameters = self._parameters | {
            name: type(self.held(name))(tensor, requires_grad=False)
            for name, tensor in stored.items()
        }
        layouts = self.layouts | self._lanes()
        changed = {"_parameters": parameters, "layouts": layouts, "_had_lanes": True}
        return self.__dict__ | changed

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        had_lanes = state.pop("_had_lanes", False)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if had_lanes:
            self.use_lanes()


def use_lanes(model: nn.Module) -> None:
    """Hold the packed layers of a loaded model in lanes, where kernels can multiply them.

    A module at a time, so that memory holds one matrix twice at most. A parameter that several
    modules have stays in the stored form.

    Raises FormatError when a byte is no code, which is possible in a file that was not verified.
    """
    owners: dict[int, int] = {}
    modules = packed_modules(model)
    for module in modules.values():
        for leaf in module.layouts:
            key = id(module.held(leaf))
            owners[key] = owners.get(key, 0) + 1
    fit = {
        name: module
        for name, module in modules.items()
        if all(owners[id(module.held(leaf))] == 1 for leaf in module.layouts)
    }
    # in one piece, which large pages can hold: a single matrix is often smaller than a page
    memory = kernels.memory(sum(module.lanes_size() for module in fit.values()))
    for name, module in fit.items():
        size = module.lanes_size()
        try:
            module.use_lanes(memory[:size])
        except FormatError as error:
            raise FormatError(f"{name}: {error.where}", *error.args[1:]) from None
        memory = memory[size:]
    kernels.give_back()


def packed_modules(model: nn.Module) -> dict[str, Packed]:
    """The packed modules of a model, by path."""
    return {path: m for path, m in model.named_modules() if isinstance(m, Packed)}


class Scale(nn.Parameter):
    """The scales of a packed weight, which a model must not take for a weight in its dtype.

    `model.dtype` is that of the first floating-point parameter, which could be the scales of a
    packed embedding, and `model.to(dtype)` casts all of those.
    """

    def is_floating_point(self) -> bool:
        return False


def empty_parameters(
    rows: tuple[int, ...],
    layout: Layout,
    scale_rows: int,
    scale_dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> tuple[nn.Parameter, nn.Parameter]:
    """Parameters for a packed tensor of shape (*rows, cols) and for its scales."""
    groups = layout.planes * group_count(layout.cols, layout.group_size)
    packed = torch.empty(*rows, layout.width(), dtype=layout.dtype, device=device)
    scale = torch.empty(*rows[:-1], scale_rows, groups, dtype=scale_dtype, device=device)
    return nn.Parameter(packed, requires_grad=False), nn.Parameter(scale, requires_grad=False)
