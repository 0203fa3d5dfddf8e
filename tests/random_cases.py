"""Random cases, for the kernels of any backend. FASTDIFF_FUZZ_CASES sets how many the CPU kernels get."""

import os
from functools import wraps

import torch
from cases import TOLERANCE
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from fastdiff import (
    dce_loss,
    dse_loss,
    harmonic_mask,
    mask_exactly,
    mask_tokens,
    reverse_probs,
    reverse_step,
    sample_tokens,
)

CASES = int(os.environ.get("FASTDIFF_FUZZ_CASES", "500"))
# Types of rows that a backend has kernels for, and large numbers for them. Where an exponential overflows float32 the
# CPU kernels start again in float64; those of GPUs give inf, also where a small weight would have made that finite.
GPU_ROWS = ([torch.float32, torch.bfloat16, torch.float16], [10.0, 1000.0])
ROWS = {"cpu": (list(TOLERANCE), [100.0]), "triton": GPU_ROWS, "cuda": GPU_ROWS}


def fuzz(cases):
    return settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


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
    dtypes, large = ROWS[backend]
    shape = draw(st.sampled_from([(1,), (5,), (0,), (1, 1), (3, 4), (2, 0), (0, 3), (2, 3, 2)]))
    num_states = draw(st.one_of(st.integers(2, 40), st.sampled_from([64, 65, 257, 1023, 1024, 1025, 2100])))
    dtype = draw(st.sampled_from(dtypes))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    z = torch.randn(*shape, num_states, generator=g, dtype=torch.float64) * draw(st.sampled_from([0.0, 0.1, 1.0, 2.0]))
    if special and z.numel():
        value = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, -1e6, *large]))
        hit = torch.rand(z.shape, generator=g) < draw(st.sampled_from([0.01, 0.5, 1.0]))
        z = z.masked_fill(hit, value)
    z = laid_out(draw, z.to(device, dtype))
    mask_index = draw(st.integers(0, num_states - 1))
    x0 = torch.randint(0, num_states - 1, shape, generator=g)
    x0 = x0 + (x0 >= mask_index)
    masked = torch.rand(shape, generator=g) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return z, x0, masked, mask_index, g


def laid_out(draw, z):
    layout = draw(st.sampled_from(["contiguous", "rows apart", "expanded", "columns apart", "offset"]))
    if layout == "rows apart":
        z = torch.cat([z, z], -1)[..., : z.shape[-1]]
    if layout == "expanded" and len(z):
        z = z[:1].expand(z.shape)
    if layout == "columns apart":
        z = torch.stack([z, z], -1)[..., 0]
    if layout == "offset":
        z = torch.cat([z[..., :1], z], -1)[..., 1:]
    return z


def weights(draw, shape, g, low=0.0):
    """A number, or a tensor over a prefix of the shape, or one to broadcast."""
    form = draw(st.sampled_from(["number", "prefix", "full", "broadcast"]))
    if form == "number":
        return 0.7
    size = {"prefix": shape[:1], "full": shape, "broadcast": (shape[0],) + (1,) * (len(shape) - 1)}[form]
    return low + torch.rand(size, generator=g, dtype=draw(st.sampled_from([torch.float32, torch.float64])))


def placed(options, device):
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in options.items()}


def agree(loss_of, z, backend, options, slack=1, least=1e-30):
    """Loss and gradient of kernel and reference, to `slack` float32 tolerances, on a leaf with z's layout."""
    results, options = [], placed(options, z.device)
    for name in (backend, "reference"):
        leaf = z.detach().requires_grad_()
        loss = loss_of(leaf, backend=name, **options)
        upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
        (grad,) = torch.autograd.grad(loss, leaf, upstream)
        results.append((loss.detach(), grad))
    (loss, grad), (expected, expected_grad) = results
    tolerance = slack * TOLERANCE[torch.float64 if z.dtype == torch.float64 else torch.float32]
    assert_near(loss, expected, tolerance, least)
    assert_near(grad, expected_grad, max(tolerance, TOLERANCE[z.dtype]), least)


def assert_near(got, expected, tolerance, least):
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    finite = expected.isfinite()
    assert torch.equal(got[~finite].isnan(), expected[~finite].isnan())
    got, expected = got.double().where(finite, 0), expected.double().where(finite, 0)
    if got.numel():
        assert (got - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(least)


@with_poisoned_buffers
def check_dce(draw, backend, device="cpu"):
    special = draw(st.booleans())
    z, x0, masked, mask_index, g = rows(draw, special, backend, device)
    if draw(st.booleans()):
        x0 = torch.where(torch.rand(x0.shape, generator=g) < 0.3, -100, x0)
    given_as = draw(st.sampled_from(["xt", "mask", "all"]))
    options = {"xt": dict(xt=torch.where(masked, mask_index, x0)), "mask": dict(mask=masked), "all": {}}[given_as]
    options |= dict(x0=x0, mask_index=mask_index, exclude_mask=draw(st.booleans()))
    options |= dict(reduction=draw(st.sampled_from(["none", "sum", "mean"])), weight=weights(draw, x0.shape, g))
    if not special:  # beside numbers of -1e6 the reference's own log-sum-exp is not exact enough
        options["z_loss"] = draw(st.sampled_from([0.0, 0.1]))
    agree(dce_loss, z, backend, options)


@with_poisoned_buffers
def check_dse(draw, backend, device="cpu"):
    z, x0, masked, mask_index, g = rows(draw, draw(st.booleans()), backend, device)
    graph = draw(st.sampled_from(["absorb", "uniform"]))
    moved = mask_index if graph == "absorb" else torch.randint(0, z.shape[-1], x0.shape, generator=g)
    form = draw(st.sampled_from(["log_score", "scale_by_sigma", "logits"]))
    options = dict(graph=graph, x0=x0, xt=torch.where(masked, moved, x0), mask_index=mask_index, parametrization=form)
    options |= dict(sigma=weights(draw, x0.shape, g, low=0.05), dsigma=weights(draw, x0.shape, g))
    options["reduction"] = draw(st.sampled_from(["none", "sum", "mean"]))
    # A gradient of conditionals is a difference, which for equal logits is 0 but for rounding.
    least = 0.1 if form == "logits" else 1e-30
    # Close to log a, which float32 rounds, a term and its slope lose a digit, and a row may hold nothing else.
    agree(dse_loss, z, backend, options, slack=5, least=least)


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


def rows_to_draw(draw, backend, device, least_states=1):
    """z [B, L, V] in some layout and dtype, an id that is finite, tokens, the mask's id and the names of the draws."""
    shape = draw(st.sampled_from([(1, 3), (2, 2), (2, 4), (4, 1), (0, 3), (2, 0)]))
    num_states = draw(st.sampled_from([27, least_states, 2, 1025, 1024, 1023, 2049, 3000]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    z = torch.randn(*shape, num_states, generator=g, dtype=torch.float64) * draw(st.sampled_from([0.0, 0.1, 1.0, 5.0]))
    for value in draw(st.sampled_from([[], [-torch.inf], [1e4, -torch.inf], [1e4]])):
        hit = torch.rand(z.shape, generator=g) < draw(st.sampled_from([0.01, 0.5, 1.0]))
        z = z.masked_fill(hit, value)
    finite, mask_index = (draw(st.sampled_from([num_states - 1, num_states // 2, 0])) for _ in range(2))
    z[..., finite] = 0.5
    z = laid_out(draw, z.to(device, draw(st.sampled_from(ROWS[backend][0]))))
    masked = torch.rand(shape, generator=g) < draw(st.sampled_from([0.5, 1.0]))
    xt = torch.where(masked, mask_index, torch.randint(0, num_states, shape, generator=g))
    names = dict(seed=draw(st.integers(-(2**63), 2**63 - 1)), step=draw(st.integers(0, 2**30)))
    names["sample_ids"] = torch.randint(0, 2**62, shape[:1], generator=g)
    return z, finite, xt, mask_index, names, g


def spoil(z, live):
    """Rows that nobody may read hold NaN."""
    if z.numel() and z.stride(0):  # not where rows are one
        z[~live.to(z.device)] = torch.nan


def tally_tokens(tally, got, expected, live, case):
    """Where tokens agree. A race that float32's roundings decide differently is noted, which is to be rare."""
    same = got == expected
    assert (same | live.to(same.device)).all()
    tally["live rows"] += int(live.sum())
    if not same.all():
        tally["rows that differ"] += int((~same).sum())
        tally["cases"] = [*tally.get("cases", []), case]
    return same


@with_poisoned_buffers
def check_sample(draw, backend, tally, device="cpu"):
    z, finite, xt, mask_index, names, g = rows_to_draw(draw, backend, device)
    num_states = z.shape[-1]
    options = dict(mask_index=mask_index, exclude_mask=draw(st.booleans()) and mask_index != finite)
    options["exclude"] = set(draw(st.lists(st.integers(0, num_states - 1), max_size=3))) - {finite}
    options["temperature"] = draw(st.sampled_from([0.0, 0.3, 1.0, 2.0]))
    options["top_k"] = draw(st.sampled_from([None, 1, 3, 40, num_states, 10**6]))
    options["top_p"] = draw(st.sampled_from([None, 1e-6, 0.3, 0.9, 1 - 1e-4]))
    live = xt == mask_index
    if draw(st.booleans()):
        live = options["mask"] = torch.rand(xt.shape, generator=g) < 0.7
    spoil(z, live)
    with_stats = draw(st.booleans())
    case = f"sample_tokens of {z.dtype} {tuple(z.shape)}, {options}, {names}"
    results = []
    for name in (backend, "reference"):
        given = placed(dict(xt=xt, **options, **names), device)
        results.append(sample_tokens(z, backend=name, return_stats=with_stats, **given))
    if not with_stats:
        tally_tokens(tally, *results, live, case)
        return
    (tokens, stats), (expected, expected_stats) = results
    same = tally_tokens(tally, tokens, expected, live, case)
    for x, y in zip(stats, expected_stats, strict=True):
        torch.testing.assert_close(x[same], y[same], rtol=2e-5, atol=1e-6)


@with_poisoned_buffers
def check_reverse(draw, backend, tally, device="cpu"):
    z, finite, xt, mask_index, names, g = rows_to_draw(draw, backend, device, least_states=2)
    graph = draw(st.sampled_from(["absorb", "uniform"]))
    forms = ["log_score", "scale_by_sigma", "logits"]
    form = draw(st.sampled_from(forms if finite != mask_index else forms[:2]))  # conditionals are not of the mask
    if graph == "absorb":
        spoil(z, xt == mask_index)
    sigma = 1e-3 * 3e4 ** weights(draw, xt.shape, g)  # 0.001 to 30
    options = dict(graph=graph, parametrization=form, mask_index=mask_index, sigma=sigma)
    if draw(st.booleans()):
        options["sigma_next"] = sigma * draw(st.sampled_from([0.0, 0.5, 0.99]))
        if graph == "uniform" and form != "logits":  # a step d costs a score exp(d) of its digits
            options["sigma_next"] = sigma - torch.as_tensor(sigma - options["sigma_next"]).clamp_max(1)
    else:
        options["step_size"] = draw(st.sampled_from([1e-3, 0.1, 2.0]))
    temperature = draw(st.sampled_from([0.0, 0.3, 1.0, 2.0]))
    case = f"reverse_step of {z.dtype} {tuple(z.shape)}, temperature {temperature}, {options}, {names}, xt {xt}"
    tokens, probs = [], []
    for name in (backend, "reference"):
        given = placed(dict(xt=xt, backend=name, **options), device)
        tokens.append(reverse_step(z, temperature=temperature, **given, **placed(names, device)))
        probs.append(reverse_probs(z, **given))
    live = xt == mask_index if graph == "absorb" else torch.ones_like(xt, dtype=torch.bool)
    tally_tokens(tally, *tokens, live, case)
    torch.testing.assert_close(*probs, rtol=1e-4, atol=1e-6)
