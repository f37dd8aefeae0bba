"""What the groups of the pipelined prefill kernel tell each other, and what a warp asks itself,
beside what Gluon has words for.

Gluon's arrival at a barrier is that of a whole group: all its warps wait for each other first, as
they do before a second wait for the same barrier. A consumer would do so four times a step. So the
barriers by which consumers give back rooms of the rings are memory of our own, at which each warp
arrives for itself. And a scalar that a warp computes from its own numbers, which Triton has no type
for, is a register of our own. Both are declared once, at the head of the kernel (`declare`), and
the assembly here refers to them by name.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

V_ROOMS = gl.constexpr(64)
"""Where the barriers of the rooms of values begin, in bytes: behind eight of keys."""


@gluon.jit
def declare(CONSUMERS: gl.constexpr, STAGES: gl.constexpr):
    """Declare what the other functions name, and initialise the barriers, before groups part.

    The memory is of 1,024 bytes because tiles that are copied into what follows it must begin at
    multiples of that.
    """
    gl.inline_asm_elementwise(
        """
        .shared .align 1024 .b8 kvcluster_rooms[1024];
        .reg .u32 kvcluster_grown, kvcluster_late;
        mov.u32 kvcluster_grown, 0;
        mov.u32 kvcluster_late, 0;
        mov.u32 $0, 0;
        """,
        "=r",
        [],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    for i in gl.static_range(STAGES):
        _init(8 * i, 4 * CONSUMERS)
        _init(V_ROOMS + 8 * i, 4 * CONSUMERS)


@gluon.jit
def _init(offset, count):
    gl.inline_asm_elementwise(
        """
        { .reg .pred first; .reg .u32 thread, barrier;
          mov.u32 thread, %tid.x;
          setp.eq.u32 first, thread, 0;
          mov.u32 barrier, kvcluster_rooms;
          add.u32 barrier, barrier, $1;
          @first mbarrier.init.shared::cta.b64 [barrier], $2;
          mov.u32 $0, 0; }
        """,
        "=r,r,r",
        [offset, count],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def free_room(offset):
    """This warp is done with a room; the barrier is `offset` bytes into ours."""
    gl.inline_asm_elementwise(
        """
        { .reg .pred first; .reg .u32 lane, barrier;
          mov.u32 lane, %laneid;
          setp.eq.u32 first, lane, 0;
          mov.u32 barrier, kvcluster_rooms;
          add.u32 barrier, barrier, $1;
          @first mbarrier.arrive.shared::cta.b64 _, [barrier];
          mov.u32 $0, 0; }
        """,
        "=r,r",
        [offset],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def await_room(offset, phase):
    """Block until all warps of all consumers are done with a room."""
    gl.inline_asm_elementwise(
        """
        { .reg .pred done; .reg .u32 barrier;
          mov.u32 barrier, kvcluster_rooms;
          add.u32 barrier, barrier, $1;
          waiting:
          mbarrier.try_wait.parity.shared::cta.b64 done, [barrier], $2;
          @!done bra.uni waiting;
          mov.u32 $0, 0; }
        """,
        "=r,r,r",
        [offset, phase],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def note_growth(x_MQ, bound_MQ):
    """Note whether any number of this warp's is above its bound. A thread has two of them."""
    gl.inline_asm_elementwise(
        """
        { .reg .pred above;
          setp.gt.f32 above, $2, $4;
          setp.gt.or.f32 above, $3, $5, above;
          vote.sync.any.pred above, above, 0xffffffff;
          selp.u32 kvcluster_grown, 1, 0, above;
          mov.u32 $0, 0;
          mov.u32 $1, 0; }
        """,
        "=r,=r,f,f,f,f",
        [x_MQ, bound_MQ],
        dtype=gl.int32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def has_grown():
    """What was noted last, of this warp: a branch on it is one that the whole warp takes. Nothing
    in such a branch may be done by several warps together."""
    grown = gl.inline_asm_elementwise(
        "mov.u32 $0, kvcluster_grown;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    return grown != 0


@gluon.jit
def zero_after(sums_MQ):
    """Zero, which is not known before these sums of numbers that are not below zero are."""
    gl.inline_asm_elementwise(
        """
        { .reg .pred below; .reg .f32 sum;
          add.f32 sum, $2, $3;
          setp.lt.f32 below, sum, 0f00000000;
          selp.u32 kvcluster_late, 1, 0, below;
          mov.u32 $0, 0;
          mov.u32 $1, 0; }
        """,
        "=r,=r,f,f",
        [sums_MQ],
        dtype=gl.int32,
        is_pure=False,
        pack=2,
    )
    return gl.inline_asm_elementwise(
        "mov.u32 $0, kvcluster_late;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _barrier(asm: gl.constexpr):
    gl.inline_asm_elementwise(asm, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def await_turn(CONSUMER: gl.constexpr, TAKES_TURNS: gl.constexpr):
    """Block until the consumer before has asked for its products: 256 threads, its and ours."""
    if TAKES_TURNS:
        if CONSUMER == 0:
            _barrier("bar.sync 8, 256; mov.u32 $0, 0;")
        elif CONSUMER == 1:
            _barrier("bar.sync 9, 256; mov.u32 $0, 0;")
        else:
            _barrier("bar.sync 10, 256; mov.u32 $0, 0;")


@gluon.jit
def give_turn(CONSUMER: gl.constexpr, TAKES_TURNS: gl.constexpr):
    """Let that consumer go on, without waiting for it."""
    if TAKES_TURNS:
        if CONSUMER == 0:
            _barrier("bar.arrive 8, 256; mov.u32 $0, 0;")
        elif CONSUMER == 1:
            _barrier("bar.arrive 9, 256; mov.u32 $0, 0;")
        else:
            _barrier("bar.arrive 10, 256; mov.u32 $0, 0;")
