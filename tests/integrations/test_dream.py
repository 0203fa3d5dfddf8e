"""Dream's context-adaptive weights, and its SFT loss where the shared test does not look."""

import pytest
import torch
from standins import dream as standin

from fastdiff.integrations import dream

B, L, V = 3, 11, 33


def made(seed=0, dtype=torch.float64):
    """Logits, labels, masks and times; the first token is never masked."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(B, L, V, generator=g, dtype=dtype).requires_grad_()
    mask = torch.rand(B, L, generator=g) < 0.5
    mask[:, 0] = False
    return z, torch.randint(0, V, (B, L), generator=g), mask, torch.rand(B, generator=g)


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
    z, labels, mask, t = made()
    diffusion = standin.config(time_reweighting=method, token_reweighting=focal, alpha=0.7, gamma=1.5)
    ours = dream.sft_loss(z, labels, mask, t, diffusion)
    theirs = double(standin.sft_loss, z, labels, mask, t, diffusion)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=0)
    grads = (torch.autograd.grad(loss, z)[0] for loss in (ours, theirs))
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("focal", [False, True])
def test_nothing_masked_is_no_loss(focal):
    z, labels, mask, t = made()
    diffusion = standin.config(token_reweighting=focal)
    assert standin.sft_loss(z, labels, mask & False, 0 * t, diffusion).isnan()  # 0 / 0, as published
    loss = dream.sft_loss(z, labels, mask & False, 0 * t, diffusion)
    loss.backward()
    assert loss == 0
    assert not z.grad.any()


def test_everything_but_the_first_is_masked():
    z, labels, mask, t = made()
    mask[:, 1:] = True
    diffusion = standin.config(time_reweighting="cart")
    theirs = double(standin.sft_loss, z, labels, mask, t, diffusion)
    torch.testing.assert_close(dream.sft_loss(z, labels, mask, t, diffusion), theirs, rtol=1e-7, atol=0)


def test_labels_that_are_not_to_be_predicted_count_for_nothing():
    z, labels, mask, t = made()
    without = mask.clone()
    without[0], without[1, 5:] = False, False
    expected = dream.sft_loss(z, labels, without, t, standin.config())
    labels[0], labels[1, 5:] = -100, -100
    torch.testing.assert_close(dream.sft_loss(z, labels, mask, t, standin.config()), expected, rtol=1e-12, atol=0)


def test_the_first_token_is_never_scored_and_the_last_logits_never_read():
    z, labels, mask, t = made()
    expected = dream.sft_loss(z, labels, mask, t, standin.config())
    mask[:, 0] = True
    with torch.no_grad():
        z[:, -1] = torch.nan
    loss = dream.sft_loss(z, labels, mask, t, standin.config())
    assert loss == expected
    loss.backward()
    assert not z.grad[:, -1].any()


def test_one_write_of_the_gradient_and_no_copy_of_the_logits():
    """Not even that of a slice, whose backward would copy the gradient into zeros."""
    z, labels, mask, t = made(dtype=torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        dream.sft_loss(z, labels, mask, t, standin.config()).backward()
    names = {event.key for event in profile.key_averages()}
    assert "aten::slice_backward" not in names
    made_bytes = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    assert made_bytes < 1.8 * z.numel() * z.element_size()


def test_errors_name_the_argument():
    z, labels, mask, t = made()
    with pytest.raises(ValueError, match="p: "):
        dream.sft_loss(z, labels, mask, t, standin.config(time_reweighting="cart", cart_p=0.0))
    with pytest.raises(TypeError, match="logits"):
        dream.sft_loss(labels, labels, mask, t, standin.config())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("focal", [False, True])
@pytest.mark.parametrize("method", ["original", "cart"])
def test_losses_have_the_type_of_losses(dtype, focal, method):
    z, labels, mask, t = made(dtype=dtype)
    loss = dream.sft_loss(z, labels, mask, t.double(), standin.config(time_reweighting=method, token_reweighting=focal))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
