"""Megatron: a last layer cut along the vocabulary, MegaDLMs' model and Megatron-Bridge's step around it."""

import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.integrations import megatron
from standins import Network, Problem


def get_tensor_model_parallel_group():
    return dist.group.WORLD if dist.is_initialized() else None


def _summed(x, op=dist.ReduceOp.SUM):
    x = x.clone()
    if dist.is_initialized():
        dist.all_reduce(x, op)
    return x


class Copied(torch.autograd.Function):
    """The same on all ranks, whose gradients are summed."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _summed(grad)


class Summed(torch.autograd.Function):
    """The sum over all ranks, whose gradient is the same on all."""

    @staticmethod
    def forward(ctx, x):
        return _summed(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class Gathered(torch.autograd.Function):
    """The parts of all ranks. Their gradients are summed, and each rank keeps that of its part."""

    @staticmethod
    def forward(ctx, part):
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        return _summed(grad).chunk(dist.get_world_size())[dist.get_rank()]


class ColumnParallelLinear(nn.Module):
    """[s, b, h] -> [s, b, V / ranks], by a weight of this rank's ids, perhaps one that each call gives."""

    def __init__(self, config, weight=None, bias=None):
        super().__init__()
        self.config, self.sequence_parallel, self.skip_bias_add = config, config.sequence_parallel, False
        self.weight, self.bias = weight, bias

    def forward(self, input_, weight=None, runtime_gather_output=None):
        input_ = (Gathered if self.sequence_parallel else Copied).apply(input_)
        return F.linear(input_, self.weight if weight is None else weight, self.bias), None


class GPTModel(nn.Module):
    """MegaDLMs' noise, a decoder, and what comes behind it."""

    def __init__(self, decoder, output_layer, tied=None, post_process=True):
        super().__init__()
        self.decoder, self.output_layer, self.tied, self.post_process = decoder, output_layer, tied, post_process
        self.config = SimpleNamespace(gpt_block_return_loss_and_logits=False)

    def difflm_forward_process(self, input_ids):
        t = torch.rand(len(input_ids), 1, dtype=torch.float64).expand(input_ids.shape)
        mask = torch.rand(input_ids.shape) < t
        return torch.where(mask, -1, input_ids), mask, t

    def forward(
        self,
        input_ids,
        position_ids,
        attention_mask,
        decoder_input=None,
        labels=None,
        inference_params=None,
        packed_seq_params=None,
        extra_block_kwargs=None,
        runtime_gather_output=None,
    ):
        """Tokens and labels are those of next-token prediction: the former without the first are the latter."""
        if labels is not None:
            labels = labels[:, :-1]
            input_ids, mask, p_mask = self.difflm_forward_process(input_ids[:, 1:])
        hidden_states = self.decoder(input_ids)
        if not self.post_process:
            return hidden_states
        logits, _ = self.output_layer(hidden_states, weight=self.tied, runtime_gather_output=runtime_gather_output)
        if labels is None:
            return logits.transpose(0, 1).contiguous()
        loss = self.compute_language_model_loss(labels, logits)
        return loss * mask / p_mask, mask

    def compute_language_model_loss(self, labels, logits):
        """[b, s], of each rank's part [s, b, V / ranks] of the logits."""
        logits, size = logits.transpose(0, 1), logits.shape[-1]
        at = labels - size * (dist.get_rank() if dist.is_initialized() else 0)
        own = torch.where((at >= 0) & (at < size), logits.gather(-1, at.clamp(0, size - 1)[..., None])[..., 0], 0)
        top = _summed(logits.detach().amax(-1), dist.ReduceOp.MAX)
        return Summed.apply(torch.exp(logits - top[..., None]).sum(-1)).log() + top - Summed.apply(own)


def unwrap_model(model):
    return getattr(model, "module", model)


class DGPTStep:
    """Megatron-Bridge's step over [xt, x0]: the first half is masked, the second predicts the next token."""

    def _apply_noise(self, tokens, labels, loss_mask, attention_mask, position_ids):
        p_mask = torch.rand(len(tokens), 1, dtype=torch.float64).expand(tokens.shape)
        mask = (torch.rand(tokens.shape) < p_mask) & (loss_mask != 0)
        both = torch.cat([torch.where(mask, -1, tokens), tokens], 1)
        return both, labels, loss_mask, attention_mask, position_ids, mask, p_mask, tokens.shape[1]

    def __call__(self, state, data_iterator, model, return_schedule_plan=False):
        tokens, labels_causal, loss_mask = next(data_iterator)
        both, labels, _, _, _, mask, p_mask, length = self._apply_noise(tokens, tokens.clone(), loss_mask, None, None)
        first, second = (half.transpose(0, 1).contiguous() for half in model(both, None, None).split(length, 1))
        core = unwrap_model(model)
        losses = core.compute_language_model_loss(labels, first)[mask] / p_mask[mask]
        ar_losses = core.compute_language_model_loss(labels_causal, second)
        return (losses, ar_losses, labels_causal.numel()), partial(summed_loss, mask)


def summed_loss(mask, output, dlm_loss_weight=0.3, ar_loss_weight=1.0):
    """What `_masked_loss_sbd_block_diff` is without its checks: the sum, and of how many tokens."""
    losses, ar_losses, num_tokens_ar = output
    return dlm_loss_weight * losses.sum() + ar_loss_weight * ar_losses.sum(), mask.sum() + num_tokens_ar


NAMES = (
    "megatron.bridge.diffusion.models.common.dgpt_step",
    "megatron.core.models.difflm.gpt_model",
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel",
    "megatron.core.utils",
)
PUBLISHED = dict.fromkeys(NAMES, sys.modules[__name__])
CONFIG = SimpleNamespace(sequence_parallel=False, defer_embedding_wgrad_compute=False)


def cases(p: Problem) -> dict[str, tuple[Callable[[Network], Tensor], Callable[[Network], Tensor]]]:
    mask, p_mask = p.xt == p.mask_index, p.t[:, None].expand(p.x0.shape)

    def model_of(network: Network) -> Any:
        """Its last layer is tied to the network's."""
        return GPTModel(
            lambda input_ids: network.hidden[:, : input_ids.shape[1]].transpose(0, 1),
            ColumnParallelLinear(CONFIG, bias=network.lm_head.bias),
            tied=network.lm_head.weight,
        )

    def megadlms(forward: Callable[..., Any], network: Network) -> Tensor:
        model = model_of(network)
        model.difflm_forward_process = lambda input_ids: (p.xt, mask, p_mask)
        return forward(model, F.pad(p.x0, (1, 0)), None, None, labels=F.pad(p.x0, (0, 1)))[0]

    def bridge(call: Callable[..., Any], network: Network) -> Tensor:
        step = DGPTStep()
        step._apply_noise = lambda tokens, *rest: (torch.cat([p.xt, tokens], 1), *rest, mask, p_mask, tokens.shape[1])
        batch = (p.x0, p.x0.roll(-1, 1), torch.ones_like(p.x0))
        output, loss_of = call(step, None, iter([batch]), model_of(network))
        return loss_of(output)[0]

    def pair(loss: Callable[..., Tensor], make: Callable[..., Any], published: Callable[..., Any]):
        def ours(network: Network) -> Tensor:
            with mock.patch.dict(sys.modules, PUBLISHED):
                return loss(make(published), network)

        return partial(loss, published), ours

    return {
        "MegaDLMs": pair(megadlms, megatron.megadlms_forward, GPTModel.forward),
        "Megatron-Bridge": pair(bridge, megatron.dgpt_step, DGPTStep.__call__),
    }
