"""A second device in the CPU's memory, to try out on a machine without a GPU what must also run on one.

As on a GPU, no operator mixes its tensors with those of the CPU (except a number in arithmetic, and an index), no generator of the CPU
draws its random numbers, and its memory is limited: more than `limit` bytes raise OutOfMemoryError. Unlike a GPU it computes what the CPU
does, or nothing at all: made of shapes only, it holds models of any size and counts their memory and FLOPs. Code that checks for "cuda" by
name does not recognise it as a GPU.

    python -m experiments.benchmarks.second_device <bytes of memory, 0 without limit> run method=fedit ...    a command of fedsim on it
"""

import importlib
import json
import pkgutil
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
from torch.utils.flop_counter import flop_registry

NAME = "second"
DEVICE_TYPES = {"values": "cpu", "shapes": "meta"}
CPU = torch.device("cpu")
aten = torch.ops.aten
_norm = functional.rms_norm
CROSSING = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default}
SIZED_LATER = ("arange", "arange.start", "arange.start_step", "eye", "eye.m")
"""Factories whose results PyTorch creates empty and resizes afterwards, which a wrapper cannot follow."""
KERNELS = ("native_layer_norm", "silu_backward")
"""Operators that are one kernel on a GPU but that PyTorch would split into several for another device."""


class Memory:
    """The device's memory: the bytes in use, and their peak."""

    def __init__(self) -> None:
        self.limit, self.held, self.peak, self.times_full = 0, 0, 0, 0
        self.users: Counter[int] = Counter()  # tensors that use each storage, by its address

    def hold(self, storage: torch.UntypedStorage) -> "Held":
        """Counts a storage as long as any `Held` returned for it is alive: views share a storage."""
        if storage._cdata not in self.users:
            if self.limit and self.held + storage.nbytes() > self.limit:
                self.times_full += 1
                raise torch.OutOfMemoryError(f"The second device has {self.limit} bytes, and holds {self.held} already.")
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
        self.users[storage._cdata] += 1
        return Held(self, storage)


@dataclass
class Held:
    """One of the tensors that use a storage."""

    memory: Memory
    storage: torch.UntypedStorage

    def __del__(self) -> None:
        users, address = self.memory.users, self.storage._cdata
        users[address] -= 1
        if not users[address]:
            del users[address]
            self.memory.held -= self.storage.nbytes()


class SecondDevice:
    """The device, its memory, and counts of its use."""

    def __init__(self) -> None:
        self.made_of = CPU
        self.memory = Memory()
        self.calls: Counter[Any] = Counter()  # by operator
        self.waits = 0  # how often the CPU needed a value, or a size that depends on values
        self.flops = 0  # of matrix products, without attention
        self._libraries: list[torch.library.Library] = []

    def install(self, made_of: str = "values") -> torch.device:
        """Registers the device with PyTorch for the rest of this process and returns it. Made of "shapes", its only values are 0 and True.

        The norm keeps as much for backward as CUDA's kernel, as does attention without a mask on a device made of shapes.
        """
        self.made_of = torch.device(DEVICE_TYPES[made_of])
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        torch.__future__.set_swap_module_params_on_conversion(True)  # converting a module replaces its parameters, not their contents
        operators, everything = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
        everything.fallback(lambda operator, *args, **kwargs: self.carried_out(operator, args, kwargs), "PrivateUse1")
        operators.impl("_copy_from", _copy_from, "PrivateUse1")
        for name in SIZED_LATER:
            operators.impl(name, self._factory(name), "PrivateUse1")
        for name in KERNELS:
            operators.impl(name, self._kernel(name), "PrivateUse1")
        self._libraries = [operators, everything]  # they unregister their functions when they are deleted
        functional.rms_norm = _fused_norm  # type: ignore[assignment]
        if made_of == "shapes":
            functional.scaled_dot_product_attention = _fused_attention  # type: ignore[assignment]
        return torch.device(NAME, 0)

    def _factory(self, name: str) -> Any:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(aten, packet), overload or "default")
        return lambda *args, **kwargs: SecondDeviceTensor(operator(*args, **kwargs | {"device": self.made_of}))

    def _kernel(self, name: str) -> Any:
        operator = getattr(aten, name).default
        return lambda *args, **kwargs: self.carried_out(operator, args, kwargs)

    def carried_out(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """Executes an operator on the tensors underneath, and wraps results that stay on the device."""
        self.calls[operator] += 1
        given, shape = pytree.tree_flatten((args, kwargs))
        known = {id(value.raw if isinstance(value, SecondDeviceTensor) else value): value for value in given if isinstance(value, Tensor)}
        indices = {id(index) for index in args[1] if index is not None} if operator in INDEXING else ()
        stays = all(device.type == NAME for device in given if isinstance(device, torch.device))
        own = bool(args) and isinstance(args[0], SecondDeviceTensor)
        numbers_may_come = own and torch.Tag.pointwise in operator.tags
        self.waits += operator in WAITING or (operator in CROSSING and own != stays)
        if self.made_of != CPU and (stand_in := _stand_in_value(operator, args, kwargs, stays)) is not None:
            return stand_in

        def underneath(value: Any) -> Any:
            if isinstance(value, SecondDeviceTensor):
                return value.raw
            if (
                isinstance(value, Tensor)
                and operator not in CROSSING
                and id(value) not in indices
                and (value.dim() or not numbers_may_come)
            ):
                raise RuntimeError(f"{operator}: a tensor {list(value.shape)} of the CPU beside the second device.")
            if isinstance(value, torch.Generator) and stays:
                raise RuntimeError(f"{operator}: a generator of the CPU for the second device.")
            return (self.made_of if stays else CPU) if isinstance(value, torch.device) else value

        def back(value: Tensor) -> Tensor:
            return known.get(id(value), SecondDeviceTensor(value) if stays else value)

        arguments, options = pytree.tree_unflatten([underneath(value) for value in given], shape)
        made = operator(*arguments, **options)
        if operator._overloadpacket in flop_registry:
            self.flops += flop_registry[operator._overloadpacket](*arguments, **options, out_val=made)
        for value in given:
            if isinstance(value, SecondDeviceTensor) and (value.shape, value.stride()) != (value.raw.shape, value.raw.stride()):
                raise NotImplementedError(f"{operator} changes the shape of a tensor in place; add it to SIZED_LATER.")
        return pytree.tree_map_only(Tensor, back, made)


DEVICE = SecondDevice()


class SecondDeviceTensor(Tensor):
    """A tensor of the device; `raw` is the tensor underneath."""

    raw: Tensor
    held: Held

    @staticmethod
    def __new__(cls, raw: Tensor) -> "SecondDeviceTensor":
        made = Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=torch.device(NAME, 0)
        )
        made.raw = raw
        made.held = DEVICE.memory.hold(raw.untyped_storage())
        return made

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return DEVICE.carried_out(operator, args, kwargs or {})

    def tolist(self) -> Any:
        DEVICE.waits += 1
        return self.raw.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"{NAME}({self.raw!r})"


def _stand_in_value(operator: Any, args: Any, kwargs: Any, stays: bool) -> Any:
    """Returns the stand-in for values that move from the device to the CPU, None for an operator that moves none."""
    if operator is aten._local_scalar_dense.default:
        return True if args[0].dtype is torch.bool else 0
    if operator is aten._to_copy.default and not stays and isinstance(args[0], SecondDeviceTensor):
        return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
    return None


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    to, what = (tensor.raw if isinstance(tensor, SecondDeviceTensor) else tensor for tensor in (target, source))
    to.copy_(what)
    return target


class _FusedAttention(torch.autograd.Function):
    """Keeps queries, keys, values, result, and one number per row."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        result, per_row = torch.empty_like(queries), queries.new_empty(queries.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(queries, keys, values, result, per_row)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])


def _fused_attention(queries: Tensor, keys: Tensor, values: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    if attn_mask is not None:
        raise NotImplementedError("Attention with a mask, on a device made of shapes.")
    return _FusedAttention.apply(queries, keys, values)  # type: ignore[no-any-return]


class _FusedNorm(torch.autograd.Function):
    """Keeps only its input (CUDA's kernel also keeps one number per row)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Any) -> Tensor:
        ctx.others = others
        ctx.save_for_backward(x)
        return _norm(x, *others)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            return *torch.autograd.grad(_norm(x, *ctx.others), x, gradient), None, None, None


def _fused_norm(x: Tensor, *others: Any) -> Tensor:
    return _FusedNorm.apply(x, *others) if x.device.type == NAME else _norm(x, *others)  # type: ignore[no-any-return]


class _Module(_DummyBackendModule):
    """The module that PyTorch requires of a device for activation checkpointing and for restoring random states."""

    _initialized = False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


def choose(device: torch.device) -> None:
    """Makes `device` the device of every model of fedsim in this process, whatever `model.device` says."""
    import fedsim
    from fedsim import models

    chosen_by_option = models.device
    for module in pkgutil.walk_packages(fedsim.__path__, "fedsim."):
        if not module.name.endswith("__main__"):
            names = vars(importlib.import_module(module.name))
            names |= {name: lambda config: device for name, value in names.items() if value is chosen_by_option}


def _command(limit: int, arguments: list[str]) -> int:
    from fedsim.cli.main import main

    choose(DEVICE.install())
    DEVICE.memory.limit = limit
    status = main(arguments)
    print(json.dumps({"peak_bytes": DEVICE.memory.peak, "times_full": DEVICE.memory.times_full}))
    return status


if __name__ == "__main__":
    from experiments.benchmarks import second_device  # the module itself: __main__ is a second copy with a device of its own

    sys.exit(second_device._command(int(sys.argv[1]), sys.argv[2:]))
