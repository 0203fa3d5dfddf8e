"""Duo: a training step, what the model's output is when, digits near alpha = 1, the step by frequency, labels."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from backbones import tiny_dit
from standins import Network, is_real, problem
from standins import duo as published
from standins.mdlm import Backbone
from standins.sedd import default_dtype
from step import NoLogits, assert_same_step, loss_and_grads
from torch import nn

from fastdiff.integrations import duo
from fastdiff.schedules import LogLinear

P = problem(3, 8, 7)
Z = torch.randn(3, 8, 7, generator=torch.Generator().manual_seed(1))
ATTENTION = torch.ones(3, 8).index_fill(1, torch.tensor([6, 7]), 0)
BATCH = {"input_ids": P.x0, "attention_mask": ATTENTION}
REAL = is_real(published.PUBLISHED["algo"])


def noise(t):
    """As the codebase's, t -> (dalpha, alpha)."""
    return -torch.ones_like(t), LogLinear().alpha(t)


class Given(nn.Module):
    """Answers with these numbers, whatever it is asked, which it keeps; no last layer is to be found in it."""

    def __init__(self, answer):
        super().__init__()
        self.answer = nn.Parameter(answer)

    def forward(self, x, sigma, class_cond=None, weights=None):
        self.asked = x, sigma, class_cond
        return self.answer


class WithLastLayer(Backbone):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(Network(P, 3, bias=True, dtype=torch.float64))

    def forward(self, x, sigma, class_cond=None, weights=None):
        self.asked = x, sigma, class_cond
        return super().forward(x, sigma)


def diffusion(guid_weight=None, algo="duo_base", cls=published.DUO_BASE, **attributes):
    config = SimpleNamespace(
        algo=SimpleNamespace(name=algo),
        sampling=SimpleNamespace(guid_weight=guid_weight, use_float64=True),
        loader=SimpleNamespace(global_batch_size=64),
    )
    machines = dict(num_nodes=1, node_rank=0, num_devices=1, local_rank=0)
    trainer = SimpleNamespace(accumulate_grad_batches=2, **machines)
    settings = dict(
        config=config,
        noise=noise,
        backbone=Given(Z),
        _sample_t=lambda n, step: P.t,
        q_xt=lambda x0, alpha_t: P.moved,
        trainer=trainer,
        _trainer=trainer,  # Lightning's own trainer is a property
        _fabric=None,
        metrics=mock.Mock(),
        log=mock.Mock(),
    )
    return published.given(cls, 7, **(settings | attributes))


@pytest.fixture
def in_float64():
    """Times in steps are of the default type."""
    with default_dtype(torch.float64):
        yield


@pytest.fixture
def swap(applied):
    return lambda: applied(published, duo.apply_to_duo)


@pytest.mark.parametrize("xt", [P.x0, P.moved, (P.x0 + 1) % 7], ids=["none moved", "some", "all"])
@pytest.mark.parametrize("options", [{}, dict(time_conditioning=False), dict(T=16)])
def test_a_training_step_is_the_published_one_without_logits(xt, options, swap, in_float64):
    """Loss, gradients, metrics, and what is asked of the noise and of the backbone."""
    seen = []
    for _ in range(2):
        backbone, q_xt = WithLastLayer(), mock.Mock(return_value=xt)
        it = diffusion(backbone=backbone, q_xt=q_xt, **options)
        with torch.inference_mode():  # Lightning validates before it trains
            valid = it.validation_step(BATCH, 5)
        step = loss_and_grads(it.training_step, backbone, BATCH, 5)
        metrics = [*it.metrics.update_train.call_args[0], *it.metrics.update_valid.call_args[0]]
        metrics = [torch.as_tensor(number, dtype=torch.float64) for number in metrics]
        seen.append([*step, valid, *metrics, q_xt.call_args[0][1], *backbone.asked[:2]])
        swap()
    assert_same_step(*reversed(seen), rtol=1e-10)
    with NoLogits(3, 8, 7):
        loss_and_grads(it.training_step, backbone, BATCH, 5)


def test_classes_are_dropped_as_published(swap):
    """By draws between those of the noise and of dropout."""
    seen, labels = [], torch.tensor([3, 4, 5])
    options = dict(class_conditional=True, class_cond_dropout=0.3, num_classes=9)
    for _ in range(2):
        it = diffusion(backbone=WithLastLayer(), **options)
        torch.manual_seed(1)
        step = loss_and_grads(it.training_step, it.backbone, BATCH | dict(labels=labels), 5)
        seen.append([*step, it.backbone.asked[2], torch.rand(())])
        swap()
    assert seen[0][2].tolist() == [3, 9, 5]
    assert_same_step(*reversed(seen))
    with pytest.raises(ValueError, match="labels: expected classes if class_conditional"):
        it.training_step(BATCH, 5)


def test_a_step_of_the_real_backbone(swap, monkeypatch):
    """With its own noise, dropout and adaLN, in float64."""
    if not REAL:
        pytest.skip("the backbone is that of a checkout: FASTDIFF_CHECKOUTS")
    base = published.PUBLISHED["trainer_base"]
    backbone, seen = tiny_dit(base.models.dit, monkeypatch, num_states=211), []
    batch = {"input_ids": torch.randint(211, (32, 8)), "attention_mask": ATTENTION[:1].repeat(32, 1)}
    for _ in range(2):
        it = published.DUO_BASE.__new__(published.DUO_BASE)
        base.L.LightningModule.__init__(it)
        given = {
            name: value for name, value in vars(diffusion()).items() if name not in ("_sample_t", "q_xt", "backbone")
        }
        it.__dict__.update(
            given, vocab_size=211, antithetic_sampling=True, sampling_eps=1e-3, noise=base.LogLinear(1e-3)
        )
        it.backbone = backbone
        torch.manual_seed(1)
        with default_dtype(torch.float64):
            step = loss_and_grads(it.training_step, backbone, batch, 5)
        seen.append([*step, it.metrics.update_train.call_args[0][0]])
        swap()
    assert all(grad.any() for grad in seen[0][1].values())
    assert_same_step(*reversed(seen))
    with NoLogits(32, 8, 211):
        loss_and_grads(it.training_step, backbone, batch, 5)


@pytest.mark.parametrize("xt", [P.x0, P.moved, (P.x0 + 1) % 7], ids=["none moved", "some", "all"])
def test_a_backbone_whose_logits_are_no_product(xt, swap):
    """As UNet's: its loss is of its logits."""
    it = diffusion(q_xt=lambda x0, alpha_t: xt, _sample_t=lambda n, step: P.t.float())
    expected = it._loss(P.x0, None, ATTENTION).loss
    swap()
    torch.testing.assert_close(it._loss(P.x0, None, ATTENTION).loss, expected, rtol=1e-5, atol=1e-5)


def test_losses_per_token_for_whoever_asks_for_them(swap):
    it = diffusion(backbone=WithLastLayer())
    expected = it.nll(P.x0, None, None)
    swap()
    it.forward = None  # which gives log-probabilities
    torch.testing.assert_close(it.nll(P.x0, None, None), expected)


class Soft(published.DUO_BASE):
    """As Duo's curriculum: the model is given other inputs than x_t, and beyond it the loss is the base's."""

    soft = True

    def nll(self, x0, labels, output_tokens, current_accumulation_step=None, train_mode=False):
        if not self.soft:
            return super().nll(x0, labels, output_tokens, current_accumulation_step, train_mode)
        dalpha_t, alpha_t = (a[:, None] for a in self.noise(P.t))
        log_x_theta = self.forward(P.x0, self._sigma_from_alphat(alpha_t))
        return self.nll_per_token(log_x_theta, P.moved, x0, alpha_t, dalpha_t)


@pytest.mark.parametrize("soft", [True, False])
def test_the_curriculum(soft, swap):
    """Has logits, and the loss beyond it has none."""
    it = diffusion(cls=Soft, soft=soft, backbone=WithLastLayer())
    expected = loss_and_grads(it.training_step, it.backbone, BATCH, 5)
    swap()
    assert_same_step(loss_and_grads(it.training_step, it.backbone, BATCH, 5), expected)
    if not soft:
        with NoLogits(3, 8, 7):
            loss_and_grads(it.training_step, it.backbone, BATCH, 5)


def test_what_a_derived_class_may_not_do_is_an_error(swap):
    class Weighed(published.DUO_BASE):
        def nll(self, *arguments):
            return super().nll(*arguments) * torch.ones(3, 8)

    class Own(published.DUO_BASE):
        def nll_per_token(self, *arguments):
            return super().nll_per_token(*arguments)

    swap()
    with pytest.raises(TypeError, match="_Sum"):
        diffusion(cls=Weighed, backbone=WithLastLayer())._loss(P.x0, None, ATTENTION)
    with pytest.raises(TypeError, match=r"Own\.nll_per_token: expected the published one, as nll does not call it"):
        diffusion(cls=Own, backbone=WithLastLayer())._loss(P.x0, None, ATTENTION)


@pytest.mark.parametrize("dalpha_t", [-1.0, torch.tensor([[-1.0], [-0.5], [-2.0]])])
def test_nll_of_log_probabilities_and_of_logits(dalpha_t, swap):
    it, alpha_t = diffusion(), torch.exp(-P.sigma)[:, None]
    expected = it.nll_per_token(Z.log_softmax(-1), P.moved, P.x0, alpha_t, dalpha_t)
    swap()
    for z in (Z, Z.log_softmax(-1)):
        nll = it.nll_per_token(z, P.moved, P.x0, alpha_t, dalpha_t)
        torch.testing.assert_close(nll, expected, check_dtype=False, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("algo", ["duo", "distillation"])
def test_the_curriculum_has_logits_and_all_others_log_probabilities(algo, swap):
    """In whatever mode the network is; distillation compares log-probabilities in its loss."""
    seen = []

    def nll_per_token(log_x_theta, *_, **__):
        seen.append(log_x_theta)
        return log_x_theta.sum(-1)

    swap()
    it = diffusion(algo=algo, cls=Soft, nll_per_token=nll_per_token)
    it._loss(P.x0, None, torch.ones(3, 8))
    assert torch.equal(seen[0], Z if algo == "duo" else Z.log_softmax(-1))
    assert torch.equal(it.forward(P.moved, P.sigma[:, None]), Z.log_softmax(-1))
    assert it.backbone.training


def test_little_noise_keeps_its_digits():
    z = torch.randn(1, 8, 50257, generator=torch.Generator().manual_seed(0)) * 3
    x0, alpha_t, it = torch.arange(8)[None], torch.tensor([[0.9999]]), published.given(published.DUO_BASE, 50257)
    exact = published.DUO_BASE.nll_per_token(it, z.double().log_softmax(-1), x0, x0, alpha_t.double(), -1.0)
    theirs = published.DUO_BASE.nll_per_token(it, z.log_softmax(-1), x0, x0, alpha_t, -1.0)
    ours = duo.DUO_BASE.nll_per_token(it, z, x0, x0, alpha_t, -1.0)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)
    assert ((theirs - exact) / exact).abs().max() > 1e-4


@pytest.mark.parametrize("noise_removal_step", [False, True])
def test_a_step_is_drawn_from_the_published_law(noise_removal_step, swap):
    n, x, dt = 20_000, torch.tensor([[0, 3, 6]]), None if noise_removal_step else 0.3
    backbone = mock.Mock(side_effect=lambda x, **_: Z[:1, :3].expand(len(x), 3, 7), training=False)
    it = diffusion(backbone=backbone)
    with mock.patch.object(published.PUBLISHED["trainer_base"], "sample_categorical", return_value=x) as drawn_from:
        it._ancestral_update(x, torch.full((1, 1), 0.6), None, dt, noise_removal_step=noise_removal_step)
    law = drawn_from.call_args[0][0][0]
    swap()
    torch.manual_seed(0)
    arguments = (x.expand(n, 3), torch.full((n, 1), 0.6), None, dt)
    cache, drawn = it._ancestral_update(*arguments, noise_removal_step=noise_removal_step)
    share = torch.nn.functional.one_hot(drawn, 7).double().mean(0)
    assert ((share - law).abs() <= 5 * (law * (1 - law) / n).sqrt() + 1e-9).all()
    torch.manual_seed(0)
    again = it._ancestral_update(*arguments, p_x0=cache, noise_removal_step=noise_removal_step)
    assert torch.equal(again[1], drawn)
    assert it.backbone.call_count == 2


@pytest.mark.parametrize(("guid_weight", "asked"), [(None, 9), (0.0, 9), (1.0, 4)])
def test_labels_are_those_that_guidance_means(guid_weight, asked):
    backbone = mock.Mock(return_value=Z, training=False)
    it = diffusion(guid_weight, backbone=backbone, class_conditional=True, num_classes=9)
    duo.DUO_BASE._ancestral_update(it, P.moved, torch.full((3, 1), 0.6), torch.full((3,), 4), 0.1)
    assert backbone.call_args[1]["class_cond"].tolist() == [asked] * 3


def test_what_is_not_here_is_an_error():
    for name, it in (("p_nucleus", diffusion(p_nucleus=0.9)), ("guid_weight", diffusion(2.0, class_conditional=True))):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            duo.DUO_BASE._ancestral_update(it, P.moved, torch.full((3, 1), 0.6), None, 0.1)
    with pytest.raises(ValueError, match="sigma"):
        duo.DUO_BASE.nll_per_token(diffusion(), Z, P.moved, P.x0, torch.ones(3, 1), -1.0)
