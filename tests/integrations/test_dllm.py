"""dllm's trainers: what their losses do at the edges, and call after call."""

from types import SimpleNamespace

import pytest
import torch
from standins import dllm as standin
from standins import problem

from fastdiff.integrations import dllm, dream

B, L, V = 3, 12, 33
KINDS = {"MDLMTrainer": dllm.MDLMTrainer.compute_loss, "BD3LMTrainer": dllm.BD3LMTrainer.compute_loss}


@pytest.fixture
def p():
    return problem(B, L, V)


def made_inputs(p, prompts=(3, 1, 12)):
    """Prompts that are never masked, the last as long as its sequence."""
    labels = p.x0.clone()
    for row, length in enumerate(prompts):
        labels[row, :length] = -100
    return dict(input_ids=p.x0.clone(), labels=labels, attention_mask=torch.ones_like(labels))


def run(kind, p, *, inputs=None, length=L, **options):
    """The loss of a trainer and of the published one: values, gradients, meters, how the network was asked."""
    rows = length if kind == "MDLMTrainer" else 2 * length
    results = []
    for compute_loss in (KINDS[kind], getattr(standin, kind).compute_loss):
        trainer = standin.trainer(getattr(standin, kind), p.mask_index, **options)
        g = torch.Generator().manual_seed(1)
        network = standin.Network(torch.randn(B, rows, V, generator=g, dtype=torch.float64).requires_grad_())
        torch.manual_seed(3)
        loss, outputs = compute_loss(trainer, network, dict(inputs or made_inputs(p)), return_outputs=True)
        (grad,) = torch.autograd.grad(loss, network.logits)
        results.append((loss, grad, trainer.meter, network.asked, outputs))
    return results


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["token", "sequence", "batch"])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("weight", ["scheduler", "uniform"])
def test_losses_are_the_published_ones(kind, norm, shifted, weight, p):
    options = dict(loss_norm_type=norm, right_shift_logits=shifted, loss_weight_type=weight)
    (loss, grad, meter, asked, outputs), theirs = run(kind, p, **options)
    torch.testing.assert_close(loss, theirs[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(grad, theirs[1], rtol=1e-7, atol=1e-14)
    torch.testing.assert_close(meter.sums, theirs[2].sums, rtol=1e-9, atol=0)
    assert meter.split == "train"
    assert asked.keys() == theirs[3].keys()
    assert all(torch.equal(value, theirs[3][name]) for name, value in asked.items())
    assert torch.equal(outputs.logits, theirs[4].logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_beginning_token_is_added_where_logits_are_shifted(kind, p):
    inputs = dict(input_ids=p.x0, labels=p.x0)
    ours, theirs = run(kind, p, inputs=inputs, length=L + 1, right_shift_logits=True)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(ours[1], theirs[1], rtol=1e-7, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["token", "sequence", "batch"])
def test_nothing_to_mask_is_no_loss(kind, norm, p):
    inputs = made_inputs(p, (L, L, L))
    (loss, grad, *_), theirs = run(kind, p, inputs=inputs, loss_norm_type=norm)
    assert loss == theirs[0] == 0
    assert not grad.any()


def test_everything_is_masked(p):
    ours, theirs = run("MDLMTrainer", p, time_epsilon=1 - 1e-7)
    assert (ours[3]["input_ids"] == p.mask_index).sum() == (made_inputs(p)["labels"] != -100).sum()
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=0)


def test_flex_attention_sees_what_sdpa_sees(p):
    trainer = standin.trainer(standin.BD3LMTrainer, p.mask_index)
    for kind in ("sdpa", "flex_attention"):
        network = standin.Network(torch.randn(B, 2 * L, V), config=SimpleNamespace(_attn_implementation=kind))
        dllm.BD3LMTrainer.compute_loss(trainer, network, made_inputs(p))
        if kind == "sdpa":
            dense = network.asked["attention_mask"]
    rule, at = network.asked["attention_mask"].mask_mod, torch.arange(2 * L)
    assert torch.equal(rule(0, 0, at[:, None], at[None, :]), dense[0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_steps_in_a_row_have_the_published_masks(kind, p, applied):
    """One seed, and then call after call."""
    rows, seen = L if kind == "MDLMTrainer" else 2 * L, []
    for _ in range(2):
        torch.manual_seed(0)
        trainer = standin.trainer(getattr(standin, kind), p.mask_index)
        network = standin.Network(torch.randn(B, rows, V, generator=torch.Generator().manual_seed(1)))
        losses = [trainer.compute_loss(network, made_inputs(p)) for _ in range(3)]
        seen.append((torch.stack(losses), network.asked["input_ids"]))
        applied(standin, dllm.apply_to_dllm)
    torch.testing.assert_close(*seen)
    assert len(seen[0][0].unique()) == 3


def test_one_call_swaps_the_weights_of_dream(p, applied):
    trainer, mask = standin.PUBLISHED["dllm.pipelines.dream.trainer"], p.xt == p.mask_index
    expected = trainer.cart_weight(mask, p.t, p=0.1)
    applied(standin, dream.apply_to_dream)
    assert trainer.cart_weight is dream.cart_weight
    torch.testing.assert_close(trainer.cart_weight(mask, p.t, p=0.1), expected, check_dtype=False)


def test_errors_name_the_argument(p):
    def loss(kind="MDLMTrainer", inputs=None, config="sdpa", **options):
        trainer = standin.trainer(getattr(standin, kind), p.mask_index, **options)
        network = standin.Network(torch.randn(B, L, V), config=SimpleNamespace(_attn_implementation=config))
        return KINDS[kind](trainer, network, inputs or made_inputs(p))

    with pytest.raises(ValueError, match="loss_norm_type"):
        loss(loss_norm_type="no")
    with pytest.raises(ValueError, match="padding_side"):
        loss(processing_class=SimpleNamespace(padding_side="left"))
    with pytest.raises(ValueError, match="labels"):
        loss(inputs=dict(input_ids=p.x0, labels=(p.x0 + 1) % V))
    with pytest.raises(ValueError, match="_attn_implementation"):
        loss("BD3LMTrainer", config="flash_attention_2")
