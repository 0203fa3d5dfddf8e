"""dllm's trainers: what their losses do at the edges, and call after call."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from rows import largest_rows
from standins import Network, is_real, problem
from standins import dllm as standin

from fastdiff.integrations import dllm, dream

B, L, V, D = 3, 12, 33, 4
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


@pytest.fixture
def network(p):
    torch.manual_seed(1)
    return Network(problem(B, L + 1, V), D, bias=True, dtype=torch.float64)


def run(kind, p, network, *, inputs=None, return_outputs=False, **options):
    """The loss of a trainer and of the published one: values, gradients, meters, how the network was asked, outputs."""
    results = []
    for compute_loss in (KINDS[kind], getattr(standin, kind).compute_loss):
        trainer = standin.trainer(getattr(standin, kind), p.mask_index, **options)
        torch.manual_seed(0)
        loss = compute_loss(trainer, network, dict(inputs or made_inputs(p)), return_outputs=return_outputs)
        loss, outputs = loss if return_outputs else (loss, None)
        grads = torch.autograd.grad(loss, tuple(network.parameters()))
        results.append((loss.detach(), grads, trainer.meter.sums, network.asked, outputs))
        assert trainer.meter.split == ("train" if network.training else "eval")
    return results


def same(ours, theirs):
    torch.testing.assert_close(ours[:3], theirs[:3], rtol=1e-10, atol=1e-13)
    assert ours[3].keys() == theirs[3].keys()
    assert all(torch.equal(value, theirs[3][name]) for name, value in ours[3].items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["token", "sequence", "batch"])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("weight", ["scheduler", "uniform"])
@pytest.mark.parametrize("return_outputs", [False, True])
def test_losses_are_the_published_ones(kind, norm, shifted, weight, return_outputs, p, network):
    options = dict(loss_norm_type=norm, right_shift_logits=shifted, loss_weight_type=weight)
    ours, theirs = run(kind, p, network, return_outputs=return_outputs, **options)
    same(ours, theirs)
    if return_outputs:
        assert torch.equal(ours[4].logits, theirs[4].logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shifted", [False, True])
def test_training_makes_logits_of_masked_tokens_only(kind, shifted):
    p = problem(B, L, 1031)
    network = Network(p, D, dtype=torch.float64)
    trainer = standin.trainer(getattr(standin, kind), p.mask_index, right_shift_logits=shifted)
    rows = []
    for compute_loss in (KINDS[kind], getattr(standin, kind).compute_loss):
        torch.manual_seed(0)
        rows.append(largest_rows(lambda f=compute_loss: f(trainer, network, made_inputs(p)).backward(), 1031)[1])
    seen = network.asked["input_ids"]
    masked = (seen[:, :L] == p.mask_index).sum()
    assert D < rows[0] == masked < B * L
    assert rows[1] >= seen.numel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("loss_only", [False, True])
def test_evaluation_makes_logits_only_where_they_are_asked_for(kind, shifted, loss_only, applied):
    p = problem(B, L, 1031)
    network = Network(p, D, dtype=torch.float64).eval()
    results, rows = [], []
    for _ in range(2):
        torch.manual_seed(0)
        trainer = standin.trainer(getattr(standin, kind), p.mask_index, right_shift_logits=shifted)
        step = partial(trainer.prediction_step, network, made_inputs(p), loss_only)
        result, largest = largest_rows(step, 1031)
        results.append((*result, trainer.meter.sums))
        rows.append(largest)
        applied(standin, dllm.apply_to_dllm)
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-13)
    assert not results[1][0].requires_grad
    seen = network.asked["input_ids"]
    assert rows[0] >= seen.numel()
    assert rows[1] >= seen.numel() if not loss_only else rows[1] == (seen[:, :L] == p.mask_index).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_a_beginning_token_is_added_where_logits_are_shifted(kind, p, network):
    inputs = made_inputs(p) | dict(labels=p.x0)
    ours, theirs = run(kind, p, network, inputs=inputs, right_shift_logits=True)
    same(ours, theirs)
    assert ours[3]["input_ids"].shape[1] == (L + 1) * (1 if kind == "MDLMTrainer" else 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["token", "sequence", "batch"])
def test_nothing_to_mask_is_no_loss(kind, norm, p, network):
    inputs = made_inputs(p, (L, L, L))
    (loss, grads, *_), theirs = run(kind, p, network, inputs=inputs, loss_norm_type=norm)
    assert loss == theirs[0] == 0
    assert not any(grad.any() for grad in grads)


def test_everything_is_masked(p, network):
    ours, theirs = run("MDLMTrainer", p, network, time_epsilon=1 - 1e-7)
    assert (ours[3]["input_ids"] == p.mask_index).sum() == (made_inputs(p)["labels"] != -100).sum()
    same(ours, theirs)


def test_flex_attention_sees_what_sdpa_sees(p, network):
    for kind in ("sdpa", "flex_attention"):
        trainer = standin.trainer(standin.BD3LMTrainer, p.mask_index, attention=kind)
        dllm.BD3LMTrainer.compute_loss(trainer, network, made_inputs(p))
        if kind == "sdpa":
            dense = network.asked["attention_mask"]
    rule, at = network.asked["attention_mask"].mask_mod, torch.arange(2 * L)
    assert torch.equal(rule(0, 0, at[:, None], at[None, :]), dense[0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_steps_in_a_row_have_the_published_masks(kind, p, network, applied):
    """One seed, and then call after call."""
    seen = []
    for _ in range(2):
        torch.manual_seed(0)
        trainer = standin.trainer(getattr(standin, kind), p.mask_index)
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


@pytest.mark.skipif(not is_real(standin.PUBLISHED["dllm.pipelines.a2d"]), reason="dllm's models are in its checkout")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["A2DLlama", "A2DQwen3"])
def test_a_run_of_dllm_itself_ends_at_the_published_weights(kind, model, tmp_path, applied):
    """Three steps of SGD in float64, and the evaluation after them."""
    trainers, a2d = (standin.PUBLISHED[name] for name in ("dllm.core.trainers", "dllm.pipelines.a2d"))
    sizes = dict(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = getattr(a2d, f"{model}Config")(num_key_value_heads=1, head_dim=8, **sizes)
    steps = dict(max_steps=3, optim="sgd", learning_rate=0.5, eval_strategy="steps", eval_steps=3, logging_steps=1)
    options = dict(use_cpu=True, bf16=False, report_to="none", save_strategy="no", remove_unused_columns=False)
    args = getattr(trainers, kind.replace("Trainer", "Config"))(output_dir=tmp_path, **steps, **options)
    p = problem(9, L, V)
    data = [dict(input_ids=row, labels=row) for row in p.x0]
    tokenizer = standin.trainer(standin.MDLMTrainer, p.mask_index).processing_class
    results, metered = [], []
    for _ in range(2):
        torch.manual_seed(0)
        network = getattr(a2d, f"{model}LMHeadModel")(config).double()
        options = dict(processing_class=tokenizer, train_dataset=data, eval_dataset=data)
        trainer = getattr(trainers, kind)(args=args, model=network, **options)
        trainer.train()
        logged = {name: number for log in trainer.state.log_history for name, number in log.items()}
        results.append((*network.parameters(), torch.tensor(logged["eval_loss"], dtype=torch.float64)))
        metered.append([logged[name] for name in ("nll", "ppl", "eval_nll", "eval_ppl")])
        applied(standin, dllm.apply_to_dllm)
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-13)
    torch.testing.assert_close(*metered, rtol=1e-5, atol=0)  # sums in float32


def test_errors_name_the_argument(p, network):
    def loss(kind="MDLMTrainer", inputs=None, model=network, **options):
        trainer = standin.trainer(getattr(standin, kind), p.mask_index, **options)
        return KINDS[kind](trainer, model, inputs or made_inputs(p))

    with pytest.raises(ValueError, match="loss_norm_type"):
        loss(loss_norm_type="no")
    with pytest.raises(ValueError, match="padding_side"):
        loss(processing_class=SimpleNamespace(padding_side="left"))
    with pytest.raises(ValueError, match="labels"):
        loss(inputs=dict(input_ids=p.x0, labels=(p.x0 + 1) % V))
    with pytest.raises(ValueError, match="_attn_implementation"):
        loss("BD3LMTrainer", attention="flash_attention_2")


def test_a_last_layer_that_cannot_be_followed_is_an_error(p, network):
    """And the step after it is as good as any."""

    class Normalised(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, **inputs):
            return SimpleNamespace(logits=self.network(**inputs).logits.log_softmax(-1))

    trainer, model = standin.trainer(standin.MDLMTrainer, p.mask_index), Normalised()
    with pytest.raises(TypeError, match="get_output_embeddings"):
        dllm.MDLMTrainer.compute_loss(trainer, model, made_inputs(p))
    model.get_output_embeddings = network.get_output_embeddings
    with pytest.raises(ValueError, match="expected a model that scales, caps"):
        dllm.MDLMTrainer.compute_loss(trainer, model, made_inputs(p))
    assert network(p.x0).logits.shape == (B, L, V)
    same(*run("MDLMTrainer", p, network))
