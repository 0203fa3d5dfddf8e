import itertools
import math

import pytest
import torch
from networks import RandomNetwork, random_tokens
from oracles import mixture
from torch import Tensor

from fastdiff import one_pass_nll

PROMPT = torch.tensor([[False, False, True, True, True], [False, True, True, False, False]])  # false: prompt, padding
LENGTHS = torch.tensor([5, 3])


def test_it_is_the_nll_where_tokens_are_independent() -> None:
    oracle = mixture(6, 4, components=1)
    x0 = oracle.sample(3, 6)
    estimate = one_pass_nll(oracle, x0, mask_index=oracle.mask_index)
    torch.testing.assert_close(estimate.nll, oracle.nll(x0))
    assert estimate.stderr.tolist() == [0, 0, 0]
    assert estimate.num_forwards.tolist() == [1, 1, 1]
    assert estimate.bias.isnan().all()


def test_elsewhere_it_is_the_sum_of_marginals() -> None:
    oracle = mixture(6, 4)
    x0 = oracle.sample(1, 6)
    hidden = torch.full_like(x0, oracle.mask_index)
    alone = [oracle.log_prob(hidden.index_copy(1, torch.tensor([i]), x0[:, [i]])) for i in range(6)]
    estimate = one_pass_nll(oracle, x0, mask_index=oracle.mask_index)
    torch.testing.assert_close(estimate.token_nll[0], -torch.cat(alone))
    assert abs(estimate.nll - oracle.nll(x0)).item() > 0.1


class Padded(RandomNetwork):
    def __call__(self, xt: Tensor) -> Tensor:
        return super().__call__(torch.nn.functional.pad(xt, (0, 5 - xt.shape[1])))[:, : xt.shape[1]]


def test_prompts_are_masked_by_chance() -> None:
    network, x0, p, passes = Padded(5), random_tokens(2, 5), 0.3, 4000
    options = dict(mask_index=4, target=PROMPT, lengths=LENGTHS)
    found = one_pass_nll(network, x0, prompt_masking=p, num_samples=passes, **options)
    truth = torch.zeros(2, 5, dtype=torch.float64)
    for hidden in itertools.product([False, True], repeat=2):
        mask = torch.tensor(hidden)
        chance = math.prod(p if h else 1 - p for h in hidden)
        shown = x0.clone()
        shown[0, :2] = shown[0, :2].masked_fill(mask, 4)
        truth[0] += chance * one_pass_nll(network, shown, **options).token_nll[0]
        shown[1, :1] = shown[1, :1].masked_fill(mask[:1], 4)
        truth[1] += chance * one_pass_nll(network, shown, **options).token_nll[1]
    z = (found.nll - truth.sum(1)) / found.stderr
    assert z.abs().max() < 4
    torch.testing.assert_close(found.token_nll, truth, rtol=0.05, atol=0)
    assert not found.token_nll[~PROMPT].any()
    torch.testing.assert_close(found.token_nll.sum(1), found.nll)


def test_draws_are_named() -> None:
    network, x0 = Padded(5), random_tokens(2, 5)
    options = dict(mask_index=4, target=PROMPT, lengths=LENGTHS, prompt_masking=0.5, num_samples=16)
    both = one_pass_nll(network, x0, batch_size=3, **options)
    options |= dict(target=PROMPT[1:], lengths=LENGTHS[1:], sample_ids=torch.tensor([1]))
    torch.testing.assert_close(one_pass_nll(network, x0[1:], **options).nll, both.nll[1:])
    assert both.num_forwards.tolist() == [16, 16]
    assert both.stderr.gt(0).all()


def test_one_pass_that_could_have_been_another_has_no_error() -> None:
    options = dict(mask_index=4, target=PROMPT, lengths=LENGTHS)
    assert one_pass_nll(Padded(5), random_tokens(2, 5), prompt_masking=0.5, **options).stderr.isnan().all()
    assert not one_pass_nll(Padded(5), random_tokens(2, 5), prompt_masking=1.0, **options).stderr.any()


def test_gradient() -> None:
    network, x0 = RandomNetwork(5), random_tokens(2, 5)
    network.head.requires_grad_()
    nll = one_pass_nll(network, x0, mask_index=4, num_samples=3, differentiable=True).nll.sum()
    found = torch.autograd.grad(nll, network.head)[0]
    logits = network(torch.full_like(x0, 4))[..., :4]
    direct = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x0.flatten(), reduction="sum")
    expected = torch.autograd.grad(direct, network.head)[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"prompt_masking": 1.5}, r"^prompt_masking: .*\[0, 1\].*1.5"), ({"num_samples": 0}, r"^num_samples: .*1.*got 0")],
)
def test_bad_arguments(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one_pass_nll(RandomNetwork(4), random_tokens(1, 4), mask_index=4, **change)
