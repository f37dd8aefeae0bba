"""Where the registers of a warp hold what the packed decode kernel for Hopper multiplies.

A matrix unit wants the numbers of an operand at fixed places. Which token or channel stands at
which place is free, as long as both operands agree. So a lane reads bytes that lie together, as
many as its quarter of a row has, and their order is that of the products: nothing moves between
lanes but the weights, which one instruction turns. Layouts here say what lies where; conversions
between them are of names alone, and refused by the compiler where they are not.

Of C bytes of a row, place 16 j + 4 t + b of a product is byte (C / 4) t + 4 j + b.
Of P tokens, row 16 s + 8 h + 2 t + i of their scores is token (P / 4) t + 4 s + 2 h + i.

Shape letters: P tokens of a part of a block, D channels, C bytes of a row of codes, N query rows.
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
def key_tile(tokens, size):
    """Of [P, C]: tokens are rows of the first operand."""
    words = [[0, x] for x in _powers(4, size // 4)]
    tiles = [[x, 0] for x in _powers(4, tokens // 4)]
    lanes = [[0, size // 4], [0, size // 2], [1, 0], [tokens // 4, 0], [tokens // 2, 0]]
    return Layout([[0, 1], [0, 2], [2, 0], *words, *tiles], lanes, [], [], [tokens, size])


@gluon.constexpr_function
def value_tile(channels, size):
    """Of [D, C]: channels are rows of the first operand."""
    words = [[0, x] for x in _powers(4, size // 4)]
    tiles = [[x, 0] for x in _powers(16, channels)]
    lanes = [[0, size // 4], [0, size // 2], [1, 0], [2, 0], [4, 0]]
    return Layout([[0, 1], [0, 2], [8, 0], *words, *tiles], lanes, [], [], [channels, size])


@gluon.constexpr_function
def folded_twice(tile):
    """Of [rows, 2, C / 2] for a tile of [rows, C]."""
    rows, size = tile.shape
    half = size // 2

    def bent(bases):
        return [[row, place // half, place % half] for row, place in bases]

    warps = bent(tile.warp_bases)
    return Layout(bent(tile.reg_bases), bent(tile.lane_bases), warps, [], [rows, 2, half])


@gluon.constexpr_function
def line(size):
    """Of one number for each of so many bytes of a row."""
    words = [[x] for x in _powers(1, size // 4)]
    return Layout(words, [[size // 4], [size // 2], [0], [0], [0]], [], [], [size])


@gluon.constexpr_function
def token_line(tokens):
    """Of one number for each token of a part, to be met by rows of scores."""
    tiles = [[x] for x in _powers(4, tokens // 4)]
    return Layout([[2], *tiles], [[0], [0], [1], [tokens // 4], [tokens // 2]], [], [], [tokens])


@gluon.constexpr_function
def copied(count, size):
    """Of the addresses of `count` numbers of `size` bytes each, 16 bytes of a lane where there are
    enough, and 4 at least."""
    return gl.BlockedLayout([min(16 // size, max(count // 32, 4 // size))], [32], [1], [0])


@gluon.constexpr_function
def sums():
    """Of what one warp adds products to."""
    return gl.NVMMADistributedLayout([2, 0], [1, 1], [16, 8])


@gluon.constexpr_function
def operand(index):
    """Of the first (0) or the second (1) matrix of a product."""
    return gl.DotOperandLayout(index, sums(), 4)


FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
"""Of shared memory: numbers one after another."""


@gluon.jit
def keys_first(x_PC):
    """The first operand that `key_tile` was loaded for, [places of tokens, places of bytes]."""
    P: gl.constexpr = x_PC.shape[0]
    C: gl.constexpr = x_PC.shape[1]
    x = x_PC.reshape([4, P // 16, 2, 2, 4, C // 16, 4]).permute([1, 2, 0, 3, 5, 4, 6])
    return gl.convert_layout(x.reshape([P, C]), operand(0), assert_trivial=True)


@gluon.jit
def values_first(x_DC):
    """The first operand that `value_tile` was loaded for, [channels, places of bytes]."""
    D: gl.constexpr = x_DC.shape[0]
    C: gl.constexpr = x_DC.shape[1]
    x = x_DC.reshape([D, 4, C // 16, 4]).permute([0, 2, 1, 3]).reshape([D, C])
    return gl.convert_layout(x, operand(0), assert_trivial=True)


@gluon.jit
def in_places(x_C, INDEX: gl.constexpr):
    """A `line` as the numbers of either operand's places: of all rows of the first, or of all
    columns of the second."""
    C: gl.constexpr = x_C.shape[0]
    x = x_C.reshape([4, C // 16, 4]).permute([1, 0, 2]).reshape([C])
    return gl.convert_layout(x, gl.SliceLayout(INDEX, operand(INDEX)), assert_trivial=True)


@gluon.jit
def in_rows(x_P):
    """A `token_line` as the numbers of the rows of scores."""
    P: gl.constexpr = x_P.shape[0]
    x = x_P.reshape([4, P // 16, 2, 2]).permute([1, 2, 0, 3]).reshape([P])
    return gl.convert_layout(x, gl.SliceLayout(1, sums()), assert_trivial=True)


@gluon.jit
def byte_of_place(place, C: gl.constexpr):
    """Which byte of a row stands at a place."""
    return place // 4 % 4 * (C // 4) + place // 16 * 4 + place % 4


@gluon.jit
def token_of_row(row, P: gl.constexpr):
    """Which token of a part stands in a row of its scores."""
    return row // 2 % 4 * (P // 4) + row // 16 * 4 + row // 8 % 2 * 2 + row % 2


@gluon.jit
def turned(weights_PN):
    """Weights of a part, float16, as the second operand of a product with values: its places are
    those of the bytes of P tokens. `movmatrix` transposes each 8 by 8 of them."""
    P: gl.constexpr = weights_PN.shape[0]
    N: gl.constexpr = weights_PN.shape[1]
    x = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;",
        "=r,r",
        [weights_PN],
        dtype=gl.float16,
        is_pure=True,
        pack=2,
    )
    x = x.reshape([P // 16, 2, 8, N // 8, 4, 2]).permute([0, 4, 1, 5, 3, 2]).reshape([P, N])
    return gl.convert_layout(x, operand(1), assert_trivial=True)
