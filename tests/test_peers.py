"""The drop-in lines of the README: loss and gradient equal the published formulas, evaluated in float64."""

import peers
import pytest
import torch

from fastdiff import (
    Geometric,
    csm_loss,
    d3pm_loss,
    dce_loss,
    dse_loss,
    loo_loss,
    mixture_loss,
    reverse_probs,
    sample_tokens,
)

V, NOISE = 40, Geometric(0.01, 3.0)


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    x0 = torch.randint(0, V - 1, (4, 12), generator=g)
    masked = torch.rand(4, 12, generator=g) < 0.5
    return dict(
        z=torch.randn(4, 12, V, generator=g, dtype=torch.float64),
        x0=x0,
        masked=masked,
        xt=torch.where(masked, V - 1, x0),
        moved=torch.where(masked, torch.randint(0, V, (4, 12), generator=g), x0),
        sigma=torch.rand(4, generator=g, dtype=torch.float64) + 0.3,
        rate=torch.rand(4, generator=g, dtype=torch.float64) + 0.5,
    )


PAIRS = {
    "SEDD absorb": (
        lambda z, b: dse_loss(z, b["sigma"][:, None], b["xt"], b["x0"]).sum(),
        lambda z, b: peers.sedd_absorb(z, b["sigma"], b["xt"], b["x0"]),
    ),
    "SEDD uniform": (
        lambda z, b: dse_loss(z, b["sigma"][:, None], b["moved"], b["x0"], graph="uniform").sum(),
        lambda z, b: peers.sedd_uniform(z, b["sigma"], b["moved"], b["x0"]),
    ),
    "Duo": (
        lambda z, b: dse_loss(
            z,
            b["sigma"],
            b["moved"],
            b["x0"],
            graph="uniform",
            parametrization="logits",
            dsigma=b["rate"],
            reduction="sum",
        ),
        lambda z, b: peers.duo_nelbo(z, b["sigma"], b["rate"], b["moved"], b["x0"]),
    ),
    "MDLM": (
        lambda z, b: dce_loss(z, b["x0"], xt=b["xt"], weight=b["rate"], reduction="sum"),
        lambda z, b: peers.mdlm_subs(z, b["rate"], b["xt"], b["x0"]),
    ),
    "RADD": (
        lambda z, b: dce_loss(z, b["x0"], xt=b["xt"], weight=b["rate"]).sum(),
        lambda z, b: peers.radd_lambda(z, b["rate"], b["xt"], b["x0"]),
    ),
    "LLaDA": (
        lambda z, b: dce_loss(z, b["x0"], mask=b["masked"], weight=b["rate"], exclude_mask=False, reduction="sum"),
        lambda z, b: peers.llada_ce(z, b["rate"], b["xt"], b["x0"]),
    ),
    "CSM absorb": (
        lambda z, b: csm_loss(z, b["sigma"], b["xt"], b["x0"], reduction="sum"),
        lambda z, b: peers.squared_ratios(z, b["sigma"], b["xt"], b["x0"], False),
    ),
    "CSM uniform": (
        lambda z, b: csm_loss(z, b["sigma"], b["moved"], b["x0"], graph="uniform", reduction="sum"),
        lambda z, b: peers.squared_ratios(z, b["sigma"], b["moved"], b["x0"], True),
    ),
    "DiffusionGemma": (
        lambda z, b: loo_loss(z, b["sigma"], b["moved"], b["x0"], reduction="sum"),
        lambda z, b: peers.diffusion_gemma(z, b["sigma"], b["moved"], b["x0"]),
    ),
    "D3PM": (
        lambda z, b: d3pm_loss(
            z, 3, b["moved"], b["x0"], num_steps=4, graph="uniform", schedule=NOISE, weight=1 / 4, reduction="sum"
        ),
        lambda z, b: peers.d3pm_uniform(
            z,
            *(NOISE.total_noise(torch.full((4,), t, dtype=torch.float64)) for t in (3 / 4, 2 / 4)),
            b["moved"],
            b["x0"],
        ),
    ),
    "GIDD": (
        lambda z, b: mixture_loss(z, b["sigma"], b["rate"] / 2, b["moved"], b["x0"], reduction="sum"),
        lambda z, b: peers.gidd(z, b["sigma"], b["rate"] / 2, b["moved"], b["x0"]),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_published_formula(name, batch):
    z = batch["z"].requires_grad_()
    ours, theirs = (f(z, batch) for f in PAIRS[name])
    tolerance = 2e-6 if name == "RADD" else 1e-9  # RADD takes the logarithm in float32
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0, check_dtype=False)
    grads = (torch.autograd.grad(loss, z)[0] for loss in (ours, theirs))
    torch.testing.assert_close(*grads, rtol=tolerance, atol=tolerance)


def test_shifted_logits_need_no_copy(batch):
    """Dream predicts the next position: logits[:, :-1] against x0[:, 1:]."""
    z, x0 = batch["z"].requires_grad_(), batch["x0"]
    ours = dce_loss(z[:, :-1], x0[:, 1:], mask=batch["masked"][:, 1:], reduction="mean")
    copied = dce_loss(z[:, :-1].contiguous(), x0[:, 1:].contiguous(), mask=batch["masked"][:, 1:], reduction="mean")
    assert torch.equal(ours, copied)


def test_analytic_step_is_the_published_one(batch):
    """SEDD's predictor, from its log score, which is 0 at x_t; what it clamps it leaves out of the sum too."""
    xt = batch["xt"]
    log_score = (batch["z"] - 6).scatter(-1, xt.unsqueeze(-1), 0)
    theirs = peers.sedd_probs(log_score, xt, 0.25)
    assert (theirs >= 0).all()
    ours = reverse_probs(log_score, xt, 0.75, sigma_next=0.5)
    torch.testing.assert_close(ours.double(), theirs / theirs.sum(-1, keepdim=True), rtol=1e-5, atol=1e-7)


def test_llada_step_is_the_published_one(batch):
    """Confidence and greedy tokens; its softmax runs over the mask too."""
    z, xt = batch["z"], batch["xt"]
    tokens, confidence = peers.llada_step(z, xt, 0.0)
    ours, stats = sample_tokens(z, xt, exclude_mask=False, temperature=0, return_stats=True)
    assert torch.equal(ours, tokens)
    torch.testing.assert_close(
        stats.probability[batch["masked"]].double(), confidence[batch["masked"]], rtol=1e-6, atol=0
    )
