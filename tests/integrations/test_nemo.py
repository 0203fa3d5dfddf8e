"""NeMo Automodel's recipe before and after, on one rank and on two: data parallel, or sharing the vocabulary."""

import copy
import functools
import sys
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torchrun
from rows import largest_rows
from standins import nemo as standin
from standins import problem
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fastdiff.integrations import nemo

B, L, D, V = 4, 8, 4, 34
TOKENS = dict(num_diffusion_tokens=99, num_ar_tokens=88)
STRATEGIES = {
    "MDLM": ("MDLMStrategy", {}, {}),
    "Hybrid": ("HybridStrategy", dict(ar_loss_alpha=0.7), dict(paradigm="sbd_block_diff")),
    "Hybrid, one loss": ("HybridStrategy", {}, dict(paradigm="block_diff")),
    "Hybrid, one half": ("HybridStrategy", {}, dict(paradigm="bidirectional")),
    "IDLM": ("IDLMStrategy", dict(clean_loss_weight=0.3), {}),
    "IDLM, balanced": ("IDLMStrategy", dict(auto_balance_clean_loss=True), {}),
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.lm_head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.lm_head(self.hidden(input_ids)))

    def hidden(self, input_ids):
        return torch.tanh(self.embedding(input_ids))

    def get_output_embeddings(self):
        return self.lm_head


def made(paradigm=None):
    torch.manual_seed(0)
    model = Model().double()
    return model if paradigm is None else standin.TwoHalves(model, paradigm)


def run(recipe, batch, is_train=True):
    """The losses of the log, and of the parameters' gradients what they are whole."""
    model, losses = recipe.model_parts[0], []
    model.zero_grad()
    recipe._dllm_loss_buffer.clear()
    recipe.dllm_strategy.forward_backward(
        recipe, 0, dict(batch), loss_buffer=losses, num_batches=1, is_train=is_train, **TOKENS
    )
    grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    return [*losses, *recipe._dllm_loss_buffer, *grads]


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_step_before_and_after(applied, name):
    strategy, config, model = STRATEGIES[name]
    recipe, batch = standin.recipe_of(made(**model), strategy, 4, **config), standin.batch_of(problem(B, L, V))
    expected, before = largest_rows(lambda: run(recipe, batch), V)
    applied(standin, nemo.apply_to_nemo)
    loss_fn = recipe.dllm_loss_fn
    same(run(recipe, batch), expected)  # and a look at what is behind the last layer
    got, after = largest_rows(lambda: run(recipe, batch), V)
    same(got, expected)
    assert len(got) == 4
    assert recipe.dllm_loss_fn is loss_fn
    masked = (batch["_noise_mask"] & batch["loss_mask"].bool()).sum().item()
    following = batch["_noise_mask"][:, 1:].sum().item()
    scored = masked + B * (L - 2) if name == "Hybrid" else masked
    scored = 2 * following if strategy == "IDLMStrategy" else scored
    assert before >= B * L * (1 if name in ("MDLM", "Hybrid, one half") else 2)
    assert after <= scored
    assert recipe.model_parts[0](batch["input_ids"]).logits.shape == (B, L, V)


def test_validation_has_no_gradient(applied):
    recipe, batch = standin.recipe_of(made(), "MDLMStrategy"), standin.batch_of(problem(B, L, V))
    with torch.no_grad():
        expected = run(recipe, batch, is_train=False)
        applied(standin, nemo.apply_to_nemo)
        got = run(recipe, batch, is_train=False)
    same(got[:2], expected[:2])
    assert got[2:] == [None, None]


def test_an_attention_mask_leaves_tokens_out(applied):
    recipe, batch = standin.recipe_of(made(), "IDLMStrategy"), standin.batch_of(problem(B, L, V))
    batch["attention_mask"] = (torch.arange(L) < L - 2).long().expand(B, L)
    expected = run(recipe, batch)
    applied(standin, nemo.apply_to_nemo)
    same(run(recipe, batch), expected)


def test_tiny_probabilities_and_no_tokens_at_all(applied):
    recipe, batch = standin.recipe_of(made(), "MDLMStrategy"), standin.batch_of(problem(B, L, V))
    batch["_p_mask"] = torch.full((B, L), 1e-12)
    expected = run(recipe, batch)
    applied(standin, nemo.apply_to_nemo)
    same(run(recipe, batch), expected)
    batch["_noise_mask"] = torch.zeros(B, L, dtype=torch.bool)
    assert all((one == 0).all() for one in run(recipe, batch))


@pytest.mark.parametrize("twice", [False, True])
def test_undone_it_is_as_published(applied, twice):
    recipe, batch = standin.recipe_of(made(), "MDLMStrategy"), standin.batch_of(problem(B, L, V))
    undos = [applied(standin, nemo.apply_to_nemo) for _ in range(1 + twice)]
    for undo in undos:
        undo()
    assert largest_rows(lambda: run(recipe, batch), V)[1] >= B * L


class OtherLoss(nn.Module):
    """As a strategy of one's own has."""

    def forward(self, logits, **_):
        return standin.DLLMLossOutput(logits.square().mean(), logits.detach().mean())


def test_what_is_not_followed_stays_as_published(applied):
    batch = standin.batch_of(problem(B, L, V))
    recipe = standin.recipe_of(made(), "MDLMStrategy")
    recipe.dllm_loss_fn = OtherLoss()
    expected = run(recipe, batch)
    applied(standin, nemo.apply_to_nemo)
    assert all(torch.equal(a, b) for a, b in zip(run(recipe, batch), expected, strict=True))


@pytest.mark.parametrize("normalize", ["tokens", "mean"])
def test_dflash(applied, normalize):
    g = torch.Generator().manual_seed(0)
    loss_fn = standin.LOSSES.DFlashDecayLoss(loss_gamma=3.0, normalize=normalize, use_fused_linear_ce=True)
    hidden = torch.randn(2, 12, D, generator=g, dtype=torch.float64).requires_grad_()
    head = torch.randn(V, D, generator=g, dtype=torch.float64)
    target, mask = torch.randint(0, V, (2, 12), generator=g), (torch.rand(2, 12, generator=g) < 0.6).float()
    with torch.no_grad():
        head[target[0]] += 9 * hidden[0]  # some are right

    def results():
        out = loss_fn.forward_fused(hidden, head, target, mask, num_tokens=11, block_size=5)
        return [*out, torch.autograd.grad(out.total_loss, hidden)[0]]

    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):  # to which the published one casts
        expected = results()
    assert 0 < expected[2].sum() < mask.sum()
    applied(standin, nemo.apply_to_nemo)
    same(results(), expected)


def data_parallel():
    """Each rank has every second sequence; gradients are averaged over ranks, as the recipe expects."""
    sys.modules.update(standin.PUBLISHED)
    for name, (strategy, config, options) in STRATEGIES.items():
        model, batch = made(**options), standin.batch_of(problem(B, L, V))
        halves = [{key: value[rank::2] for key, value in batch.items()} for rank in range(2)]
        alone = [run(standin.recipe_of(copy.deepcopy(model), strategy, 1, **config), half) for half in halves]
        expected = [sum(of_ranks) for of_ranks in zip(*alone, strict=True)]
        mine = halves[dist.get_rank()]
        inner = getattr(model, "network", model)
        fully_shard(inner.lm_head)
        fully_shard(model)
        undo = nemo.apply_to_nemo()
        got = run(standin.recipe_of(model, strategy, 2, **config), mine)
        undo()
        for loss in got[:2]:
            dist.all_reduce(loss)
        assert all(isinstance(p, DTensor) for p in model.parameters()), name
        same(got, expected)


class PartOfTokens(Model):
    """As in sequence parallelism: each rank has the hidden states of its own."""

    def hidden(self, input_ids):
        return super().hidden(input_ids).chunk(2, 1)[dist.get_rank()]


def vocabulary_parallel():
    """The last layer is cut along its ids, as Automodel's plans do; there are plans that give whole logits too."""
    sys.modules.update(standin.PUBLISHED)
    mesh = init_device_mesh("cpu", (2,))
    sharded = dict(output_layouts=Shard(-1), use_local_output=False)
    for plan in (sharded, dict(output_layouts=Replicate()), dict(sharded, input_layouts=Shard(1))):
        for name, (strategy, config, options) in STRATEGIES.items():
            model, batch = made(**options), standin.batch_of(problem(B, L, V))
            expected = run(standin.recipe_of(copy.deepcopy(model), strategy, 1, **config), batch)
            inner = getattr(model, "network", model)
            parallelize_module(inner, mesh, {"lm_head": ColwiseParallel(**plan)})
            inner.__class__ = PartOfTokens if "input_layouts" in plan else Model
            undo = nemo.apply_to_nemo()
            recipe = standin.recipe_of(model, strategy, 1, **config)
            run(recipe, batch)
            got, rows = largest_rows(functools.partial(run, recipe, batch), V // 2)
            undo()
            if "input_layouts" in plan:
                dist.all_reduce(got[2])  # of the embedding, which all ranks have
            same(got, expected)
            assert rows < B * L * (1 if name in ("MDLM", "Hybrid, one half") else 2), name


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["data_parallel", "vocabulary_parallel"])
def test_two_ranks(ranks):
    torchrun.launch(__file__, 2, ranks)


def test_errors_name_what_is_wrong(applied):
    applied(standin, nemo.apply_to_nemo)
    p = problem(B, L, V)
    batch = standin.batch_of(p)
    recipe = standin.recipe_of(made("sbd_block_diff"), "HybridStrategy")
    recipe.model_parts[0].config = SimpleNamespace(dlm_paradigm="sbd, renamed")
    with pytest.raises(ValueError, match="x0: expected shape"):
        run(recipe, batch)
    recipe = standin.recipe_of(CausalOf(made()), "HybridStrategy")
    with pytest.raises(ValueError, match="causal_logits: expected None of this dlm_paradigm"):
        run(recipe, batch)
    recipe = standin.recipe_of(made(), "MDLMStrategy")
    recipe.model_parts[0].get_output_embeddings = lambda: None
    with pytest.raises(TypeError, match="layer: expected a last layer"):
        run(recipe, batch)
    recipe = standin.recipe_of(made(), "MDLMStrategy")
    with pytest.raises(ValueError, match="x0: expected"):
        run(recipe, batch | dict(_clean_input_ids=p.x0 + V))
    run(recipe, batch)  # and nothing is left behind


class CausalOf(nn.Module):
    """A model of a paradigm of its own, with causal_logits."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, SimpleNamespace()

    def forward(self, input_ids, **_):
        logits = self.model(input_ids).logits
        return SimpleNamespace(logits=logits, causal_logits=logits)

    def get_output_embeddings(self):
        return self.model.lm_head


def test_what_the_recipe_takes_from_a_loss():
    assert nemo.DLLMLossOutput._fields == standin.LOSSES.DLLMLossOutput._fields
    assert nemo.DLLMLossOutput._field_defaults == standin.LOSSES.DLLMLossOutput._field_defaults


if __name__ == "__main__":
    torchrun.run(globals())
