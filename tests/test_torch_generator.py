"""torch's generator: no function takes from it what it was given, or does not need."""

import pytest
import torch

import fastdiff
from fastdiff import Absorbing, LogLinear, Uniform

B, L, V, M = 2, 6, 8, 7
X0 = torch.arange(B * L).view(B, L) % M
XT = torch.where(torch.arange(L) % 2 == 0, M, X0)
SIGMA, HIDDEN, HEAD = torch.full((B,), 0.7), torch.linspace(-1, 1, B * L * 4).view(B, L, 4), torch.linspace(0, 1, V * 4)
HEAD = HEAD.view(V, 4)
LOGITS = HIDDEN @ HEAD.T


def network(xt, sigma=None):
    return LOGITS[:1].expand(len(xt), L, V)


def likelihood(num_samples, **options):
    return fastdiff.time_free_nll(network, X0, mask_index=M, num_samples=num_samples, **options)


SEEDED = {
    "mask_tokens": lambda **seed: fastdiff.mask_tokens(X0, 0.5, mask_index=M, **seed),
    "mask_exactly": lambda **seed: fastdiff.mask_exactly(X0, torch.tensor([1, 2]), mask_index=M, **seed),
    "harmonic_mask": lambda **seed: fastdiff.harmonic_mask(X0, mask_index=M, **seed),
    "sample_mask_counts": lambda **seed: fastdiff.sample_mask_counts(3, L, **seed),
    "corrupt": lambda **seed: fastdiff.corrupt(X0, SIGMA, Uniform(V), **seed),
    "sample_times": lambda **seed: fastdiff.sample_times(4, **seed),
    "sample_limit": lambda **seed: Uniform(V).sample_limit(B, L, **seed),
    "sample_tokens": lambda **seed: fastdiff.sample_tokens(LOGITS, XT, **seed),
    "linear_sample_tokens": lambda **seed: fastdiff.linear_sample_tokens(HIDDEN, HEAD, XT, **seed),
    "reverse_step": lambda **seed: fastdiff.reverse_step(LOGITS, XT, SIGMA, sigma_next=0.3, **seed),
    "sample": lambda **seed: fastdiff.sample(network, num_samples=B, length=L, mask_index=M, **seed),
    "time_free_nll": lambda **seed: likelihood(4, **seed),
    "corpus_nll": lambda **seed: fastdiff.corpus_nll(network, X0, mask_index=M, num_samples=4, **seed),
    "time_integral_nll": lambda **seed: fastdiff.time_integral_nll(network, X0, mask_index=M, num_samples=4, **seed),
    "dse_nll": lambda **seed: fastdiff.dse_nll(network, X0, graph=Absorbing(V), schedule=LogLinear(), **seed),
    "mutual_information": lambda **seed: fastdiff.mutual_information(
        network, X0, graph=Absorbing(V), times=torch.tensor([0.5, 0.9]), **seed
    ),
    "log_likelihood_ratio": lambda **seed: fastdiff.log_likelihood_ratio(
        network, X0, X0.flip(1), mask_index=M, num_samples=4, **seed
    ),
}
NEEDLESS = {
    "uniforms": lambda: fastdiff.mask_tokens(X0, 0.5, mask_index=M, uniforms=torch.full((B, L), 0.4)),
    "argmax": lambda: fastdiff.sample_tokens(LOGITS, XT, temperature=0),
    "argmax without logits": lambda: fastdiff.linear_sample_tokens(HIDDEN, HEAD, XT, temperature=0),
    "enumeration": lambda: likelihood(2**L - 1, seed=None),
    "reverse_probs": lambda: fastdiff.reverse_probs(LOGITS, XT, SIGMA, sigma_next=0.3),
}


def is_touched(function):
    before = torch.get_rng_state()
    function()
    return not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", SEEDED)
def test_a_seed_is_all_that_is_needed(name):
    assert not is_touched(lambda: SEEDED[name](seed=3))
    assert not is_touched(lambda: SEEDED[name](seed=torch.tensor(3)))
    assert name == "sample" or is_touched(lambda: SEEDED[name](seed=None))


@pytest.mark.parametrize("name", NEEDLESS)
def test_what_draws_nothing_takes_no_seed(name):
    assert not is_touched(NEEDLESS[name])


def test_bad_arguments_take_no_seed():
    def refused():
        for call in (
            lambda: fastdiff.mask_exactly(X0, torch.tensor([1]), mask_index=M),
            lambda: fastdiff.mask_tokens(X0, torch.ones(3), mask_index=M),
            lambda: fastdiff.corrupt(X0, -SIGMA, Uniform(V)),
        ):
            with pytest.raises(ValueError, match=r"counts|p|sigma"):
                call()

    assert not is_touched(refused)


def test_masks_by_own_uniforms_are_torchs_call_after_call():
    torch.manual_seed(0)
    expected = [torch.rand(B, L) < 0.5 for _ in range(3)]
    torch.manual_seed(0)
    for mask in expected:
        assert torch.equal(fastdiff.mask_tokens(X0, 0.5, mask_index=M, uniforms=torch.rand(B, L)).mask, mask)
