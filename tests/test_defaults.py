"""Nothing depends on torch's default type and device: the same bits come under any."""

import copy
import dataclasses
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import pytest
import torch

import fastdiff
from fastdiff import data, reference
from fastdiff.integrations import bd3lm, dream, llada, mdlm, radd
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.noise.graphs import Absorbing, Uniform
from fastdiff.noise.mixture import Mixture
from fastdiff.schedules import Cosine, Geometric, Hybrid, Linear, LogLinear, Polynomial
from fastdiff.training import TrainConfig, noise, train

B, L, V, D, M = 3, 6, 5, 4, 4  # the mask is the last
G = torch.Generator().manual_seed(0)
X0, Y0 = torch.randint(M, (2, B, L), generator=G)
MASK = torch.rand(B, L, generator=G) < 0.6
XT = X0.masked_fill(MASK, M)
LOGITS, SCORES = torch.randn(2, B, L, V, generator=G)
HIDDEN, LM_HEAD, BIAS = (torch.randn(*size, generator=G) for size in ((B, L, D), (V, D), (V,)))
HALF = LOGITS.bfloat16()
TABLE, SPREAD = torch.randn(V, V, generator=G), torch.linspace(0.1, 1, L)
TIME, SIGMA = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0.3, 0.8, 2.0])
EMBED = torch.randn(V, D, generator=G)
P, PROMPT, COUNTS = torch.tensor([0.2, 0.5, 0.9]), X0[:, :2], torch.tensor([1, 3, 6])
THIN, CONDITIONED = (
    DiffusionTransformer(ModelConfig(V, L, 8, 1, 2, cond_dim=4 * conditioned)) for conditioned in (False, True)
)
for parameter in (*THIN.parameters(), *CONDITIONED.parameters()):
    torch.nn.init.normal_(parameter, generator=G)


def network(xt, sigma=None):
    """Logits or log scores that look at the whole sequence."""
    return TABLE[xt] + (TABLE[xt] * SPREAD.unsqueeze(1)).sum(1, keepdim=True)


def body(xt):
    return EMBED[xt].cumsum(1)


def importance_times():
    law = fastdiff.ImportanceTimes()
    for step in range(40):
        t, weight = law.sample(64, seed=1, step=step)
        law.update(t, weight.unsqueeze(1) * SPREAD)
    return law.sample(5, seed=2)


class LastLayer(torch.nn.Module):
    """A model that nothing has been asked of yet."""

    def __init__(self):
        super().__init__()
        self.lm_head = torch.nn.Linear(D, V, device="cpu", dtype=torch.float32)
        self.lm_head.weight.data, self.lm_head.bias.data = LM_HEAD, BIAS

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.lm_head(body(input_ids)))

    def get_output_embeddings(self):
        return self.lm_head


def nll_of(estimate):
    return (
        vars(estimate),
        estimate.bits_per_token,
        estimate.bits_per_token_stderr,
        estimate.perplexity,
        estimate.pooled(),
    )


def trained():
    config = TrainConfig(steps=2, batch_size=4, eval_every=1, eval_sequences=2, eval_samples=3)
    text = data.Table(X0, num_tokens=M, held_out=Y0)
    records = []
    model = train(config, copy.deepcopy(THIN), text, callback=records.append)
    return list(model.parameters()), [record | {"tokens_per_second": 0, "memory": 0} for record in records]


def token_logps_with_grad(logits):
    """Where the entropy alone has an upstream gradient."""
    logits = logits.clone().requires_grad_()
    logps, entropy = fastdiff.token_logps(logits, X0, temperature=0.5, return_entropy=True)
    return logps, entropy, *torch.autograd.grad(entropy.sum(), logits)


def mixtures(schedule):
    (sigma, dsigma), (graph, dshare) = schedule(TIME), Mixture(V).at(schedule, TIME)
    xt = fastdiff.corrupt(X0, sigma, graph, **DRAWN)
    steps = [
        fastdiff.mixture_reverse_step(LOGITS, xt, sigma, graph.share, sigma_next=sigma / 2, backend=b, **DRAWN)
        for b in (None, "reference")
    ]
    options = dict(graph=Mixture(V), schedule=schedule, parametrization="logits")
    return (
        *(xt, steps, schedule.inverse(sigma), graph.transition(X0, sigma), graph.transp_transition(X0, sigma)),
        fastdiff.mixture_weight(xt, X0, sigma, dsigma, graph, dshare=dshare),
        fastdiff.sample(network, num_samples=2, length=L, **options, **DRAWN),
        nll_of(fastdiff.dse_nll(network, X0, num_samples=8, **options, **DRAWN)),
    )


def denoised(codebase, **attributes):
    diffusion = SimpleNamespace(
        parameterization="subs",
        mask_index=M,
        backbone=lambda x, sigma, **flags: network(x),
        _process_sigma=lambda sigma: sigma,
        _sigma_from_p=lambda p: -torch.log1p(-p),
        noise=lambda t: (-torch.log1p(-t), t) if codebase is mdlm else (1 / t, t),
        **attributes,
    )
    return codebase.Diffusion._ddpm_caching_update(diffusion, XT, TIME.unsqueeze(1), 0.1)[1]


ESTIMATED = dict(mask_index=M, seed=3)
DRAWN = dict(seed=3)
REVERSED = dict(sigma_next=0.1, parametrization="logits")
SAMPLED = dict(num_samples=2, length=L, mask_index=M, seed=3)
BLOCKS = SimpleNamespace(
    sampling=SimpleNamespace(first_hitting=False, nucleus_p=1.0, kv_cache=False), algo=SimpleNamespace(name="bd3lm")
)
TEXT = data.Text([b"to be or not to be " * 9], 5, held_out=0.2)
DREAM = SimpleNamespace(time_reweighting="cart", cart_p=0.3, token_reweighting=True, alpha=0.5, gamma=2.0)

CALLS = {
    "dce_loss": lambda: fastdiff.dce_loss(LOGITS, X0, xt=XT, weight=P, reduction="mean", return_stats=True),
    "dce_loss, reference": lambda: fastdiff.dce_loss(
        HALF, X0, xt=XT, weight=0.3, reduction="mean", backend="reference"
    ),
    "dse_loss": lambda: fastdiff.dse_loss(SCORES, 0.7, XT, X0, reduction="mean"),
    "dse_loss, reference": lambda: fastdiff.dse_loss(SCORES, SIGMA, XT, X0, graph="uniform", backend="reference"),
    "token_logps": lambda: token_logps_with_grad(LOGITS),
    "csm_loss": lambda: fastdiff.csm_loss(SCORES, SIGMA, XT, X0, graph="uniform", backend="reference"),
    "linear_csm_loss": lambda: fastdiff.linear_csm_loss(HIDDEN, LM_HEAD, 0.7, XT, X0, reduction="sum"),
    "d3pm_loss": lambda: fastdiff.d3pm_loss(LOGITS, 2, XT, X0, num_steps=4, graph="uniform", backend="reference"),
    "linear_d3pm_loss": lambda: fastdiff.linear_d3pm_loss(HIDDEN, LM_HEAD, 2, XT, X0, num_steps=4, reduction="sum"),
    "loo_loss": lambda: fastdiff.loo_loss(LOGITS, SIGMA, XT, X0, backend="reference"),
    "linear_loo_loss": lambda: fastdiff.linear_loo_loss(HIDDEN, LM_HEAD, 0.7, XT, X0, reduction="sum"),
    "mixture_loss": lambda: fastdiff.mixture_loss(LOGITS, SIGMA, 0.2, XT, X0, backend="reference"),
    "linear_mixture_loss": lambda: fastdiff.linear_mixture_loss(HIDDEN, LM_HEAD, 0.7, 0.2, XT, X0, reduction="sum"),
    "linear_dce_loss": lambda: fastdiff.linear_dce_loss(
        HIDDEN, LM_HEAD, X0, bias=BIAS, xt=XT, reduction="mean", return_stats=True
    ),
    "linear_dse_loss": lambda: fastdiff.linear_dse_loss(HIDDEN, LM_HEAD, SIGMA, XT, X0, softcap=3.0, reduction="sum"),
    "scored_rows": lambda: fastdiff.scored_rows(MASK, 20),
    "mask_tokens": lambda: fastdiff.mask_tokens(X0, 0.3, mask_index=M, **DRAWN),
    "mask_exactly": lambda: fastdiff.mask_exactly(X0, COUNTS, mask_index=M, **DRAWN),
    "harmonic_mask": lambda: [
        fastdiff.harmonic_mask(X0, mask_index=M, backend=b, **DRAWN) for b in (None, "reference")
    ],
    "sample_mask_counts": lambda: [
        fastdiff.sample_mask_counts(7, 9, proposal=p, **DRAWN) for p in ("stratified", "uniform", "harmonic")
    ],
    "sample_times": lambda: [fastdiff.sample_times(7, method=m, **DRAWN) for m in ("iid", "antithetic", "stratified")],
    "importance times": importance_times,
    "without a seed": lambda: [fastdiff.mask_tokens(X0, P, mask_index=M), fastdiff.sample_times(3)],
    "corrupt": lambda: [fastdiff.corrupt(X0, SIGMA, g, **DRAWN) for g in (Absorbing(V), Uniform(V))],
    "graphs": lambda: [
        method(g)
        for g in (Absorbing(V), Uniform(V))
        for method in (
            lambda g: (g.transition(X0, 0.3), g.transp_transition(X0, SIGMA), g.score_entropy(SCORES, SIGMA, XT, X0)),
            lambda g: (g.reverse_rate(XT, SCORES.exp()), g.staggered_score(SCORES.exp(), 0.2)),
        )
    ],
    "mixtures": lambda: mixtures(Hybrid()),
    "implicit_score_entropy": lambda: [
        fastdiff.implicit_score_entropy(network, XT, SIGMA, parametrization=p, **kind, **DRAWN)
        for kind in (dict(mask_index=M), dict(graph="uniform"))
        for p in ("log_score", "scale_by_sigma", "logits")
    ],
    "sample_limit": lambda: (Absorbing(V).sample_limit(2, 3), Uniform(V).sample_limit(2, 3, seed=1)),
    "schedules": lambda: [
        (s(TIME), s.alpha(TIME), s.inverse(SIGMA))
        for s in (LogLinear(), Geometric(), Cosine(), Linear(), Polynomial(2.0))
    ],
    "reverse_step": lambda: [
        fastdiff.reverse_step(LOGITS, XT, SIGMA, graph=g, backend=b, **DRAWN, **REVERSED)
        for g in ("absorb", "uniform")
        for b in (None, "reference")
    ],
    "reverse_probs": lambda: fastdiff.reverse_probs(SCORES, XT, SIGMA, step_size=0.1),
    "sample_tokens": lambda: [
        fastdiff.sample_tokens(LOGITS, XT, return_stats=True, top_p=0.7, backend=b, **DRAWN)
        for b in (None, "reference")
    ],
    "linear_sample_tokens": lambda: fastdiff.linear_sample_tokens(
        HIDDEN, LM_HEAD, XT, bias=BIAS, return_stats=True, **DRAWN
    ),
    "linear_soft_embeddings": lambda: [
        fastdiff.linear_soft_embeddings(HIDDEN, LM_HEAD, bias=BIAS, mask=XT == M, backend=b)
        for b in (None, "reference")
    ],
    "sample": lambda: [fastdiff.sample(network, sampler=s, **SAMPLED) for s in ("tweedie", "first_hitting", "margin")],
    "sample, scores": lambda: fastdiff.sample(network, sampler="euler", parametrization="log_score", **SAMPLED),
    "sample, hidden states": lambda: fastdiff.sample((body, LM_HEAD), sampler="entropy", prompt=PROMPT[0], **SAMPLED),
    "exact_nll": lambda: nll_of(fastdiff.exact_nll(network, X0, mask_index=M)),
    "time_free_nll": lambda: [
        nll_of(fastdiff.time_free_nll(network, X0, num_samples=20, proposal=p, **ESTIMATED))
        for p in ("stratified", "systematic", "uniform", "harmonic")
    ],
    "time_free_nll, tolerance": lambda: nll_of(
        fastdiff.time_free_nll((body, LM_HEAD), X0, num_samples=20, tolerance=0.1, max_samples=40, **ESTIMATED)
    ),
    "corpus_nll": lambda: vars(
        fastdiff.corpus_nll(network, X0, num_samples=20, tolerance=0.1, max_samples=40, **ESTIMATED)
    ),
    "conditional_nll": lambda: nll_of(fastdiff.conditional_nll(network, X0[:, :2], X0[:, 2:], **ESTIMATED)),
    "time_integral_nll": lambda: nll_of(fastdiff.time_integral_nll(network, X0, num_samples=8, **ESTIMATED)),
    "dse_nll": lambda: [
        nll_of(fastdiff.dse_nll(network, X0, graph=g, schedule=Geometric(), num_samples=8, density=d, **DRAWN))
        for g in (Absorbing(V), Uniform(V))
        for d in ("sqrt", "schedule")
    ],
    "log_likelihood_ratio": lambda: fastdiff.log_likelihood_ratio(network, X0, Y0, num_samples=20, **ESTIMATED),
    "mutual_information": lambda: [
        fastdiff.mutual_information(network, X0, graph=Absorbing(V), schedule=s, num_samples=2, seed=1).to_dict()
        for s in (None, LogLinear())
    ],
    "interval": lambda: fastdiff.exact_nll(network, X0, mask_index=M).to_dict(),
    "reference": lambda: (reference.subsets(3), reference.count_law(4, "harmonic"), reference.count_law(4, "uniform")),
    "models": lambda: (THIN(XT), CONDITIONED(XT, SIGMA)),
    "noise": lambda: [
        noise(X0, loss, V, seed=1, step=2) for loss in ("dce-t", "dce-lambda", "dce-k", "dse-absorb", "gidd")
    ],
    "train": trained,
    "text": lambda: (
        TEXT.sequences(2, 5),
        TEXT.validation(1),
        data.encode("to be"),
        data.Table(X0, num_tokens=M).sequences(1, 3),
    ),
    "radd": lambda: [radd.Batch_Uniform_Sampler(5, type, "cpu") for type in ("naive", "vdm", "decoupled")],
    "dream": lambda: (dream.cart_weight(MASK, 0.3), dream.sft_loss(LastLayer(), XT, X0, MASK, P, DREAM)),
    "llada": lambda: llada.pretraining_loss(LastLayer(), XT, X0, MASK, P.unsqueeze(1).expand(B, L)),
    "mdlm": lambda: denoised(mdlm),
    "bd3lm": lambda: denoised(bd3lm, block_size=3, config=BLOCKS),
}


def leaves(result):
    """Tensors and numbers of a result, in order."""
    if dataclasses.is_dataclass(result):
        result = vars(result)
    if isinstance(result, dict):
        result = list(result.values())
    if isinstance(result, list | tuple):
        return [leaf for part in result for leaf in leaves(part)]
    return [result]


@contextmanager
def defaults(which):
    usual = torch.get_default_dtype()
    torch.set_default_device(which if which == "meta" else None)
    torch.set_default_dtype(usual if which == "meta" else which)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(usual)


def run(name):
    torch.manual_seed(0)
    return leaves(CALLS[name]())


expected = cache(run)  # under the usual defaults


@pytest.mark.parametrize("which", [torch.float64, torch.bfloat16, "meta"], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_under_any_defaults(name, which):
    usual = expected(name)
    with defaults(which):
        got = run(name)
    assert len(got) == len(usual)
    for ours, theirs in zip(got, usual, strict=True):
        if torch.is_tensor(theirs):
            assert (ours.dtype, ours.device) == (theirs.dtype, theirs.device)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        else:
            assert ours == theirs or ours != ours


def test_a_model_is_loaded_in_float32_and_its_angles_are(tmp_path):
    THIN.save_pretrained(tmp_path)
    for which in (torch.float64, torch.bfloat16, "meta"):
        with defaults(which):
            model = DiffusionTransformer.from_pretrained(tmp_path)
        assert torch.equal(model(X0), THIN(X0))
        assert all(map(torch.equal, model.parameters(), THIN.parameters()))
