import math

import pytest
import torch

from fastdiff import reference
from fastdiff.generation.reverse import reverse_law

GRAPHS = [("absorb", 2), ("uniform", None)]
STEPS = [dict(sigma_next=0.4), dict(sigma_next=0.0), dict(step_size=0.07)]


def expected_rows(graph, mask, parametrization, z, xt, sigma, sigma_next=None, step_size=None):
    """The rows by the formulas of the field, from scores."""
    if parametrization == "log_score":
        log_score = z
    elif parametrization == "scale_by_sigma":
        log_score = reference.scale_by_sigma(z, sigma, xt)
    elif graph == "absorb":
        log_score = reference.log_score_from_logits(z, sigma, mask)
    else:
        p_t = 1 + z.shape[-1] / torch.expm1(sigma).unsqueeze(-1) * torch.softmax(z, -1)
        log_score = (p_t / p_t.gather(-1, xt.unsqueeze(-1))).log()
    if step_size is not None:
        return reference.euler_step(graph, log_score, xt, torch.full_like(sigma, step_size), mask)
    rows = reference.reverse_step(graph, log_score, xt, sigma, torch.full_like(sigma, sigma_next), mask)
    if graph == "absorb" and sigma_next == 0:
        rows[..., mask] = 0
    return rows / rows.sum(-1, keepdim=True)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("parametrization", ["log_score", "scale_by_sigma", "logits"])
@pytest.mark.parametrize(("graph", "mask"), GRAPHS)
def test_law_gives_the_rows_of_the_field(graph, mask, parametrization, step):
    torch.manual_seed(0)
    z = torch.randn(2, 3, 5, dtype=torch.float64) - float(parametrization == "log_score")
    xt = torch.full((2, 3), mask) if graph == "absorb" else torch.randint(5, (2, 3))
    if parametrization == "log_score":
        z = z.scatter(-1, xt.unsqueeze(-1), 0)
    sigma = torch.linspace(0.5, 2, 6, dtype=torch.float64).view(2, 3)
    law = reverse_law(graph, parametrization, xt, 5, sigma, step.get("sigma_next"), step.get("step_size"))
    rows = reference.reverse_weights(z, xt, law)
    rows = rows / rows.sum(-1, keepdim=True)
    torch.testing.assert_close(rows, expected_rows(graph, mask, parametrization, z, xt, sigma, **step))
    assert math.isclose(float(rows.sum()), 6)
