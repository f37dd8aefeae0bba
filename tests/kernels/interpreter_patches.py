"""Triton's interpreter without a third of its work.

It swaps the functions of `triton.language` for its own when a kernel is launched, which lasts until
the launch ends, and again at each call of a function that the kernel calls, where nothing is left
to swap. Looking for it took a third of the time of the tests that interpret kernels.
"""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import triton.language as tl
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

    def __call__(self, function: Any) -> Scope:
        modules = self._modules_of(function)
        if self._launched is not None and modules <= self._swapped:
            return self  # what a call within a launch gets is not restored
        scope = self._patch(function)
        self._swapped |= modules
        if self._launched is None:
            self._launched = scope
        return self

    def restore(self) -> None:
        """Called by Triton when the launch is over."""
        launched, self._launched = self._launched, None
        self._swapped.clear()
        if launched is not None:
            launched.restore()

    def _modules_of(self, function: Any) -> frozenset[str]:
        seen = function.__globals__
        if id(seen) not in self._modules:
            self._modules[id(seen)] = frozenset(
                module.__name__
                for module in seen.values()
                if inspect.ismodule(module) and module in (tl, tl.core)
            )
        return self._modules[id(seen)]


def install() -> None:
    """For the process; where Triton has no such function, nothing is changed."""
    patch = getattr(interpreter, "_patch_lang", None)
    if patch is not None and not isinstance(patch, SwapOnce):
        interpreter._patch_lang = SwapOnce(patch)
