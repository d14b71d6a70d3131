"""A second device made of the CPU's memory: what must also run on a GPU, run on a machine without one.

As on a GPU, no operator takes a tensor of it beside one of the CPU (a number, and an index, may be the CPU's), nothing of it is drawn with
a generator of the CPU, and its memory ends: more than `limit` bytes raise OutOfMemoryError. Unlike a GPU it computes what the CPU does.

    python tests/second_device.py <bytes of memory, 0 without limit> run method=fedit ...    a command of fedsim on it
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
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "second"
CPU = torch.device("cpu")
CROSSING = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}
SIZED_LATER = ("arange", "arange.start", "arange.start_step", "eye", "eye.m")
"""Factories whose results PyTorch makes empty and enlarges afterwards, which a wrapper cannot follow."""


class Memory:
    """The device's memory: what lives in it, and the most that ever did, in bytes."""

    def __init__(self) -> None:
        self.limit, self.held, self.peak, self.times_full = 0, 0, 0, 0
        self.users: Counter[int] = Counter()  # of each storage, by its address

    def hold(self, storage: torch.UntypedStorage) -> "Held":
        """Counts a storage as long as what is returned, or another that was returned for it, lives: views share one."""
        if storage.data_ptr() not in self.users:
            if self.limit and self.held + storage.nbytes() > self.limit:
                self.times_full += 1
                raise torch.OutOfMemoryError(f"The second device has {self.limit} bytes, and holds {self.held} already.")
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
        self.users[storage.data_ptr()] += 1
        return Held(self, storage)


@dataclass
class Held:
    """One of the tensors that use a storage."""

    memory: Memory
    storage: torch.UntypedStorage

    def __del__(self) -> None:
        users, address = self.memory.users, self.storage.data_ptr()
        users[address] -= 1
        if not users[address]:
            del users[address]
            self.memory.held -= self.storage.nbytes()


MEMORY = Memory()
CALLS: Counter[Any] = Counter()
"""How often each operator was called."""


class SecondDeviceTensor(Tensor):
    """A tensor of the device, whose values are those of `raw` on the CPU."""

    raw: Tensor
    held: Held

    @staticmethod
    def __new__(cls, raw: Tensor) -> "SecondDeviceTensor":
        made = Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=torch.device(NAME, 0)
        )
        made.raw = raw
        made.held = MEMORY.hold(raw.untyped_storage())
        return made

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _carried_out(operator, args, kwargs or {})

    def tolist(self) -> Any:
        return self.raw.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"{NAME}({self.raw!r})"


def _carried_out(operator: Any, args: Any, kwargs: Any) -> Any:
    CALLS[operator] += 1
    given, shape = pytree.tree_flatten((args, kwargs))
    known = {id(value.raw if isinstance(value, SecondDeviceTensor) else value): value for value in given if isinstance(value, Tensor)}
    indices = {id(index) for index in args[1] if index is not None} if operator in INDEXING else ()
    stays = all(device.type == NAME for device in given if isinstance(device, torch.device))

    def on_cpu(value: Any) -> Any:
        if isinstance(value, SecondDeviceTensor):
            return value.raw
        if isinstance(value, Tensor) and value.dim() and operator not in CROSSING and id(value) not in indices:
            raise RuntimeError(f"{operator}: a tensor {list(value.shape)} of the CPU beside the second device.")
        if isinstance(value, torch.Generator) and stays:
            raise RuntimeError(f"{operator}: a generator of the CPU for the second device.")
        return CPU if isinstance(value, torch.device) else value

    def back(value: Tensor) -> Tensor:
        return known.get(id(value), SecondDeviceTensor(value) if stays else value)

    arguments, options = pytree.tree_unflatten([on_cpu(value) for value in given], shape)
    made = operator(*arguments, **options)
    for value in given:
        if isinstance(value, SecondDeviceTensor) and (value.shape, value.stride()) != (value.raw.shape, value.raw.stride()):
            raise NotImplementedError(f"{operator} changes the shape of a tensor in place; add it to SIZED_LATER.")
    return pytree.tree_map_only(Tensor, back, made)


class _Module(_DummyBackendModule):  # type: ignore[misc]
    """What PyTorch asks of a device: for activation checkpointing, and to leave its random numbers as they were."""

    _initialized = False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


def install() -> list[Any]:
    """Makes the device known to PyTorch, in this process for good. What is returned has to be kept as long as it is used."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    torch.__future__.set_swap_module_params_on_conversion(True)  # a module's parameters become others, not others' contents
    operators, everything = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        raw = [tensor.raw if isinstance(tensor, SecondDeviceTensor) else tensor for tensor in (source, target)]
        raw[1].copy_(raw[0])
        return target

    def factory(name: str) -> Any:
        packet, _, overload = name.partition(".")
        operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
        return lambda *args, **kwargs: SecondDeviceTensor(operator(*args, **kwargs | {"device": CPU}))

    everything.fallback(lambda operator, *args, **kwargs: _carried_out(operator, args, kwargs), "PrivateUse1")
    operators.impl("_copy_from", copy_from, "PrivateUse1")
    for name in SIZED_LATER:
        operators.impl(name, factory(name), "PrivateUse1")
    return [operators, everything]


def choose() -> None:
    """Makes it the device of every model of fedsim, whatever `model.device` says."""
    import fedsim
    from fedsim.models import device

    for module in pkgutil.walk_packages(fedsim.__path__, "fedsim."):
        if not module.name.endswith("__main__"):
            names = vars(importlib.import_module(module.name))
            names |= {name: lambda config: torch.device(NAME, 0) for name, value in names.items() if value is device}


def _command(limit: int, arguments: list[str]) -> int:
    from fedsim.cli.main import main

    choose()
    MEMORY.limit = limit
    status = main(arguments)
    print(json.dumps({"peak_bytes": MEMORY.peak, "times_full": MEMORY.times_full}))
    return status


if __name__ == "__main__":
    kept = install()
    sys.exit(_command(int(sys.argv[1]), sys.argv[2:]))
