"""Random bits as a pure function of names, in Triton. Twin of csrc/philox.h and fastdiff/philox.py."""

import triton
import triton.language as tl

KEY_STEP_0, KEY_STEP_1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
FACTOR_0, FACTOR_1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
DERIVE = tl.constexpr(0xFF)


@triton.jit
def philox4x32(k0, k1, c0, c1, c2, c3):
    """Ten rounds over uint32 values that broadcast."""
    factor_0 = tl.full((), FACTOR_0, tl.uint32)
    factor_1 = tl.full((), FACTOR_1, tl.uint32)
    for _ in tl.static_range(10):
        high_0, high_1 = tl.umulhi(c0, factor_0), tl.umulhi(c2, factor_1)
        low_0, low_1 = c0 * factor_0, c2 * factor_1
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 += tl.full((), KEY_STEP_0, tl.uint32)
        k1 += tl.full((), KEY_STEP_1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def stream(seed, purpose: tl.constexpr, step, sample_id):
    """Key, sample and purpose_step of one (seed, purpose, step, sample): what draw_groups needs. Inputs are int64."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    high_sample, high_step = (sample_id >> 32).to(tl.uint32), (step >> 24).to(tl.uint32)
    zero = tl.zeros_like(k0)
    derived_0, derived_1, _, _ = philox4x32(k0, k1, high_sample, high_step, zero, zero + (DERIVE << 24))
    far = (high_sample | high_step) != 0
    k0, k1 = tl.where(far, derived_0, k0), tl.where(far, derived_1, k1)
    return k0, k1, sample_id.to(tl.uint32), (step & 0xFFFFFF).to(tl.uint32) | (purpose << 24)


@triton.jit
def draw(k0, k1, sample, purpose_step, first, n: tl.constexpr, row=0):
    """Draws first .. first + n - 1 of a row (uint32) of a stream, uint32 [n]; first is a multiple of 4."""
    group = (first // 4 + tl.arange(0, n // 4)).to(tl.uint32)
    zero = tl.zeros_like(group)
    w0, w1, w2, w3 = philox4x32(k0 + zero, k1 + zero, group, row + zero, sample + zero, purpose_step + zero)
    pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [n / 4, 2, 2]: w0 w1, w2 w3
    return tl.reshape(pairs, (n,))


@triton.jit
def draw_at(k0, k1, sample, purpose_step, row, index):
    """The draw with an index, or one for each of some, of a row (uint32) of a stream."""
    group, word = (index >> 2).to(tl.uint32), index & 3
    zero = tl.zeros_like(group)
    w0, w1, w2, w3 = philox4x32(k0 + zero, k1 + zero, group, row + zero, sample + zero, purpose_step + zero)
    return tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))


@triton.jit
def threshold(p):
    """round(p 2^32) to the nearest even, as int64: a draw below it has probability p."""
    magic = 4503599627370496.0  # 2^52: in the sum the integer is the low bits
    return (p * 4294967296.0 + magic).to(tl.int64, bitcast=True) & 0xFFFFFFFFFFFFF


@triton.jit
def scaled(draw_, size):
    """floor(draw size / 2^32), as int64, for any size."""
    draw_, size = draw_.to(tl.uint64), size.to(tl.uint64)
    return (draw_ * (size >> 32) + ((draw_ * (size & 0xFFFFFFFF)) >> 32)).to(tl.int64)
