import math
import re
from pathlib import Path

import pytest
import torch
from oracles import MarkovChain, Tabled, skewed_chain
from torch import Tensor

from fastdiff.estimators import LogRatioEstimate, log_likelihood_ratio, time_free_nll
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.preferences import dpo_loss, grpo_loss

MARGINS = torch.tensor([-30.0, -2.0, 0.0, 0.5, 400.0], dtype=torch.float64)


def estimate(m: Tensor, variance: Tensor) -> LogRatioEstimate:
    return LogRatioEstimate(m, variance.sqrt(), torch.ones_like(m), torch.ones_like(m), variance)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------
# DPO.


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo_is_the_log_likelihood_of_a_preference(beta: float) -> None:
    expected = torch.tensor([math.log1p(math.exp(-beta * m)) for m in MARGINS.tolist()], dtype=torch.float64)
    loss = dpo_loss(MARGINS, beta=beta, reduction="none")
    torch.testing.assert_close(loss.loss, expected)
    assert loss.bias is None
    for reduction in ("sum", "mean"):
        expected_scalar = getattr(expected, reduction)()
        torch.testing.assert_close(dpo_loss(MARGINS, beta=beta, reduction=reduction).loss, expected_scalar)
    m = MARGINS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: dpo_loss(m, beta=beta).loss, m)


def test_dpo_with_a_large_beta_is_a_hinge() -> None:
    wrong_or_right = MARGINS[MARGINS != 0]
    torch.testing.assert_close(
        dpo_loss(wrong_or_right, beta=1e4, reduction="none").loss, -1e4 * wrong_or_right.clamp(max=0)
    )


def test_the_bias_is_half_the_curvature_times_the_variance() -> None:
    m, variance, beta = numbers(4).requires_grad_(), numbers(4, seed=1).square().requires_grad_(), 0.7
    slope = torch.autograd.grad(dpo_loss(m, beta=beta, reduction="sum").loss, m, create_graph=True)[0]
    curvature = torch.autograd.grad(slope.sum(), m)[0]
    plain = dpo_loss(estimate(m, variance), beta=beta, reduction="none")
    torch.testing.assert_close(plain.bias, (curvature * variance / 2).detach())
    assert not plain.bias.requires_grad
    debiased = dpo_loss(estimate(m, variance), beta=beta, debias=True, reduction="none")
    torch.testing.assert_close(debiased.loss, plain.loss - plain.bias)
    torch.testing.assert_close(debiased.bias, plain.bias)
    assert torch.autograd.gradcheck(lambda m, v: dpo_loss(estimate(m, v), beta=beta, debias=True).loss, (m, variance))


@pytest.mark.slow
@pytest.mark.parametrize(("proposal", "passes"), [("stratified", 12), ("uniform", 6)])
def test_debias_brings_the_loss_and_its_gradient_to_those_of_the_true_margin(proposal: str, passes: int) -> None:
    trained, scale = Tabled(skewed_chain(), 8), torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    transition = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    reference = Tabled(MarkovChain(torch.full((2,), 0.5, dtype=torch.float64), transition), 8)
    x, y = torch.zeros(1, 8, dtype=torch.int64), torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0]])

    def loss(rows: int, num_samples: int, **options) -> Tensor:
        """The loss and its derivative for scale, [2], with and without its bias."""
        margin = log_likelihood_ratio(
            lambda xt: scale * trained(xt),
            x.expand(rows, -1),
            y.expand(rows, -1),
            mask_index=2,
            num_samples=num_samples,
            proposal=proposal,
            reference=reference,
            differentiable=True,
        )
        losses = [dpo_loss(margin, debias=debias).loss for debias in (False, True)]
        slopes = [torch.autograd.grad(loss, scale, retain_graph=True)[0] for loss in losses]
        return torch.stack([torch.stack([a.detach(), b]) for a, b in zip(losses, slopes, strict=True)])

    truth = loss(1, 255)
    assert torch.equal(truth[0], truth[1])
    plain, debiased = (loss(4000, passes) - truth).abs()
    assert (plain > 0.003).all()
    assert (debiased < plain / 2).all(), (plain, debiased)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"margin": torch.tensor([0.0, math.inf])}, ValueError, r"^margin: expected finite numbers, got inf at \[1\]"),
        ({"margin": torch.tensor([math.nan])}, ValueError, r"^margin: .*got nan at \[0\]"),
        ({"margin": torch.zeros(2, 3)}, ValueError, r"^margin: expected shape \[B\] .*got \(2, 3\)"),
        ({"margin": torch.zeros(0)}, ValueError, r"^margin: .*B >= 1, got \(0,\)"),
        ({"margin": torch.zeros(2).long()}, TypeError, r"^margin: expected a floating dtype, got torch.int64"),
        ({"margin": 1.0}, TypeError, r"^margin: .*got float"),
        ({"beta": 0.0}, ValueError, r"^beta: .*above 0, got 0.0"),
        ({"beta": -1.0}, ValueError, r"^beta: .*got -1.0"),
        ({"beta": math.nan}, ValueError, r"^beta: .*got nan"),
        ({"debias": True}, ValueError, r"^debias: needs variances"),
        ({"reduction": "max"}, ValueError, r"^reduction: .*'max'"),
    ],
)
def test_bad_input_of_dpo_is_named(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        dpo_loss(**{"margin": torch.zeros(2), **change})


def test_an_impossible_answer_is_named() -> None:
    """A token of the second preferred answer has probability 0."""

    def model(xt: Tensor) -> Tensor:
        return torch.tensor([0.0, 0.0, -math.inf, 0.0]).expand(*xt.shape, 4)

    x, y = torch.tensor([[0, 1, 0], [2, 1, 0]]), torch.tensor([[1, 1, 1], [1, 1, 1]])
    margin = log_likelihood_ratio(model, x, y, mask_index=3, reference=lambda xt: torch.zeros(*xt.shape, 4))
    with pytest.raises(ValueError, match=r"^margin: expected finite numbers, got -inf at \[1\]"):
        dpo_loss(margin)


def test_the_code_of_the_docs() -> None:
    page = (Path(__file__).parents[1] / "docs" / "post_training.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    model, reference = (DiffusionTransformer(ModelConfig(5, 12, dim=16, depth=1, heads=2)) for _ in range(2))
    x = torch.randint(4, (4, 12), generator=torch.Generator().manual_seed(0))
    target, advantages = (torch.arange(12) >= 3).expand(4, -1), torch.tensor([1.0, -1.0, 0.5, -0.5])
    for block in blocks:
        names = dict(model=model, reference=reference, mask_index=4, step=7, target=target, torch=torch)
        exec(block, names | dict(x0=x, better=x, worse=3 - x, advantages=advantages))
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert all(p.grad is None for p in reference.parameters())
        model.zero_grad()


# ---------------------------------------------------------------------------------------------------------
# GRPO.

ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, 2.0, -1.5], dtype=torch.float64)


def published(r: float, a: float, low: float, high: float) -> float:
    return -min(r * a, min(max(r, 1 - low), 1 + high) * a)


@pytest.mark.parametrize("num_tokens", [None, torch.tensor([1, 2, 3, 4, 5])])
@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_grpo_of_answers(num_tokens: Tensor | None, kl: str) -> None:
    new, old, ref = numbers(5), numbers(5, seed=1), numbers(5, seed=2)
    loss = grpo_loss(new, old, ADVANTAGES, num_tokens=num_tokens, reference_logps=ref, clip=(0.2, 0.3), beta=0.4, kl=kl)
    n = [1] * 5 if num_tokens is None else num_tokens.tolist()
    d = [(p - q).item() for p, q in zip(new, ref, strict=True)]
    distance = [(x * x / 2 if kl == "k2" else math.exp(-x) + x - 1) / k for x, k in zip(d, n, strict=True)]
    ratio = [math.exp((p - q).item() / k) for p, q, k in zip(new, old, n, strict=True)]
    each = [published(r, a, 0.2, 0.3) + 0.4 * x for r, a, x in zip(ratio, ADVANTAGES.tolist(), distance, strict=True)]
    assert loss.loss.item() == pytest.approx(sum(each) / 5, rel=1e-12)
    assert loss.kl.item() == pytest.approx(sum(distance) / 5, rel=1e-12)
    below = sum(r < 0.8 and a < 0 for r, a in zip(ratio, ADVANTAGES.tolist(), strict=True))
    above = sum(r > 1.3 and a > 0 for r, a in zip(ratio, ADVANTAGES.tolist(), strict=True))
    assert (loss.clipped_low.item(), loss.clipped_high.item()) == pytest.approx((below / 5, above / 5))
    assert below + above > 0


MASK = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]]).bool()


@pytest.mark.parametrize(
    ("options", "divisors"),
    [
        ({}, [12] * 5),
        ({"reduction": "sequence_mean"}, [5 * n for n in (2, 3, 1, 4, 2)]),
        ({"num_items": 20}, [20] * 5),
        ({"num_items": torch.tensor(20)}, [20] * 5),
    ],
)
def test_grpo_of_tokens(options: dict, divisors: list[int]) -> None:
    new, old, ref = numbers(5, 4), numbers(5, 4, seed=1), numbers(5, 4, seed=2)
    total = count = clipped = distance = 0.0
    for i, j in MASK.nonzero().tolist():
        r, d = math.exp((new - old)[i, j].item()), (new - ref)[i, j].item()
        kl, a = math.exp(-d) + d - 1, ADVANTAGES[i].item()
        total += (published(r, a, 0.2, 0.2) + 0.1 * kl) / divisors[i]
        distance, count, clipped = distance + kl, count + 1, clipped + (r < 0.8 and a < 0) + (r > 1.2 and a > 0)
    for x in (new, old, ref):
        x[~MASK] = math.nan  # is never looked at
    loss = grpo_loss(new, old, ADVANTAGES, mask=MASK, reference_logps=ref, beta=0.1, kl="k3", **options)
    assert loss.loss.item() == pytest.approx(total, rel=1e-12)
    assert loss.kl.item() == pytest.approx(distance / count, rel=1e-12)
    assert (loss.clipped_low + loss.clipped_high).item() == pytest.approx(clipped / count)


@pytest.mark.parametrize("tokens", [False, True])
def test_the_gradient_of_grpo(tokens: bool) -> None:
    shape, options = ((5, 4), {"mask": MASK}) if tokens else ((5,), {"num_tokens": torch.tensor([2, 3, 1, 4, 2])})
    new, old, ref = (numbers(*shape, seed=seed) for seed in range(3))
    options |= dict(reference_logps=ref, beta=0.3)
    assert torch.autograd.gradcheck(lambda x: grpo_loss(x, old, ADVANTAGES, **options).loss, new.requires_grad_())
    assert new.grad is None


def test_where_the_model_drew_the_answers_the_gradient_is_the_policy_gradient() -> None:
    logps = numbers(5).requires_grad_()
    for old in (None, logps, logps.detach()):
        loss = grpo_loss(logps, old, ADVANTAGES, num_tokens=torch.tensor([1, 2, 3, 4, 5]))
        torch.testing.assert_close(loss.loss, -ADVANTAGES.mean())
        slope = torch.autograd.grad(loss.loss, logps)[0]
        torch.testing.assert_close(slope, -ADVANTAGES / torch.arange(1, 6) / 5)


def test_what_is_clipped_has_no_gradient_and_does_not_overflow() -> None:
    logps = torch.tensor([1000.0, -1000.0, -1000.0, 0.1], requires_grad=True)
    loss = grpo_loss(logps, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, 1.0]), clip=(0.2, 0.05))
    torch.testing.assert_close(loss.loss, torch.tensor((-1.05 + 0.8 - 0 - 1.05) / 4))
    assert torch.autograd.grad(loss.loss, logps)[0].abs().max() == 0
    assert (loss.clipped_low, loss.clipped_high) == (0.25, 0.5)


def test_half_precision_is_widened() -> None:
    loss = grpo_loss(torch.zeros(2, dtype=torch.bfloat16), None, torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    assert loss.loss.dtype == torch.float32
    assert loss.loss.item() == -1.5


def test_old_and_reference_on_the_same_masks_share_their_noise() -> None:
    """Ratios of one model to itself are 1 on the same masks, and on others are not."""
    model, x = Tabled(skewed_chain(), 8), torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0]]).expand(50, -1)
    first, again, other = (-time_free_nll(model, x, mask_index=2, num_samples=6, seed=seed).nll for seed in (0, 0, 1))
    gain = torch.ones(50)
    same = grpo_loss(first, again, gain, reference_logps=again, beta=1.0)
    assert (same.loss.item(), same.kl, same.clipped_high) == (pytest.approx(-1), 0, 0)
    apart = grpo_loss(first, other, gain, reference_logps=other, beta=1.0)
    assert apart.clipped_high > 0.2
    assert apart.kl > 1


LOGPS, GAIN = torch.tensor([-1.0, -2.0]), torch.tensor([1.0, -1.0])
TOKENS, INSIDE = torch.full((2, 3), -1.0), torch.ones(2, 3, dtype=torch.bool)
EMPTY_ROW = torch.tensor([[True, True, True], [False, False, False]])
INFINITE = torch.tensor([-1.0, -math.inf])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logps": INFINITE}, ValueError, r"^logps: expected finite numbers, got -inf at \[1\]"),
        ({"old_logps": INFINITE}, ValueError, r"^old_logps: expected finite numbers, got -inf at \[1\]"),
        ({"reference_logps": INFINITE, "beta": 1.0}, ValueError, r"^reference_logps: .*got -inf at \[1\]"),
        ({"advantages": -INFINITE}, ValueError, r"^advantages: .*got inf at \[1\]"),
        ({"logps": torch.tensor([0.0, 200.0])}, ValueError, r"^logps - old_logps: .*finite ratio, got 202.0 at \[1\]"),
        (
            {"reference_logps": torch.tensor([0.0, 200.0]), "beta": 1.0, "kl": "k3"},
            ValueError,
            r"^logps - reference_logps: .*kl='k2'.*, got -202.0 at \[1\]",
        ),
        ({"logps": torch.zeros(2, 2, 2)}, ValueError, r"^logps: expected shape \[B\] or \[B, L\].*got \(2, 2, 2\)"),
        ({"logps": torch.zeros(0)}, ValueError, r"^logps: .*B >= 1, got \(0,\)"),
        ({"logps": LOGPS.long()}, TypeError, r"^logps: expected a floating dtype, got torch.int64"),
        ({"logps": [0.0, 0.0]}, TypeError, r"^logps: .*got list"),
        ({"old_logps": torch.zeros(3)}, ValueError, r"^old_logps: expected shape \(2,\) on cpu, got \(3,\) on cpu"),
        ({"advantages": torch.zeros(2, 1)}, ValueError, r"^advantages: expected shape \(2,\).*got \(2, 1\)"),
        ({"reference_logps": torch.zeros(1), "beta": 1.0}, ValueError, r"^reference_logps: expected shape \(2,\)"),
        ({"num_tokens": torch.tensor([3, 0])}, ValueError, r"^num_tokens: expected at least 1, got 0 at \[1\]"),
        ({"num_tokens": torch.tensor([3.0, 1.0])}, TypeError, r"^num_tokens: .*float32"),
        ({"num_tokens": torch.tensor([3])}, ValueError, r"^num_tokens: expected shape \(2,\), got \(1,\)"),
        ({"mask": INSIDE}, ValueError, r"^mask: expected None for logps \(2,\) of answers"),
        ({"logps": TOKENS, "old_logps": TOKENS}, ValueError, r"^mask: expected one.*for logps \(2, 3\) of tokens"),
        (
            {"logps": TOKENS, "old_logps": TOKENS, "mask": EMPTY_ROW},
            ValueError,
            r"^mask: expected a token in every answer, got 0 at \[1\]",
        ),
        (
            {"logps": TOKENS, "old_logps": TOKENS, "mask": INSIDE, "num_tokens": torch.tensor([3, 3])},
            ValueError,
            r"^mask: expected one, and no num_tokens",
        ),
        ({"logps": TOKENS, "mask": INSIDE[:, :2]}, ValueError, r"^mask: expected shape \(2, 3\), got \(2, 2\)"),
        ({"logps": TOKENS, "mask": INSIDE.long()}, TypeError, r"^mask: expected a bool tensor"),
        ({"beta": 0.1}, ValueError, r"^beta: .*with reference_logps, got 0.1"),
        ({"beta": -0.1, "reference_logps": LOGPS}, ValueError, r"^beta: .*got -0.1"),
        ({"clip": -0.1}, ValueError, r"^clip: .*got -0.1"),
        ({"clip": (1.0, 0.2)}, ValueError, r"^clip: expected 0 <= low < 1 .*got \(1.0, 0.2\)"),
        ({"kl": "k1"}, ValueError, r"^kl: .*'k1'"),
        ({"reduction": "sum"}, ValueError, r"^reduction: .*'sum'"),
        ({"reduction": "sequence_mean", "num_items": 3}, ValueError, r"^num_items: .*'sequence_mean'"),
        ({"num_items": 0}, ValueError, r"^num_items: expected a number above 0, got 0"),
    ],
)
def test_bad_input_of_grpo_is_named(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        grpo_loss(**{"logps": LOGPS, "old_logps": LOGPS, "advantages": GAIN, **change})
