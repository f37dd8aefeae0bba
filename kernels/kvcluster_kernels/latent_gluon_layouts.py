"""Where the registers of four warps hold what the latent decode kernel for Hopper multiplies.

As in `packed_gluon_layouts.py`, which place of a product a channel or token stands at is free, so
that a lane reads what lies together and nothing moves between lanes.

Of the C bytes of a piece of a token's codes, place 16 j + 8 h + 2 t + i of a product is byte
(C / 4) t + 4 j + 2 h + i. Of P tokens that stand in one field of the bytes of a row of values,
place 16 j + 4 t + b is token (P / 4) t + 4 j + b.

Shape letters: S tokens of a block, W words of four codes, P tokens of a part, D channels, M query
rows, E pairs of channels.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

Layout = gl.DistributedLinearLayout


@gluon.constexpr_function
def _powers(first, limit):
    """first, 2 first, ... below the limit."""
    found = []
    while first < limit:
        found.append(first)
        first *= 2
    return found


@gluon.constexpr_function
def codes_tile(words):
    """Of [S, W]: tokens are rows of the first operand, 64 of them."""
    lanes = [[0, words // 4], [0, words // 2], [1, 0], [2, 0], [4, 0]]
    own = [[0, x] for x in _powers(1, words // 4)]
    return Layout([*own, [8, 0]], lanes, [[16, 0], [32, 0]], [], [64, words])


@gluon.constexpr_function
def scale_line(words):
    """Of two words of scales for each word of codes."""
    lanes = [[words // 2], [words], [0], [0], [0]]
    own = [[x] for x in _powers(1, words // 2)]
    return Layout(own, lanes, [[0], [0]], [], [2 * words])


@gluon.constexpr_function
def expanded(width):
    """Of the sums that latents are expanded to."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])


@gluon.constexpr_function
def latents(width):
    """Of the first matrix of their product."""
    return gl.DotOperandLayout(0, expanded(width), 2)


@gluon.constexpr_function
def sums():
    """Of what products of few columns add to."""
    return gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8])


@gluon.constexpr_function
def operand(index, count):
    """Of the first (0) or the second (1) matrix of such a product, `count` neighbours of a lane."""
    return gl.DotOperandLayout(index, sums(), count)


@gluon.constexpr_function
def weighed(rows, parts):
    """Of the weights [S, M] of 64 tokens, which every warp has all of."""
    part = 64 // parts
    own = [[x, 0] for x in [1, 2, *_powers(4, part // 4), *_powers(part, 64)]]
    columns = [[0, x] for x in _powers(8, rows)]
    lanes = [[part // 4, 0], [part // 2, 0], [0, 1], [0, 2], [0, 4]]
    return Layout([*own, *columns], lanes, [[0, 0], [0, 0]], [], [64, rows])


@gluon.constexpr_function
def value_tile(channels, size):
    """Of bytes [D, C]: channels are rows of the first operand."""
    words = [[0, x] for x in _powers(4, size // 4)]
    tiles = [[x, 0] for x in _powers(64, channels)]
    lanes = [[0, size // 4], [0, size // 2], [1, 0], [2, 0], [4, 0]]
    own = [[0, 1], [0, 2], [8, 0], *words, *tiles]
    return Layout(own, lanes, [[16, 0], [32, 0]], [], [channels, size])


@gluon.constexpr_function
def line(size):
    """Of one number for each of P tokens."""
    lanes = [[size // 4], [size // 2], [0], [0], [0]]
    return Layout([[x] for x in _powers(1, size // 4)], lanes, [[0], [0]], [], [size])


@gluon.constexpr_function
def turned(pairs):
    """Of queries [M, E], which all threads share out to turn."""
    lanes = pairs // 2
    return gl.BlockedLayout([1, 2], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.constexpr_function
def copied(count, size):
    """Of the addresses of `count` numbers of `size` bytes each: 16 bytes of a lane."""
    return gl.BlockedLayout([min(16 // size, max(count // 128, 4 // size))], [32], [4], [0])


@gluon.jit
def latents_first(n0, n1, n2, n3, WIDTH: gl.constexpr):
    """Numbers of the four bytes of each word, [S, W] each, as the first operand [S, 4 W]."""
    S: gl.constexpr = n0.shape[0]
    W: gl.constexpr = n0.shape[1]
    x = gl.join(gl.join(n0, n1), gl.join(n2, n3))
    x = x.reshape([S, 4, W // 4, 2, 2]).permute([0, 2, 4, 1, 3]).reshape([S, 4 * W])
    return gl.convert_layout(x, latents(WIDTH), assert_trivial=True)


@gluon.jit
def byte_of_place(place, C: gl.constexpr):
    """Which byte of a piece stands at a place of the first operand."""
    return place // 2 % 4 * (C // 4) + place // 16 * 4 + place // 8 % 2 * 2 + place % 2


@gluon.jit
def values_first(x_DC):
    """The first operand that `value_tile` was loaded for, [channels, places of bytes]."""
    D: gl.constexpr = x_DC.shape[0]
    C: gl.constexpr = x_DC.shape[1]
    x = x_DC.reshape([D, 4, C // 16, 4]).permute([0, 2, 1, 3]).reshape([D, C])
    return gl.convert_layout(x, operand(0, 4), assert_trivial=True)


@gluon.jit
def weights_second(x_PM):
    """Weights of a part, as the second operand of a product with values."""
    P: gl.constexpr = x_PM.shape[0]
    M: gl.constexpr = x_PM.shape[1]
    x = x_PM.reshape([4, P // 16, 4, M]).permute([1, 0, 2, 3]).reshape([P, M])
    return gl.convert_layout(x, operand(1, 4), assert_trivial=True)


@gluon.jit
def in_places(x_P):
    """A `line` as a row of the first operand of a product with weights."""
    P: gl.constexpr = x_P.shape[0]
    x = x_P.reshape([4, P // 16, 4]).permute([1, 0, 2]).reshape([P])
    return gl.convert_layout(x, gl.SliceLayout(0, operand(0, 4)), assert_trivial=True)
