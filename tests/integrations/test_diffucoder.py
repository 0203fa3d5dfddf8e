"""DiffuCoder's log-probabilities: those of its trainer, in masked rows alone."""

import pytest
import torch
from rows import largest_rows
from standins import Network, problem
from standins import d1 as standin

from fastdiff.integrations import diffucoder

B, L, V, R = 4, 12, 33, 5
# The checkout's own functions give float32.
KINDS = [standin.CoupledGRPOTrainer] + [type("DiffuGRPOTrainer", (), standin.REAL_COUPLED)] * bool(standin.REAL_COUPLED)
OURS = diffucoder.DiffuGRPOTrainer._get_per_token_logps


def network_of(count, num_states=V):
    torch.manual_seed(1)
    return Network(problem(3 * count * B, L, num_states), 4, bias=num_states == V, dtype=torch.float64)


def logps(function, network, *, kind=standin.CoupledGRPOTrainer, count=1, answer=R, seeds=(5, 6), **options):
    """Values, gradients of all parameters under random weights, and what the network was asked."""
    found = function(
        standin.trainer(kind, V - 1, **options), network, problem(B, L, V).x0.expand(count, B, L), answer, seeds[:count]
    )
    weight = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return found, torch.autograd.grad((found * weight).sum(), [*network.parameters()]), network.asked["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "accumulation"), [(1, 1), (2, 1), (2, 2)])
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_log_probabilities_are_the_published_ones(kind, count, accumulation):
    options = dict(kind=kind, count=count, accumulation=accumulation)
    network = network_of(count)
    theirs = logps(kind._get_per_token_logps, network, **options)
    ours = logps(OURS, network, **options)
    assert ours[0].shape == (B, count, R)
    assert torch.equal(ours[2], theirs[2])
    tolerance = 1e-12 if theirs[0].dtype == torch.float64 else 1e-6
    torch.testing.assert_close(ours[:2], theirs[:2], rtol=tolerance, atol=tolerance, check_dtype=False)


def test_only_masked_rows_are_multiplied():
    network = network_of(1, 1031)
    rows = [
        largest_rows(lambda f=function: logps(f, network), 1031)[1]
        for function in (OURS, standin.CoupledGRPOTrainer._get_per_token_logps)
    ]
    assert rows[0] <= 2 * B * R + 1
    assert rows[1] >= 3 * B * L


def test_one_call_swaps_the_trainers_method(applied):
    undo = applied(standin, diffucoder.apply_to_diffucoder)
    assert standin.CoupledGRPOTrainer._get_per_token_logps is OURS
    undo()
    assert standin.CoupledGRPOTrainer._get_per_token_logps is not OURS


def test_errors_name_the_argument():
    network = network_of(1)
    for answer in (0, L):
        with pytest.raises(ValueError, match="logits_to_keep: expected answers of 1 to 11 tokens"):
            logps(OURS, network, answer=answer)
    with pytest.raises(ValueError, match="mask_seeds: expected one for each of 2 iterations, got 1"):
        logps(OURS, network_of(2), count=2, seeds=(1,))
    with torch.no_grad():
        network.lm_head.bias[problem(B, L, V).x0[0, -1]] = -torch.inf
    with pytest.raises(ValueError, match="finite log-probabilities, got -inf"):
        logps(OURS, network)
