"""Random cases of the compiled kernels against the reference; FASTDIFF_FUZZ_CASES sets how many."""

import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdiff import dce_loss, dse_loss, harmonic_mask, mask_exactly, mask_tokens

CASES = int(os.environ.get("FASTDIFF_FUZZ_CASES", "500"))
# Largest error against float64 inputs and outputs of each type, relative to the largest number of the result.
# 16-bit types: one unit in the last place, by which roundings of nearly equal numbers may differ.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
fuzz = settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """What a kernel gets uninitialised holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@st.composite
def rows(draw, special):
    """z [..., V] in some layout and dtype, x0 in range, a mask id and which tokens are masked."""
    shape = draw(st.sampled_from([(1,), (5,), (0,), (1, 1), (3, 4), (2, 0), (0, 3), (2, 3, 2)]))
    num_states = draw(st.one_of(st.integers(2, 40), st.sampled_from([64, 65, 257, 1023, 1024, 1025, 2100])))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    z = torch.randn(*shape, num_states, generator=g, dtype=torch.float64) * draw(st.sampled_from([0.0, 0.1, 1.0, 2.0]))
    if special and z.numel():
        value = draw(st.sampled_from([torch.nan, torch.inf, -torch.inf, -1e6, 100.0]))
        hit = torch.rand(z.shape, generator=g) < draw(st.sampled_from([0.01, 0.5, 1.0]))
        z = z.masked_fill(hit, value)
    z = z.to(dtype)
    layout = draw(st.sampled_from(["contiguous", "rows apart", "expanded", "columns apart", "offset"]))
    if layout == "rows apart":
        z = torch.cat([z, z], -1)[..., :num_states]
    if layout == "expanded" and shape[0]:
        z = z[:1].expand(*shape, num_states)
    if layout == "columns apart":
        z = torch.stack([z, z], -1)[..., 0]
    if layout == "offset":
        z = torch.cat([z[..., :1], z], -1)[..., 1:]
    mask_index = draw(st.integers(0, num_states - 1))
    x0 = torch.randint(0, num_states - 1, shape, generator=g)
    x0 = x0 + (x0 >= mask_index)
    masked = torch.rand(shape, generator=g) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    return z, x0, masked, mask_index, g


def weights(draw, shape, g, low=0.0):
    """A number, or a tensor over a prefix of the shape, or one to broadcast."""
    form = draw(st.sampled_from(["number", "prefix", "full", "broadcast"]))
    if form == "number":
        return 0.7
    size = {"prefix": shape[:1], "full": shape, "broadcast": (shape[0],) + (1,) * (len(shape) - 1)}[form]
    return low + torch.rand(size, generator=g, dtype=draw(st.sampled_from([torch.float32, torch.float64])))


def agree(call, z, slack=1, least=1e-30):
    """Loss, to `slack` times the tolerance, and gradient of kernel and reference, on a leaf with z's layout."""
    results = []
    for backend in ("cpu", "reference"):
        leaf = z.detach().requires_grad_()
        loss = call(leaf, backend)
        upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        (grad,) = torch.autograd.grad(loss, leaf, upstream)
        results.append((loss.detach(), grad))
    (loss, grad), (expected, expected_grad) = results
    assert_near(loss, expected, slack * TOLERANCE[torch.float64 if z.dtype == torch.float64 else torch.float32], least)
    assert_near(grad, expected_grad, TOLERANCE[z.dtype], least)


def assert_near(got, expected, tolerance, least):
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    finite = expected.isfinite()
    assert torch.equal(got[~finite].isnan(), expected[~finite].isnan())
    got, expected = got.double().where(finite, 0), expected.double().where(finite, 0)
    if got.numel():
        assert (got - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(least)


@fuzz
@given(st.data(), st.sampled_from(["none", "sum", "mean"]), st.booleans(), st.sampled_from(["xt", "mask", "all"]))
def test_dce(data, reduction, exclude_mask, given_as):
    special = data.draw(st.booleans())
    z, x0, masked, mask_index, g = data.draw(rows(special))
    if data.draw(st.booleans()):
        x0 = torch.where(torch.rand(x0.shape, generator=g) < 0.3, -100, x0)
    where = {"mask": masked} if given_as == "mask" else {}
    if given_as == "xt":
        where = {"xt": torch.where(masked, mask_index, x0)}
    options = dict(mask_index=mask_index, exclude_mask=exclude_mask, reduction=reduction, **where)
    options["weight"] = weights(data.draw, x0.shape, g)
    if not special:  # beside numbers of -1e6 the reference's own log-sum-exp is not exact enough
        options["z_loss"] = data.draw(st.sampled_from([0.0, 0.1]))
    agree(lambda z, backend: dce_loss(z, x0, backend=backend, **options), z)


@fuzz
@given(st.data(), st.sampled_from(["none", "sum", "mean"]), st.sampled_from(["absorb", "uniform"]))
def test_dse(data, reduction, graph):
    z, x0, masked, mask_index, g = data.draw(rows(special=data.draw(st.booleans())))
    xt = torch.where(
        masked, mask_index if graph == "absorb" else torch.randint(0, z.shape[-1], x0.shape, generator=g), x0
    )
    forms = ["log_score", "scale_by_sigma", "logits"]
    options = dict(
        graph=graph, mask_index=mask_index, reduction=reduction, parametrization=data.draw(st.sampled_from(forms))
    )
    sigma, options["dsigma"] = weights(data.draw, x0.shape, g, low=0.05), weights(data.draw, x0.shape, g)
    # A gradient of conditionals is a difference, which for equal logits is 0 but for rounding.
    least = 0.1 if options["parametrization"] == "logits" else 1e-30
    # Just outside phi's series a term loses a digit, and a row may hold nothing else.
    agree(lambda z, backend: dse_loss(z, sigma, xt, x0, backend=backend, **options), z, slack=5, least=least)


@fuzz
@given(st.data(), st.integers(0, 6), st.integers(1, 80), st.integers(-(2**63), 2**63 - 1), st.booleans())
def test_masks(data, batch, length, seed, packed):
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    lengths = torch.randint(1, length + 1, (batch,), generator=g) if packed else torch.full((batch,), length)
    x0 = torch.randint(0, 50, (int(lengths.sum()),) if packed else (batch, length), generator=g)
    maskable = torch.rand(x0.shape, generator=g) < data.draw(st.sampled_from([0.2, 0.7, 1.0]))
    names = dict(seed=seed, step=data.draw(st.integers(0, 2**30)), mask_index=50, maskable=maskable)
    names["sample_ids"] = torch.randint(0, 2**62, (batch,), generator=g)
    calls = []
    if packed:
        names["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        most = torch.stack([part.sum() for part in maskable.split(lengths.tolist())]) if batch else lengths
    else:
        most = maskable.sum(1)
        p = torch.rand(x0.shape, generator=g)
        calls.append(lambda backend: mask_tokens(x0, p, backend=backend, **names))
    counts = (torch.rand(batch, generator=g) * (most + 1)).long()
    calls.append(lambda backend: mask_exactly(x0, counts, backend=backend, **names))
    if (most > 0).all():
        calls.append(lambda backend: harmonic_mask(x0, backend=backend, **names))
    for call in calls:
        assert all(torch.equal(a, b) for a, b in zip(call("cpu"), call("reference"), strict=True))
