"""Dream's context-adaptive weights, and its SFT loss where the shared test does not look."""

import pytest
import torch
from rows import largest_rows
from standins import Network, problem
from standins import dream as standin

from fastdiff.integrations import dream

B, L, V, D = 3, 11, 33, 4


def made(num_states=V, dtype=torch.float64):
    """A network, its noised input, labels, masks and times; the first token is never masked."""
    p = problem(B, L, num_states)
    torch.manual_seed(0)
    mask = p.xt == p.mask_index
    mask[:, 0] = False
    return Network(p, D, dtype=dtype), p.xt, p.x0, mask, p.t.float()


def loss_and_grads(function, network, *arguments):
    loss = function(network, *arguments)
    return loss.detach(), torch.autograd.grad(loss, tuple(network.parameters()))


def double(function, *arguments):
    """With float64 as what numbers become by default."""
    torch.set_default_dtype(torch.float64)
    try:
        return function(*arguments)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.99])
@pytest.mark.parametrize("length", [1, 2, 7, 600])
def test_weights_are_the_published_ones(p, length):
    for share in (0.0, 0.5, 0.999, 1.0):
        mask = torch.rand(4, length, generator=torch.Generator().manual_seed(length)) < share
        got = dream.cart_weight(mask, torch.rand(4), p)
        assert (got.dtype, got.shape) == (torch.float32, mask.shape)
        expected = double(standin.cart_weight, mask, None, p)
        torch.testing.assert_close(got, expected.float(), rtol=1e-6, atol=1e-12)
        assert not got[~mask].any()


def test_weights_where_only_neighbours_count():
    mask = torch.tensor([[False, True, True, True, False, True]])
    assert dream.cart_weight(mask, torch.ones(1), p=1.0).tolist() == [[0, 0.5, 0, 0.5, 0, 0.5]]
    for p in (0.0, 1.5):
        with pytest.raises(ValueError, match="p: "):
            dream.cart_weight(mask, torch.ones(1), p)


@pytest.mark.parametrize("method", ["original", "linear", "cart", "none"])
@pytest.mark.parametrize("focal", [False, True])
def test_losses_are_the_published_ones(method, focal):
    diffusion = standin.config(time_reweighting=method, token_reweighting=focal, alpha=0.7, gamma=1.5)
    arguments = (*made(), diffusion)
    ours = loss_and_grads(dream.sft_loss, *arguments)
    theirs = double(loss_and_grads, standin.sft_loss, *arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_the_model_is_called_as_in_the_trainer():
    network, xt, *rest = made()
    more = dict(attention_mask=torch.ones(B, 1, L, L, dtype=torch.bool), position_ids=torch.arange(L), use_cache=False)
    dream.sft_loss(network, xt, *rest, standin.config(), **more)
    assert network.asked == more | dict(input_ids=xt)


@pytest.mark.parametrize("focal", [False, True])
def test_nothing_masked_is_no_loss(focal):
    network, xt, labels, mask, t = made()
    diffusion = standin.config(token_reweighting=focal)
    arguments = (network, xt, labels, mask & False, 0 * t, diffusion)
    assert standin.sft_loss(*arguments).isnan()  # 0 / 0, as published
    loss, grads = loss_and_grads(dream.sft_loss, *arguments)
    assert loss == 0
    assert not any(grad.any() for grad in grads)


def test_everything_but_the_first_is_masked():
    network, xt, labels, mask, t = made()
    mask[:, 1:] = True
    arguments = (network, xt, labels, mask, t, standin.config(time_reweighting="cart"))
    ours = loss_and_grads(dream.sft_loss, *arguments)
    torch.testing.assert_close(ours, double(loss_and_grads, standin.sft_loss, *arguments), rtol=1e-10, atol=1e-14)


def test_labels_that_are_not_to_be_predicted_count_for_nothing():
    network, xt, labels, mask, t = made()
    without = mask.clone()
    without[0], without[1, 5:] = False, False
    expected = loss_and_grads(dream.sft_loss, network, xt, labels, without, t, standin.config())
    labels[0], labels[1, 5:] = -100, -100
    got = loss_and_grads(dream.sft_loss, network, xt, labels, mask, t, standin.config())
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_the_first_token_is_never_scored_and_the_last_hidden_state_never_read():
    network, xt, labels, mask, t = made()
    expected = dream.sft_loss(network, xt, labels, mask, t, standin.config())
    mask[:, 0] = True
    with torch.no_grad():
        network.hidden[:, L - 1] = torch.nan
    loss, grads = loss_and_grads(dream.sft_loss, network, xt, labels, mask, t, standin.config())
    assert loss == expected
    assert not grads[0][:, L - 1].any()


@pytest.mark.parametrize("focal", [False, True])
def test_training_makes_logits_of_masked_tokens_only(focal):
    network, xt, labels, mask, t = made(num_states=1031)
    arguments = (network, xt, labels, mask, t, standin.config(token_reweighting=focal))
    steps = (lambda f=module.sft_loss: f(*arguments).backward() for module in (dream, standin))
    (_, ours), (_, theirs) = (largest_rows(step, 1031) for step in steps)
    assert D < ours == mask.sum() < B * L <= theirs


@pytest.mark.parametrize("focal", [False, True])
def test_autocast_multiplies_in_bfloat16_as_the_trainer_does(focal):
    """And no further off than the trainer's."""
    network, *arguments = made(dtype=torch.float32)
    arguments.append(standin.config(token_reweighting=focal))
    exact = double(loss_and_grads, standin.sft_loss, made()[0], *arguments)
    theirs = loss_and_grads(standin.sft_loss, network, *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        ours = loss_and_grads(dream.sft_loss, network, *arguments)
    assert ours[0].dtype == torch.float32
    for got, published, expected in zip(*((loss, *grads) for loss, grads in (ours, theirs, exact)), strict=True):
        assert got.dtype == published.dtype == torch.float32
        assert 0 < (got - expected).norm() <= 2 * (published - expected).norm()


def test_errors_name_the_argument():
    network, xt, labels, mask, t = made()
    with pytest.raises(ValueError, match="p: "):
        dream.sft_loss(network, xt, labels, mask, t, standin.config(time_reweighting="cart", cart_p=0.0))
    with pytest.raises(TypeError, match="loss_mask"):
        dream.sft_loss(network, xt, labels, mask.long(), t, standin.config())
    with pytest.raises(ValueError, match="loss_mask"):
        dream.sft_loss(network, xt, labels[:, 1:], mask, t, standin.config())
    with pytest.raises(ValueError, match="x0"):
        dream.sft_loss(network, xt, labels[:, 1:], mask[:, 1:], t, standin.config())
    with pytest.raises(TypeError, match="get_output_embeddings"):
        dream.sft_loss(torch.nn.Linear(2, 2), xt, labels, mask, t, standin.config())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("focal", [False, True])
@pytest.mark.parametrize("method", ["original", "cart"])
def test_losses_have_the_type_of_losses(dtype, focal, method):
    network, xt, labels, mask, t = made(dtype=dtype)
    diffusion = standin.config(time_reweighting=method, token_reweighting=focal)
    loss = dream.sft_loss(network, xt, labels, mask, t.double(), diffusion)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
