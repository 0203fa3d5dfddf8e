"""transformers: the loss that models call, the Trainer that noises batches, the small model saved and loaded."""

import copy
import inspect
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchrun
from cases import assert_near
from packaging import version

from fastdiff import sample, time_free_nll

transformers = pytest.importorskip("transformers", "4.57", reason="transformers 4.57 or newer is not installed")
pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")

from tokenizers import Tokenizer, models  # noqa: E402
from transformers import AutoModelForMaskedLM, Trainer, TrainingArguments  # noqa: E402
from transformers.loss.loss_utils import ForMaskedLMLoss  # noqa: E402

from fastdiff.integrations import transformers as ours  # noqa: E402
from fastdiff.integrations.transformers import (  # noqa: E402
    FastdiffConfig,
    FastdiffForMaskedLM,
    MaskedDiffusionTrainer,
    masked_diffusion_loss,
)

V, L = 13, 10
M = V - 1


def data(n, prompts=True):
    """Sequences that begin with a prompt and end with padding, each in its own place."""
    g = torch.Generator().manual_seed(0)
    rows = []
    for k in range(n):
        x0, seen = torch.randint(0, M, (L,), generator=g), torch.arange(L)
        labels = x0.masked_fill(seen < k % 4, -100) if prompts else x0.clone()
        rows.append(dict(input_ids=x0, labels=labels, attention_mask=(seen < L - k % 3).long()))
        rows[-1]["labels"][L - k % 3 :] = -100
    return rows


def make(seed=0, cls=FastdiffForMaskedLM, **options):
    torch.manual_seed(seed)
    model = cls(FastdiffConfig(V, L, 16, 1, 2, **options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


class Recorder(MaskedDiffusionTrainer):
    """Keeps what its model was shown, whether it made logits, and what the loss was given: labels, mask, weight, number
    of labels."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        calls = []
        hook = model.register_forward_hook(
            lambda module, args, kwargs, outputs: calls.append((kwargs["input_ids"], outputs.logits.shape[:-1])),
            with_kwargs=True,
        )
        with mock.patch.object(ours, "_options", wraps=ours._options) as options:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        hook.remove()
        (xt, rows), (labels, num_items, mask, weight, *_) = calls[-1], options.call_args.args
        self.shown = [*getattr(self, "shown", []), xt]
        self.with_logits = [*getattr(self, "with_logits", []), rows == xt.shape]
        self.given = [*getattr(self, "given", []), (labels, mask, weight, num_items)]
        return loss


def trainer_of(model, folder, rows, *, mixed=Recorder, options=None, **settings):
    settings = dict(per_device_train_batch_size=2, max_steps=1, optim="sgd", learning_rate=1.0) | settings
    settings |= dict(lr_scheduler_type="constant", max_grad_norm=0.0, weight_decay=0.0, logging_steps=1)
    settings = dict(save_strategy="no") | settings
    args = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **settings)
    return mixed(model=model, args=args, train_dataset=rows, eval_dataset=rows, **(options or {}))


def published(model, given, shown, shift=False):
    """The loss of the parts of a step: weighted cross-entropies over all their labels, with whole logits."""
    total, count = 0.0, sum((labels[:, int(shift) :] != -100).sum() for labels, *_ in given)
    for (labels, mask, weight, _), xt in zip(given, shown, strict=True):
        logits = model(xt).logits.log_softmax(-1)
        logits = torch.cat([logits[:, :1], logits[:, :-1]], 1) if shift else logits
        scored = mask & (labels != -100)
        nll = -logits.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        total = total + (weight[:, None] * nll)[scored].sum()
    return total / count


# -- the loss --------------------------------------------------------------------------------------------


def test_signature_is_that_of_the_seam():
    def names(function):
        return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]

    theirs = names(ForMaskedLMLoss)
    assert names(masked_diffusion_loss)[: len(theirs) - 1] == theirs[:-1]  # and more before **kwargs
    assert names(masked_diffusion_loss)[-1] == theirs[-1]
    assert names(MaskedDiffusionTrainer.compute_loss) == names(Trainer.compute_loss)


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
def test_with_nothing_more_it_is_the_masked_language_model_loss(num_items):
    z = torch.randn(3, L, V, generator=torch.Generator().manual_seed(0))
    labels = torch.stack([row["labels"] for row in data(3)])
    leaves = [z.clone().requires_grad_() for _ in range(2)]
    losses = [f(leaf, labels, V, num_items) for f, leaf in zip((masked_diffusion_loss, ForMaskedLMLoss), leaves)]  # noqa: B905
    grads = [torch.autograd.grad(loss, leaf)[0] for loss, leaf in zip(losses, leaves, strict=True)]
    assert_near(losses[0], losses[1], torch.float32, "loss")
    assert_near(grads[0], grads[1], torch.float32, "gradient")


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_masks_weights_and_shift(shift, per_token, exclude):
    g = torch.Generator().manual_seed(1)
    z = torch.randn(3, L, V, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.stack([row["labels"] for row in data(3)])
    mask, weight = torch.rand(3, L, generator=g) < 0.6, torch.rand(3, L if per_token else 1, generator=g)
    weight = weight if per_token else weight[:, 0]
    options = dict(mask=mask, weight=weight, shift=shift, mask_index=M if exclude else None)
    loss = masked_diffusion_loss(z, labels, V, **options)

    seen = z.index_fill(-1, torch.tensor([M]), -torch.inf) if exclude else z
    seen = torch.cat([seen[:, :1], seen[:, :-1]], 1) if shift else seen
    tokens = labels.index_fill(1, torch.tensor([0]), -100) if shift else labels
    nll = F.cross_entropy(seen.transpose(1, 2), tokens, reduction="none")
    expected = (nll * mask * weight.reshape(3, -1)).sum() / (tokens != -100).sum()
    assert_near(loss, expected, torch.float64, "loss", slack=10)
    for a, b in [(torch.autograd.grad(loss, z)[0], torch.autograd.grad(expected, z)[0])]:
        assert_near(a, b, torch.float64, "gradient", slack=10)


def test_nothing_to_predict_is_no_loss():
    z = torch.randn(1, L, V, requires_grad=True)
    labels = torch.zeros(1, L, dtype=torch.int64)
    for options in (dict(labels=labels - 100), dict(labels=labels, mask=torch.zeros(1, L, dtype=torch.bool))):
        loss = masked_diffusion_loss(z, vocab_size=V, **options)
        assert loss == 0
        assert not torch.autograd.grad(loss, z)[0].any()


def test_wrong_vocabulary():
    given = torch.zeros(2, L, V), torch.zeros(2, L, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"vocab_size: expected V of logits \(2, 10, 13\), got 12"):
        masked_diffusion_loss(*given, 12)
    for mask_index in (-1, V):
        with pytest.raises(ValueError, match=rf"mask_index: expected an id in \[0, 13\) or None, got {mask_index}"):
            masked_diffusion_loss(*given, V, mask_index=mask_index)


def test_without_a_mask_every_id_counts():
    """Also the last, which is a token like others where a vocabulary has no mask."""
    z = torch.randn(2, L, V, generator=torch.Generator().manual_seed(0))
    labels = torch.full((2, L), V - 1)
    assert_near(masked_diffusion_loss(z, labels, V), ForMaskedLMLoss(z, labels, V), torch.float32, "loss")


@pytest.mark.parametrize("name", ["ModernBert", "Llama"])
def test_one_assignment_gives_it_to_a_model(name):
    """A bidirectional model, and one whose logits predict the next token; keywords pass through their forward."""
    sizes = dict(vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = getattr(transformers, f"{name}Config")(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if name == "ModernBert":
        config.reference_compile = False
    model = getattr(transformers, f"{name}For{'MaskedLM' if name == 'ModernBert' else 'CausalLM'}")(config).eval()
    shift = name == "Llama"
    x0 = torch.stack([row["input_ids"] for row in data(4)])
    mask, weight = torch.rand(4, L, generator=torch.Generator().manual_seed(0)) < 0.5, torch.linspace(1, 2, 4)
    own = model.loss_function
    model.loss_function = masked_diffusion_loss
    xt = x0.masked_fill(mask, M)
    loss = model(input_ids=xt, labels=x0, mask=mask, weight=weight, shift=shift, num_items_in_batch=40).loss
    mask[:, 0] &= not shift
    given = [(x0, mask, weight, None)]
    counted = 36 if shift else 40
    assert_near(loss, published(model, given, [xt], shift) * counted / 40, torch.float32, name)
    del model._loss_function
    assert model.loss_function is own


# -- the Trainer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True])
def test_a_step_of_parts_with_prompts_and_padding(tmp_path, shift):
    """Its gradient is that of the sum over the parts' masked tokens, over the labels of all parts."""
    model, rows = make(), data(6)
    before = copy.deepcopy(model)
    trainer = trainer_of(model, tmp_path, rows, gradient_accumulation_steps=3, options=dict(shift=shift))
    trainer.train()
    seen = {tuple(row["input_ids"].tolist()): row for row in rows}
    assert len(trainer.given) == 3
    masked = 0
    for (labels, mask, _, num_items), xt in zip(trainer.given, trainer.shown, strict=True):
        assert num_items == sum((row["labels"][int(shift) :] != -100).sum() for row in rows)
        assert torch.equal(xt == M, mask)
        assert not mask[labels == -100].any()
        assert not (shift and mask[:, 0].any())
        for row in torch.where(mask, labels, xt):
            assert tuple(row.tolist()) in seen  # nothing else was touched
        masked += int(mask.sum())
    assert masked > 10
    loss = published(before, trainer.given, trainer.shown, shift)
    loss.backward()
    assert not trainer._seen.any()  # counted anew from the next step on
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-3)
    correct, entropies = [], []
    for (labels, mask, *_), xt in zip(trainer.given, trainer.shown, strict=True):
        masked, tokens = (mask.roll(-1, 1), labels.roll(-1, 1)) if shift else (mask, labels)
        p = before(xt).logits[masked].softmax(-1)
        correct.append(p.argmax(-1) == tokens[masked])
        entropies.append(-(p * p.log()).sum(-1))
    assert log["masked_accuracy"] == pytest.approx(torch.cat(correct).float().mean().item())
    assert log["masked_entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-5)
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert_near(new.detach(), (old - old.grad).detach(), torch.float32, "parameter", slack=8)


def test_padding_with_labels_is_never_masked(tmp_path):
    rows = [dict(row, labels=row["input_ids"]) for row in data(6)]
    trainer = trainer_of(make(), tmp_path, rows, per_device_train_batch_size=6, max_steps=3)
    trainer.train()
    (padding,) = {int((row["attention_mask"] == 0).sum()) for row in rows[2::3]}
    assert padding == 2
    ends = torch.cat([xt[:, -2:] for xt in trainer.shown])
    assert sum((row == M).sum().item() == 0 for row in ends) >= len(ends) // 3
    for labels, mask, *_ in trainer.given:
        for x0, masked in zip(labels, mask, strict=True):
            (row,) = [row for row in rows if torch.equal(row["input_ids"], x0)]
            assert not masked[row["attention_mask"] == 0].any()


def test_a_resumed_run_is_the_unbroken_one(tmp_path):
    rows = [dict(input_ids=row["input_ids"], labels=row["input_ids"]) for row in data(8)]
    options = dict(gradient_accumulation_steps=2, max_steps=4, save_strategy="steps", save_steps=2)
    whole = trainer_of(make(), tmp_path, rows, **options)
    whole.train()
    resumed = trainer_of(make(seed=1), tmp_path, rows, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole.shown[4:], resumed.shown, strict=True))
    assert len({tuple(weight.tolist()) for *_, weight, _ in whole.given}) == 8  # each part has noise of its own
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_evaluations_meet_the_same_noise(tmp_path):
    class NoLabels(FastdiffForMaskedLM):
        """A model that takes none, as LLaDA's."""

        def forward(self, input_ids):
            return super().forward(input_ids)

    model = NoLabels(make().config)
    trainer = trainer_of(model, tmp_path, data(7, prompts=False), options=dict(exclude_mask=True))
    first, second = (trainer.evaluate()["eval_loss"] for _ in range(2))
    assert first == second
    assert len(trainer.shown) == 2  # of one batch each
    trainer.train()
    assert not torch.equal(trainer.shown[0][:2], trainer.shown[2])


def test_untrained_loss_is_that_of_not_knowing(tmp_path):
    """On average over times, so the weights are those of a bound on the likelihood."""
    model = FastdiffForMaskedLM(FastdiffConfig(V, L, 16, 1, 2))  # its logits are 0
    rows = data(16, prompts=False) * 64
    settings = dict(per_device_eval_batch_size=512)
    trainer = trainer_of(model, tmp_path, rows, options=dict(exclude_mask=True), **settings)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(torch.tensor(V - 1.0).log().item(), rel=0.03)


def test_an_evaluation_makes_logits_where_they_are_asked_for(tmp_path):
    seen = []
    with_metrics = dict(compute_metrics=lambda found: seen.append(found) or {})
    trainers = [
        trainer_of(make(), tmp_path, data(6), options=options, per_device_eval_batch_size=3)
        for options in ({}, with_metrics, dict(from_logits=True))
    ]
    losses = [trainer.evaluate()["eval_loss"] for trainer in trainers]
    assert [trainer.with_logits for trainer in trainers] == [[False] * 2, [True] * 2, [True] * 2]
    for loss in losses:
        assert loss == pytest.approx(losses[1], rel=1e-6)
    assert [found.predictions.shape for found in seen] == [(6, L, V)]
    assert trainers[0].predict(data(6)).predictions.shape == (6, L, V)
    batch = {name: torch.stack([row[name] for row in data(3)]) for name in data(1)[0]}
    assert trainers[0].compute_loss(trainers[0].model, batch, return_outputs=True)[1].logits.shape == (3, L, V)


class Unnamed(FastdiffForMaskedLM):
    """Does not say which its last layer is."""

    def get_output_embeddings(self):
        return None


class Normalized(FastdiffForMaskedLM):
    """Does with its logits what a head does not know."""

    def forward(self, input_ids, attention_mask=None):
        outputs = super().forward(input_ids)
        outputs.logits = outputs.logits.log_softmax(-1)
        return outputs


def test_models_whose_last_layer_cannot_compute_the_loss(tmp_path):
    results = []
    for model, options in ((make(), {}), (make(cls=Unnamed), {}), (make(cls=Normalized), dict(from_logits=True))):
        trainer = trainer_of(model, tmp_path, data(6), options=options)
        trainer.train()
        results.append([parameter.detach() for parameter in model.parameters()])
        assert trainer.with_logits == [type(model) is not FastdiffForMaskedLM]
    for a, *others in zip(*results, strict=True):
        for b in others:
            assert_near(b, a, torch.float32, "parameter", slack=4)
    with pytest.raises(RuntimeError, match=r"that scales, caps .* from_logits=True takes it from them"):
        trainer_of(make(cls=Normalized), tmp_path, data(6)).train()


class Watching(Trainer):
    """As SFTTrainer, which computes an accuracy of the logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        raise AssertionError("there may be no logits to look at")


def test_no_other_base_sees_what_is_in_the_place_of_logits(tmp_path):
    trainer_of(make(), tmp_path, data(2), mixed=type("Mixed", (Recorder, Watching), {})).train()


def test_a_batch_with_nothing_to_predict(tmp_path):
    model, rows = make(), [dict(row, labels=torch.full((L,), -100)) for row in data(2)]
    before = copy.deepcopy(model)
    trainer_of(model, tmp_path, rows).train()
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), model.parameters(), strict=True))


def test_wrong_calls(tmp_path):
    model = make()
    trainer = trainer_of(model, tmp_path, data(2))
    with pytest.raises(ValueError, match=r"inputs: expected labels.* got input_ids, attention_mask"):
        trainer.compute_loss(model, {k: v for k, v in data(1)[0].items() if k != "labels"})
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in data(2)]
    with pytest.raises(ValueError, match="inputs: expected labels"):
        trainer_of(model, tmp_path, rows, options=dict(shift=True)).train()
    with pytest.raises(ValueError, match=r"label_smoothing_factor: expected 0, got 0\.1"):
        trainer_of(model, tmp_path, data(2), label_smoothing_factor=0.1)


def test_who_says_which_id_is_the_mask(tmp_path):
    def found(**options):
        return trainer_of(model, tmp_path, data(2), options=options).mask_index

    model, vocabulary = make(), {f"[{k}]": k for k in range(V)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[0]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[4]")
    assert found() == M
    with pytest.raises(ValueError, match=r"mask_index: expected one, for config and tokenizer disagree: \[4, 12\]"):
        found(processing_class=tokenizer)
    assert found(processing_class=tokenizer, mask_index=3) == 3
    model.config.mask_token_id = None
    assert found(processing_class=tokenizer) == 4
    with pytest.raises(ValueError, match="mask_index: expected an id, for neither config nor processing_class has"):
        found()


def test_dream_is_shifted(tmp_path):
    model = make()
    model.config.model_type = "Dream"
    assert trainer_of(model, tmp_path, data(2)).shift
    assert not trainer_of(model, tmp_path, data(2), options=dict(shift=False)).shift


def test_over_ranks():
    """DDP, as accelerate wraps it, and FSDP2, which transformers shards from version 5.23."""
    sharded = ["trainer_fsdp2"] if version.parse(transformers.__version__) >= version.parse("5.23") else []
    torchrun.launch(Path(__file__).with_name("ranks.py"), 2, "trainer_ddp", *sharded)


# -- the model -------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path):
    model = make(mask_token_id=5).eval()
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(loaded) is FastdiffForMaskedLM
    assert (loaded.config.mask_token_id, loaded.config.num_states) == (5, V)
    x0 = data(1)[0]["input_ids"].unsqueeze(0) % 5
    assert torch.equal(loaded(x0).logits, model(x0).logits)
    assert torch.equal(loaded(x0, labels=x0).loss, masked_diffusion_loss(model(x0).logits, x0, V))
    assert torch.equal(sample(loaded, length=L), sample(model.transformer, mask_index=5, length=L))
    nll = [time_free_nll(m, x0, mask_index=5, num_samples=20).nll for m in (loaded, model.transformer)]
    assert torch.equal(*nll)


def test_embeddings_are_found_and_resized(tmp_path):
    """Where accelerate, PEFT and resize_token_embeddings look for them; they are not tied."""
    model = make()
    assert model.get_input_embeddings() is model.transformer.vocab_embed
    assert model.get_output_embeddings() is model.transformer.lm_head
    x0 = data(1)[0]["input_ids"].unsqueeze(0)
    before = model(x0).logits
    model.resize_token_embeddings(V + 3)
    assert model(x0.fill_(V + 2)).logits.shape == (1, L, V + 3)
    model.tie_weights()
    x0 = data(1)[0]["input_ids"].unsqueeze(0)
    assert torch.equal(model(x0).logits[..., :V], before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert (loaded.config.mask_token_id, loaded.config.vocab_size) == (M, V + 3)
    assert torch.equal(loaded(x0).logits, model(x0).logits)
    with pytest.raises(ValueError, match="tie_word_embeddings: expected False"):
        FastdiffConfig(V, L, 16, 1, 2, tie_word_embeddings=True)


def test_what_a_checkpoint_lacks_begins_as_the_model_does(tmp_path):
    model = make()
    state = {name: p for name, p in model.state_dict().items() if "output_layer.linear" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert not loaded.transformer.lm_head.weight.any()
    assert torch.equal(loaded.transformer.vocab_embed.weight, model.transformer.vocab_embed.weight)
