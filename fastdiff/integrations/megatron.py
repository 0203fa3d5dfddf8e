"""Megatron: losses of a last layer that is cut along the vocabulary over tensor-parallel ranks, without its logits.

undo = apply_to_megadlms()
undo = apply_to_megatron_bridge()
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastdiff.integrations.patching import around, patch
from fastdiff.losses.linear_losses import linear_dce_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def apply_to_megadlms() -> Callable[[], None]:
    """Replaces how MegaDLMs' `GPTModel` comes from hidden states to losses, and returns what undoes that.

    Raises:
        ImportError, RuntimeError: as `patch`.
    """
    module = "megatron.core.models.difflm.gpt_model"
    return patch("MegaDLMs", {module: (around(module, "GPTModel", forward=megadlms_forward),)})


def apply_to_megatron_bridge() -> Callable[[], None]:
    """The same for Megatron-Bridge's `DGPTStep`, which trains Nemotron-Labs-Diffusion.

    Raises:
        ImportError, RuntimeError: as `patch`.
    """
    module = "megatron.bridge.diffusion.models.common.dgpt_step"
    return patch("Megatron-Bridge", {module: (around(module, "DGPTStep", __call__=dgpt_step),)})


def output_layer_loss(
    layer: nn.Module, hidden: Tensor, labels: Tensor, *, mask: Tensor | None = None, weight: Tensor | None = None
) -> Tensor:
    """Cross-entropy of each token, [b, s] in nats, 0 where it is not scored; the same on all tensor-parallel ranks.

    Args:
        layer: a `ColumnParallelLinear`, whose rows of [V / ranks, h] are this rank's ids.
        hidden: [s, b, h] of the type of its weight; [s / ranks, b, h] if the layer is `sequence_parallel`.
        labels: [b, s] int64. mask: [b, s] bool, the tokens that are scored; None scores all. Other rows are not
            multiplied.
        weight: in the place of the layer's own, where it is tied to the embedding.

    Raises:
        TypeError: a layer that does more than multiply, or weights that are not plain numbers.
        ValueError: weight gradients are deferred (`defer_embedding_wgrad_compute`).
        ValueError, TypeError: as `linear_dce_loss`.
    """
    return _loss(layer, _whole(layer, hidden), labels, mask, weight)


def megadlms_forward(published: Any) -> Callable[..., Any]:
    def forward(
        self: Any,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        decoder_input: Tensor | None = None,
        labels: Tensor | None = None,
        inference_params: Any = None,
        packed_seq_params: Any = None,
        extra_block_kwargs: dict[str, Any] | None = None,
        runtime_gather_output: bool | None = None,
    ) -> Any:
        """As published, which with labels returns losses [b, s] and the mask."""
        batch = (input_ids, position_ids, attention_mask, decoder_input, labels)
        rest = (inference_params, packed_seq_params, extra_block_kwargs, runtime_gather_output)
        if labels is None or not self.post_process or self.config.gpt_block_return_loss_and_logits:
            return published(self, *batch, *rest)
        with _from_hidden(self, noise=(self, "difflm_forward_process", 1)):
            return published(self, *batch, *rest)

    return forward


def dgpt_step(published: Any) -> Callable[..., Any]:
    def __call__(self: Any, state: Any, data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> Any:
        """As published: losses of the masked tokens and of the autoregressive half, and what sums them."""
        from megatron.core.utils import unwrap_model

        core = unwrap_model(model)
        core = getattr(core, "language_model", core)
        if return_schedule_plan or not core.post_process:
            return published(self, state, data_iterator, model, return_schedule_plan)
        with _from_hidden(core, noise=(self, "_apply_noise", 5)):
            return published(self, state, data_iterator, model, return_schedule_plan)

    return __call__


@contextmanager
def _from_hidden(model: Any, noise: tuple[Any, str, int]) -> Iterator[None]:
    """Within, a GPTModel's last layer gives the hidden states in the place of logits, and its loss multiplies them.

    The first loss after noise is that of masked tokens. noise: whose method draws it, and where it returns the mask.
    """
    layer, (owner, name, index) = model.output_layer, noise
    draw, weights = getattr(owner, name), []
    masks: list[Tensor] = []

    def output_layer(input_: Tensor, weight: Tensor | None = None, *_: Any, **__: Any) -> tuple[Tensor, None]:
        weights.append(weight)
        return _whole(layer, input_), None

    def compute_language_model_loss(labels: Tensor, hidden: Tensor) -> Tensor:
        return _loss(layer, hidden, labels, masks.pop() if masks else None, weights[-1])

    def noised(*arguments: Any) -> Any:
        drawn = draw(*arguments)
        masks.append(drawn[index])
        return drawn

    with (
        _instead(layer, "forward", output_layer),
        _instead(model, "compute_language_model_loss", compute_language_model_loss),
        _instead(owner, name, noised),
    ):
        yield


@contextmanager
def _instead(owner: Any, name: str, ours: Callable[..., Any]) -> Iterator[None]:
    """Another method, of this object alone."""
    before = vars(owner).get(name)
    setattr(owner, name, ours)
    try:
        yield
    finally:
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)


def _loss(layer: Any, hidden: Tensor, labels: Tensor, mask: Tensor | None, weight: Tensor | None) -> Tensor:
    """`output_layer_loss` of hidden states that are whole; a wrapper may have made float32 of them."""
    weight = _weight(layer, weight)
    loss = linear_dce_loss(
        hidden.to(weight.dtype),
        weight,
        labels.t(),
        bias=None if layer.skip_bias_add else layer.bias,
        mask=None if mask is None else mask.t(),
        exclude_mask=False,
        group=_group(layer),
    )
    return loss.t().contiguous()


def _weight(layer: Any, tied: Tensor | None) -> Tensor:
    from megatron.core.tensor_parallel import ColumnParallelLinear

    if type(layer) is not ColumnParallelLinear:
        raise TypeError(f"output_layer: expected a ColumnParallelLinear and nothing else, got {type(layer).__name__}")
    weight = layer.weight if tied is None else tied
    if type(weight) not in (Tensor, nn.Parameter):
        raise TypeError(f"output_layer: expected weights of plain numbers, got a {type(weight).__name__}")
    if layer.config.defer_embedding_wgrad_compute:
        raise ValueError("defer_embedding_wgrad_compute: expected False, as the loss makes the gradient of the weights")
    return weight


def _group(layer: Any) -> "ProcessGroup":
    """Of the layer, or (before 0.13) of all layers."""
    if getattr(layer, "tp_group", None) is not None:
        return layer.tp_group
    from megatron.core.parallel_state import get_tensor_model_parallel_group

    return get_tensor_model_parallel_group()


def _whole(layer: Any, hidden: Tensor) -> Tensor:
    return _Gathered.apply(hidden, _group(layer)) if layer.sequence_parallel else hidden


class _Gathered(torch.autograd.Function):
    """All ranks' parts, [s, b, h]. The loss's gradient is whole on each rank, which keeps that of its own part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: "ProcessGroup") -> Tensor:
        ctx.group = group
        whole = part.new_empty((dist.get_world_size(group) * len(part), *part.shape[1:]))
        dist.all_gather_into_tensor(whole, part.contiguous(), group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.chunk(dist.get_world_size(ctx.group))[dist.get_rank(ctx.group)], None
