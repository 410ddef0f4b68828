"""The math of every cell in Triton, forward and backward side by side.

These equations stand twice more: in ``csrc/cells.h``, whose names are the same, and for the oracle
in ``fused_rnn/cells.py``. Everything is a tile of float32, widened at load and rounded at store.

``gx``, ``gh``, ``saved``, ``dgx`` and ``dgh`` are tuples, one tile for each gate (or saved block).
A cell without c passes it through untouched.
"""

import triton
import triton.language as tl

RNN_TANH = tl.constexpr(0)
RNN_RELU = tl.constexpr(1)
LSTM = tl.constexpr(2)
GRU = tl.constexpr(3)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """By powers of x where 1 - e^-2x would lose digits: error below 1 ulp there (fitted to 0.6)."""
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    y = x * x
    p = -0.0062763873 * y + 0.021116214
    p = p * y - 0.053875137
    p = p * y + 0.13332924
    p = p * y - 0.33333331
    near = x + x * (y * p)
    return tl.where(tl.abs(x) < 0.6, near, tl.where(x < 0, -far, far))


@triton.jit
def next_c(saved, c):
    """The LSTM's c', which a backward asks for again where zoneout carried on another one."""
    return saved[1] * c + saved[0] * saved[2]


@triton.jit
def forward(CELL: tl.constexpr, gx, gh, h, c):
    """States after the step, and what the backward reads: ``h1, c1, saved``."""
    if CELL == RNN_TANH:
        h1, c1, saved = tanh(gx[0] + gh[0]), c, ()
    elif CELL == RNN_RELU:
        x = gx[0] + gh[0]
        h1, c1, saved = tl.where(x <= 0, 0.0, x), c, ()  # a NaN passes, as in torch
    elif CELL == LSTM:
        i, f = sigmoid(gx[0] + gh[0]), sigmoid(gx[1] + gh[1])
        g, o = tanh(gx[2] + gh[2]), sigmoid(gx[3] + gh[3])
        saved = (i, f, g, o)
        c1 = next_c(saved, c)
        h1 = o * tanh(c1)
    else:
        r, z = sigmoid(gx[0] + gh[0]), sigmoid(gx[1] + gh[1])
        n = tanh(gx[2] + r * gh[2])
        h1, c1, saved = n + z * (h - n), c, (r, z, n, gh[2])
    return h1, c1, saved


@triton.jit
def backward(CELL: tl.constexpr, dh1, dc1, saved, h, c, h1, c1):
    """``dgx, dgh``, and of ``dh, dc`` what does not pass through the recurrent product."""
    if CELL == RNN_TANH:
        dgx = (dh1 * (1 - h1 * h1),)
        dgh, dh, dc = dgx, tl.zeros_like(dh1), dc1
    elif CELL == RNN_RELU:
        dgx = (tl.where(h1 <= 0, 0.0, dh1),)
        dgh, dh, dc = dgx, tl.zeros_like(dh1), dc1
    elif CELL == LSTM:
        i, f, g, o = saved[0], saved[1], saved[2], saved[3]
        tanh_c = tanh(c1)
        d = dc1 + dh1 * o * (1 - tanh_c * tanh_c)
        di, df = d * g * i * (1 - i), d * c * f * (1 - f)
        dg, do = d * i * (1 - g * g), dh1 * tanh_c * o * (1 - o)
        dgx = (di, df, dg, do)
        dgh, dh, dc = dgx, tl.zeros_like(dh1), d * f
    else:
        r, z, n = saved[0], saved[1], saved[2]
        dn = dh1 * (1 - z) * (1 - n * n)
        dr = dn * saved[3] * r * (1 - r)
        dz = dh1 * (h - n) * z * (1 - z)
        dgx, dgh = (dr, dz, dn), (dr, dz, dn * r)
        dh, dc = dh1 * z, dc1
    return dgx, dgh, dh, dc
