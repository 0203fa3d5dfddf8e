"""TRL's trainers with a masked diffusion model: log-probabilities of masked answers, and estimated likelihoods."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from standins import trl as standin
from torch import nn

from fastdiff import exact_nll, one_pass_nll, time_free_nll
from fastdiff.integrations.llada import generate
from fastdiff.integrations.patching import patch
from fastdiff.integrations.trl import apply_to_trl, masked_lm_head

B, L, V, ANSWER = 3, 9, 13, 4
MASK, PAD = V - 1, 0
EXACT = partial(time_free_nll, num_samples=2**ANSWER)


class Model(nn.Module):
    """What it says of a token depends on all that are not padding, but not on how many of these there are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.lm_head = nn.Embedding(V, 8), nn.Linear(8, V)
        self.config = SimpleNamespace(model_type="model")

    def forward(self, input_ids, attention_mask=None):
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden, weight = self.embed(input_ids), (input_ids % 5 + 1) * seen
        others = (hidden * weight[..., None]).sum(1, keepdim=True) / weight.sum(1)[:, None, None]
        return SimpleNamespace(logits=self.lm_head(torch.tanh(2 * hidden + 3 * others)))

    def get_output_embeddings(self):
        return self.lm_head


@pytest.fixture
def batch():
    """Answers of ANSWER, 2 and 1 tokens after prompts; padding on both sides."""
    g = torch.Generator().manual_seed(0)
    x0, at = torch.randint(1, MASK, (B, L), generator=g), torch.arange(L)
    first = torch.tensor([0, 2, 1])[:, None]
    last = L - torch.tensor([0, 2, 3])[:, None]
    seen = (at >= first) & (at < last)
    labels = x0.where(seen & (at >= L - ANSWER), -100)
    return dict(input_ids=x0.where(seen, PAD), labels=labels, attention_mask=seen.long())


def scored(model, batch, *, temperature=1.0, outputs=standin.GRPO, **options):
    model = copy.deepcopy(model)
    masked_lm_head(SimpleNamespace, MASK, **options)(model, temperature, outputs=outputs)
    return model, model(**batch, fused_lm_head=True)


def moved(batch, right):
    """The same sequences, with all of their padding on one side."""
    order = (batch["attention_mask"] * (-1 if right else 1)).argsort(dim=1, stable=True)
    return {name: tokens.gather(1, order) for name, tokens in batch.items()}


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_answers_are_scored_as_from_logits(shift, temperature, batch):
    model, attention_mask = Model(), batch.pop("attention_mask")
    expected = standin.from_logits(
        lambda input_ids: model(input_ids, attention_mask), MASK, **batch, temperature=temperature, shift=shift
    )
    batch["attention_mask"] = attention_mask
    _, found = scored(model, batch, temperature=temperature, shift=shift)
    for name in standin.GRPO:
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6)
    assert torch.equal(found.label_mask, batch["labels"][:, 1:] != -100)
    assert found.log_probs.requires_grad
    assert found.entropy.requires_grad
    if temperature == 1:
        _, found = scored(model, batch, shift=shift, outputs=standin.DPO)
        assert torch.equal(found.is_top1, expected.is_top1.bool())
        assert found.mean_logits.isnan().all()
        torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-6)


def test_without_the_word_the_model_gives_logits(batch):
    del batch["labels"]
    model, _ = scored(Model(), problem_of(batch))
    assert torch.equal(model(**batch).logits, Model()(**batch).logits)


def problem_of(batch):
    return dict(batch, labels=batch["input_ids"])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_an_estimate_is_that_of_each_sequence_alone(temperature, batch):
    model, plain = Model(), Model()
    model, found = scored(model, batch, temperature=temperature, estimate=EXACT, exclude_mask=True)
    logps = found.log_probs.sum(1)
    for row, (tokens, labels, seen) in enumerate(zip(*batch.values(), strict=True)):
        x0, target = tokens[seen == 1][None], labels[seen == 1][None] != -100
        options = dict(mask_index=MASK, target=target, differentiable=True)
        alone = exact_nll(lambda xt: plain(xt).logits / temperature, x0, **options)
        torch.testing.assert_close(logps[row], -alone.nll[0].float(), rtol=1e-5, atol=1e-5)
        alone.nll.neg().backward()
    logps.sum().backward()
    for got, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-5)
    assert not found.log_probs[batch["labels"][:, 1:] == -100].any()


def test_all_who_score_a_sequence_meet_the_same_masks(batch):
    """Wherever its padding is, whatever stands beside it; and others with another seed."""
    estimate, found = partial(time_free_nll, num_samples=3, proposal="uniform"), []
    for right in (False, True):
        given = moved(batch, right)
        given = {name: tokens.flip(0) for name, tokens in given.items()} if right else given
        _, outputs = scored(Model(), given, estimate=estimate)
        found.append(outputs.log_probs.sum(1).flip(0) if right else outputs.log_probs.sum(1))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    _, other = scored(Model(), batch, estimate=partial(estimate, seed=1))
    assert not torch.allclose(other.log_probs.sum(1)[0], found[0][0])


def test_one_pass_as_an_estimate_is_one_pass(batch):
    _, expected = scored(Model(), batch)
    for outputs in (standin.GRPO, ("log_probs",)):
        _, found = scored(Model(), batch, estimate=one_pass_nll, outputs=outputs)
        torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-5, atol=1e-6)
        assert hasattr(found, "entropy") == ("entropy" in outputs)


def test_an_answer_that_was_truncated_away_scores_nothing(batch):
    batch["labels"][0] = -100
    for estimate in (None, EXACT):
        logps = scored(Model(), batch, estimate=estimate)[1].log_probs
        assert not logps[0].any()
        assert logps[1:].any(1).all()
        model, found = scored(Model(), dict(batch, labels=torch.full_like(batch["labels"], -100)), estimate=estimate)
        found.log_probs.sum().backward()
        assert not any(parameter.grad.any() for parameter in model.parameters())


def test_errors_name_the_argument(batch):
    with pytest.raises(ValueError, match="use_weighting: expected False"):
        scored(Model(), batch, outputs=(*standin.DPO, "log_sum_sq_probs"))
    with pytest.raises(ValueError, match="router_aux_loss_coef: expected 0"):
        scored(Model(), dict(batch, output_router_logits=True))
    with pytest.raises(ValueError, match="mask_index: expected at least 0"):
        masked_lm_head(SimpleNamespace, -1)
    model = Model()
    with torch.no_grad():
        model.lm_head.bias[batch["labels"][0, -1]] = -math.inf
    for estimate in (None, EXACT):
        with pytest.raises(ValueError, match="log-probabilities: expected finite numbers"):
            scored(model, batch, estimate=estimate)
    batch["labels"][0] = -100
    with pytest.raises(ValueError, match="labels: expected an answer of at least one token"):
        scored(Model(), batch, outputs=standin.DPO)


def test_dropout_that_backward_cannot_repeat_is_an_error(batch):
    model, draws = Model(), torch.Generator().manual_seed(0)
    model.embed.register_forward_hook(lambda embed, inputs, h: h * torch.rand(h.shape, generator=draws))
    _, found = scored(model, batch, estimate=EXACT)
    with pytest.raises(RuntimeError, match="dropout must draw from torch's generator"):
        found.log_probs.sum().backward()


def from_logits_instead(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs",)):
    """For TRL's function of that name, by the logits of everything."""
    from trl.trainer.utils import FusedCausalLMOutput

    original = model.forward

    def forward(input_ids, attention_mask=None, *, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return original(input_ids, attention_mask, **kwargs)
        network = partial(original, attention_mask=attention_mask)
        found = standin.from_logits(network, MASK_ID, input_ids, labels, temperature)
        found.is_top1 = found.is_top1.bool()
        return FusedCausalLMOutput(**vars(found), mean_logits=torch.full_like(found.log_probs, torch.nan))

    model.forward = forward


from_logits_instead.__name__ = "add_fused_lm_head"
MASK_ID = 3
WORDS = ["[PAD]", "[EOS]", "[UNK]", "[MASK]", *(f"w{i}" for i in range(12))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny BERT as one has it on disk, and its tokenizer."""
    pytest.importorskip("trl", reason="TRL is an extra of its own")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    backend = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[EOS]", "[UNK]", "[MASK]", *WORDS])}, "[UNK]")
    )
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]", mask_token="[MASK]")
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=16, max_position_embeddings=32, **sizes, **dropout)).save_pretrained(folder)
    return folder, PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def loaded(folder):
    from transformers import BertForMaskedLM, GenerationConfig

    model = BertForMaskedLM.from_pretrained(folder)
    model.generation_config = GenerationConfig()  # which TRL writes into
    return model


def options(tmp_path, **more):
    steps = dict(max_steps=3, logging_steps=1, optim="sgd", learning_rate=0.1, per_device_train_batch_size=4)
    quiet = dict(report_to="none", use_cpu=True, bf16=False, save_strategy="no")
    return dict(output_dir=tmp_path, disable_tqdm=True, **steps, **quiet, **more)


def dpo(made, tmp_path):
    from trl import DPOConfig, DPOTrainer

    pairs = [dict(prompt=f"w{i} w2", chosen=f" w{i} w3 w4", rejected=f" w5 w{i}") for i in range(8)]
    args = DPOConfig(**options(tmp_path))
    return DPOTrainer(loaded(made[0]), loaded(made[0]), args=args, **data(made, pairs))


def kto(made, tmp_path):
    from trl import KTOConfig, KTOTrainer

    answers = [dict(prompt=f"w{i} w2", completion=f" w{i} w3 w4", label=i % 2 == 0) for i in range(8)]
    args = KTOConfig(**options(tmp_path))
    return KTOTrainer(loaded(made[0]), loaded(made[0]), args=args, **data(made, answers))


def grpo(made, tmp_path):
    from trl import GRPOConfig, GRPOTrainer

    model, more = sampled(made)
    args = options(tmp_path, **SAMPLES, num_iterations=2, beta=0.1, entropy_coef=0.1)
    return GRPOTrainer(model, reward, args=GRPOConfig(**args), **more)


def rloo(made, tmp_path):
    from trl import RLOOConfig, RLOOTrainer

    model, more = sampled(made)
    args = options(tmp_path, **SAMPLES, num_iterations=2, beta=0.1)
    return RLOOTrainer(model, reward, args=RLOOConfig(**args), **more)


SAMPLES = dict(num_generations=4, max_completion_length=5)


def reward(completions, **_):
    return [float(len(set(text.split()))) for text in completions]


def data(made, rows):
    from datasets import Dataset

    return dict(train_dataset=Dataset.from_list(rows), processing_class=made[1])


def sampled(made):
    """A model that draws its answers, and prompts of several lengths."""
    model = loaded(made[0])

    def answers(input_ids, attention_mask, generation_config, **_):
        options = dict(steps=5, gen_length=5, block_length=5, temperature=generation_config.temperature)
        return generate(model, input_ids, attention_mask, **options, mask_id=MASK_ID)

    model.generate = answers
    return model, data(made, [dict(prompt=f"w{i}" + " w2" * i) for i in range(4)])


@pytest.mark.parametrize("trainer", [dpo, kto, grpo, rloo])
def test_a_run_of_trl_ends_where_logits_end(trainer, made, tmp_path):
    """Three steps of SGD; DPO's reference and GRPO's are models of their own, and GRPO uses its answers twice."""
    ends = []
    published = partial(patch, "TRL", {"trl.trainer.utils": (from_logits_instead,)})
    for apply in (published, partial(apply_to_trl, MASK_ID)):
        undo = apply()
        run = trainer(made, tmp_path)
        undo()
        run.train()
        ends.append((*run.model.parameters(), *(torch.tensor(log["entropy"]) for log in run.state.log_history[:3])))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)
    moved = [(a - b).abs().max() for a, b in zip(ends[0], loaded(made[0]).parameters(), strict=False)]
    assert max(moved) > 1e-3


@pytest.mark.parametrize("trainer", [dpo, grpo])
def test_policy_and_reference_meet_the_same_masks(trainer, made, tmp_path):
    undo = apply_to_trl(MASK_ID, estimate=partial(time_free_nll, num_samples=4))
    run = trainer(made, tmp_path)
    undo()
    run.train()
    first, *_, last, _ = run.state.log_history
    assert first["loss"] == pytest.approx(math.log(2)) if trainer is dpo else first["kl"] == 0
    assert last["loss"] < math.log(2) if trainer is dpo else last["kl"] > 0
