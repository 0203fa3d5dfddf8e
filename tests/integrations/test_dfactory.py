"""dFactory's training step where the shared test does not look: a whole model, one and two ranks, and edges."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torchrun
from standins import dfactory as standin
from torch import nn
from torch.distributed.fsdp import fully_shard

from fastdiff.integrations import dfactory

B, L, V, M = 4, 8, 61, 60


class Model(nn.Module):
    """As LLaDA2.0's: a mixture of experts over [xt, x0] with a mask of who sees whom."""

    def __init__(self):
        super().__init__()
        self.embed, self.router = nn.Embedding(V, 16), nn.Linear(16, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(3))
        self.lm_head = nn.Linear(16, V, bias=False)

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None, output_router_logits=None):
        assert not use_cache
        x = self.embed(input_ids)
        if attention_mask is not None:
            x = nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=attention_mask[:, 0])
        shares = self.router(x).softmax(-1).unsqueeze(-2)
        x = (torch.stack([expert(x) for expert in self.experts], -1) * shares).sum(-1)
        return SimpleNamespace(logits=self.lm_head(x))

    def get_output_embeddings(self):
        return self.lm_head


def made():
    """A model, what it is called with, and labels of the masked tokens."""
    torch.manual_seed(0)
    x0 = torch.randint(0, M, (B, L))
    masked = torch.rand(B, L) < 0.5
    masked[:, 0], masked[:, 1] = True, False  # some in every row: ranks weigh alike
    masked[:, 2:] = masked[:1, 2:]
    hidden = (torch.rand(2 * L, 2 * L) < 0.5) & ~torch.eye(2 * L, dtype=torch.bool)
    mask = torch.zeros(hidden.shape, dtype=torch.float64).masked_fill(hidden, -torch.inf).expand(B, 1, -1, -1)
    both = torch.cat([torch.where(masked, M, x0), x0], 1)
    micro_batch = dict(input_ids=both, attention_mask=mask, position_ids=torch.arange(L).repeat(2).expand(B, -1))
    return Model().double(), micro_batch, torch.where(masked, x0, -100)


@pytest.mark.parametrize("same_token_labels", [True, False])
@pytest.mark.parametrize("blocks", [True, False])
def test_a_step_is_the_tasks(same_token_labels, blocks):
    model, micro_batch, labels = made()
    if not blocks:
        micro_batch = dict(input_ids=micro_batch["input_ids"][:, :L], attention_mask=None)
    results = []
    for step in (standin.train_llada2_loss, dfactory.train_llada2_loss):
        model.zero_grad()
        loss = step(model, dict(micro_batch), labels, same_token_labels)
        loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-14)


def test_only_masked_tokens_of_the_first_half_are_read():
    model, micro_batch, labels = made()
    expected = dfactory.train_llada2_loss(model, micro_batch, labels, True)
    others = torch.cat([labels == -100, torch.ones_like(labels, dtype=torch.bool)], 1).unsqueeze(-1)
    model.lm_head.register_forward_pre_hook(lambda layer, hidden: hidden[0].masked_fill(others, torch.nan))
    assert torch.equal(dfactory.train_llada2_loss(model, micro_batch, labels, True), expected)


def test_logits_are_as_before_and_after():
    model, micro_batch, labels = made()
    before = model(**micro_batch).logits
    dfactory.train_llada2_loss(model, micro_batch, labels)
    assert torch.equal(model(**micro_batch).logits, before)


def test_nothing_masked_is_0():
    model, micro_batch, labels = made()
    loss = dfactory.train_llada2_loss(model, micro_batch, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def fsdp2():
    """The mean over ranks is one process's, for each has as many masked tokens."""
    model, micro_batch, labels = made()
    whole = copy.deepcopy(model)
    dfactory.train_llada2_loss(whole, micro_batch, labels).backward()
    for expert in model.experts:
        fully_shard(expert)
    fully_shard(model)
    rows = slice(dist.get_rank() * B // 2, (dist.get_rank() + 1) * B // 2)
    micro_batch = {name: value[rows] for name, value in micro_batch.items()}
    dfactory.train_llada2_loss(model, micro_batch, labels[rows]).backward()
    for sharded, p in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(sharded.grad.full_tensor(), p.grad, rtol=1e-10, atol=1e-14)


def test_two_ranks_of_fsdp2():
    torchrun.launch(__file__, 2, "fsdp2")


def test_errors_name_the_argument():
    model, micro_batch, labels = made()
    for wrong in (labels[:, 1:], labels[1:], labels[0]):
        with pytest.raises(ValueError, match=r"labels: expected shape \[4, 16\] or half as long"):
            dfactory.train_llada2_loss(model, micro_batch, wrong)
    with pytest.raises(TypeError, match="labels"):
        dfactory.train_llada2_loss(model, micro_batch, None)
    with pytest.raises(ValueError, match="x0"):
        dfactory.train_llada2_loss(model, micro_batch, labels.masked_fill(labels != -100, V))


if __name__ == "__main__":
    torchrun.run(globals())
