"""Runs Gluon kernels with NumPy: what they compute, without what makes them fast.

Triton interprets kernels of its own language, not of Gluon. Here the modules of such a kernel are
read again with other names for `triton`, `gluon` and their languages: tensors are arrays, shared
memory is memory, copies are made at once, and layouts are nothing, because a conversion that the
compiler accepts changes no number. Inline assembly is run instruction by instruction; the registers
of an element are its neighbours on the last axis, and `movmatrix` turns tiles of 8 by 8.
"""

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.kernels.gluon_assembly import run

_PACKED = ("codes", "softmax", "levels", "paging", "packed_gluon_layouts", "packed_gluon_codes")
PACKED_MODULES = (*_PACKED, "packed_gluon_copies", "packed_gluon_tiles", "packed_gluon")
LATENT_MODULES = (*_PACKED, "latent_turns", "latent_gluon_layouts", "latent_gluon_tiles",
                  "latent_gluon_values", "latent_gluon")  # fmt: skip
"""Of a kernel, each after those that it imports."""
_TYPES = ("uint8", "int8", "uint16", "uint32", "int32", "int64", "float16", "float32")


@dataclass(frozen=True)
class Dtype:
    """A type of numbers; NumPy takes it for its own."""

    dtype: np.dtype[Any]

    @classmethod
    def named(cls, name: str) -> "Dtype":
        return cls(np.dtype(name))

    @property
    def primitive_bitwidth(self) -> int:
        return 8 * self.dtype.itemsize


class Tensor:
    """An array with the methods of a tensor of a kernel."""

    def __init__(self, numbers: Any) -> None:
        self.numbers = np.asarray(numbers)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    @property
    def dtype(self) -> Dtype:
        return Dtype(self.numbers.dtype)

    def to(self, dtype: Dtype, *, bitcast: bool = False) -> "Tensor":
        return Tensor(
            self.numbers.view(dtype.dtype) if bitcast else self.numbers.astype(dtype.dtype)
        )

    def reshape(self, shape: Sequence[int]) -> "Tensor":
        return Tensor(self.numbers.reshape(shape))

    def permute(self, order: Sequence[int]) -> "Tensor":
        return Tensor(self.numbers.transpose(order))

    def broadcast_to(self, shape: Sequence[int]) -> "Tensor":
        return Tensor(np.broadcast_to(self.numbers, shape))

    def __getitem__(self, key: Any) -> "Tensor":
        return Tensor(self.numbers[key])

    def __bool__(self) -> bool:
        return bool(self.numbers)

    def __index__(self) -> int:
        return int(self.numbers)

    def __float__(self) -> float:
        return float(self.numbers)


def _operator(name: str) -> Callable[[Tensor, Any], Any]:
    def apply(self: Tensor, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        return Tensor(getattr(np.ndarray, name)(self.numbers, _plain(other)))

    return apply


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor", "rshift"):
    for _side in ("", "r"):
        setattr(Tensor, f"__{_side}{_name}__", _operator(f"__{_side}{_name}__"))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Tensor, f"__{_name}__", _operator(f"__{_name}__"))
Tensor.__neg__ = lambda self: Tensor(-self.numbers)  # type: ignore[attr-defined]


@dataclass
class Pointer:
    """Places in a flat array."""

    memory: np.ndarray[Any, Any]
    offset: Any = 0

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=Dtype(self.memory.dtype))

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, np.asarray(self.offset) + _plain(offset))

    def to(self, dtype: Dtype, *, bitcast: bool) -> "Pointer":
        """To numbers of another type at the same place."""
        assert bitcast
        size = dtype.dtype.itemsize
        count = self.memory.nbytes // size
        memory = self.memory.view(np.uint8)[: count * size].view(dtype.dtype)
        return Pointer(memory, np.asarray(self.offset) * self.memory.itemsize // size)

    @classmethod
    def at(cls, x: torch.Tensor | None) -> "Pointer | None":
        """The first element of a tensor, and all memory behind it."""
        if x is None:
            return None
        whole = x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(),  # type: ignore[call-overload]
                                    (x.untyped_storage().nbytes() // x.element_size()
                                     - x.storage_offset(),), (1,))  # fmt: skip
        if x.dtype == torch.bfloat16:
            return cls(whole.float().numpy())
        return cls(whole.numpy())


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, numbers: np.ndarray[Any, Any]) -> None:
        self.numbers = numbers

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    @property
    def dtype(self) -> Dtype:
        return Dtype(self.numbers.dtype)

    def index(self, place: Any) -> "Shared":
        return Shared(self.numbers[int(place)])

    def reshape(self, shape: Sequence[int]) -> "Shared":
        return Shared(self.numbers.reshape(shape))

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.numbers.transpose(order))

    def store(self, value: Tensor) -> None:
        self.numbers[...] = value.numbers

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        assert start + length <= self.shape[dim]
        return Shared(
            np.moveaxis(np.moveaxis(self.numbers, dim, 0)[start : start + length], 0, dim)
        )

    def load(self, layout: object) -> Tensor:
        del layout
        return Tensor(self.numbers.copy())


@dataclass
class _Linear:
    reg_bases: list[list[int]]
    lane_bases: list[list[int]]
    warp_bases: list[list[int]]
    block_bases: list[list[int]]
    shape: list[int]


def _plain(x: Any) -> Any:
    return x.numbers if isinstance(x, Tensor) else x


def _wrapped(function: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda *given: Tensor(function(*map(_plain, given)))


def _load(ptr: Pointer, *, mask: Any = True, other: Any = 0, cache_modifier: str = "") -> Tensor:
    places, mask = np.broadcast_arrays(np.asarray(ptr.offset), _plain(mask))
    found = np.full(places.shape, other, ptr.memory.dtype)
    found[mask] = ptr.memory[places[mask]]
    return Tensor(found)


def _store(ptr: Pointer, value: Any, *, mask: Any = True) -> None:
    places, mask, value = np.broadcast_arrays(np.asarray(ptr.offset), _plain(mask), _plain(value))
    ptr.memory[places[mask]] = value[mask]


def _copy(smem: Shared, ptr: Pointer, *, mask: Any = True) -> None:
    smem.numbers[...] = _load(ptr, mask=mask).numbers


def _allocated(dtype: Dtype, shape: Sequence[int], layout: object, value: Any = None) -> Shared:
    """Nothing that is there before counts as a number."""
    del layout
    if value is not None:
        return Shared(value.numbers.astype(dtype.dtype))
    size = dtype.dtype.itemsize
    return Shared(np.full(shape, 0xFF, np.uint8).repeat(size, -1).view(dtype.dtype))


def _mma(a: Tensor, b: Tensor, acc: Tensor) -> Tensor:
    assert a.numbers.dtype == b.numbers.dtype == np.float16
    with np.errstate(invalid="ignore"):
        return Tensor(acc.numbers + a.numbers.astype(np.float32) @ b.numbers.astype(np.float32))


def _warpgroup_mma(
    a: Tensor, b: Shared, acc: Tensor, *, use_acc: bool = True, is_async: bool
) -> Tensor:
    assert is_async
    start = acc if use_acc else Tensor(np.zeros_like(acc.numbers))
    return _mma(a, Tensor(b.numbers), start)


def _fused(a: Any, b: Any, c: Any) -> Any:
    """Float32, rounded once."""
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c))


def _inline_assembly(
    assembly: str, constraints: str, args: Sequence[Tensor], dtype: Any, is_pure: bool, pack: int
) -> Any:
    del constraints, is_pure
    if assembly.startswith("movmatrix"):
        rows, columns = args[0].shape
        tiles = args[0].numbers.reshape(rows // 8, 8, columns // 8, 8)
        return Tensor(tiles.transpose(0, 3, 2, 1).reshape(rows, columns))
    if "nanosleep" in assembly:
        return args[0]
    outputs = dtype if isinstance(dtype, tuple) else (dtype,)
    args = [Tensor(x) for x in np.broadcast_arrays(*(x.numbers for x in args))]
    shape = args[0].shape
    # A register of its own for each number of 16 bits that is not packed.
    each = max(1, pack * outputs[0].dtype.itemsize // 4)
    registers: dict[str, Any] = {}
    for x in args:
        numbers = np.ascontiguousarray(x.numbers)
        packed = numbers.dtype.kind == "f" or numbers.itemsize * pack == 4
        words = numbers.view("<u4") if packed else numbers.astype("<u4")
        for word in words.reshape(*shape[:-1], shape[-1] // pack, -1).transpose(
            -1, *range(len(shape))
        ):
            registers[f"${len(outputs) * each + len(registers)}"] = word.astype(np.uint64)
    run(assembly, registers)
    found = []
    for number in range(len(outputs)):
        words = np.stack([registers[f"${number * each + i}"] for i in range(each)], axis=-1)
        kind = "<u4" if pack * outputs[number].dtype.itemsize >= 4 else "<u2"
        found.append(Tensor(words.astype(kind).view(outputs[number].dtype).reshape(shape)))
    return tuple(found) if isinstance(dtype, tuple) else found[0]


@dataclass
class _Program:
    """Where a program is in its grid."""

    place: tuple[int, ...] = (0, 0, 0)
    grid: tuple[int, ...] = (1, 1, 1)


@dataclass
class _Language:
    """What kernels find under `gl` and `tl`."""

    program: _Program = field(default_factory=_Program)

    def names(self) -> ModuleType:
        language = ModuleType("gl")
        math_names = {
            "exp2": _wrapped(np.exp2),
            "log2": _wrapped(np.log2),
            "ceil": _wrapped(np.ceil),
            "abs": _wrapped(np.abs),
            "floor": _wrapped(np.floor),
            "fma": _wrapped(_fused),
        }
        names = {
            "constexpr": lambda x: x,
            "static_range": range,
            "range": range,
            **{name: Dtype.named(name) for name in _TYPES},
            "zeros": lambda shape, dtype, layout=None: Tensor(np.zeros(shape, dtype.dtype)),
            "full": lambda shape, x, dtype, layout=None: Tensor(np.full(shape, x, dtype.dtype)),
            "arange": lambda start, end, layout=None: Tensor(np.arange(start, end, dtype=np.int32)),
            "convert_layout": lambda x, layout, assert_trivial=False: x,
            "expand_dims": lambda x, axis: Tensor(np.expand_dims(x.numbers, axis)),
            "allocate_shared_memory": _allocated,
            "static_assert": lambda condition: None,
            "join": lambda a, b: Tensor(np.stack([a.numbers, b.numbers], -1)),
            "split": lambda x: (Tensor(x.numbers[..., 0]), Tensor(x.numbers[..., 1])),
            "sum": lambda x, axis: Tensor(x.numbers.sum(axis)),
            "min": lambda x, axis: Tensor(x.numbers.min(axis)),
            "load": _load,
            "store": _store,
            "max": lambda x, axis: Tensor(x.numbers.max(axis)),
            "maximum": _wrapped(np.maximum),
            "minimum": _wrapped(np.minimum),
            "where": _wrapped(np.where),
            "cdiv": lambda a, b: Tensor(-(-_plain(a) // b)),
            "inline_asm_elementwise": _inline_assembly,
            "program_id": lambda axis: Tensor(np.int32(self.program.place[axis])),
            "num_programs": lambda axis: Tensor(np.int32(self.program.grid[axis])),
            "math": SimpleNamespace(**math_names),
            "SliceLayout": lambda dim, parent: (dim, parent),
            "DistributedLinearLayout": _Linear,
            **dict.fromkeys(
                ("BlockedLayout", "SwizzledSharedLayout", "DotOperandLayout",
                 "NVMMADistributedLayout", "NVMMASharedLayout"),
                lambda *given: given,
            ),
            "tensor": Tensor, "tuple": tuple, "pointer_type": lambda dtype: dtype,
            **math_names,
        }  # fmt: skip
        for name, value in names.items():
            setattr(language, name, value)
        return language


def _module(name: str, **names: Any) -> ModuleType:
    module = ModuleType(name)
    for key, value in names.items():
        setattr(module, key, value)
    return module


@contextmanager
def _other_names(modules: dict[str, ModuleType]) -> Iterator[None]:
    saved = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in saved.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class Kernel:
    """The function of this name of the last of some modules, launched as a compiled kernel is."""

    def __init__(
        self,
        modules: Sequence[str] = PACKED_MODULES,
        function: str = "packed_kernel",
        num_warps: int = 1,
    ) -> None:
        self._num_warps = num_warps
        self._language = _Language()
        language = self._language.names()

        def as_it_is(function: Any = None, **_settings: object) -> Any:
            return as_it_is if function is None else function

        gluon = _module("gluon", jit=as_it_is, constexpr_function=as_it_is, language=language)
        copies = _module(
            "async_copy", async_copy_global_to_shared=_copy, commit_group=lambda: None,
            wait_group=lambda count: None,
        )  # fmt: skip
        triton = _module(
            "triton", jit=as_it_is, constexpr_function=as_it_is, language=language,
            cdiv=lambda a, b: -(-a // b),
            next_power_of_2=lambda n: 1 << math.ceil(math.log2(n)), JITFunction=type(None),
        )  # fmt: skip
        experimental = "triton.experimental"
        replaced = {
            "triton": triton,
            "triton.language": language,
            experimental: _module("experimental", gluon=gluon),
            f"{experimental}.gluon": gluon,
            f"{experimental}.gluon.language": language,
            f"{experimental}.gluon.language.nvidia": ModuleType("nvidia"),
            f"{experimental}.gluon.language.nvidia.ampere": _module(
                "ampere", async_copy=copies, mma_v2=_mma
            ),
            f"{experimental}.gluon.language.nvidia.hopper": _module(
                "hopper",
                warpgroup_mma=_warpgroup_mma,
                fence_async_shared=lambda: None,
                warpgroup_mma_wait=lambda count, deps: deps,
            ),
        }
        for name in modules:
            spec = importlib.util.find_spec(f"kvcluster_kernels.{name}")
            assert spec is not None
            assert spec.loader is not None
            replaced[f"kvcluster_kernels.{name}"] = importlib.util.module_from_spec(spec)
        with _other_names(replaced):
            for name in modules:
                module = replaced[f"kvcluster_kernels.{name}"]
                assert module.__spec__ is not None
                assert module.__spec__.loader is not None
                module.__spec__.loader.exec_module(module)
        self._function = getattr(replaced[f"kvcluster_kernels.{modules[-1]}"], function)

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        def launch(*given: Any, num_warps: int, launch_pdl: bool = False, **constants: Any) -> None:
            assert num_warps == self._num_warps
            assert not launch_pdl
            arguments = [
                Pointer.at(x) if isinstance(x, torch.Tensor)
                else Tensor(np.float32(x) if isinstance(x, float) else np.int32(x))
                for x in given
            ]  # fmt: skip
            self._language.program.grid = grid
            for z in range(grid[2]):
                for y in range(grid[1]):
                    for x in range(grid[0]):
                        self._language.program.place = (x, y, z)
                        self._function(*arguments, **constants)

        return launch
