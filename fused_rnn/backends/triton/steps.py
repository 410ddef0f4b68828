"""What forward and backward share: where the rows of a step stand, and states in memory.

Everywhere in the kernels: ``n`` are a program's rows of the batch, ``u`` a tile of units. A tile of
units ends beyond H and one of rows beyond N; what lies there is masked, reads as 0 and stays 0.
"""

import triton
import triton.language as tl

CLEAR = tl.constexpr(1)
HOLD = tl.constexpr(2)
CUT = tl.constexpr(4)
# Where the state before a row lies, if not in a row of h.
INITIAL = tl.constexpr(-1)
ZERO = tl.constexpr(-2)
# Triton's interpreter (3.9) multiplies bfloat16 as the integers that store it.
WIDENS = tl.constexpr(not isinstance(tl.zeros, triton.JITFunction))


def kernel(*sizes):
    """For functions that are launched: compiled for any ``sizes``, named after whose they are."""

    def decorate(function):
        name = f"fused_rnn_{function.__name__}"
        return triton.jit(function, repr=lambda _: name, do_not_specialize=sizes)

    return decorate


@triton.jit
def time_of(step, T, reverse):
    """The step'th step in the order in which forward runs."""
    return step + reverse * (T - 1 - 2 * step)


@triton.jit
def rows_of(a, at, inside):
    """What a step is told of its rows.

    Args:
        a: has ``control`` and ``rows``.
        at: ``t * N + n``, int64.
        inside: false beyond the batch, and for steps that there are not.

    Returns:
        ``index``, each row's place in x, h, c and saved, -1 where it has none; ``live``: does not
        hold; ``clears``: begins with states of 0; ``passes``: a gradient reaches the state before.
    """
    index = at
    if a.rows is not None:
        index = tl.load(a.rows + at, mask=inside, other=-1).to(tl.int64)
    index = tl.where(inside, index, -1)
    live = index >= 0
    clears = live & (index < 0)
    passes = live
    if a.control is not None:
        bits = tl.load(a.control + at, mask=inside, other=0).to(tl.int32)
        live = live & ((bits & HOLD) == 0)
        clears = live & ((bits & CLEAR) != 0)
        passes = live & ((bits & (CLEAR | CUT)) == 0)
    return index, live, clears, passes


@triton.jit
def read(base, at, mask):
    """Widened; ``base`` may be None."""
    if base is None:
        x = tl.zeros(mask.shape, tl.float32)
    else:
        x = tl.load(base + at, mask=mask, other=0).to(tl.float32)
    return x


@triton.jit
def read_tuple(base, row, u, mask, COUNT: tl.constexpr, H: tl.constexpr):
    """Blocks of H side by side in a row: gates, or what was saved."""
    blocks = ()
    for k in tl.static_range(COUNT):
        blocks = blocks + (read(base, (row * COUNT + k) * H + u, mask),)
    return blocks


@triton.jit
def write_tuple(base, row, u, mask, blocks, COUNT: tl.constexpr, H: tl.constexpr):
    for k in tl.static_range(COUNT):
        tl.store(base + (row * COUNT + k) * H + u, blocks[k], mask=mask)


@triton.jit
def multiply(x, w, sums, PRECISION: tl.constexpr):
    """``sums + x w``, in float32."""
    if WIDENS:
        product = tl.dot(x.to(tl.float32), w.to(tl.float32), sums)
    else:
        product = tl.dot(x, w, sums, input_precision=PRECISION)
    return product


@triton.jit
def keeps(a, at, u, mask, STATE: tl.constexpr, STATES: tl.constexpr, H: tl.constexpr):
    """Whether an element of a state stays as it was (zoneout)."""
    return tl.load(a.keep + (at * STATES + STATE) * H + u, mask=mask, other=0) != 0


@triton.jit
def after(
    a,
    at,
    u,
    mask,
    STATE: tl.constexpr,
    STATES: tl.constexpr,
    H: tl.constexpr,
    before,
    computed,
):
    """What becomes of a state: ``keep`` is a mask, or how much of it stays."""
    if a.keep.dtype.element_ty == tl.uint8:
        state = tl.where(keeps(a, at, u, mask, STATE, STATES, H), before, computed)
    else:
        share = read(a.keep, STATE * H + u, u < H)
        state = computed + share * (before - computed)
    return state


@triton.jit
def multiplied(a, x, n, u, mask, H: tl.constexpr):
    """A hidden state on its way into the recurrent product, or a gradient on its way back."""
    if a.h_mask is not None:
        x = x * read(a.h_mask, n * H + u, mask)
    return x


@triton.jit
def before_of(a, at, step, N, reverse, inside):
    """Where the state before each row lies: a row of h, or INITIAL, or ZERO."""
    if a.before is not None:
        before = tl.load(a.before + at, mask=inside, other=ZERO)
    else:
        before = tl.where(step > 0, at - (1 - 2 * reverse) * N, INITIAL)
    return before


@triton.jit
def state_before(states, initial, before, n, u, mask, H: tl.constexpr):
    """The state before a step, from the visible ones and the initial one; that may be None."""
    x = read(states, before * H + u, mask & (before >= 0))
    if initial is not None:
        x = tl.where(before == INITIAL, read(initial, n * H + u, mask & (before == INITIAL)), x)
    return x
