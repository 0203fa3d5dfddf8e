"""torchtitan 0.3: masked diffusion in the place of next-token prediction, and no logits.

def llama3_8b():  # in a config registry of your own
    return masked_diffusion(config_registry.llama3_8b(), mask_index=128255)
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import spmd_types as spmd
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss, ChunkedLossWrapper
from torchtitan.components.validate import Validator
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention, VarlenAttention
from torchtitan.models.common.decoder import Decoder
from torchtitan.trainer import Trainer

from fastdiff.losses.linear_losses import linear_dce_loss
from fastdiff.noise.noising import mask_tokens, sample_times, spread
from fastdiff.schedules import LogLinear

Batch = dict[str, Tensor]


def masked_diffusion(
    config: Trainer.Config, mask_index: int | None = None, seed: int = 0
) -> "MaskedDiffusionTrainer.Config":
    """A training config of next-token prediction, e.g. of torchtitan.models.llama3.config_registry, made one of this.

    Attention sees both ways: varlen attention within documents, any other whole rows. CUDA graphs are switched off, for
    the masked tokens of a batch are counted.

    Args:
        config: not to be used afterwards.
        mask_index: the mask's id; None means the tokenizer's.
        seed: names the noise, with the step and the row of the global batch.

    Raises:
        TypeError: a Trainer.Config with more to it, or not of a decoder.
        ValueError: the model masks its attention in a way of its own; `MaskedDiffusionTrainer.Config` refuses.
    """
    model = getattr(config.model_spec, "model", None)
    if type(config) is not Trainer.Config or not isinstance(model, Decoder.Config):
        got = f"{type(config).__qualname__} of {type(model).__qualname__}"
        raise TypeError(f"config: expected a Trainer.Config of a decoder, got {got}")
    kinds = (FlexAttention.Config, ScaledDotProductAttention.Config, VarlenAttention.Config)
    masks = model._owner.get_attention_masks
    if masks is not Decoder.get_attention_masks or not all([*layer.traverse(kinds)] for layer in model.layers):
        raise ValueError(f"config: expected attention that is causal and no more, got {model._owner.__name__}'s")
    for _, inner, owner, name in [*model.traverse(kinds)]:
        if isinstance(inner, VarlenAttention.Config):
            setattr(owner, name, replace(inner, window_size=(inner.window_size[0], inner.window_size[0])))
        else:
            setattr(owner, name, BidirectionalAttention.Config())
    config.loss = MaskedDiffusionLoss.Config(mask_index=mask_index, seed=seed)
    config.validator = MaskedDiffusionValidator.Config(**_fields(config.validator))
    config.training.disable_cuda_graphs = True
    return MaskedDiffusionTrainer.Config(**_fields(config))


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in fields(config)}


class BidirectionalAttention(ScaledDotProductAttention):
    """Attention of every token to every token of its row."""

    @dataclass(kw_only=True, slots=True)
    class Config(ScaledDotProductAttention.Config):
        pass

    def forward(self, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(q_BLNH, k_BLNH, v_BLNH, **kwargs, is_causal=False)


class MaskedDiffusionLoss(ChunkedLossWrapper):
    """Cross-entropy of the masked tokens with weight dsigma / expm1(sigma), in nats, from hidden states.

    It is a ChunkedLossWrapper for the trainer to hand it the last layer, and to leave that out of the model.

    Args:
        config: mask_index, the mask's id, where a trainer is not to ask its tokenizer; seed, which names the noise.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        mask_index: int | None = None
        seed: int = 0

    def __init__(self, config: Config, *, compile_config: Any = None) -> None:
        self.mask_index: Any = config.mask_index
        self.seed, self.lm_head = config.seed, None

    def set_lm_head(self, lm_head: nn.Module) -> None:
        """Takes the last layer; a TypeError if it is not a plain linear one (adapters, quantised or capped)."""
        if type(lm_head).forward is not nn.Linear.forward:
            raise TypeError(f"lm_head: expected a linear layer and no more, got a {type(lm_head).__name__}")
        super().set_lm_head(lm_head)

    def noised(
        self, input_dict: Batch, labels: Tensor, step: int, rank: int, world_size: int, training: bool = True
    ) -> tuple[Batch, Tensor]:
        """A batch with tokens masked, each with probability 1 - alpha(t) at a time t of its row.

        Tokens are labels, as loaders shift within a document, so that its end is among them and its begin is not. Those
        without a label stay as they are.

        Args:
            input_dict: input [B, L] int64, and more. labels: [B, L] int64, of input one ahead, or -100.
            step, rank, world_size: which B rows of a step's batch these are; the first step is 0.

        Returns:
            input_dict and labels [B, L] complex128: x0, or -100 where nothing is masked, and i times its weight. Labels
            are all that reaches a loss.
        """
        known, tokens = labels != IGNORE_INDEX, input_dict["input"]
        x0 = torch.where(known, labels, torch.cat([tokens[:, 1:], tokens[:, -1:]], 1))
        names: dict[str, Any] = dict(seed=self.seed + (not training), step=step)
        n = len(x0)
        total, rows = n * world_size, rank * n + torch.arange(n, device=x0.device)
        t = sample_times(total, device=x0.device, **names)[spread(total, x0.device)[rows]]
        sigma, dsigma = LogLinear()(t)
        options = dict(mask_index=self.mask_index, maskable=known, sample_ids=rows, **names)
        xt, mask = mask_tokens(x0, -torch.expm1(-sigma), **options)
        weight = (dsigma / torch.expm1(sigma)).unsqueeze(1).expand(x0.shape)
        labels = torch.complex(torch.where(mask, x0, IGNORE_INDEX).double(), weight.double())
        return {**input_dict, "input": xt}, labels

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of weighted losses over global_valid_tokens (not divided if that is None), and no metrics.

        Args:
            pred: hidden states [B, L, D], the same on ranks of tensor parallelism.
            labels: as `noised` gives them.
            global_valid_tokens: labels of a step on all ranks, masked or not.

        Raises:
            ValueError, TypeError: as `linear_dce_loss`.
        """
        head: Any = self.lm_head
        group = None
        if isinstance(head, FSDPModule):
            head.unshard()
        if spmd_mesh_size("tp") > 1:  # local tensors: the loss sums pred's gradient over ranks, which R would do again
            group = current_spmd_mesh().get_group("tp")
            pred = spmd.redistribute(pred, group, src=spmd.R, dst=spmd.I)
        loss = linear_dce_loss(
            pred,
            head.weight,
            labels.real.long(),
            bias=head.bias,
            weight=labels.imag,
            mask_index=self.mask_index,
            reduction="sum" if global_valid_tokens is None else "mean",
            num_items=global_valid_tokens,
            group=group,
        )
        if isinstance(head, FSDPModule) and not pred.requires_grad:
            head.reshard()  # in training backward does, with the norm, which is in the same unit
        return loss, {}


class MaskedDiffusionTrainer(Trainer):
    """Trainer for `MaskedDiffusionLoss`, whose batches it masks.

    Draws are named by the loss's seed, step and row of the global batch: any number of ranks and accumulated parts
    meets the same noise, if it meets the same rows, and so does a run that is resumed.

    Raises:
        ValueError: no mask, or one outside the vocabulary, or not the tokenizer's; what Config refuses.
        TypeError: the last layer is not linear.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        """Trainer's; a ValueError for pipeline and context parallelism and the full_dtensor backend."""

        def __post_init__(self) -> None:
            Trainer.Config.__post_init__(self)
            how = self.parallelism
            for name, expected in (("pipeline_parallel_degree", 1), ("context_parallel_degree", 1)):
                if getattr(how, name) != expected:
                    raise ValueError(f"parallelism.{name}: expected {expected}, got {getattr(how, name)}")
            if how.spmd_backend == "full_dtensor":
                raise ValueError("parallelism.spmd_backend: expected spmd_types or partial_dtensor, got full_dtensor")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.loss_fn.mask_index = _mask_index(config.loss.mask_index, self.tokenizer, self.model_config.vocab_size)

    def train_step(self, data_iterator: Iterator[tuple[Batch, Tensor]]) -> None:
        self.part = 0
        super().train_step(data_iterator)

    def post_dataloading_process(self, input_dict: Batch, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        mesh = self.parallel_dims.get_optional_mesh("batch")
        rank, ranks = (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())
        at = self.step - 1, self.part * ranks + rank, self.gradient_accumulation_steps * ranks
        self.part += 1
        return super().post_dataloading_process(*self.loss_fn.noised(input_dict, labels, *at))


class MaskedDiffusionValidator(Validator):
    """Validator of the same loss, with the same noise each time."""

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        pass

    def validate(self, model_parts: list[nn.Module], step: int) -> None:
        self.batch = 0
        super().validate(model_parts, step)

    def post_dataloading_process(
        self, input_dict: Batch, labels: Tensor, model_parts: list[nn.Module]
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        at = self.batch, self.dp_rank, self.dp_world_size
        self.batch += 1
        noised = self.loss_fn.noised(input_dict, labels, *at, training=False)
        return super().post_dataloading_process(*noised, model_parts)


def _mask_index(said: int | None, tokenizer: Any, num_states: int) -> int:
    token = (getattr(tokenizer, "_hf_config", None) or {}).get("mask_token")
    own = (
        None
        if token is None
        else tokenizer.tokenizer.token_to_id(token["content"] if isinstance(token, dict) else token)
    )
    if said is not None and own is not None and said != own:
        raise ValueError(f"loss.mask_index: expected {own}, the tokenizer's, got {said}")
    mask_index = own if said is None else said
    if mask_index is None or not 0 <= mask_index < num_states:
        raise ValueError(f"loss.mask_index: expected an id in [0, {num_states}), got {mask_index}")
    return mask_index
