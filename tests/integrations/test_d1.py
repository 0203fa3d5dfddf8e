"""d1's log-probabilities: those of its trainer, in the rows of answers alone."""

import pytest
import torch
from rows import largest_rows
from standins import Network, problem
from standins import d1 as standin

from fastdiff.integrations import d1

B, L, V, R = 3, 12, 33, 5
# The checkout's own function gives float32.
KINDS = [standin.DiffuGRPOTrainer] + [type("DiffuGRPOTrainer", (), standin.REAL)] * bool(standin.REAL)


def network_of(rows):
    torch.manual_seed(1)
    return Network(problem(rows, L, V), 4, bias=True, dtype=torch.float64)


def logps(function, network, *, kind=standin.DiffuGRPOTrainer, count=1, answer=R, seeds=(5, 6), **options):
    """Values, gradients of all parameters under random weights, and what the network was asked."""
    x0 = problem(B, L, V).x0
    made = standin.trainer(kind, V - 1, **options)
    found = function(made, network, x0.expand(count, B, L), answer, list(seeds)[:count])
    weight = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return found, torch.autograd.grad((found * weight).sum(), [*network.parameters()]), network.asked["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("cfg_scale", [0.0, 0.7])
@pytest.mark.parametrize("p_mask_prompt", [0.0, 0.4])
def test_log_probabilities_are_the_published_ones(kind, count, cfg_scale, p_mask_prompt):
    network = network_of(B * count * (2 if cfg_scale else 1))
    options = dict(kind=kind, count=count, cfg_scale=cfg_scale, p_mask_prompt=p_mask_prompt)
    theirs = logps(kind._get_per_token_logps, network, **options)
    ours = logps(d1.DiffuGRPOTrainer._get_per_token_logps, network, **options)
    assert ours[0].shape == (count, B, R)
    assert torch.equal(ours[2], theirs[2])
    tolerance = 1e-12 if theirs[0].dtype == torch.float64 else 1e-6
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=tolerance, atol=tolerance, check_dtype=False)


def test_only_rows_of_answers_are_multiplied():
    p = problem(B, L, 1031)
    network, made = Network(p, 4, dtype=torch.float64), standin.trainer(standin.DiffuGRPOTrainer, p.mask_index)
    rows = [
        largest_rows(lambda f=kind._get_per_token_logps: f(made, network, p.x0[None], R, [1]).sum().backward(), 1031)[1]
        for kind in (d1.DiffuGRPOTrainer, standin.DiffuGRPOTrainer)
    ]
    assert rows[0] <= B * R + 1  # a row of what is behind the layer
    assert rows[1] >= B * L


def test_one_call_swaps_the_trainers_method(applied):
    undo, ours = applied(standin, d1.apply_to_d1), d1.DiffuGRPOTrainer._get_per_token_logps
    assert standin.DiffuGRPOTrainer._get_per_token_logps is ours
    undo()
    assert standin.DiffuGRPOTrainer._get_per_token_logps is not ours


def test_errors_name_the_argument():
    ours = d1.DiffuGRPOTrainer._get_per_token_logps
    network = network_of(B)
    for answer in (0, L + 1):
        with pytest.raises(ValueError, match="logits_to_keep: expected answers of 1 to 12 tokens"):
            logps(ours, network, answer=answer)
    with pytest.raises(ValueError, match="mask_seeds: expected one for each of 2 iterations, got 1"):
        logps(ours, network, count=2, seeds=(1,))
    with torch.no_grad():
        network.lm_head.bias[problem(B, L, V).x0[0, -1]] = -torch.inf
    with pytest.raises(ValueError, match="finite log-probabilities, got -inf"):
        logps(ours, network)
