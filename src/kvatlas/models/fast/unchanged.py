"""Whether modules are still what they were when something was derived from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see a module run."""
    return any(getattr(module, name) for name in _HOOKS)


def _may_be_bypassed(hooks: Mapping[int, object]) -> bool:
    """Whether whoever stands for a module does what its hooks do."""
    return all(getattr(hook, "bypassed", False) for hook in hooks.values())


class Unchanged:
    """Remembers modules, and tells whether they still have their parameters.

    A microsecond per linear. What ``weight.data`` hides from torch, other values at the same address, is not seen.

    Args:
        modules: to remember.
        bypassed: nobody calls these modules: another part, class, forward or plain setting, and any hook but ours,
            count as changes as well.
    """

    def __init__(self, modules: Iterable[nn.Module], *, bypassed: bool = False) -> None:
        self._holders: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._held: list[object] = []
        self._hooks: list[Mapping[int, object]] = []
        self._modules: list[nn.Module] = []
        self._parameters: list[Tensor] = []
        if bypassed:
            self._hooks += [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
        for module in modules:
            self.remember(module._parameters, module._parameters)
            self._parameters += [each for each in module._parameters.values() if each is not None]
            if bypassed:
                self.remember(module._modules, module._modules)
                settings = (name for name, value in vars(module).items() if isinstance(value, int | float | None))
                self.remember(vars(module), ["forward", *settings])
                self._hooks += [module._forward_hooks, module._forward_pre_hooks]
                self._modules.append(module)
        self._classes: list[Any] = [type(module) for module in self._modules]
        self._forwards = [kind.forward for kind in self._classes]
        self._places = [(each._version, each.data_ptr()) for each in self._parameters]

    def remember(self, holder: dict[str, Any], names: Iterable[str]) -> None:
        """Let other values under these names count as a change."""
        for name in names:
            self._holders.append(holder)
            self._names.append(name)
            self._held.append(holder.get(name))

    def __call__(self) -> bool:
        """Return whether nothing has changed."""
        return (
            (not any(self._hooks) or all(map(_may_be_bypassed, self._hooks)))
            and all(map(is_, map(dict.get, self._holders, self._names), self._held))
            and all(map(is_, map(type, self._modules), self._classes))
            and [kind.forward for kind in self._classes] == self._forwards
            and [(each._version, each.data_ptr()) for each in self._parameters] == self._places
        )
