"""What the interpreter computes is the same with less of its work."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import core
from triton.runtime import interpreter

from tests.kernels import interpreter_patches
from tests.kernels.interpreter_patches import QUICK, SwapOnce

ROWS, COLUMNS = 4, 8


@triton.jit
def _halved(x):
    return x // 2


@triton.jit
def _kernel(x_ptr, half_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Broadcasts of every kind, an integer that wraps, types that meet, reductions and a matrix."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    places = rows[:, None] * COLUMNS + columns
    x = tl.load(x_ptr + places, mask=(columns > 0)[None, :], other=1.5)
    half = tl.load(half_ptr + places).to(tl.bfloat16)
    wrapped = (columns + 2147483647) * 3 - rows[:, None]
    byte = (columns * 50).to(tl.uint8) + columns.to(tl.int8)
    shape: tl.constexpr = x.shape
    total = tl.sum(x, axis=1) * shape[1] + x.numel
    product = tl.dot(x, tl.trans(half.to(tl.float32)))
    found = tl.where(x > half, x, half) + total[:, None] + wrapped.to(tl.float32)
    found += byte.to(tl.float32) + tl.max(product, axis=0)[:, None] - _halved(tl.program_id(0) + 7)
    tl.store(out_ptr + places, found)


@triton.jit
def _shaped_by(out_ptr, SIZE: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, 4), tl.sum(tl.full([4, SIZE], 1.0, tl.float32), axis=1))


@contextmanager
def as_triton_has_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(interpreter_patches, "QUICK", [])
        yield


def computed() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, COLUMNS, generator=generator)
    half = torch.randn(ROWS, COLUMNS, generator=generator).half()
    out = torch.full((ROWS, COLUMNS), float("nan"))
    _kernel[(2,)](x, half, out, ROWS=ROWS, COLUMNS=COLUMNS)
    return out


@pytest.mark.usefixtures("interpreted")
def test_kernels_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = computed()
    with as_triton_has_it(monkeypatch):
        slow = computed()

    assert not quick.isnan().any()
    assert torch.equal(quick, slow)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("size", [0, 3, 2**20])
def test_shapes_that_no_block_can_have_are_refused_alike(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal() -> str:
        with pytest.raises(Exception, match=r"must be a power of 2|exceeds") as refused:
            _shaped_by[(1,)](torch.zeros(4), SIZE=size)
        return str(refused.value)

    quick = refusal()
    with as_triton_has_it(monkeypatch):
        assert refusal() == quick


@pytest.mark.usefixtures("interpreted")
def test_after_a_launch_all_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [getattr(owner, name) for owner, name, _ in QUICK]

    computed()
    with pytest.raises(interpreter.InterpreterError):
        _shaped_by[(1,)](torch.zeros(4), SIZE=3)

    assert all(
        getattr(owner, name) is original
        for (owner, name, _), original in zip(QUICK, before, strict=True)
    )


def _kinds() -> list[Any]:
    scalars = [kind for kind in vars(tl).values() if type(kind) is core.dtype]
    scalars = [kind for kind in scalars if kind.name != "void"]
    pointers = [core.pointer_type(kind) for kind in scalars]
    return [*scalars, *pointers, *(core.block_type(kind, [4, 2]) for kind in scalars + pointers)]


@pytest.mark.parametrize("kind", _kinds(), ids=str)
def test_numbers_of_every_type_are_stored_as_triton_stores_them(kind: Any) -> None:
    assert interpreter_patches.get_np_dtype(kind) == interpreter._get_np_dtype(kind)


@pytest.mark.parametrize("kind", _kinds(), ids=str)
def test_blocks_of_every_type_have_the_same_shape_and_name(kind: Any) -> None:
    quick, slow = (object.__new__(core.block_type) for _ in range(2))
    shape = [core.constexpr(2), 8]

    interpreter_patches.init_block_type(quick, kind.scalar, shape)
    core.block_type.__init__(slow, kind.scalar, shape)

    assert quick == slow
    assert (quick.name, quick.numel, len(quick.shape)) == (slow.name, slow.numel, len(slow.shape))
    assert list(quick.shape) == list(slow.shape)
    of_quick, of_slow = (object.__new__(core.tensor) for _ in range(2))
    interpreter_patches.init_tensor(of_quick, "handle", quick)
    core.tensor.__init__(of_slow, "handle", slow)
    assert vars(of_quick).keys() == vars(of_slow).keys()
    assert (of_quick.numel.value, str(of_quick)) == (of_slow.numel.value, str(of_slow))


@pytest.mark.parametrize(
    "value",
    [3, 2.5, True, None, "a", [core.constexpr(1), 2], (core.constexpr(1),), core.constexpr("b")],
    ids=repr,
)
def test_what_is_wrapped_is_unwrapped_alike(value: Any) -> None:
    slow = core._unwrap_if_constexpr(value)

    assert interpreter_patches.unwrap_if_constexpr(value) == slow
    assert type(interpreter_patches.unwrap_if_constexpr(value)) is type(slow)


@pytest.mark.parametrize("other", [[4, 2], [4, 1], [4], [core.constexpr(4), core.constexpr(2)]])
def test_tuples_are_equal_to_the_same_lists(other: list[Any]) -> None:
    sizes = core.tuple([4, 2])

    assert bool(interpreter_patches.tuples_are_equal(sizes, other)) == bool(sizes == other)


@pytest.mark.parametrize("index", [0, -1, core.constexpr(1)])
def test_an_item_of_a_tuple_is_the_same(index: Any) -> None:
    sizes = core.tuple([4, 2])

    assert interpreter_patches.item_of_tuple(sizes, index) == sizes[index]


def test_it_is_installed_once() -> None:
    interpreter_patches.install()
    patch = interpreter._patch_lang

    interpreter_patches.install()

    assert interpreter._patch_lang is patch
    assert isinstance(patch, SwapOnce)
