import math

import pytest
import torch

from fastdiff.schedules import Cosine, Geometric, Hybrid, Linear, LogLinear, Polynomial, Schedule

SCHEDULES = [
    LogLinear(),
    LogLinear(eps=1e-5),
    Geometric(1e-4, 20.0),
    Cosine(),
    Cosine(eps=0.1),
    Linear(0.0, 10.0),
    Linear(0.2, 3.0),
    Polynomial(2.0),
    Polynomial(0.5),
    Hybrid(),
    Hybrid(0.3, gamma=0.5),
]
# close to both ends, where careless forms lose their digits
SMALL = torch.logspace(-12, -2, 11, dtype=torch.float64)
TIMES = torch.cat([SMALL, torch.linspace(0.05, 0.95, 19, dtype=torch.float64), 1 - SMALL.flip(0)])

each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)


@each_schedule
def test_rate_is_the_derivative_of_total_noise(schedule: Schedule) -> None:
    t = TIMES.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(schedule.total_noise(t).sum(), t)
    torch.testing.assert_close(schedule.rate_noise(TIMES), derivative, rtol=1e-10, atol=0)


@each_schedule
def test_rate_is_the_finite_difference_of_total_noise(schedule: Schedule) -> None:
    t = torch.linspace(0.1, 0.9, 17, dtype=torch.float64)
    difference = (schedule.total_noise(t + 1e-5) - schedule.total_noise(t - 1e-5)) / 2e-5
    torch.testing.assert_close(schedule.rate_noise(t), difference, rtol=1e-6, atol=0)


@each_schedule
def test_call_alpha_and_inverse_agree_with_total_noise(schedule: Schedule) -> None:
    sigma, dsigma = schedule(TIMES)
    torch.testing.assert_close(sigma, schedule.total_noise(TIMES), rtol=0, atol=0)
    torch.testing.assert_close(dsigma, schedule.rate_noise(TIMES), rtol=0, atol=0)
    torch.testing.assert_close(schedule.alpha(TIMES), torch.exp(-sigma), rtol=1e-14, atol=0)
    # where noise is there at t = 0, sigma(t) - sigma(0) holds no more than 1e-16 / t of t
    starts_at_zero = schedule.total_noise(torch.zeros(1, dtype=torch.float64)) == 0
    torch.testing.assert_close(schedule.inverse(sigma), TIMES, rtol=1e-9, atol=0 if starts_at_zero else 1e-14)


@each_schedule
def test_noise_grows_with_time(schedule: Schedule) -> None:
    sigma = schedule.total_noise(torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert (sigma.diff() > 0).all()
    assert sigma[0] >= 0
    assert sigma[-1].isfinite()


@pytest.mark.parametrize(
    ("schedule", "alpha"),
    [
        (LogLinear(1e-3), lambda t: 1 - 0.999 * t),
        (Geometric(0.01, 5.0), lambda t: math.exp(-(0.01 ** (1 - t)) * 5.0**t)),
        (Cosine(1e-3), lambda t: 1e-3 + 0.999 * math.cos(math.pi * t / 2)),
        (Linear(0.5, 2.0), lambda t: math.exp(-0.5 - 1.5 * t)),
        (Polynomial(3.0, eps=0.01), lambda t: 1 - 0.99 * t**3),
    ],
    ids=lambda value: repr(value) if isinstance(value, Schedule) else "formula",
)
def test_alpha_is_the_published_formula(schedule: Schedule, alpha) -> None:
    t = [0.0, 0.25, 0.5, 0.9, 1.0]
    result = schedule.alpha(torch.tensor(t, dtype=torch.float64))
    assert result.tolist() == pytest.approx([alpha(s) for s in t], rel=1e-12)


@each_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_float_dtype_is_exact_to_its_own_rounding(schedule: Schedule, dtype: torch.dtype) -> None:
    t = torch.tensor([2.0**-10, 0.25, 0.5, 0.75, 1.0], dtype=dtype).reshape(1, 5)
    for method in (schedule.total_noise, schedule.rate_noise, schedule.alpha):
        result = method(t)
        assert result.dtype == dtype
        assert torch.equal(result, method(t.double()).to(dtype))


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine(), Polynomial(2.0)], ids=repr)
def test_small_times_keep_their_relative_precision(schedule: Schedule) -> None:
    t = torch.tensor([1e-6], dtype=torch.float64)
    leading = {LogLinear: 1e-6, Cosine: (math.pi * 1e-6) ** 2 / 8, Polynomial: 1e-12}[type(schedule)]
    assert schedule.total_noise(t).item() == pytest.approx(0.999 * leading, rel=1e-6)


def test_polynomial_of_degree_one_is_log_linear() -> None:
    assert torch.equal(Polynomial(1.0).total_noise(TIMES), LogLinear().total_noise(TIMES))


@pytest.mark.parametrize("kind", [LogLinear, Cosine, lambda eps: Polynomial(2.0, eps)])
@pytest.mark.parametrize("eps", [-0.1, 1.0, math.nan])
def test_eps_out_of_range_is_an_error(kind, eps: float) -> None:
    with pytest.raises(ValueError, match="eps"):
        kind(eps=eps)


@pytest.mark.parametrize("kind", [Geometric, Linear])
@pytest.mark.parametrize("bounds", [(-1.0, 1.0), (2.0, 1.0), (1.0, 1.0), (0.1, math.inf), (math.nan, 1.0)])
def test_noise_range_out_of_order_is_an_error(kind, bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="sigma_min"):
        kind(*bounds)


def test_geometric_cannot_start_at_zero() -> None:
    with pytest.raises(ValueError, match="sigma_min: expected > 0"):
        Geometric(0.0, 1.0)


@pytest.mark.parametrize("k", [0.0, -1.0, math.inf, math.nan])
def test_polynomial_degree_out_of_range_is_an_error(k: float) -> None:
    with pytest.raises(ValueError, match="k: expected a positive"):
        Polynomial(k)


@pytest.mark.parametrize("bad", [0.5, torch.tensor([0, 1])], ids=["number", "integers"])
def test_times_that_are_not_floating_tensors_are_errors(bad) -> None:
    with pytest.raises(TypeError, match=r"^t: expected a"):
        LogLinear().total_noise(bad)
    with pytest.raises(TypeError, match=r"^sigma: expected a"):
        LogLinear().inverse(bad)
