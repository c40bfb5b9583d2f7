"""Linears that are fast for few rows: decode steps read weights at memory speed, from copies of fewer bits.

On the CPU in float32, ``forward`` of each ``nn.Linear`` that is large enough is replaced by one that gives up to 32
rows to `kvatlas.kernels.small_linear`, and more rows, as in prefill, to `kvatlas.kernels.product`. What is no
``nn.Linear`` (GPT-2's Conv1D, experts that are one parameter) is left to torch.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, TypeGuard, get_args

import psutil
import torch
from torch import Tensor, nn

from kvatlas.core.errors import CapacityError, ConfigError, UnsupportedError
from kvatlas.core.units import format_bytes
from kvatlas.core.vocabulary import Format
from kvatlas.kernels import product
from kvatlas.kernels.dispatch import choose
from kvatlas.kernels.small_linear import MAX_ROWS, LinearWeights, encode, exact_format, small_linear
from kvatlas.kernels.small_linear.native import bind
from kvatlas.models.fast.unchanged import Unchanged, has_hooks

_SAMPLE = 64  # numbers of a weight that tell whether it has changed
LinearChoice = Literal["auto", "off", "fp32", "fp16", "bf16", "int8"]

MIN_ELEMENTS = 1 << 16
"""Weights below which torch's linear is about as fast, at least for many rows."""

_LOG = logging.getLogger(__name__)


class SmallLinears:
    """The replaced linears of a model.

    Args:
        model: whose linears are replaced.
        choice: ``"auto"`` keeps a bf16 or fp16 copy where it holds every weight exactly, and reads the weights
            themselves elsewhere, so that only the order of sums changes; ``"fp32"`` reads the weights themselves;
            ``"bf16"``, ``"fp16"`` and ``"int8"`` (one scale per output) round them, for up to 32 rows only: prefill
            keeps the weights as they are. ``"off"`` replaces nothing. Where native kernels are not in use, ``"auto"``
            and ``"fp32"`` replace nothing either, while the others round in the form that is.
        min_elements: weights of fewer elements are left to torch; ``MIN_ELEMENTS`` if None.

    Attributes:
        formats: number of replaced linears by format.
        copy_bytes: bytes of the copies, each counted once.
        active: whether linears may be replaced, even if all are too small to be.

    Raises:
        ConfigError: ``choice`` is unknown.
        UnsupportedError: a format was named, and the model is not on the CPU in float32, or a weight does not fit.
        CapacityError: a format was named, and there is too little memory for the copies.
    """

    def __init__(self, model: nn.Module, choice: LinearChoice = "auto", *, min_elements: int | None = None) -> None:
        self.formats: Counter[Format] = Counter()
        self.copy_bytes = 0
        self._replaced: list[nn.Module] = []
        check_choice(choice)
        self.active = choice != "off" and _covers(model, choice)
        if not self.active:
            return
        try:
            least = MIN_ELEMENTS if min_elements is None else min_elements
            self._replace(list(_suitable(model, least)), choice)
        except BaseException:
            self.restore()
            raise
        if self._replaced:
            _LOG.info("%s: %s", type(model).__name__, self)

    def __str__(self) -> str:
        if not self._replaced:
            return "torch's linears"
        kinds = ", ".join(f"{count} {format}" for format, count in self.formats.items())
        return f"linears for up to {MAX_ROWS} rows: {kinds}; copies of {format_bytes(self.copy_bytes)}"

    def refresh(self) -> None:
        """Let go of copies whose weights were written to behind torch's back, as ``weight.data`` allows.

        Looks at a few dozen numbers of each weight, so a change of single rows may be missed: load such a model anew.
        """
        for module in list(self._replaced):
            forward = vars(module).get("forward")
            if isinstance(forward, _Forward) and forward.is_stale():
                vars(module).pop("forward", None)
                self._replaced.remove(module)
                _LOG.warning("a linear's weights have changed; it runs as torch's from now on")

    def weights_of(self, module: nn.Linear) -> LinearWeights | None:
        """Return the weights that a replaced linear computes few rows from; None for another."""
        forward = vars(module).get("forward")
        return forward.weights if isinstance(forward, _Forward) else None

    def restore(self) -> None:
        """Give the linears their own forward back and let go of the copies; what is not replaced stays as it is."""
        for module in self._replaced:
            give_back(module, _Forward)
        self._replaced.clear()
        self.formats.clear()
        self.copy_bytes = 0

    def _replace(self, modules: list[nn.Linear], choice: LinearChoice) -> None:
        choice = _affordable(modules, choice)
        copies: dict[tuple[int, torch.Size], LinearWeights] = {}
        for module in modules:
            address = module.weight.data_ptr(), module.weight.shape
            if address not in copies:
                copies[address] = _copy(module.weight, choice)
                if copies[address].format is not Format.FP32:
                    self.copy_bytes += copies[address].nbytes
            module.forward = _Forward(module, copies[address])  # type: ignore[method-assign]  # until restore
            self._replaced.append(module)
            self.formats[copies[address].format] += 1


def check_choice(choice: str) -> None:
    """Refuse an unknown way of keeping weights.

    Raises:
        ConfigError: ``choice`` is unknown.
    """
    if choice not in get_args(LinearChoice):
        raise ConfigError(f"unknown linear_weights {choice!r}; choose one of {', '.join(get_args(LinearChoice))}")


def _covers(model: nn.Module, choice: LinearChoice) -> bool:
    """Whether linears are to be replaced; raises if a format was named for a model that cannot have it."""
    weight = next(model.parameters(), torch.empty(0))
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        if choice == "auto":
            return False
        raise UnsupportedError(
            f"linear_weights={choice} is for float32 on the CPU, but the model computes in "
            f"{str(weight.dtype).removeprefix('torch.')} on {weight.device.type}; use auto"
        )
    return choice not in ("auto", "fp32") or choose(weight.device, native=True) == "native"


def _suitable(model: nn.Module, min_elements: int) -> Iterator[nn.Linear]:
    """Yield the linears that do what ``nn.Linear`` does and nothing else, with weights of their own on the CPU."""
    for module in model.modules():
        if is_suitable(module) and module.weight.numel() >= max(1, min_elements):
            yield module


def is_suitable(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module does what ``nn.Linear`` does and nothing else, with weights of its own on the CPU."""
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and not has_hooks(module)
        and all(map(is_plain, module.parameters()))
        and (module.bias is None or module.bias.shape == module.weight.shape[:1])
    )


def give_back(module: nn.Module, kind: type) -> None:
    """Let a module's class compute again, unless somebody has put a forward of their own in the place of ours."""
    if isinstance(vars(module).get("forward"), kind):
        del module.forward


def is_ordinary(*inputs: object) -> bool:
    """Whether inputs are contiguous float32 memory of the CPU, and nothing but a result is wanted of them."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return all(type(x) is Tensor and x.dtype is torch.float32 and x.is_cpu and x.is_contiguous() for x in inputs)


def is_plain(parameter: nn.Parameter) -> bool:
    """Whether a parameter is ordinary float32 memory of the CPU, whose changes torch counts."""
    return (
        type(parameter) is nn.Parameter
        and parameter.device.type == "cpu"
        and parameter.dtype == torch.float32
        and parameter.is_contiguous()
        and not parameter.is_inference()  # it has no version, so a change could not be seen
    )


def _affordable(modules: list[nn.Linear], choice: LinearChoice) -> LinearChoice:
    """Return the choice, or ``"fp32"`` instead of ``"auto"`` where copies would not fit into memory."""
    if choice == "fp32":
        return choice
    elements = sum({module.weight.data_ptr(): module.weight.numel() for module in modules}.values())
    wanted, available = elements * (1 if choice == "int8" else 2), psutil.virtual_memory().available
    if wanted <= available:
        return choice
    lack = f"copies of weights take {format_bytes(wanted)}, but {format_bytes(available)} are available"
    if choice != "auto":
        raise CapacityError(f"{lack}; use --linear-weights fp32, which makes none")
    _LOG.warning("%s; decode steps read the float32 weights", lack)
    return "fp32"


def _copy(weight: Tensor, choice: LinearChoice) -> LinearWeights:
    return encode(weight, exact_format(weight) if choice == "auto" else Format(choice))


class _Forward:
    """Gives few rows to the kernel, many to oneDNN, and the original everything that these do not cover.

    The original also takes over once the module's parameters were replaced or changed in place: then the copy is out
    of date. What ``weight.data`` hides from torch is found by `SmallLinears.refresh`.
    """

    def __init__(self, module: nn.Linear, weights: LinearWeights) -> None:
        self.weights = weights
        self._module = module
        self._original = module.forward
        self._num_inputs = module.in_features
        self._most = MAX_ROWS * module.in_features  # elements
        self._sample, self._bias_sample = _sampled(module.weight), _sampled(module.bias)
        self._small = _bound(weights, None if module.bias is None else module.bias.detach())
        self._has_product = product.available()
        self._is_unchanged = Unchanged([module])

    def __call__(self, input: Tensor) -> Tensor:
        if is_ordinary(input) and input.dim() > 0 and input.size(-1) == self._num_inputs and self._is_unchanged():
            if input.numel() <= self._most:
                return self._small(input)
            if self._has_product and input.dim() > 1:
                return product.product(input, self._module.weight, self._module.bias)
        return self._original(input)

    def is_stale(self) -> bool:
        """Whether the weights are no longer those of the copy, as far as a sample can tell."""
        module = self._module
        now = _sampled(module.weight), _sampled(module.bias)
        return not all(map(torch.equal, now, (self._sample, self._bias_sample)))

    def __reduce__(self) -> tuple[object, ...]:
        """A copy of the module, pickled or deep, computes with its own weights."""
        return partial, (nn.Linear.forward, self._module)


def _sampled(parameter: Tensor | None) -> Tensor:
    """Return a few dozen numbers of a parameter, spread over all of it."""
    if parameter is None:
        return torch.empty(0)
    flat = parameter.detach().view(-1)
    return flat[:: max(1, flat.numel() // _SAMPLE)].clone()


def _bound(weights: LinearWeights, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    if choose(weights.codes.device, native=True) == "native":
        return bind(weights, bias)
    return lambda x: small_linear(x, weights, bias)
