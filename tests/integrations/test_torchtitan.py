"""torchtitan's loss and noise by themselves; its trainer, where it is installed, on ranks of the CPU."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchrun
from standins import Network, problem
from standins import torchtitan as standin
from torch import nn

from fastdiff import LogLinear, mask_tokens, sample_times
from fastdiff.integrations import torchtitan
from fastdiff.noise.noising import spread

M, B, L, V = 5, 8, 32, 50
RANKS = Path(__file__).parent / "torchtitan_ranks.py"
with_torchtitan = pytest.mark.skipif(not standin.INSTALLED, reason="torchtitan is not installed")


def made(mask_index=M, **options):
    return torchtitan.MaskedDiffusionLoss(torchtitan.MaskedDiffusionLoss.Config(mask_index=mask_index, **options))


def batch(share=0.3):
    """What a loader gives: tokens and those one ahead, of which a share is not to be learnt."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(M + 1, V, (B, L + 1), generator=g)
    labels = tokens[:, 1:].masked_fill(torch.rand(B, L, generator=g) < share, -100)
    return dict(input=tokens[:, :-1], positions=torch.arange(L)), labels, tokens[:, 1:].clone()


def test_tokens_are_labels_and_only_those_are_masked():
    inputs, labels, tokens = batch()
    noised, targets = made(seed=3).noised(inputs, labels, 7, 0, 1)
    mask = targets.real != -100
    assert torch.equal(targets.real[mask].long(), labels[mask])
    assert torch.equal(noised["input"] == M, mask)
    tokens[:, -1] = torch.where(labels[:, -1] == -100, inputs["input"][:, -1], tokens[:, -1])  # where nobody says it
    assert torch.equal(noised["input"][~mask], tokens[~mask])
    assert noised["positions"] is inputs["positions"]
    assert 0 < mask.sum() < (labels != -100).sum()
    sigma, dsigma = LogLinear()(sample_times(B, seed=3, step=7)[spread(B)])
    assert torch.equal(
        mask, mask_tokens(tokens, -torch.expm1(-sigma), mask_index=M, seed=3, step=7, maskable=labels != -100).mask
    )
    assert torch.equal(targets.imag, (dsigma / torch.expm1(sigma)).double()[:, None].expand(B, L))


@pytest.mark.parametrize("parts", [2, 4])
def test_noise_is_named_by_the_row_of_the_whole_batch(parts):
    inputs, labels, _ = batch()
    whole, whole_targets = made().noised(inputs, labels, 1, 0, 1)
    for k in range(parts):
        rows = slice(k * B // parts, (k + 1) * B // parts)
        noised, targets = made().noised({"input": inputs["input"][rows]}, labels[rows], 1, k, parts)
        assert torch.equal(noised["input"], whole["input"][rows])
        assert torch.equal(targets, whole_targets[rows])
    others = [made().noised(inputs, labels, 2, 0, 1), made(seed=1).noised(inputs, labels, 1, 0, 1)]
    others.append(made().noised(inputs, labels, 1, 0, 1, training=False))
    assert all(not torch.equal(noised["input"], whole["input"]) for noised, _ in others)


def test_without_a_number_of_tokens_losses_are_summed():
    p = problem(3, 17, 33)
    labels = standin.labels_of(p.x0, p.xt == p.mask_index, 1 / p.t[:, None])
    network, loss_fn = Network(p, 8, bias=True, dtype=torch.float64), made(p.mask_index)
    loss_fn.set_lm_head(network.lm_head)
    with torch.no_grad():
        hidden = network.hidden[:, :17]
        total, metrics = loss_fn(hidden, labels)
        mean, _ = loss_fn(hidden, labels, torch.tensor(10), positions=None)
        expected = standin.published_loss(network(p.xt).logits, labels, p.mask_index, 1)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(mean, expected / 10, rtol=1e-12, atol=0)
    assert metrics == {}


def test_only_a_linear_last_layer_is_taken():
    class Capped(nn.Linear):
        def forward(self, hidden):
            return torch.tanh(super().forward(hidden))

    class Named(nn.Linear):
        pass

    made().set_lm_head(Named(8, V))
    for layer in (Capped(8, V), nn.Sequential(nn.Linear(8, V))):
        with pytest.raises(
            TypeError, match=f"lm_head: expected a linear layer and no more, got a {type(layer).__name__}"
        ):
            made().set_lm_head(layer)


def test_mask_of_config_and_tokenizer():
    def tokenizer(token):
        ids = {"<mask>": M}.get
        return SimpleNamespace(_hf_config={"mask_token": token}, tokenizer=SimpleNamespace(token_to_id=ids))

    nobody = SimpleNamespace()
    for said, own in (
        (M, nobody),
        (None, tokenizer("<mask>")),
        (M, tokenizer({"content": "<mask>"})),
        (M, tokenizer(None)),
    ):
        assert torchtitan._mask_index(said, own, V) == M
    for said, own, text in (
        (V, nobody, r"an id in \[0, 50\), got 50"),
        (-1, nobody, r"got -1"),
        (None, nobody, "got None"),
        (None, tokenizer("<unknown>"), "got None"),
        (M + 1, tokenizer("<mask>"), "5, the tokenizer's, got 6"),
    ):
        with pytest.raises(ValueError, match=f"loss.mask_index: expected .*{text}"):
            torchtitan._mask_index(said, own, V)


@with_torchtitan
def test_what_becomes_of_a_config():
    from torchtitan.models.common.attention import VarlenAttention
    from torchtitan.models.llama3 import config_registry

    before = config_registry.llama3_debugmodel()
    before.training.steps, before.validator.steps = 17, 3
    config = torchtitan.masked_diffusion(before, mask_index=M, seed=2)
    assert type(config) is torchtitan.MaskedDiffusionTrainer.Config
    assert (config.training.steps, config.validator.steps) == (17, 3)
    assert config.training.disable_cuda_graphs
    assert type(config.validator) is torchtitan.MaskedDiffusionValidator.Config
    assert (config.loss.mask_index, config.loss.seed) == (M, 2)
    inner = [layer.attention.inner_attention for layer in config.model_spec.model.layers]
    assert all(type(one) is torchtitan.BidirectionalAttention.Config for one in inner)
    config = torchtitan.masked_diffusion(config_registry.llama3_debugmodel_varlen_attn())
    inner = [layer.attention.inner_attention for layer in config.model_spec.model.layers]
    assert all(type(one) is VarlenAttention.Config and one.window_size == (-1, -1) for one in inner)


@with_torchtitan
def test_attention_sees_both_ways():
    q, k, v = torch.randn(3, 2, 7, 4, 8).unbind()
    out = torchtitan.BidirectionalAttention.Config().build()(q, k, v)
    expected = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(out, expected)


@with_torchtitan
def test_what_cannot_be_done_is_refused():
    from torchtitan.models.gpt_oss import config_registry as gpt_oss
    from torchtitan.models.llama3 import config_registry

    with pytest.raises(ValueError, match="config: expected attention that is causal and no more, got GptOssModel's"):
        torchtitan.masked_diffusion(gpt_oss.gpt_oss_debugmodel())
    config = config_registry.llama3_debugmodel()
    config.model_spec.model.layers[1].attention = None
    with pytest.raises(ValueError, match="config: expected attention that is causal and no more, got Llama3Model's"):
        torchtitan.masked_diffusion(config)
    with pytest.raises(
        TypeError, match=r"config: expected a Trainer.Config of a decoder, got MaskedDiffusionTrainer.Config"
    ):
        torchtitan.masked_diffusion(torchtitan.masked_diffusion(config_registry.llama3_debugmodel()))
    for name, value in (
        ("pipeline_parallel_degree", 2),
        ("context_parallel_degree", 2),
        ("spmd_backend", "full_dtensor"),
    ):
        config = config_registry.llama3_debugmodel()
        setattr(config.parallelism, name, value)
        with pytest.raises(ValueError, match=f"parallelism.{name}: expected .* got {value}"):
            torchtitan.masked_diffusion(config)


@pytest.mark.slow
@with_torchtitan
@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [(1, ["accumulated"]), (2, ["fsdp2", "tensor_parallel", "tensor_parallel_spmd_types", "last_layer_of_its_own"])],
)
def test_steps_of_the_trainer_are_those_of_one_process(ranks, layouts):
    torchrun.launch(RANKS, ranks, *layouts)


@pytest.mark.slow
@with_torchtitan
@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_of_a_run_are_those_of_the_trainer_of_this_package(ranks):
    torchrun.launch(RANKS.with_name("torchtitan_curve.py"), ranks, "same_curve")
