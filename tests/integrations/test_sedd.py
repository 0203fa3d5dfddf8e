"""SEDD: signatures, reverse steps by frequency, noise, edge cases and what the published formula loses."""

from contextlib import nullcontext
from functools import partial

import one_step
import pytest
import torch
from repeated import Repeated
from standins import is_real, problem
from standins import sedd as published
from step import assert_same_step
from torch import nn

from fastdiff.integrations import sedd
from fastdiff.schedules import Geometric, LogLinear


@pytest.fixture(params=["absorb", "uniform"])
def graph(request):
    return published.Absorbing(6) if request.param == "absorb" else published.Uniform(7)


@pytest.mark.parametrize("predictor", ["AnalyticPredictor", "EulerPredictor", "Denoiser"])
def test_a_step_is_drawn_from_the_published_law(predictor, graph, monkeypatch, applied):
    """Of a score as SEDD gives it, which is 1 at x."""
    noise, n = (LogLinear() if graph.absorb else Geometric()), 20_000
    rows = torch.tensor([[6, 2, 6, 0]])
    score = (torch.randn(1, 4, 7, generator=torch.Generator().manual_seed(0)) - 3).exp().scatter(-1, rows[..., None], 1)
    arguments = (torch.full((n, 1), 0.6),) + ((0.1,) if predictor != "Denoiser" else ())
    step = getattr(published, predictor)(graph, noise)
    with monkeypatch.context() as patched:
        for module in published.PUBLISHED.values():
            patched.setattr(module, "sample_categorical", lambda probs: probs, raising=False)
        law = step.update_fn(lambda x, sigma: score.expand(n, 4, 7), rows.expand(n, 4), *arguments)[0].clamp_min(0)
    law = law / law.sum(-1, keepdim=True)

    applied(published, sedd.apply_to_sedd)
    torch.manual_seed(0)
    drawn = step.update_fn(lambda x, sigma: score.expand(n, 4, 7), rows.expand(n, 4), *arguments)
    assert (drawn < law.shape[-1]).all()  # no mask after the last step
    share = torch.nn.functional.one_hot(drawn, 7).double().mean(0)[..., : law.shape[-1]]
    assert ((share - law).abs() <= 5 * (law * (1 - law) / n).sqrt() + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_of_zero_is_never_drawn(dtype, graph):
    x = torch.full((500, 2), 6)
    score = torch.ones(500, 2, 7, dtype=dtype)
    score[..., 3] = 0  # its logarithm is -inf
    drawn = sedd.Denoiser.update_fn(published.Denoiser(graph, LogLinear()), lambda *_: score, x, torch.ones(500, 1))
    assert not (drawn == 3).any()


def test_noise_moves_tokens_as_often_as_published(graph, applied):
    applied(published, sedd.apply_to_sedd)
    x0, sigma = torch.arange(6).repeat(3, 5000), torch.tensor([[0.0], [0.5], [20.0]])
    torch.manual_seed(0)
    xt = graph.sample_transition(x0, sigma)
    expected = -torch.expm1(-sigma.squeeze()) * (1 if graph.absorb else 6 / 7)
    torch.testing.assert_close((xt != x0).float().mean(1), expected, atol=0.015, rtol=0)
    assert xt[2].eq(6).all() if graph.absorb else xt[2].bincount(minlength=7).min() > 4000
    torch.manual_seed(0)
    assert torch.equal(graph.sample_transition(x0, sigma), xt)


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_and_everything_masked(masked):
    p = problem(2, 6, 11)
    graph, xt = published.Absorbing(10), torch.full_like(p.x0, 10) if masked else p.x0
    z = torch.randn(2, 6, 11, requires_grad=True)
    loss = sedd.Absorbing.score_entropy(graph, z, p.sigma[:, None], xt, p.x0)
    torch.testing.assert_close(loss, graph.score_entropy(z, p.sigma[:, None], xt, p.x0), check_dtype=False)
    loss.sum().backward()
    assert masked or (not loss.any() and not z.grad.any())


def test_small_noise_keeps_its_digits():
    """Where 1 - N / (expm1(sigma) + N) loses a fifth of the loss in float32; in float64 it is right."""
    x0, sigma, graph = torch.zeros(1, 8, dtype=torch.int64), torch.tensor([[1e-2]]), published.Uniform(50257)
    z = torch.randn(1, 8, 50257, generator=torch.Generator().manual_seed(0))
    exact = graph.score_entropy(z.double(), sigma.double(), x0 + 1, x0)
    theirs, ours = (methods.score_entropy(graph, z, sigma, x0 + 1, x0) for methods in (published.Uniform, sedd.Uniform))
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)
    assert ((theirs - exact) / exact).abs().min() > 0.1


def test_swapped_arguments_are_named():
    p = problem(2, 6, 11)
    z, graph = torch.randn(2, 6, 11), published.Absorbing(10)
    with pytest.raises(ValueError, match="x0"):
        sedd.Absorbing.score_entropy(graph, z, p.sigma[:, None], p.x0, p.xt)
    with pytest.raises(ValueError, match="sigma"):
        sedd.Denoiser.update_fn(published.Denoiser(graph, LogLinear()), lambda *_: z, p.xt, torch.zeros(2, 1))


class Wrapped(nn.Module):
    """As DDP has a model."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *arguments):
        return self.module(*arguments)


def compiled(model):
    return torch.compile(model, backend="aot_eager")


@pytest.fixture
def model(graph):
    return published.network(Repeated(24, 7), scaled=graph.absorb)


X0, T = torch.arange(6).repeat(2, 4), torch.tensor([0.3, 0.9])


@pytest.mark.parametrize(
    ("wrap", "train"), [(nn.Identity(), True), (nn.Identity(), False), (Wrapped, True), (compiled, True)]
)
def test_a_step_as_published(wrap, train, model, graph, applied):
    xt = graph.sample_transition(X0, T[:, None])

    def results():
        loss_fn = published.PUBLISHED["losses"].get_loss_fn(LogLinear(), graph, train)
        whole = wrap(model)
        assert loss_fn(whole, X0).shape == (2,)  # at times and with noise of its own
        assert whole.training == train
        loss = loss_fn(whole, X0, cond=None, t=T, perturbed_batch=xt)
        yield torch.autograd.grad(loss.mean() / 4, [*model.parameters()])
        with torch.no_grad():
            yield loss_fn(whole, X0, t=T, perturbed_batch=xt), loss.detach()

    expected = [*results()]
    applied(published, sedd.apply_to_sedd)
    torch.testing.assert_close([*results()], expected, rtol=1e-5, atol=1e-5)


def test_sequences_that_weigh_differently_are_an_error(model, graph, applied):
    applied(published, sedd.apply_to_sedd)
    loss = published.PUBLISHED["losses"].get_loss_fn(LogLinear(), graph, True)(model, X0)
    with pytest.raises(ValueError, match="summed"):
        (loss * torch.tensor([1.0, 2.0])).sum().backward()


def test_the_model_is_asked_for_scores_as_ever(model, graph, applied):
    """Though it has computed a loss, and though it is still in training mode."""
    xt, sigma = graph.sample_transition(X0, T[:, None]), T
    expected = model(xt, sigma)
    applied(published, sedd.apply_to_sedd)
    published.PUBLISHED["losses"].get_loss_fn(LogLinear(), graph, train=True)(model, X0)
    torch.testing.assert_close(model(xt, sigma), expected)


def test_no_logits_are_made(model, graph, applied):
    applied(published, sedd.apply_to_sedd)
    seen = []
    model.register_forward_hook(lambda module, arguments, out: seen.append(out.shape))
    published.PUBLISHED["losses"].get_loss_fn(LogLinear(), graph, train=True)(model, X0)
    assert seen[-1] != (*X0.shape, 7)


def test_a_tail_that_the_loss_does_not_know_is_an_error(graph):
    """As the model has without the seam in the place of its forward."""
    model = published.network(Repeated(24, 7))
    with pytest.raises(ValueError, match="logits"):
        sedd.get_loss_fn(LogLinear(), graph, train=True)(model, X0)


def test_a_failed_step_leaves_nothing_behind(model, graph, applied):
    applied(published, sedd.apply_to_sedd)
    loss_fn = published.PUBLISHED["losses"].get_loss_fn(LogLinear(), graph, True)
    expected = loss_fn(model, X0, t=T, perturbed_batch=X0)
    with pytest.raises(ValueError, match="x0"):
        loss_fn(model, X0 + 100, t=T, perturbed_batch=X0)
    torch.testing.assert_close(loss_fn(model, X0, t=T, perturbed_batch=X0), expected)
    assert model(X0, T).shape == (2, 24, 7)


def attention(qkv, cu_seqlens, seq_len, dropout, causal):
    """What flash_attn has on GPUs."""
    q, k, v = qkv.unflatten(0, (-1, seq_len)).permute(2, 0, 3, 1, 4)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


@pytest.fixture
def transformer(graph, monkeypatch):
    """The codebase's own, small and random, in float64 throughout."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)
    monkeypatch.setattr(published.PUBLISHED["model"].transformer, "flash_attn_varlen_qkvpacked_func", attention)
    sizes = dict(hidden_size=32, cond_dim=16, length=24, n_blocks=2, n_heads=2, scale_by_sigma=graph.absorb, dropout=0)
    tokens = graph.dim - 1 if graph.absorb else graph.dim
    kind = "absorb" if graph.absorb else "uniform"
    with published.default_dtype(torch.float64):
        yield one_step.drawn(published.SEDD(dict(tokens=tokens, graph=dict(type=kind), model=sizes)))


@pytest.mark.skipif(not is_real(published.PUBLISHED["model"]), reason="SEDD's transformer is in its checkout")
@pytest.mark.parametrize("wrap", [nullcontext, one_step.in_ddp], ids=["bare", "DDP"])
def test_a_step_of_its_transformer(wrap, transformer, graph, applied):
    xt = graph.sample_transition(X0, T[:, None])
    graph.sample_transition = lambda *_: xt
    get_step_fn = published.PUBLISHED["losses"].get_step_fn
    with wrap(transformer) as model:
        step = partial(one_step.results, lambda *how: get_step_fn(LogLinear(), graph, *how, accum=1), model, X0)
        expected = step()
        applied(published, sedd.apply_to_sedd)
        assert_same_step(step(), expected)
