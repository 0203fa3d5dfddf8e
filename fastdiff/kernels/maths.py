"""The mathematics of row losses in Triton. Constants of a row are float64, what runs along it float32."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def expm1_(x):
    """expm1 in float64, by Kahan's correction of exp(x) - 1."""
    u = tl.exp(x)
    inside = (u != 1) & (u != 0)
    corrected = (u - 1) * x / tl.where(inside, tl.log(tl.where(inside, u, 2.0)), 1.0)
    return tl.where(inside, corrected, tl.where(u == 0, -1.0, x))


@triton.jit
def log1p_(x):
    """log1p in float64, by Kahan's correction of log(1 + x)."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * x / tl.where(u == 1, 1.0, u - 1))


@triton.jit
def survival(sigma):
    """alpha = exp(-sigma), 1 - alpha, and 1 / e1, where e1 = expm1(sigma) is never formed."""
    alpha, rest = tl.exp(-sigma), -expm1_(-sigma)
    return alpha, rest, alpha / rest


@triton.jit
def weight_parts(weight):
    """RowWeight of csrc/scores.h: its factor, and the share that goes into the exponent."""
    small = tl.abs(weight) < 1
    return tl.where(small, tl.where(weight < 0, -1.0, 1.0), weight), tl.where(small, tl.abs(weight), 1.0)


@triton.jit
def scaled_phi(s, d, a, near: tl.constexpr):
    """a phi(d) and its derivative exp(s) - a, where phi(d) = expm1(d) - d, d = s - log a; a series where |d| < near."""
    e = tl.exp(s)
    series = a * (d * d) * (1 / 2 + d * (1 / 6 + d * (1 / 24 + d * (1 / 120 + d * (1 / 720)))))
    is_near = tl.abs(d) < tl.where(a > 0, near, 0.0)
    return tl.where(is_near, series, e - a * (1 + d)), tl.where(is_near, series + a * d, e - a)


@triton.jit
def log_gap(w, rho, near: tl.constexpr):
    """w - log(rho) for rho = 1 + w, each rounded by itself; a series where |w| < near."""
    t = w / (2 + w)  # log(1 + w) = 2 artanh(t), and w - 2 t = w t
    t2 = t * t
    series = w * t - 2 * t * t2 * (1 / 3 + t2 * (1 / 5 + t2 * (1 / 7 + t2 * (1 / 9 + t2 * (1 / 11)))))
    return tl.where(tl.abs(w) < near, series, w - tl.log(rho))


@triton.jit
def gap_at(w, rho, divisor):
    """gap(rho) and 1 - 1/rho of rho = 1 + w in float64, from both times a divisor."""
    return log_gap(w / divisor, rho / divisor, 1e-3), w / rho
