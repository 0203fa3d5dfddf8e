"""transformers: the loss of a masked diffusion model, a Trainer that noises its batches, and the small model.

model.loss_function = masked_diffusion_loss  # then model(xt, labels=x0, mask=xt == mask_index, weight=1 / p_mask)

trainer = MaskedDiffusionTrainer(model=model, args=args, train_dataset=dataset)  # in the place of Trainer

AutoModelForMaskedLM.from_config(FastdiffConfig(vocab_size=257, max_position_embeddings=128))
"""

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel, Trainer
from transformers.modeling_outputs import MaskedLMOutput

from fastdiff.integrations.loss_head import LossHead
from fastdiff.integrations.patching import setting
from fastdiff.losses.row_losses import dce_loss
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.noise.noising import mask_tokens, sample_times
from fastdiff.schedules import LogLinear, Schedule


def masked_diffusion_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    weight: Tensor | float | None = None,
    shift: bool = False,
    mask_index: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """Weighted cross-entropy of the masked tokens over the number of all labels, in nats: a model's `loss_function`.

    Without mask, weight and shift it is transformers' ForMaskedLMLoss, but for 0 instead of NaN where no token has a
    label. Models that take keyword arguments hand mask, weight and shift on from their call.

    Args:
        logits: [B, L, V] float32, float64, bfloat16 or float16; not copied.
        labels: [B, L] int64 clean tokens, ignore_index where there is none to predict (prompt, padding).
        vocab_size: V.
        num_items_in_batch: what to divide by; None means the number of labels, masked or not, in this batch.
        mask: [B, L] bool, the masked tokens; None scores every label.
        weight: of a token's loss, 1 / p_mask in LLaDA, a number, [B] or [B, L].
        shift: the logits at i predict token i + 1 (Dream), and nothing predicts the first.
        mask_index: leave this id out of the softmax; None keeps all V.
        kwargs: what else a model hands on; not used.

    Raises:
        ValueError, TypeError: vocab_size is not V, mask_index not in [0, V), or as `dce_loss`.
    """
    if logits.shape[-1] != vocab_size:
        raise ValueError(f"vocab_size: expected V of logits {tuple(logits.shape)}, got {vocab_size}")
    if mask_index is not None and not 0 <= mask_index < vocab_size:
        raise ValueError(f"mask_index: expected an id in [0, {vocab_size}) or None, got {mask_index}")
    labels = labels.to(logits.device)
    return dce_loss(logits, **_options(labels, num_items_in_batch, mask, weight, shift, mask_index, ignore_index))


def _options(
    labels: Tensor,
    num_items: Tensor | int | None,
    mask: Tensor | None,
    weight: Tensor | float | None,
    shift: bool,
    mask_index: int | None,
    ignore_index: int = -100,
) -> dict[str, Any]:
    """What `dce_loss` is given beside logits, and `LossHead.dce_loss`: tokens move and not logits, which are large."""
    if shift:
        labels = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
        mask = None if mask is None else mask.roll(-1, 1)
        weight = weight.roll(-1, 1) if isinstance(weight, Tensor) and weight.dim() == 2 else weight
    return dict(
        x0=labels,
        mask=mask,
        weight=weight,
        mask_index=-1 if mask_index is None else mask_index,
        exclude_mask=mask_index is not None,
        ignore_index=ignore_index,
        reduction="mean",
        num_items=(labels != ignore_index).sum() if num_items is None else num_items,
    )


def agreed_mask_index(*said: int | None) -> int | None:
    """The mask's id, where it is said by a model's config, its tokenizer or both; None where nobody says it.

    Raises:
        ValueError: they say different ids.
    """
    ids = {mask_index for mask_index in said if mask_index is not None}
    if len(ids) > 1:
        raise ValueError(f"mask_index: expected one, for config and tokenizer disagree: {sorted(ids)}")
    return ids.pop() if ids else None


def logits_are_shifted(config: Any) -> bool:
    """Whether a model's logits at i predict token i + 1: those of Dream and what is made from it."""
    return str(getattr(config, "model_type", None)).lower() == "dream"


class MaskedDiffusionTrainer(Trainer):
    """Trainer that noises input_ids and takes `masked_diffusion_loss`, without logits; a mix-in, first of the bases.

    Batches hold input_ids and labels, [B, L] int64, and may hold attention_mask: where a label is -100 or the
    attention_mask 0, tokens are never masked. A sequence has a time t, stratified over the batch and the ranks, each
    token is masked with probability 1 - alpha(t), and its loss has weight dsigma / expm1(sigma). The sum is divided by
    the labels of all ranks and accumulated parts, as Trainer counts them.

    Logits are made where they are asked for (compute_metrics, predict), or where `model.get_output_embeddings()` gives
    no layer; otherwise the last layer computes the loss, as a `LossHead`.

    With the loss it logs masked_accuracy, the share of masked tokens that are the argmax, and masked_entropy, in nats.

    Draws are named by args.seed, step, part, rank and row: a resumed run meets the noise of an unbroken one, and each
    evaluation the same.

    Args:
        mask_index: the mask's id; None means mask_token_id of the model's config and of the processing_class.
        schedule: the noise; None means `LogLinear()`.
        shift: the logits at i predict token i + 1; then the first token is never masked, and its label not counted.
            None means yes for Dream, by the model's config, and no otherwise.
        exclude_mask: leave the mask out of the softmax.
        from_logits: take the loss from logits always, of a model that `LossHead` refuses.
        args, kwargs: Trainer's.

    Raises:
        ValueError: mask_index is None and neither has one, or each another; a batch without labels; label smoothing.
        RuntimeError: `LossHead` refuses the model.
    """

    def __init__(
        self,
        *args: Any,
        mask_index: int | None = None,
        schedule: Schedule | None = None,
        shift: bool | None = None,
        exclude_mask: bool = False,
        from_logits: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **dict(compute_loss_func=self._scored, **kwargs))
        if self.args.label_smoothing_factor:
            raise ValueError(f"label_smoothing_factor: expected 0, got {self.args.label_smoothing_factor}")
        config = getattr(self.model, "config", None)
        if mask_index is None:
            said = (getattr(source, "mask_token_id", None) for source in (config, self.processing_class))
            mask_index = agreed_mask_index(*said)
        if mask_index is None:
            raise ValueError("mask_index: expected an id, for neither config nor processing_class has a mask_token_id")
        self.mask_index, self.schedule, self.exclude_mask = mask_index, schedule or LogLinear(), exclude_mask
        self.shift = logits_are_shifted(config) if shift is None else shift
        self.from_logits = from_logits
        self.label_names = self.label_names or ["labels"]  # of models whose forward takes none
        self._loss_shifts_labels = False  # or it counts what a causal model predicts
        self._at: tuple[bool, int] | None = None  # training, and the step
        self._part = 0
        self._loss_only = False
        self._seen = torch.zeros(3, device=self.args.device)  # correct, entropy, masked since the last log

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The loss of a batch, which is noised here; arguments and result are Trainer's."""
        if "labels" not in inputs:
            raise ValueError(f"inputs: expected labels, -100 where a token is never masked, got {', '.join(inputs)}")
        x0, labels = inputs["input_ids"], inputs["labels"]
        maskable = labels != -100
        if inputs.get("attention_mask") is not None:
            maskable &= inputs["attention_mask"].bool()
        if self.shift:
            maskable[:, 0] = False
        names, n, rank = self._names(model.training), len(x0), self.args.process_index
        t = sample_times(n, rank=rank, world_size=self.args.world_size, device=x0.device, **names)
        sigma, dsigma = self.schedule(t)
        names |= dict(sample_ids=rank * n + torch.arange(n, device=x0.device))
        xt, mask = mask_tokens(x0, -torch.expm1(-sigma), mask_index=self.mask_index, maskable=maskable, **names)
        weight, excluded = dsigma / torch.expm1(sigma), self.mask_index if self.exclude_mask else None
        options = _options(labels, num_items_in_batch, mask, weight, self.shift, excluded)
        options["return_stats"] = model.training
        with_logits = return_outputs and not self._loss_only
        with ExitStack() as stack:
            loss_of: Callable[[Tensor], Any] = partial(dce_loss, **options)
            if not (with_logits or self.from_logits):
                loss_of = _last_layer_scores(model, options, stack) or loss_of
            noised = {**inputs, "input_ids": xt, "labels": (loss_of, mask)}
            # not that of another base, which may look at what comes in the place of logits
            result: Any = Trainer.compute_loss(self, model, noised, with_logits, num_items_in_batch)
        return (result, {}) if return_outputs and not with_logits else result

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Trainer's, without logits where only the loss is wanted."""
        with setting(self, "_loss_only", prediction_loss_only):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with the same noise each time."""
        self._at = None
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any) -> None:
        """Trainer's, of the masked tokens too."""
        if "loss" in logs:
            correct, entropy, masked = self.accelerator.reduce(self._seen).tolist()
            logs = logs | dict(masked_accuracy=correct / max(masked, 1), masked_entropy=entropy / max(masked, 1))
            self._seen.zero_()
        super().log(logs, *args)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        """Trainer's, of the labels that something predicts."""
        if self.shift:
            batch_samples = [
                {name: value[:, 1:] if name == "labels" else value for name, value in batch.items()}
                for batch in batch_samples
            ]
        return super()._get_num_items_in_batch(batch_samples, device)

    def _names(self, training: bool) -> dict[str, Any]:
        """Names of the draws of the part of a batch that comes next."""
        at = (training, self.state.global_step)
        self._part = self._part + 1 if at == self._at else 0
        self._at = at
        step = self.state.global_step * self.args.gradient_accumulation_steps if training else 0
        return dict(seed=self.args.seed + (not training), step=step + self._part)

    def _scored(self, outputs: Any, labels: tuple[Callable, Tensor], num_items_in_batch: Any = None) -> Tensor:
        """A compute_loss_func, whose labels are what makes the loss of logits or of what is in their place, and the
        mask."""
        loss_of, mask = labels
        loss = loss_of(outputs.logits)
        if isinstance(loss, tuple):
            loss, stats = loss
            self._seen += torch.stack([stats.correct.sum(), stats.entropy.sum(), mask.sum()])
        return loss


def _last_layer_scores(model: nn.Module, options: dict[str, Any], stack: ExitStack) -> Callable[[Tensor], Any] | None:
    """What makes the loss of what the last layer gives until the stack is closed; None if the model does not say which
    layer that is."""
    try:
        head = LossHead(model)
    except TypeError:
        return None
    try:
        return stack.enter_context(head.dce_loss(**options))
    except Exception as error:
        raise RuntimeError(f"no loss without logits: {error}; from_logits=True takes it from them") from error


class FastdiffConfig(PretrainedConfig):
    """Shape of a `FastdiffForMaskedLM`, in transformers' names.

    Args:
        vocab_size: the mask included.
        max_position_embeddings: longest sequence.
        hidden_size, num_hidden_layers, num_attention_heads: dim, depth and heads of `ModelConfig`.
        mask_token_id: None means the last of the vocabulary.

    Raises:
        ValueError: tie_word_embeddings, which the model cannot.
    """

    model_type = "fastdiff"
    attribute_map = {"num_states": "vocab_size"}  # noqa: RUF012  # transformers' own form

    def __init__(
        self,
        vocab_size: int = 257,
        max_position_embeddings: int = 256,
        hidden_size: int = 256,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 4,
        mask_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size, self.max_position_embeddings = vocab_size, max_position_embeddings
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.mask_token_id = vocab_size - 1 if mask_token_id is None else mask_token_id
        if kwargs.setdefault("tie_word_embeddings", False):  # True is the default of transformers 4
            raise ValueError("tie_word_embeddings: expected False, for the last layer has weights of its own")
        super().__init__(**kwargs)


class FastdiffForMaskedLM(PreTrainedModel):
    """`DiffusionTransformer`, time-free, as a model of transformers, with `masked_diffusion_loss`."""

    config_class = FastdiffConfig
    _no_split_modules = ["_Block"]  # noqa: RUF012  # what FSDP shards, for accelerate and for transformers
    _fsdp_plan = {"transformer.blocks.*": "free_full_weight"}  # noqa: RUF012

    def __init__(self, config: FastdiffConfig) -> None:
        super().__init__(config)
        shape = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads)
        self.transformer = DiffusionTransformer(ModelConfig(config.vocab_size, config.max_position_embeddings, *shape))
        self.loss_function = masked_diffusion_loss
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> MaskedLMOutput:
        """Logits [B, L, vocab_size] of noised tokens, and the loss if there are labels.

        Args:
            input_ids: [B, L] int64.
            attention_mask: not looked at, for every position is seen, as in LLaDA; `MaskedDiffusionTrainer` masks
                nothing where it is 0.
            labels, kwargs: as in `masked_diffusion_loss`.
        """
        logits = self.transformer(input_ids)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits)

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.vocab_embed

    def set_input_embeddings(self, value: Any) -> None:
        """Also of another number of tokens, as in `resize_token_embeddings`."""
        self.transformer.vocab_embed = value
        self.transformer.config = dataclasses.replace(self.transformer.config, num_states=value.num_embeddings)

    def get_output_embeddings(self) -> nn.Module:
        return self.transformer.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.transformer.output_layer.linear = new_embeddings

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """What no checkpoint filled, as the transformer begins."""
        fresh = DiffusionTransformer(self.transformer.config)
        for parameter, value in zip(self.transformer.parameters(), fresh.parameters(), strict=True):
            if not getattr(parameter, "_is_hf_initialized", False):
                parameter.copy_(value)


AutoConfig.register("fastdiff", FastdiffConfig)
AutoModel.register(FastdiffConfig, FastdiffForMaskedLM)  # as LLaDA's and Dream's, whose AutoModel gives logits
AutoModelForMaskedLM.register(FastdiffConfig, FastdiffForMaskedLM)
