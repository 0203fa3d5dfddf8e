import math

import pytest
import torch
from oracles import dna_toy, mixture
from torch import Tensor

from examples.experiments.areas import area_under_curve
from examples.experiments.autoregressive import continued
from examples.experiments.methods import MASK, N, next_letters
from examples.experiments.published_rule import MEANS, SUMS, published
from fastdiff import exact_nll, one_pass_nll
from fastdiff.model import DiffusionTransformer, ModelConfig


@pytest.mark.parametrize("given", [0, 3])
def test_the_published_sums_leave_out_the_full_mask(given: int) -> None:
    oracle, strings = dna_toy()
    x0, n = strings[:1].expand(64, -1), 8 - given
    target = (torch.arange(8) >= given).expand(64, -1)
    exact = exact_nll(oracle, x0[:1], mask_index=4, target=target[:1]).nll
    all_masked = one_pass_nll(oracle, x0[:1], mask_index=4, target=target[:1]).nll / n
    drawn = published(oracle, x0, target, passes=64, mask_index=4)[SUMS]
    expected = (exact - all_masked) * harmonic(n) / harmonic(n - 1)
    assert abs(drawn.mean() - expected) < 4 * drawn.std() / drawn.numel() ** 0.5
    assert expected < 0.85 * exact


def test_the_published_means_count_a_token_once_for_all_that_are_masked() -> None:
    oracle = mixture(6, 3, components=1, mask_index=1)
    x0 = oracle.sample(1, 6).expand(64, -1)
    drawn = published(oracle, x0, torch.ones(64, 6, dtype=torch.bool), passes=64, mask_index=1)[MEANS]
    expected = harmonic(6) * oracle.nll(x0[:1]) / 6  # of independent tokens, whatever is masked
    assert abs(drawn.mean() - expected) < 4 * drawn.std() / drawn.numel() ** 0.5


def harmonic(n: int) -> float:
    return sum(1 / m for m in range(1, n + 1))


def test_area_under_curve_counts_pairs() -> None:
    area, _ = area_under_curve(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.0, 1.0]))
    assert area == pytest.approx((1.5 + 2.5 + 3) / 9)


def test_the_error_of_an_area_is_its_spread_over_windows() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [area_under_curve(*torch.randn(2, 50, generator=generator)) for _ in range(60)]
    areas, errors = torch.tensor(drawn).T
    assert errors.mean() == pytest.approx(math.sqrt(101 / 12) / 50, rel=0.1)  # Mann and Whitney's, of equal laws
    assert errors.mean() == pytest.approx(areas.std().item(), rel=0.25)


@pytest.fixture(scope="module")
def network() -> DiffusionTransformer:
    torch.manual_seed(0)
    model = DiffusionTransformer(ModelConfig(N + 1, 8, dim=16, depth=1, heads=2, cond_dim=0)).eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.5)  # the last layer's are made 0
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_continued_draws_from_the_next_letters(network: DiffusionTransformer, temperature: float) -> None:
    prompt = torch.tensor([[3, 1, 4]]).expand(4000, -1)
    x = continued(network, prompt, 5, temperature=temperature)
    assert torch.equal(x[:, :3], prompt)
    with torch.no_grad():
        logits = next_letters(network, x)
    for place in (3, 4):
        law = torch.softmax(logits[:, place, :N].double() / temperature, 1)
        chi_square(x[:, place], law)


def chi_square(drawn: Tensor, law: Tensor) -> None:
    """Letters [n] against what is expected of their laws [n, N]: five standard deviations of chi-square."""
    expected = law.sum(0)
    found = ((drawn.bincount(minlength=N) - expected) ** 2 / expected).sum()
    assert found < N - 1 + 5 * math.sqrt(2 * (N - 1))


def test_continued_begins_from_nothing(network: DiffusionTransformer) -> None:
    empty = torch.empty(3, 0, dtype=torch.int64)
    x = continued(network, empty, 8, seed=1)
    assert x.shape == (3, 8)
    assert (x != MASK).all()
    assert torch.equal(x, continued(network, empty, 8, seed=1))
