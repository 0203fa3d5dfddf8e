"""Models of real code, tiny and with random weights: a step of the Trainer is the published one, without logits."""

import copy
import dataclasses
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from packaging import version
from standins import published as checkout
from step import NoLogits

transformers = pytest.importorskip("transformers", "4.57", reason="transformers 4.57 or newer is not installed")
pytest.importorskip("accelerate", reason="accelerate, which Trainer needs, is not installed")

from test_transformers import L, Recorder, data, published, trainer_of  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

B, V, D = 6, 211, 16
M = V - 1
WATCHED = partial(NoLogits, B, L, V)
SEEN = (torch.arange(L) < L - 2).long()  # the rest of each sequence is padding
SIZES = dict(vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=1, head_dim=8)
SIZES |= dict(max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, mask_token_id=M)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
MODELS = {  # by the class: what its configuration has beside SIZES
    "BertForMaskedLM": dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "CohereForCausalLM": dict(logit_scale=0.25),
    "Gemma2ForCausalLM": dict(final_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "GPT2LMHeadModel": dict(n_embd=D, n_layer=2, n_head=2, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0),
    "GraniteForCausalLM": dict(logits_scaling=3.0),
    "LlamaForCausalLM": {},
    "MixtralForCausalLM": EXPERTS,
    "ModernBertForMaskedLM": {},
    "Qwen3ForCausalLM": dict(tie_word_embeddings=True),
    "Qwen3MoeForCausalLM": EXPERTS,
}
IN_DLLM = {  # the same of code that a checkout of dllm holds, with its place
    "A2DLlamaLMHeadModel": ("a2d/models/llama", "modeling_llama", SIZES),
    "A2DQwen3LMHeadModel": ("a2d/models/qwen3", "modeling_qwen3", SIZES),
    "DreamModel": ("dream", "models.modeling_dream", SIZES | dict(num_key_value_heads=2)),
    "LLaDAModelLM": (
        "llada",
        "models.modeling_llada",
        dict(vocab_size=V, embedding_size=V + 13, mask_token_id=M, d_model=D, n_heads=2, n_layers=2, weight_tying=False)
        | dict(block_type="llama", activation_type="silu", layer_norm_type="rms", mlp_hidden_size=24)
        | dict(rope=True, attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0),
    ),
    "LLaDAMoEModelLM": (
        "llada",
        "models.modeling_lladamoe",
        SIZES
        | dict(num_experts=4, num_experts_per_tok=2, expert_intermediate_size=24, shared_expert_intermediate_size=None)
        | dict(moe_layer_freq=[1, 1], rope_theta=1e4, partial_rotary_factor=1),
    ),
}
DLLM = Path(os.environ.get("FASTDIFF_CHECKOUTS", "")).resolve() / "dllm/dllm/pipelines"
RUNS_DLLM = DLLM.is_dir() and version.parse(transformers.__version__).major < 5


def make(name):
    torch.manual_seed(0)
    if name in MODELS:
        cls = getattr(transformers, name)
        model = (bidirectional(cls) if name.endswith("CausalLM") else cls)(cls.config_class(**SIZES | MODELS[name]))
    else:
        folder, place, settings = IN_DLLM[name]
        module = checkout(f"dllm/dllm/pipelines/{folder}", place)[place]
        cls = getattr(module, name)
        parts = [config := cls.config_class(**settings)]
        if name == "LLaDAModelLM":  # which begins on a GPU, left to itself
            shape = module.create_model_config_from_pretrained_config(config)
            parts.append(module.LLaDAModel(dataclasses.replace(shape, init_device="cpu")))
        model = cls(*parts)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def bidirectional(cls):
    """Every token sees all that are not padding, as in models that dllm makes of those that see what is before."""

    class Bidirectional(cls):
        def forward(self, input_ids, attention_mask=None, **kwargs):
            seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            seen = torch.where(seen[:, None, None] == 1, 0.0, -torch.inf).to(self.dtype)
            return super().forward(input_ids, seen.expand(-1, 1, seen.shape[-1], -1), **kwargs)

    return Bidirectional


class Step(Recorder, TrainerCallback):
    """Keeps its loss and, before the optimizer's step, the gradients."""

    def compute_loss(self, *args, **kwargs):
        self.loss = super().compute_loss(*args, **kwargs)
        return self.loss

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model, folder, mode=WATCHED, options=None, **settings):
    """Of the Trainer: loss, gradients, and a function that makes them of another model by the published formula."""
    rows = [dict(row, attention_mask=SEEN, labels=row["labels"].where(SEEN == 1, -100)) for row in data(B)]
    settings = dict(per_device_train_batch_size=B) | settings
    trainer = trainer_of(model, folder, rows, mixed=Step, options=dict(mask_index=M) | (options or {}), **settings)
    trainer.add_callback(trainer)
    with mode():
        trainer.train()

    def by_formula(model):
        def shown(xt):
            outputs = model(xt, attention_mask=SEEN.expand(B, L))
            if trainer.exclude_mask:
                outputs.logits = outputs.logits.index_fill(-1, torch.tensor(M), -torch.inf)
            return outputs

        loss = published(shown, trainer.given, trainer.shown, trainer.shift)
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    return trainer.loss.detach(), trainer.grads, by_formula


def errors(got, exact):
    """Of the loss and all gradients together, relative."""
    assert got[1].keys() == exact[1].keys()
    square = sum((got[1][name] - grad).square().sum() for name, grad in exact[1].items())
    size = sum(grad.square().sum() for grad in exact[1].values())
    return (abs(got[0] - exact[0]) / exact[0]).item(), (square / size).sqrt().item()


@pytest.mark.parametrize("name", [*MODELS, *(IN_DLLM if RUNS_DLLM else ())])
def test_a_step(name, tmp_path):
    model = make(name)
    exact = copy.deepcopy(model).double()
    *ours, by_formula = step(copy.deepcopy(exact), tmp_path)
    exact = by_formula(exact)
    assert max(errors(ours, exact)) < 1e-10
    original = errors(by_formula(copy.deepcopy(model)), exact)
    *ours, _ = step(model, tmp_path)
    assert ours[0].dtype == torch.float32
    loss, grads = errors(ours, exact)
    assert loss < 2 * original[0] + 2**-23
    assert grads < 2 * original[1]


def test_logits_would_be_seen(tmp_path):
    with pytest.raises(AssertionError, match="makes logits"):
        step(make("LlamaForCausalLM"), tmp_path, options=dict(from_logits=True))


CHECKPOINTED = dict(gradient_checkpointing=True)
SETTINGS = {
    "checkpointed": CHECKPOINTED | dict(gradient_checkpointing_kwargs=dict(use_reentrant=False)),
    "checkpointed, reentrant": CHECKPOINTED | dict(gradient_checkpointing_kwargs=dict(use_reentrant=True)),
    "compiled": dict(torch_compile=True, torch_compile_backend="aot_eager", mode=nullcontext),
    "mask left out": dict(options=dict(exclude_mask=True)),
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_otherwise(settings, tmp_path):
    model = make("LlamaForCausalLM").double()
    before = copy.deepcopy(model)
    *ours, by_formula = step(model, tmp_path, **SETTINGS[settings])
    assert max(errors(ours, by_formula(before))) < 1e-10


def test_a_step_under_autocast(tmp_path):
    model = make("LlamaForCausalLM")
    low, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    *ours, by_formula = step(model, tmp_path, bf16=True)
    with torch.autocast("cpu", torch.bfloat16):
        original = by_formula(low)
    (loss, grads), original = errors(ours, exact := by_formula(exact)), errors(original, exact)
    assert loss < 2 * original[0] + 2**-9
    assert grads < 2 * original[1]


LORA = {  # on layers before the last, which stays an nn.Linear; on the last; with a copy of the last that is trained
    "body": dict(target_modules=["q_proj", "v_proj"]),
    "last layer": dict(target_modules=["q_proj", "lm_head"]),
    "copy": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("where", LORA)
def test_a_step_with_lora(where, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(make("LlamaForCausalLM"), peft.LoraConfig(init_lora_weights=False, **LORA[where]))
    model = model.double()
    before = copy.deepcopy(model)
    *ours, by_formula = step(model, tmp_path)
    assert max(errors(ours, by_formula(before))) < 1e-10
