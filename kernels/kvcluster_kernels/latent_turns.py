"""Pairs of channels turned by their angle, for kernels of either language.

Shape letters: those of `latent_pages.py`; M query rows of a KV head.
"""

import triton
import triton.language as tl

_INVERSE_TURN = tl.constexpr(0.15915494309189535)
_TURN_HIGH = tl.constexpr(6.2831854820251465)
"""2 pi as float32, and what is left of it."""
_TURN_LOW = tl.constexpr(-1.7484556000744883e-07)


@triton.jit
def cos_and_sin(angle: tl.tensor, IS_GPU: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Of float32 angles to 10^6 and more, to 2^-20: whole turns are taken off in two steps, and
    what is left is what the processor's own functions are right for."""
    turns = tl.math.floor(angle * _INVERSE_TURN + 0.5)
    left = tl.math.fma(turns, -_TURN_HIGH, angle)
    left = tl.math.fma(turns, -_TURN_LOW, left)
    if IS_GPU:
        cos = tl.inline_asm_elementwise(
            "cos.approx.f32 $0, $1;", "=f,f", [left], dtype=tl.float32, is_pure=True, pack=1
        )
        sin = tl.inline_asm_elementwise(
            "sin.approx.f32 $0, $1;", "=f,f", [left], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        cos = tl.math.cos(left)
        sin = tl.math.sin(left)
    return cos, sin


@triton.jit
def _turned(
    first: tl.tensor, second: tl.tensor, cos: tl.tensor, sin: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def turned_back(
    first: tl.tensor, second: tl.tensor, angle_E: tl.tensor, IS_GPU: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Pairs [E, M] turned by the negative of their angle, float16."""
    cos_E, sin_E = cos_and_sin(angle_E, IS_GPU)
    first, second = _turned(first, second, cos_E[:, None], -sin_E[:, None])
    return first.to(tl.float16), second.to(tl.float16)


@triton.jit
def rotated_keys(
    first_SE: tl.tensor,
    second_SE: tl.tensor,
    mean_first_E: tl.tensor,
    mean_second_E: tl.tensor,
    cos_SE: tl.tensor,
    sin_SE: tl.tensor,
    IS_GPU: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Pairs, with their mean, turned by their angle: float16, as all but the first two are. A
    register holds two of them, and one instruction works on both."""
    first_SE = first_SE.to(tl.float16)
    second_SE = second_SE.to(tl.float16)
    mean_first_E = mean_first_E[None, :]
    mean_second_E = mean_second_E[None, :]
    if IS_GPU:
        turned_first, turned_second = tl.inline_asm_elementwise(
            """
            { .reg .b32 x, y, t, u;
              add.f16x2 x, $2, $4;
              add.f16x2 y, $3, $5;
              mul.f16x2 t, y, $7;
              mul.f16x2 u, x, $7;
              neg.f16x2 t, t;
              fma.rn.f16x2 $0, x, $6, t;
              fma.rn.f16x2 $1, y, $6, u; }
            """,
            "=&r,=&r,r,r,r,r,r,r",
            [first_SE, second_SE, mean_first_E, mean_second_E, cos_SE, sin_SE],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        x_SE = (first_SE + mean_first_E).to(tl.float32)
        y_SE = (second_SE + mean_second_E).to(tl.float32)
        turned_first, turned_second = _turned(
            x_SE, y_SE, cos_SE.to(tl.float32), sin_SE.to(tl.float32)
        )
        turned_first = turned_first.to(tl.float16)
        turned_second = turned_second.to(tl.float16)
    return turned_first, turned_second
