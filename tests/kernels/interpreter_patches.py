"""Triton's interpreter without more than half of its work.

Left out is what changes no result (`test_interpreter_patches.py` compares), while a kernel runs:

- Swapping the functions of `triton.language` for the interpreter's own at each call of a function
  that the kernel calls. They are swapped when it is launched, until the launch ends.
- Computing each sum, difference and product of integers again in 64 bits, to find an overflow that
  nothing is told of unless Triton debugs. Its compilers leave this out for the same reason.
- Making a table of all types for each number of which the type is asked, and the same shapes for
  each number that has one.
"""

import builtins
import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import triton.language as tl
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


class Scope(Protocol):
    """What was swapped."""

    def restore(self) -> None: ...


class SwapOnce:
    """Triton's `_patch_lang`, once for each launch and set of modules that a function sees.

    As Triton's own, for one launch at a time. Mutable.
    """

    def __init__(self, patch: Callable[[Any], Scope]) -> None:
        self._patch = patch
        self._modules: dict[int, frozenset[str]] = {}
        self._swapped: set[str] = set()
        self._launched: Scope | None = None
        self._replaced: list[tuple[Any, str, Any]] = []

    def __call__(self, function: Any) -> Scope:
        modules = self._modules_of(function)
        if self._launched is not None and modules <= self._swapped:
            return self  # what a call within a launch gets is not restored
        scope = self._patch(function)
        self._swapped |= modules
        if self._launched is None:
            self._launched = scope
            self._replace()
        return self

    def restore(self) -> None:
        """Called by Triton when the launch is over."""
        launched, self._launched = self._launched, None
        self._swapped.clear()
        while self._replaced:
            setattr(*self._replaced.pop())
        if launched is not None:
            launched.restore()

    def _replace(self) -> None:
        for owner, name, quick in QUICK:
            self._replaced.append((owner, name, getattr(owner, name)))
            setattr(owner, name, quick)

    def _modules_of(self, function: Any) -> frozenset[str]:
        seen = function.__globals__
        if id(seen) not in self._modules:
            self._modules[id(seen)] = frozenset(
                module.__name__
                for module in seen.values()
                if inspect.ismodule(module) and module in (tl, tl.core)
            )
        return self._modules[id(seen)]


class Shape(NamedTuple):
    """What Triton makes of a block's shape."""

    sizes: Any
    """Of the type: tl.tuple of int."""
    text: str
    numel: int
    tensor_sizes: Any
    """Of the tensor: tl.tuple of constexpr."""
    tensor_numel: Any


@functools.cache
def shape_of(sizes: tuple[int, ...]) -> Shape:
    """Raises: what Triton raises for sizes that a block cannot have."""
    numel = core.validate_block_shape(sizes)
    of_type = core.tuple(sizes)
    of_tensor = core.tuple([core.constexpr(size) for size in sizes])
    return Shape(of_type, str(of_type), numel, of_tensor, core.constexpr(numel))


_SCALAR = core.tuple([]), core.constexpr(1)


def init_block_type(self: Any, element_ty: Any, shape: Sequence[Any]) -> None:
    if isinstance(shape, core.tuple):
        shape = shape.values
    made = shape_of(builtins.tuple([unwrap_if_constexpr(size) for size in shape]))
    if not made.sizes.values:
        raise TypeError("0d block_type is forbidden")
    self.element_ty = element_ty
    self.shape = made.sizes
    self.numel = made.numel
    self.name = f"<{made.text}, {element_ty}>"


def init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle = handle
    self.type = type
    self.dtype = type.scalar
    if type.is_block():
        made = shape_of(builtins.tuple(type.shape.values))
        self.shape, self.numel = made.tensor_sizes, made.tensor_numel
    else:
        self.shape, self.numel = _SCALAR


def item_of_tuple(self: Any, index: Any) -> Any:
    return self.values[index] if type(index) is int else _slow_item_of_tuple(self, index)


def tuples_are_equal(self: Any, other: Any) -> Any:
    if type(other) is list:
        return core.constexpr(self.values == [unwrap_if_constexpr(value) for value in other])
    return _slow_tuples_are_equal(self, other)


def unwrap_if_constexpr(value: Any) -> Any:
    kind = type(value)
    if kind is core.constexpr:
        return value.value
    return value if kind in _NEVER_WRAPPED else _slow_unwrap_if_constexpr(value)


def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
    left, right = lhs.type, rhs.type
    if left.is_block():
        is_alike = right.is_block() and left.shape.values == right.shape.values
    else:
        is_alike = not right.is_block()
    return (lhs, rhs) if is_alike else _slow_broadcast(self, lhs, rhs)


def get_np_dtype(of: Any) -> np.dtype[Any]:
    if isinstance(of, core.block_type):
        of = of.element_ty
    return _POINTER if isinstance(of, core.pointer_type) else _NUMPY[of.name]


_NEVER_WRAPPED = {core.tensor, core.dtype, int, float, bool, str, type(None)}
_POINTER = np.dtype(np.uint64)
_NUMPY = {
    kind.name: interpreter._get_np_dtype(kind)
    for kind in vars(tl).values()
    if type(kind) is core.dtype and kind.name != "void"
}
_slow_item_of_tuple = core.tuple.__getitem__
_slow_tuples_are_equal = core.tuple.__eq__
_slow_unwrap_if_constexpr = core._unwrap_if_constexpr
_slow_broadcast = TritonSemantic.broadcast_impl_value

QUICK: list[tuple[Any, str, Any]] = [
    (core.block_type, "__init__", init_block_type),
    (core.tensor, "__init__", init_tensor),
    (core.tuple, "__getitem__", item_of_tuple),
    (core.tuple, "__eq__", tuples_are_equal),
    (core, "_unwrap_if_constexpr", unwrap_if_constexpr),
    (TritonSemantic, "broadcast_impl_value", broadcast),
    (interpreter, "_get_np_dtype", get_np_dtype),
    (
        interpreter.interpreter_builder,
        "options",
        dataclasses.replace(
            interpreter.interpreter_builder.options,
            sanitize_overflow=interpreter.interpreter_builder.options.debug,
        ),
    ),
]
"""What has another definition while a kernel runs: whose, its name, and ours. All are for what
their names say of Triton; the cases that are rare are left to it."""


def install() -> None:
    """For the process; where Triton has no such function, nothing is changed."""
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is not None and not isinstance(patch, SwapOnce):
        interpreter._patch_lang = SwapOnce(patch)
