"""Random cases, for the kernels of any backend. FASTDIFF_FUZZ_CASES sets how many the CPU kernels get.

Losses are held against exact.py, and so is the reference. New cases are drawn in every run, or with
FASTDIFF_FUZZ_FIXED=1 the same ones. Tokens that are drawn from rows: random_draws.py.
"""

import os
from functools import partial, wraps

import exact
import numpy as np
import torch
from cases import TOLERANCE
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from fastdiff import (
    Geometric,
    LogLinear,
    csm_loss,
    d3pm_loss,
    dce_loss,
    dse_loss,
    harmonic_mask,
    loo_loss,
    mask_exactly,
    mask_tokens,
    mixture_loss,
    token_logps,
)

CASES = int(os.environ.get("FASTDIFF_FUZZ_CASES", "500"))
GPU_TYPES = [torch.float32, torch.bfloat16, torch.float16]  # of rows that a backend has kernels for
TYPES = {"cpu": list(TOLERANCE), "triton": GPU_TYPES, "cuda": GPU_TYPES}


def fuzz(cases):
    fixed = os.environ.get("FASTDIFF_FUZZ_FIXED", "0") == "1"
    health = list(HealthCheck)
    return settings(max_examples=cases, deadline=None, suppress_health_check=health, print_blob=True, derandomize=fixed)


def with_poisoned_buffers(check):
    """What a kernel gets uninitialised holds NaN, or the largest integer."""

    @wraps(check)
    def poisoned(*args, **kwargs):
        torch.use_deterministic_algorithms(True)
        try:
            check(*args, **kwargs)
        finally:
            torch.use_deterministic_algorithms(False)

    return poisoned


def rows(draw, special, backend, device):
    """z [..., V] in some layout and dtype, x0 in range, a mask id and which tokens are masked."""
    shape = draw(st.sampled_from([(1,), (5,), (0,), (1, 1), (3, 4), (2, 0), (0, 3), (2, 3, 2)]))
    num_states = draw(st.one_of(st.integers(2, 40), st.sampled_from([64, 65, 257, 1023, 1024, 1025, 2100])))
    dtype = draw(st.sampled_from(TYPES[backend]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    z = torch.randn(*shape, num_states, generator=g, dtype=torch.float64) * draw(st.sampled_from([0.0, 0.1, 1.0, 2.0]))
    if special:
        hit = torch.rand(z.shape, generator=g) < draw(st.sampled_from([0.01, 0.5, 1.0]))
        z = torch.where(hit, extremes(draw, z.shape, dtype, g), z)
    z = laid_out(draw, z.to(device, dtype))
    mask_index = draw(st.integers(0, num_states - 1))
    x0 = torch.randint(0, num_states - 1, shape, generator=g)
    x0 = x0 + (x0 >= mask_index)
    masked = torch.rand(shape, generator=g) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return z, x0, masked, mask_index, g


def extremes(draw, shape, dtype, g):
    """Numbers that are not finite, or of any size that the type has, of one sign or of both."""
    largest = min(torch.finfo(dtype).max, 1e150)  # there is no wider type for squares and sums of float64
    size = draw(st.sampled_from([torch.nan, torch.inf, 1e6, 80.0, 100.0, 1000.0, largest, None]))
    if size is None:
        size = largest ** torch.rand(shape, generator=g, dtype=torch.float64)
        for low, high in (
            (300, 450),
            (600, 900),
        ):  # whose exponential, or its square, fits float64 only with its weight
            size[(size > low) & (size < high)] = high
    return size * one_of(draw, [[1.0], [-1.0], [1.0, -1.0]], shape, g)


def one_of(draw, choices, shape, g):
    """Independently for each of a shape, one of some numbers."""
    numbers = torch.tensor(draw(st.sampled_from(choices)), dtype=torch.float64)
    return numbers[torch.randint(0, len(numbers), shape, generator=g)]


def laid_out(draw, z):
    layout = draw(st.sampled_from(["contiguous", "rows apart", "expanded", "columns apart", "offset"]))
    if layout == "rows apart":
        z = torch.cat([z, z], -1)[..., : z.shape[-1]]
    if layout == "expanded" and len(z):
        z = z[:1].expand(z.shape)
    if layout == "columns apart":
        z = torch.stack([z, z], -1)[..., 0]
    if layout == "offset":
        many = draw(st.integers(1, min(9, z.shape[-1])))
        z = torch.cat([z[..., :many], z], -1)[..., many:]
    return z


def per_token(draw, shape, g, low=0.0):
    """A number, or a tensor over a prefix of the shape, or one to broadcast."""
    form = draw(st.sampled_from(["number", "prefix", "full", "broadcast"]))
    if form == "number":
        return 0.7
    size = {"prefix": shape[:1], "full": shape, "broadcast": (shape[0],) + (1,) * (len(shape) - 1)}[form]
    return low + torch.rand(size, generator=g, dtype=draw(st.sampled_from([torch.float32, torch.float64])))


def weights(draw, shape, g):
    """The same, also 0, negative, tiny or huge."""
    weight = per_token(draw, shape, g)
    factor = one_of(draw, [[1.0], [0.0, 1.0], [0.0, 1.0, -1.0, 1e-30, 1e30]], getattr(weight, "shape", ()), g)
    return weight * factor.to(weight.dtype) if torch.is_tensor(weight) else weight * float(factor)


def noise_levels(draw, shape, g):
    sigma = per_token(draw, shape, g, low=0.05)
    return 1e-6 * 9e7 ** (sigma / 1.05) if draw(st.booleans()) else sigma  # 1e-6 to 90


def placed(options, device):
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}


def extended(x, scored):
    """What is known of the scored tokens, a number or a tensor over a prefix of their shape, in extended precision."""
    x = torch.as_tensor(x, dtype=torch.float64)
    x = x.view(*x.shape, *[1] * (scored.dim() - x.dim())).expand(scored.shape)
    return x[scored].numpy().astype(exact.EXTENDED)


@np.errstate(all="ignore")
def agree(loss_of, z, backend, options, weight, scored, loss_of_rows, slack=1):
    """Loss and gradient of a backend and of the reference, on a leaf with z's layout, are what loss_of_rows gives."""
    reduction, shape = options["reduction"], scored.shape if options["reduction"] == "none" else ()
    upstream = torch.linspace(-1, 2, shape.numel() if shape else 1).view(shape)
    factor = extended(weight, scored)
    numbers = z.cpu().double()[scored].numpy().astype(exact.EXTENDED)
    numbers[(factor == 0)[:, None] & np.isfinite(numbers)] = 0  # count for nothing, whatever their exponential
    rows = loss_of_rows(numbers)
    factor /= max(len(factor), 1) if reduction == "mean" else 1
    rows = rows._replace(loss_size=rows.loss_size + 1e-32 * z.shape[-1], grad_size=rows.grad_size + 1e-32)  # exp_ is 0
    loss = scattered((factor * rows.loss).astype(np.float64), scored)  # as they are summed
    loss_size = scattered(abs(factor) * rows.loss_size, scored)
    undecided = False
    if reduction != "none":
        # Infinities of both signs are NaN, but for a backend whose type for them is wider.
        undecided = np.isnan(loss.astype(np.float32).sum())
        loss, loss_size = loss.sum(), loss_size.sum()
    factor = (factor * extended(upstream, scored))[:, None]
    grad, grad_size = scattered(factor * rows.grad, scored), scattered(abs(factor) * rows.grad_size, scored)
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    for name in (backend, "reference"):
        leaf = z.detach().requires_grad_()
        got = loss_of(leaf, backend=name, **placed(options, z.device))
        (got_grad,) = torch.autograd.grad(got, leaf, upstream.to(got))
        if not undecided:
            assert_near(got.detach(), wide, loss, slack * TOLERANCE[wide] * loss_size, f"{name}'s loss")
        tolerance = max(slack * TOLERANCE[wide], TOLERANCE[z.dtype])
        assert_near(got_grad, z.dtype, grad, tolerance * grad_size, f"{name}'s gradient")


@np.errstate(all="ignore")
def stats_agree(z, backend, options, scored, stats_of_rows):
    """The same for the statistics of rows for which they are finite; 0 where nothing is scored."""
    expected = stats_of_rows(z.cpu().double()[scored].numpy().astype(exact.EXTENDED))
    finite = np.isfinite(expected[:3].astype(np.float64)).all(0)
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    for name in (backend, "reference"):
        _, stats = dce_loss(z, return_stats=True, backend=name, **placed(options, z.device))
        for field, got, want in zip(stats._fields, stats, expected[:, finite], strict=True):
            assert not got.cpu()[~scored].any()
            error = TOLERANCE[wide] * (1 + abs(want))
            assert_near(got.cpu()[scored][finite].to(wide), wide, want, error, f"{name}'s {field}")


def scattered(x, scored):
    """What the scored tokens have, in the place of each; 0 for the others."""
    to = np.zeros((*scored.shape, *x.shape[1:]), exact.EXTENDED)
    to[scored.numpy()] = x
    return to


def assert_near(got, dtype, expected, error, name):
    """Infinite and NaN where that is expected, and beyond the range of the type."""
    assert got.shape == expected.shape
    assert got.dtype == dtype
    limits, got = torch.finfo(dtype), got.cpu().double().numpy().astype(exact.EXTENDED)
    error = np.where(np.isfinite(error), error, 0) + max(limits.smallest_normal * limits.eps, 2e-38)
    error = np.broadcast_to(error, got.shape)
    beyond = np.isinf(got) & (np.sign(got) * expected + error >= limits.max)
    right = beyond | (np.isnan(got) & np.isnan(expected)) | (abs(got - expected) <= error)
    assert right.all(), f"{name}: got {got[~right][:4]}, expected {expected[~right][:4]} within {error[~right][:4]}"


@with_poisoned_buffers
def check_dce(draw, backend, device="cpu"):
    z, x0, masked, mask_index, g = rows(draw, draw(st.booleans()), backend, device)
    if draw(st.booleans()):
        x0 = torch.where(torch.rand(x0.shape, generator=g) < 0.3, -100, x0)
    given_as = draw(st.sampled_from(["xt", "mask", "all"]))
    options = {"xt": dict(xt=torch.where(masked, mask_index, x0)), "mask": dict(mask=masked), "all": {}}[given_as]
    options |= dict(x0=x0, mask_index=mask_index, exclude_mask=draw(st.booleans()), weight=weights(draw, x0.shape, g))
    options |= dict(reduction=draw(st.sampled_from(["none", "sum", "mean"])), z_loss=draw(st.sampled_from([0.0, 0.1])))
    scored = (x0 != -100) & (masked | (given_as == "all"))
    target = x0[scored].numpy()
    excluded = np.full_like(target, mask_index if options["exclude_mask"] else -1)
    of_rows = partial(exact.dce, x0=target, excluded=excluded, z_loss=options["z_loss"])
    agree(dce_loss, z, backend, options, options["weight"], scored, of_rows)
    stats_agree(z, backend, options, scored, partial(exact.dce_stats, x0=target, excluded=excluded))


@with_poisoned_buffers
def check_logps(draw, backend, device="cpu"):
    z, x0, masked, mask_index, g = rows(draw, draw(st.booleans()), backend, device)
    options = dict(x0=x0, mask=masked, mask_index=mask_index, exclude_mask=draw(st.booleans()), reduction="none")
    choices = [[1.0], [0.0, 1.0, -1.0], [1.0, 1e20]]
    options |= {name: one_of(draw, choices, x0.shape, g) for name in ("of_logp", "of_entropy")}

    def both(z, reduction, of_logp, of_entropy, **given):
        logps, entropy = token_logps(z, return_entropy=True, **given)
        return sum(torch.where(f == 0, 0, f.to(x) * x) for f, x in ((of_logp, logps), (of_entropy, entropy)))

    target = x0[masked].numpy()
    excluded = np.full_like(target, mask_index if options["exclude_mask"] else -1)
    factors = {name: extended(options[name], masked) for name in ("of_logp", "of_entropy")}
    of_rows = partial(exact.logps, x0=target, excluded=excluded, **factors)
    agree(both, z, backend, options, 1.0, masked, of_rows)


@with_poisoned_buffers
def check_dse(draw, backend, device="cpu"):
    z, x0, masked, mask_index, g = rows(draw, draw(st.booleans()), backend, device)
    graph = draw(st.sampled_from(["absorb", "uniform"]))
    moved = mask_index if graph == "absorb" else torch.randint(0, z.shape[-1], x0.shape, generator=g)
    form = draw(st.sampled_from(["log_score", "scale_by_sigma", "logits"]))
    options = dict(graph=graph, x0=x0, xt=torch.where(masked, moved, x0), mask_index=mask_index, parametrization=form)
    options |= dict(sigma=noise_levels(draw, x0.shape, g), dsigma=weights(draw, x0.shape, g))
    options["reduction"] = draw(st.sampled_from(["none", "sum", "mean"]))
    scored = masked if graph == "absorb" else torch.ones_like(masked)
    sigma, (xt, target) = extended(options["sigma"], scored), (options[name][scored].numpy() for name in ("xt", "x0"))

    def of_rows(z):
        shift = exact.sigma_shift(sigma, z.shape[1]) if form == "scale_by_sigma" else np.zeros_like(sigma)[:, None]
        if graph == "absorb" and form == "logits":
            alpha, gone = exact.survival(sigma)
            return exact.dce(z, target, xt, 0.0).times((alpha / gone)[:, 0])
        if graph == "absorb":
            return exact.dse_absorb(z, sigma, target, mask_index, shift)
        if form == "logits":
            return exact.dse_uniform_logits(z, sigma, xt, target)
        return exact.dse_uniform(z, sigma, xt, target, shift)

    # Close to log a, which float32 rounds, a term and its slope lose a digit, and a row may hold nothing else.
    agree(dse_loss, z, backend, options, options["dsigma"], scored, of_rows, slack=5)


@with_poisoned_buffers
def check_csm(draw, backend, device="cpu"):
    z, x0, masked, mask_index, g = rows(draw, draw(st.booleans()), backend, device)
    graph = draw(st.sampled_from(["absorb", "uniform"]))
    moved = mask_index if graph == "absorb" else torch.randint(0, z.shape[-1], x0.shape, generator=g)
    form = draw(st.sampled_from(["log_score", "scale_by_sigma"]))
    options = dict(graph=graph, x0=x0, xt=torch.where(masked, moved, x0), mask_index=mask_index, parametrization=form)
    options |= dict(sigma=noise_levels(draw, x0.shape, g), dsigma=weights(draw, x0.shape, g))
    options["reduction"] = draw(st.sampled_from(["none", "sum", "mean"]))
    scored = masked if graph == "absorb" else torch.ones_like(masked)
    sigma, (xt, target) = extended(options["sigma"], scored), (options[name][scored].numpy() for name in ("xt", "x0"))

    def of_rows(z):
        shift = exact.sigma_shift(sigma, z.shape[1]) if form == "scale_by_sigma" else np.zeros_like(sigma)[:, None]
        if graph == "absorb":
            return exact.csm_absorb(z, sigma, target, mask_index, shift)
        return exact.csm_uniform(z, sigma, xt, target, shift)

    agree(csm_loss, z, backend, options, options["dsigma"], scored, of_rows, slack=5)


@with_poisoned_buffers
def check_conditionals(draw, backend, device="cpu"):
    """Losses of conditionals that score every token: leave-one-out, D3PM's, mixtures."""
    z, x0, masked, mask_index, g = rows(draw, False, backend, device)
    loss = draw(st.sampled_from([loo_loss, d3pm_loss, mixture_loss]))
    xt = torch.where(masked, torch.randint(0, z.shape[-1], x0.shape, generator=g), x0)
    scored = torch.rand(x0.shape, generator=g) < draw(st.sampled_from([0.5, 1.0]))
    sigma, factor = noise_levels(draw, x0.shape, g), 1
    options = dict(weight=weights(draw, x0.shape, g), reduction=draw(st.sampled_from(["none", "sum", "mean"])))
    if loss is loo_loss:
        options |= dict(sigma=sigma, z_loss=draw(st.sampled_from([0.0, 0.1])))
        of_rows = partial(exact.loo, sigma=extended(sigma, scored), z_loss=options["z_loss"])
    elif loss is d3pm_loss:
        factor, auxiliary = draw(st.sampled_from([1, 3, 1000])), draw(st.sampled_from([0.0, 0.1]))
        schedule = draw(st.sampled_from([LogLinear(), LogLinear(1e-9), Geometric(1e-6, 80.0)]))
        step = torch.randint(1, factor + 1, x0.shape, generator=g)
        options |= dict(step=step, num_steps=factor, schedule=schedule, graph="uniform", auxiliary=auxiliary)
        sigma, before = (schedule.total_noise(i.double() / factor) for i in (step, step - 1))
        given = dict(sigma=sigma, sigma_s=torch.where(step == 1, 0, before))
        of_rows = partial(exact.d3pm_uniform, **{k: extended(v, scored) for k, v in given.items()}, auxiliary=auxiliary)
    else:
        share = one_of(draw, [[0.0], [0.3, 1.0], [1e-8, 0.1]], x0.shape, g)
        xt = torch.where((xt != x0) & ((share == 0) | (torch.rand(x0.shape, generator=g) < 0.3)), mask_index, xt)
        options |= dict(sigma=sigma, share=share, mask_index=mask_index)
        of_rows = partial(
            exact.mixture, sigma=extended(sigma, scored), share=extended(share, scored), mask_index=mask_index
        )
    of_rows = partial(of_rows, xt=xt[scored].numpy(), x0=x0[scored].numpy())
    options |= dict(xt=xt, x0=torch.where(scored, x0, -100))
    factor = factor * torch.as_tensor(options["weight"], dtype=torch.float64)
    agree(loss, z, backend, options, factor, scored, of_rows, slack=5)


@with_poisoned_buffers
def check_masks(draw, backend, expected, device="cpu"):
    """Bit for bit what the backend `expected` gives on the CPU."""
    batch, length, packed = draw(st.integers(0, 6)), draw(st.integers(1, 80)), draw(st.booleans())
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    lengths = torch.randint(1, length + 1, (batch,), generator=g) if packed else torch.full((batch,), length)
    x0 = torch.randint(0, 50, (int(lengths.sum()),) if packed else (batch, length), generator=g)
    maskable = torch.rand(x0.shape, generator=g) < draw(st.sampled_from([0.2, 0.7, 1.0]))
    options = dict(x0=x0, mask_index=50, maskable=maskable, sample_ids=torch.randint(0, 2**62, (batch,), generator=g))
    options |= dict(seed=draw(st.integers(-(2**63), 2**63 - 1)), step=draw(st.integers(0, 2**30)))
    calls = []
    if packed:
        options["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        most = torch.stack([part.sum() for part in maskable.split(lengths.tolist())]) if batch else lengths
    else:
        most = maskable.sum(1)
        calls.append((mask_tokens, dict(p=torch.rand(x0.shape, generator=g))))
    calls.append((mask_exactly, dict(counts=(torch.rand(batch, generator=g) * (most + 1)).long())))
    if (most > 0).all():
        calls.append((harmonic_mask, {}))
    for call, more in calls:
        results = call(backend=backend, **placed(options | more, device)), call(backend=expected, **options, **more)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(*results, strict=True))
