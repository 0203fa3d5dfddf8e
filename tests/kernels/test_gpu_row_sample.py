"""Tokens drawn from rows by the GPU backends: the reference's for the same names, unless two race times nearly tie."""

import dataclasses
import math

import pytest
import torch

from fastdiff import reverse_step
from fastdiff.ops.row_sample import SampleRows, reverse_rows, row_sample

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def problem(shape, num_states, dtype, device, exclude=None, **options):
    """Rows of which some are not live, and those are NaN, as are the ids that are not drawn."""
    g = torch.Generator().manual_seed(num_states)
    z, live = 2 * torch.randn(*shape, num_states, generator=g), torch.rand(shape, generator=g) < 0.8
    z[~live] = torch.nan
    if exclude is not None:
        exclude = torch.tensor(exclude)
        z[..., exclude] = torch.nan
    tensors = dict(
        z=z.to(dtype),
        xt=torch.randint(0, num_states, shape, generator=g),
        live=live,
        exclude=exclude,
        seed=torch.tensor(-(2**40) - 7),
        step=torch.randint(0, 2**25, (), generator=g),
        sample_ids=torch.randint(0, 2**33, shape, generator=g),
        positions=torch.randint(0, 9000, shape, generator=g),
        law=None,
    ) | {name: options.pop(name) for name in list(options) if torch.is_tensor(options[name])}
    tensors = {name: t if t is None else t.to(device) for name, t in tensors.items()}
    return SampleRows(**tensors, **dict(temperature=1.0, top_k=0, top_p=1.0, with_stats=False) | options)


def both(backend, rows):
    """Asserts that a backend gives what the reference does, and gives that."""
    got, expected = (row_sample(dataclasses.replace(rows), b) for b in (backend, "reference"))
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.equal(got.argmax, expected.argmax)
    torch.testing.assert_close(got.stats, expected.stats, rtol=1e-5, atol=2e-6)
    return got


# About the lengths of a group, of the classes and of a tile.
@pytest.mark.parametrize(("temperature", "with_stats"), [(1.0, False), (0.5, True), (0.0, True)])
@pytest.mark.parametrize(
    ("num_states", "dtype", "exclude"),
    [
        (1, F32, None),
        (2, BF16, [1]),
        (27, F16, [3, 20, 26]),
        (1023, F32, None),
        (1024, BF16, [1023]),
        (1025, F32, [0]),
        (2600, BF16, [5, 2598]),
        (4999, F32, [4998, 0]),
    ],
)
def test_agrees_with_the_reference(num_states, dtype, exclude, temperature, with_stats, backend, device):
    both(backend, problem((1, 3), num_states, dtype, device, exclude, temperature=temperature, with_stats=with_stats))


@pytest.mark.parametrize(("temperature", "with_stats"), [(1.0, True), (1.7, False), (0.0, False)])
def test_other_modes(temperature, with_stats, backend, device):
    both(backend, problem((2, 2), 1030, F16, device, [1], temperature=temperature, with_stats=with_stats))


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.5), (0, 1e-60), (40, 0.7), (5000, 1.0)])
def test_truncated(top_k, top_p, backend, device):
    options = dict(exclude=[7], temperature=0.8, top_k=top_k, top_p=top_p, with_stats=top_k == 3)
    for num_states, dtype in ((27, F16), (2100, BF16), (27, F32)):
        both(backend, problem((1, 2), num_states, dtype, device, **options))


def test_truncated_ties_stay_together(backend, device):
    z = torch.tensor([2.0, -0.0, 0.0, -1.0, -torch.inf, -2.0], device=device).expand(2, 6, 6)
    rows = problem((2, 6), 6, BF16, device, z=z, live=torch.ones(2, 6).bool(), top_k=2, temperature=9.0)
    assert set(both(backend, rows).tokens.flatten().tolist()) == {0, 1, 2}


# theta V, kappa / V, lam and log_here: of scores and of conditionals, on the absorbing graph and on the uniform one.
LAWS = {
    "absorb": (0.0, 14.0, 1.0, 0.0),
    "absorb, conditionals": (0.0, 0.0, -1.5, -math.inf),
    "x_t by what stands there": (0.0, 1.0, 0.0, math.nan),
    "uniform": (0.6, 5.0, 0.0, 0.3),
    "uniform, conditionals": (-0.4, 2.0, -0.1, math.nan),
    "uniform, all else gone": (1e9, 1.0, 0.0, 0.0),
}


@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("name", LAWS)
def test_laws(name, temperature, backend, device):
    theta, kappa, lam, log_here = LAWS[name]
    for num_states, dtype in ((27, F32), (2101, BF16)) if temperature == 0.3 else ((1027, F16),):
        law = torch.tensor([theta / num_states, kappa * num_states, lam, log_here], dtype=torch.float64)
        options = dict(temperature=temperature, law=law.expand(1, 4, 4).contiguous())
        both(backend, problem((1, 4), num_states, dtype, device, None if theta < 0 else [num_states - 2], **options))


@pytest.mark.parametrize("name", ["uniform", "uniform, conditionals"])
def test_cold_laws(name, backend, device):
    theta, kappa, lam, log_here = LAWS[name]
    law = torch.tensor([theta / 27, kappa * 27, lam, log_here], dtype=torch.float64).expand(1, 4, 4).contiguous()
    for temperature in (0.03, 1e-5):
        both(backend, problem((1, 4), 27, F32, device, temperature=temperature, law=law))


@pytest.mark.parametrize("temperature", [1e-6, 1e30])
def test_extreme_temperatures(temperature, backend, device):
    both(backend, problem((1, 3), 27, F32, device, [1], temperature=temperature, with_stats=True))
    both(backend, problem((1, 2), 27, F16, device, temperature=temperature, top_k=4, top_p=0.9))


def both_rows(backend, rows, law):
    """Asserts that a backend's rows of probabilities are the reference's, and gives them."""
    law = torch.tensor(law, dtype=torch.float64, device=rows.xt.device).expand(*rows.xt.shape, 4).contiguous()
    got, expected = (reverse_rows(dataclasses.replace(rows), law, b) for b in (backend, "reference"))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got.sum(-1), torch.ones_like(rows.xt, dtype=torch.float32), rtol=0, atol=1e-5)
    return got


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize(("num_states", "dtype"), [(2, BF16), (27, F32), (1025, F16), (2600, BF16)])
def test_laws_as_rows(num_states, dtype, name, backend, device):
    theta, kappa, lam, log_here = LAWS[name]
    rows = problem((1, 4), num_states, dtype, device)
    probs = both_rows(backend, rows, (theta / num_states, kappa * num_states, lam, log_here))
    stays = torch.nn.functional.one_hot(rows.xt, num_states).float()
    assert torch.equal(probs[~rows.live], stays[~rows.live])


@pytest.mark.parametrize("num_states", [5, 1060, 2603])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_rows_that_start_anywhere(num_states, dtype, backend, device):
    wide = torch.randn(2, 3, num_states + 3, generator=torch.Generator().manual_seed(0))
    wide[0, 1, 3] = -torch.inf
    for z in (wide[..., 3:], wide[:, 1:]):
        rows = problem(z.shape[:-1], z.shape[-1], dtype, device, z=z.to(dtype), live=torch.ones(z.shape[:-1]).bool())
        for law in ((0.3 / num_states, num_states, 0.0, 0.0), (-0.4 / num_states, 1.0, -0.1, math.nan)):
            both_rows(backend, rows, law)


def test_rows_at_their_limits(backend, device):
    z = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    rows = problem((5,), 9, F32, device, z=z, live=torch.ones(5).bool())
    stays = torch.nn.functional.one_hot(rows.xt, 9).float()
    assert torch.equal(
        both_rows(backend, rows, (1e9, 0.0, 0.0, 0.0)), stays
    )  # nothing can replace x_t, nor can it stay
    likely = both_rows(backend, rows, (0.0, 0.0, 0.0, -10.0))
    rows.z -= 300
    torch.testing.assert_close(both_rows(backend, rows, (0.0, 0.0, 0.0, 0.0)), likely, rtol=1e-4, atol=0)
    torch.testing.assert_close(both_rows(backend, rows, (0.1, 1.0, 0.0, 0.0)), stays)


@pytest.mark.parametrize("xt", [0, 1])
def test_the_other_of_two_states_though_its_logit_is_minus_infinity(xt, backend, device):
    z = torch.full((4, 8, 2), -torch.inf, device=device)
    z[..., xt] = 0
    tokens = torch.full((4, 8), xt, device=device)
    options = dict(graph="uniform", parametrization="logits", seed=3, temperature=0.0)
    drawn = reverse_step(z, tokens, 20.0, sigma_next=10.0, backend=backend, **options)
    expected = reverse_step(z, tokens, 20.0, sigma_next=10.0, backend="reference", **options)
    assert torch.equal(drawn, expected)
    assert (drawn != xt).any()


def test_rows_without_a_law_are_nan(backend, device):
    z = torch.zeros(6, 9)
    z[0, 3], z[1, 3], z[2] = torch.nan, torch.inf, -torch.inf
    xt = torch.tensor([1, 5, 7, 9, -1, 0])
    for theta in (0.0, 0.1, -0.1):
        for log_here in (-math.inf, math.nan):
            law = torch.tensor([theta, 0.0, 0.0, log_here], dtype=torch.float64, device=device).repeat(6, 1)
            rows = problem((6,), 9, F32, device, z=z, xt=xt, live=torch.ones(6).bool())
            assert reverse_rows(rows, law, backend).isnan().all(-1).tolist() == [True] * 5 + [False]
            rows.live[:] = False
            law[:] = torch.nan
            probs = reverse_rows(rows, law, backend)
            assert probs.sum(-1).tolist() == [1, 1, 1, 0, 0, 1]


@pytest.mark.parametrize("layout", ["next position", "rows apart", "columns apart", "expanded", "four dimensions"])
def test_layouts(layout, backend, device):
    z = torch.randn(2, 2, 1065, generator=torch.Generator().manual_seed(0))
    if layout == "next position":
        z = z[:, 1:]
    if layout == "rows apart":
        z = z[..., 3:1064]
    if layout == "columns apart":
        z = torch.stack([z, z], -1)[..., 0]
    if layout == "expanded":
        z = z[:, :1].expand(z.shape)
    if layout == "four dimensions":
        z = z[None].expand(2, *z.shape)
    both(
        backend,
        problem(z.shape[:-1], z.shape[-1], F32, device, z=z, live=torch.ones(z.shape[:-1]).bool(), with_stats=True),
    )


def test_rows_without_a_distribution_keep_their_token(backend, device):
    z = torch.zeros(4, 9)
    z[0, 3], z[1, 3], z[2] = torch.nan, torch.inf, -torch.inf
    law = torch.tensor([0.0, 0.0, 0.0, 0.0], dtype=torch.float64).expand(4, 4).contiguous()
    xt = torch.tensor([1, 5, 7, 9])  # the last does not exist, which matters to a law only
    live = torch.ones(4).bool()
    for options in (dict(with_stats=True), dict(temperature=0.0), dict(top_k=2, top_p=0.5)):
        tokens = row_sample(problem((4,), 9, F32, device, z=z, xt=xt, live=live, **options), backend).tokens
        assert tokens[:3].tolist() == [1, 5, 7]
        assert 0 <= tokens[3] < 9
    for theta in (0.0, 0.1, -0.1):
        law[:, 0], law[:, 3] = theta, torch.nan
        rows = problem((4,), 9, F32, device, z=z, xt=xt, live=live, law=law)
        assert row_sample(rows, backend).tokens.tolist() == [1, 5, 7, 9]


def test_empty_batches_and_float64(backend, device):
    for shape in ((0, 3), (2, 0)):
        drawn = row_sample(problem(shape, 11, F32, device, with_stats=True), backend)
        assert drawn.tokens.shape == shape
        assert drawn.stats.shape == (3, *shape)
        law = torch.zeros(*shape, 4, dtype=torch.float64, device=device)
        probs = reverse_rows(problem(shape, 11, F32, device), law, backend)
        assert (probs.shape, probs.dtype) == ((*shape, 11), F32)
    both(backend, problem((2, 3), 11, torch.float64, device, with_stats=True))
    both_rows(backend, problem((2, 3), 11, torch.float64, device), LAWS["absorb"])


def test_opcheck(backend, device):
    rows = problem((1, 2), 11, F32, device, exclude=[3], with_stats=True)
    torch.library.opcheck(getattr(torch.ops.fastdiff.row_sample, backend), rows.arguments())
    rows = problem((1, 2), 11, F32, device)
    law = torch.tensor(LAWS["uniform"], dtype=torch.float64, device=device).repeat(1, 2, 1)
    torch.library.opcheck(getattr(torch.ops.fastdiff.reverse_rows, backend), (rows.z, rows.xt, rows.live, law))
