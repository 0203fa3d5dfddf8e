"""Drawing tokens from rows: kernels against the reference, and the law against float64."""

import math

import pytest
import torch
from torch.library import opcheck

from fastdiff import linear_sample_tokens, reference, reverse_probs, reverse_step, sample_tokens
from fastdiff.generation.tokens import token_rows
from fastdiff.ops.row_sample import _row_sample

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [1, 2, 27, 1023, 1024, 1025, 2600]
M = -1


def rows(num_states, dtype=torch.float32, spread=3.0, batch=4, length=5):
    """Logits whose rows start anywhere, and tokens of which some are masks, the last id."""
    torch.manual_seed(num_states)
    z = (torch.randn(batch, length, num_states + 3) * spread).to(dtype)[..., 3:]
    xt = torch.randint(num_states, (batch, length))
    return z, torch.where(torch.rand(batch, length) < 0.8, num_states - 1, xt)


def assert_same(ours, expected):
    (tokens, stats), (tokens_, stats_) = ours, expected
    assert torch.equal(tokens, tokens_)
    assert torch.equal(stats.argmax, stats_.argmax)
    for x, y in zip(stats[:3], stats_[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"temperature": 0},
        {"top_k": 3},
        {"top_k": 10**6},
        {"top_p": 0.6},
        {"top_p": 1 - 1e-9},
        {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
        {"exclude": [0, 1, -2], "exclude_mask": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_the_reference(dtype, options):
    for num_states in SIZES[3 if "exclude" in options else 1 :]:
        z, xt = rows(num_states, dtype)
        names = dict(return_stats=True, seed=12345678901, step=3, sample_ids=torch.arange(len(xt)) * 7)
        expected = sample_tokens(z, xt, backend="reference", **names, **options)
        assert_same(sample_tokens(z, xt, **names, **options), expected)
        assert torch.equal(
            sample_tokens(z, xt, seed=12345678901, step=3, sample_ids=names["sample_ids"], **options), expected[0]
        )


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("step", [{"sigma_next": 0.4}, {"sigma_next": 0.0}, {"step_size": 0.05}], ids=str)
@pytest.mark.parametrize("parametrization", ["log_score", "scale_by_sigma", "logits"])
@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_reverse_steps_agree_with_the_reference(graph, parametrization, step, temperature):
    for dtype in DTYPES:
        for num_states in (2, 27, 2600):
            z, xt = rows(num_states, dtype)
            z = z - 5.0 * (parametrization == "log_score")
            sigma = torch.rand(xt.shape) + 0.5
            options = dict(graph=graph, parametrization=parametrization, temperature=temperature, seed=5, **step)
            tokens = reverse_step(z, xt, sigma, **options)
            assert torch.equal(tokens, reverse_step(z, xt, sigma, backend="reference", **options))
            assert graph == "uniform" or torch.equal(tokens[xt != num_states - 1], xt[xt != num_states - 1])
            if temperature == 1:
                options = dict(graph=graph, parametrization=parametrization, **step)
                probs = reverse_probs(z, xt, sigma, **options)
                torch.testing.assert_close(
                    probs, reverse_probs(z, xt, sigma, backend="reference", **options), rtol=2e-5, atol=1e-7
                )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.6}, {"exclude": [3]}], ids=str)
def test_temperatures_without_bounds(options, backend):
    """Cold ones take the largest; of hot ones all ids with a finite logit are alike."""
    options = dict(options, seed=1, backend=backend)
    for dtype in DTYPES:
        z, xt = rows(2600, dtype)
        z[..., 5] = -math.inf
        cold = sample_tokens(z, xt, **options | {"temperature": 0})
        for temperature in (1e-7, 1e-39, 5e-324):
            assert torch.equal(sample_tokens(z, xt, **options | {"temperature": temperature}), cold)
        hot = sample_tokens(z, xt, **options | {"temperature": 1e9})
        for temperature in (1e20, 1e39, 1e300):
            assert torch.equal(sample_tokens(z, xt, **options | {"temperature": temperature}), hot)


@pytest.mark.parametrize("parametrization", ["log_score", "logits"])
def test_cold_steps_of_the_uniform_graph_jump_to_likely_tokens(parametrization):
    """Also where all jumps are so unlikely that their powers underflow."""
    z, xt = rows(27, batch=40)
    z = z - 5.0 * (parametrization == "log_score")
    for step in ({"sigma_next": 0.4}, {"sigma_next": 0.0}, {"step_size": 0.3}):
        for temperature in (0.03, 1e-3, 1e-5, 1e-9, 1e300):
            options = dict(graph="uniform", parametrization=parametrization, temperature=temperature, seed=5, **step)
            tokens = reverse_step(z, xt, 0.9, **options)
            assert torch.equal(tokens, reverse_step(z, xt, 0.9, backend="reference", **options))


@pytest.mark.parametrize("parametrization", ["log_score", "scale_by_sigma", "logits"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_excluded_ids_are_never_jumped_to(backend, parametrization):
    n, z = 4000, rows(7, batch=1, length=1)[0]
    z[..., [1, 4]] = 5.0
    z = z.expand(n, 1, 7) - 5.0 * (parametrization == "log_score")
    xt, options = torch.full((n, 1), 6), dict(sigma_next=0.4, parametrization=parametrization)
    tokens = reverse_step(z, xt, 0.9, exclude=[1, -3], seed=2, backend=backend, **options).flatten()
    law = reverse_probs(z[:1].index_fill(-1, torch.tensor([1, 4]), -math.inf), xt[:1], 0.9, **options).flatten()
    value, freedom = chi_square(tokens, law)
    assert value < freedom + 4 * math.sqrt(2 * freedom) + 8
    with pytest.raises(ValueError, match="exclude: needs graph='absorb'"):
        reverse_step(z, xt, 0.9, graph="uniform", exclude=[1], backend=backend, **options)
    with pytest.raises(ValueError, match="exclude: expected to leave one of 7 ids, got all"):
        reverse_step(z, xt, 0.9, exclude=range(6), backend=backend, **options)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_head_without_a_row_for_the_mask(backend):
    z, xt = rows(27)
    xt[xt == 26] = 27
    options = dict(exclude_mask=False, seed=0, backend=backend, return_stats=True)
    tokens, stats = sample_tokens(z, xt, mask_index=27, **options)
    expected, expected_stats = sample_tokens(z, xt, mask=xt == 27, mask_index=0, **options)
    assert torch.equal(tokens, expected)
    assert torch.equal(stats.probability, expected_stats.probability)
    with pytest.raises(ValueError, match=r"mask_index: expected an id in \[-27, 27\), got 27"):
        sample_tokens(z, xt, mask_index=27, **options | {"exclude_mask": True})


def chi_square(tokens, law):
    """Of draws against a law, ids that are expected less than 5 times taken together; and its degrees of freedom."""
    expected = law.double() * len(tokens)
    counts = torch.bincount(tokens, minlength=len(law)).double()
    assert counts[law == 0].sum() == 0
    rare = expected < 5
    expected = torch.cat([expected[~rare], expected[rare].sum(0, keepdim=True)])
    counts = torch.cat([counts[~rare], counts[rare].sum(0, keepdim=True)])
    live = expected > 0
    return ((counts - expected)[live] ** 2 / expected[live]).sum().item(), int(live.sum()) - 1


@pytest.mark.parametrize(
    ("num_states", "spread", "options"),
    [
        (5, 1.0, {}),
        (1030, 1.0, {}),
        (5000, 3.0, {}),
        (3000, 2.0, {"temperature": 0.6}),
        (3000, 2.0, {"top_k": 40}),
        (3000, 2.0, {"top_p": 0.8}),
    ],
)
def test_law_is_that_of_float64(num_states, spread, options):
    n, (z, _) = 20_000, rows(num_states, batch=1, length=1, spread=spread)
    xt = torch.full((n, 1), num_states - 1)
    tokens = sample_tokens(z.expand(n, 1, num_states), xt, seed=3, **options).flatten()
    law = z.flatten().double().index_fill(0, torch.tensor(num_states - 1), -math.inf)
    law = torch.softmax(
        reference.kept_logits(law, options.pop("temperature", 1.0), options.get("top_k", 0), options.get("top_p", 1.0)),
        0,
    )
    value, freedom = chi_square(tokens, law)
    assert value < freedom + 4 * math.sqrt(2 * freedom) + 8  # four standard deviations


SAMPLED = 1024  # numbers by which the CPU guesses where thresholds are, at equal distances


def misleading_rows(num_states):
    """Rows whose sample is like the rest, above it, below it, ties, all there is, or in the order of a vocabulary."""
    noise = torch.randn(num_states)
    at = torch.arange(SAMPLED) * num_states // SAMPLED
    rank = torch.arange(1, num_states + 1).log()
    return torch.stack(
        [
            2 * noise,
            noise.index_add(0, at, torch.full((SAMPLED,), 9.0)),
            noise.index_add(0, at, torch.full((SAMPLED,), -9.0)),
            torch.zeros(num_states),
            (noise > 1).float(),
            -noise.relu(),  # the largest is -0
            torch.full((num_states,), -math.inf).index_copy(0, at, noise[:SAMPLED]),
            noise - rank,
            (noise * 1e-3).index_fill(0, torch.tensor([777]), 30.0),
            noise * 1e30,
        ]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_thresholds_do_not_depend_on_the_sample(dtype):
    torch.manual_seed(0)
    z = misleading_rows(5003).to(dtype).unsqueeze(1)
    z[..., -1] = math.nan  # the mask's, which is not drawn
    z = z.expand(-1, 6, -1)
    xt = torch.full(z.shape[:2], 5002)
    hot = [dict(top_k=k, temperature=30.0) for k in (1, 3, 40, 1500, 4900)]  # all that are kept are drawn
    some = [dict(top_p=p) for p in (1e-60, 0.1, 0.9, 0.9999)]
    for options in [*hot, *some, dict(top_k=3, top_p=0.6), dict(top_k=3000, top_p=0.9, temperature=2.0)]:
        tokens, expected = (sample_tokens(z, xt, seed=4, backend=b, **options) for b in ("cpu", "reference"))
        assert torch.equal(tokens, expected), options


@pytest.mark.parametrize("gap", [95.0, 400.0, math.inf])
def test_uniform_steps_where_x_t_is_all_but_certain(gap):
    xt = torch.full((1, 50), 2)
    z = torch.zeros(1, 50, 5)
    z[..., 2] = gap if gap < math.inf else 0
    if gap == math.inf:
        z[..., torch.arange(5) != 2] = -math.inf
    options = dict(sigma_next=0.5, graph="uniform", parametrization="logits")
    expected = reverse_probs(z, xt, 3.0, backend="reference", **options)
    torch.testing.assert_close(reverse_probs(z, xt, 3.0, **options), expected, rtol=2e-5, atol=1e-7)
    tokens = reverse_step(z, xt, 3.0, seed=0, **options)
    assert torch.equal(tokens, reverse_step(z, xt, 3.0, seed=0, backend="reference", **options))
    assert (tokens != 2).any()


def test_reverse_steps_follow_their_rows():
    n = 20_000
    z, xt = rows(7, batch=1, length=1)
    for graph, here in (("absorb", 6), ("uniform", 2)):
        for step in ({"sigma_next": 0.4}, {"step_size": 0.2}):
            options = dict(graph=graph, parametrization="logits", **step)
            xt = torch.full((n, 1), here)
            law = reverse_probs(z, xt[:1], 0.9, **options).flatten()
            tokens = reverse_step(z.expand(n, 1, 7), xt, 0.9, seed=1, **options).flatten()
            value, freedom = chi_square(tokens, law)
            assert value < freedom + 4 * math.sqrt(2 * freedom) + 8


def test_tail():
    """Ids of probability 5e-6 each, half of the mass in all: they come as often as they should."""
    z = torch.zeros(1, 1, 100_001)
    z[..., 0] = math.log(1e5)
    tokens = sample_tokens(z.expand(2000, 1, -1), torch.full((2000, 1), 1), mask_index=1, seed=0)
    assert abs((tokens == 0).double().mean() - 0.5) < 4 * 0.5 / math.sqrt(2000)
    assert len(tokens[tokens > 0].unique()) > 0.98 * (tokens > 0).sum()


def test_a_token_does_not_depend_on_its_batch():
    z, xt = rows(2600)
    ids = torch.arange(len(xt))
    tokens = sample_tokens(z, xt, seed=2)
    assert torch.equal(sample_tokens(z[2:4], xt[2:4], seed=2, sample_ids=ids[2:4]), tokens[2:4])
    assert torch.equal(sample_tokens(z.transpose(0, 1).contiguous().transpose(0, 1), xt, seed=2), tokens)
    assert not torch.equal(sample_tokens(z, xt, seed=2, step=1), tokens)


def test_only_masked_rows_are_read():
    z, xt = rows(27)
    live = xt == 26
    poisoned = z.masked_fill(~live.unsqueeze(-1), math.nan)
    tokens, stats = sample_tokens(poisoned, xt, seed=0, return_stats=True)
    assert torch.equal(tokens, sample_tokens(z, xt, seed=0))
    assert torch.equal(tokens[~live], xt[~live])
    assert (stats.probability[~live] == 0).all()
    some = live & (torch.rand(live.shape) < 0.5)
    assert torch.equal(sample_tokens(z, xt, mask=some, seed=0), torch.where(some, tokens, xt))


def test_nothing_here_has_a_gradient():
    z, xt = rows(27)
    _, stats = sample_tokens(z.requires_grad_(), xt, seed=0, return_stats=True)
    assert not stats.probability.requires_grad


def test_large_offsets_cost_no_digits():
    z, xt = rows(2600)
    z = (z * 64).round() / 64
    one, other = (sample_tokens(z + c, xt, seed=0, return_stats=True) for c in (0, 1024.0))
    assert_same(one, other)


def test_without_logits():
    hidden, lm_head, bias = torch.randn(4, 5, 16), torch.randn(2600, 16), torch.randn(2600)
    _, xt = rows(2600)
    options = dict(seed=0, temperature=0.8, return_stats=True)
    expected = sample_tokens(torch.nn.functional.linear(hidden, lm_head, bias), xt, **options)
    assert_same(linear_sample_tokens(hidden, lm_head, xt, bias=bias, **options), expected)


def test_operator():
    z, xt = rows(27)
    operator = token_rows(z, xt, None, M, True, (), (0, 0, None, None))
    for with_stats in (False, True):
        operator.with_stats = with_stats
        opcheck(_row_sample["cpu"], operator.arguments())
    compiled = torch.compile(lambda z, xt: sample_tokens(z, xt, seed=0), fullgraph=True)
    assert torch.equal(compiled(z, xt), sample_tokens(z, xt, seed=0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_without_a_law(backend, bad):
    z, xt = rows(2600)
    z[3, 2], xt[3, 2] = -math.inf, 2599
    with pytest.raises(ValueError, match="logits: expected finite numbers, or -inf beside some"):
        sample_tokens(z, xt, seed=0, backend=backend)
    z[3, 2, 1500:1600] = bad
    with pytest.raises(ValueError, match="logits: expected finite numbers, or -inf beside some"):
        sample_tokens(z, xt, seed=0, backend=backend)
    z[3, 2] = -math.inf
    z[3, 2, 1700] = -5
    assert sample_tokens(z, xt, seed=0, backend=backend)[3, 2] == 1700


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"temperature": -0.1}, ValueError, "temperature: expected a finite number >= 0, got -0.1"),
        ({"top_k": 0}, ValueError, "top_k: expected at least 1 or None, got 0"),
        ({"top_p": 0.0}, ValueError, r"top_p: expected a number in \(0, 1\] or None, got 0.0"),
        ({"exclude": range(27)}, ValueError, "exclude: expected to leave one of 27 ids, got all"),
        ({"exclude": [27]}, ValueError, r"exclude: expected an id in \[-27, 27\), got 27"),
        ({"mask_index": 27}, ValueError, r"mask_index: expected an id in \[-27, 27\), got 27"),
        ({"mask": torch.ones(4, 5)}, TypeError, "mask: expected a bool tensor"),
        ({"seed": True}, TypeError, "seed: expected an int, got True"),
        ({"step": 1.0}, TypeError, "step: expected an int, got 1.0"),
        ({"top_k": 2.0}, TypeError, "top_k: expected an int, got 2.0"),
        ({"mask_index": False}, TypeError, "mask_index: expected an int, got False"),
        ({"step": torch.arange(4)}, ValueError, r"step: expected one number, got shape \(4,\)"),
        ({"sample_ids": torch.arange(5)}, ValueError, r"sample_ids: expected shape \(4,\), got \(5,\)"),
        ({"xt": torch.zeros(4, 4).long()}, ValueError, r"xt: expected shape \(4, 5\), got \(4, 4\)"),
        ({"logits": torch.zeros(5, 27)}, ValueError, r"logits: expected shape \[B, L, V\], got \(5, 27\)"),
        ({"logits": torch.zeros(4, 5, 27).long()}, TypeError, "logits: expected float32"),
    ],
)
def test_bad_arguments(changes, error, text):
    z, xt = rows(27)
    arguments = {"logits": z, "xt": xt, "seed": 0} | changes
    with pytest.raises(error, match=text):
        sample_tokens(arguments.pop("logits"), arguments.pop("xt"), **arguments)
