"""NeMo Automodel's loss where the shared test does not look: edges, and logits that ranks share."""

import pytest
import torch
import torchrun
from standins import nemo as standin
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from fastdiff.integrations import nemo

B, L, V = 3, 7, 34


def made(dtype=torch.float64, share=0.5):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(B, L, V, generator=g, dtype=dtype).requires_grad_()
    target_ids = torch.randint(0, V, (B, L), generator=g)
    noise_mask = torch.rand(B, L, generator=g) < share
    return logits, target_ids, noise_mask, torch.rand(B, L, generator=g), (torch.arange(L) > 1).long().expand(B, L)


def agree(arguments, **options):
    results = [
        loss_fn()(*arguments, **options) for loss_fn in (nemo.MDLMCrossEntropyLoss, standin.MDLMCrossEntropyLoss)
    ]
    torch.testing.assert_close(results[0].total_loss, results[1].total_loss, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(result.total_loss, arguments[0])[0] for result in results]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-14)
    return results[0]


def test_what_the_recipe_takes_from_a_loss():
    assert nemo.DLLMLossOutput._fields == standin.DLLMLossOutput._fields
    assert nemo.DLLMLossOutput._field_defaults == standin.DLLMLossOutput._field_defaults


def test_one_call_swaps_the_loss_of_the_recipe(applied):
    """It calls by keyword what its strategy made, and multiplies the loss by its ranks."""
    strategy = standin.PUBLISHED["nemo_automodel.recipes.dllm.strategy"].MDLMStrategy()
    names = ("logits", "target_ids", "noise_mask", "p_mask", "loss_mask")
    loss_fn, outputs = strategy.create_loss_fn({}), []  # before
    for _ in range(2):
        arguments = dict(
            zip(names, made(), strict=True), num_diffusion_tokens=99, loss_mask_ar=None, causal_logits=None
        )
        result = loss_fn(**arguments)
        (4 * result.total_loss).backward()
        outputs.append((result.total_loss.detach(), arguments["logits"].grad))
        applied(standin, nemo.apply_to_nemo)
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-14)
    assert loss_fn.forward.__func__ is nemo.MDLMCrossEntropyLoss.forward


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("tokens", [None, 0, 1, 1000])
def test_normalisers(share, tokens):
    result = agree(made(share=share), num_diffusion_tokens=tokens)
    assert result.dllm_loss == result.total_loss
    assert not result.dllm_loss.requires_grad
    assert (result.total_loss == 0) == (share == 0)


def test_only_masked_and_supervised_tokens_count():
    arguments = made()
    expected = agree(arguments).total_loss
    arguments[1][~arguments[2]] = 0
    with torch.no_grad():
        arguments[0][:, :2] = torch.nan
    assert nemo.MDLMCrossEntropyLoss()(*arguments).total_loss == expected
    arguments[1][0] = -100
    assert nemo.MDLMCrossEntropyLoss()(*arguments).total_loss < expected


def test_tiny_probabilities_are_clamped():
    arguments = list(made())
    arguments[3] = torch.full((B, L), 1e-12, dtype=torch.float64)
    agree(arguments)


def test_bfloat16_is_not_rounded():
    logits, *others = made(torch.bfloat16)
    exact = standin.MDLMCrossEntropyLoss()(logits.double(), *others).total_loss
    got = nemo.MDLMCrossEntropyLoss()(logits, *others).total_loss
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)


def logits_of_two_ranks():
    mesh, (logits, *others) = init_device_mesh("cpu", (2,)), made()
    expected = standin.MDLMCrossEntropyLoss()(logits, *others, num_diffusion_tokens=9).total_loss
    expected.backward()
    sharded = distribute_tensor(logits.detach(), mesh, [Shard(-1)]).requires_grad_()
    got = nemo.MDLMCrossEntropyLoss()(sharded, *others, num_diffusion_tokens=9).total_loss
    got.backward()
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(sharded.grad.full_tensor(), logits.grad, rtol=1e-8, atol=1e-14)
    with pytest.raises(ValueError, match="logits: expected a DTensor sharded along its ids"):
        nemo.MDLMCrossEntropyLoss()(distribute_tensor(logits.detach(), mesh, [Replicate()]), *others)


def test_sharded_logits_are_not_gathered():
    torchrun.launch(__file__, 2, "logits_of_two_ranks")


def test_errors_name_the_argument():
    logits, target_ids, *others = made()
    with pytest.raises(ValueError, match="x0"):
        nemo.MDLMCrossEntropyLoss()(logits, target_ids[:, 1:], *others)
    with pytest.raises(TypeError, match="logits"):
        nemo.MDLMCrossEntropyLoss()(target_ids, target_ids, *others)


if __name__ == "__main__":
    torchrun.run(globals())
