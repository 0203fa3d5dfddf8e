"""NeMo Automodel: the strategies of its dLLM recipes, from a batch to backward."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastdiff.integrations import nemo
from standins import Network, Problem, published


class DLLMLossOutput(NamedTuple):
    total_loss: Tensor
    dllm_loss: Tensor
    draft_correct_per_pos: Tensor | None = None
    draft_count_per_pos: Tensor | None = None


def _nll(logits, target_ids):
    """Every row is scored, in the type of the logits. Sharded logits are gathered."""
    if isinstance(logits, DTensor):
        logits = logits.full_tensor()
    return F.cross_entropy(logits.transpose(1, 2), target_ids, reduction="none")


class MDLMCrossEntropyLoss(nn.Module):
    def forward(
        self,
        logits,
        target_ids,
        noise_mask,
        p_mask,
        loss_mask,
        loss_mask_ar=None,
        num_diffusion_tokens=None,
        num_ar_tokens=None,
        causal_logits=None,
        noisy_input_ids=None,
    ):
        scored = (noise_mask & loss_mask.bool()).float()
        loss = (_nll(logits, target_ids) * scored * (1 / p_mask.clamp(min=1e-8))).sum() / max(num_diffusion_tokens, 1)
        return DLLMLossOutput(loss, loss.detach().clone())


class HybridDiffusionLLMLoss(MDLMCrossEntropyLoss):
    def __init__(self, alpha=1.0, fp32_upcast=True):
        super().__init__()
        self.alpha = alpha

    def forward(
        self,
        logits,
        target_ids,
        noise_mask,
        p_mask,
        loss_mask,
        loss_mask_ar=None,
        num_diffusion_tokens=None,
        num_ar_tokens=None,
        causal_logits=None,
        noisy_input_ids=None,
    ):
        loss, _, *_ = super().forward(
            logits, target_ids, noise_mask, p_mask, loss_mask, num_diffusion_tokens=num_diffusion_tokens
        )
        loss = dllm_loss = self.alpha * loss
        if causal_logits is not None:
            nll = _nll(causal_logits[:, :-1], target_ids[:, 1:])
            loss = loss + (nll * loss_mask_ar[:, 1:].float()).sum() / max(num_ar_tokens, 1)
        return DLLMLossOutput(loss, dllm_loss.detach())


class IDLMLoss(nn.Module):
    def __init__(self, clean_loss_weight=0.2, auto_balance=False):
        super().__init__()
        self.clean_loss_weight, self.auto_balance = clean_loss_weight, auto_balance

    def forward(self, logits, target_ids, answer_mask, valid_mask, *, seq_len, num_diffusion_tokens=None):
        scored = (answer_mask & valid_mask.bool())[:, 1:].float()
        noisy, clean = (
            (_nll(half[:, :-1], target_ids[:, 1:]) * scored).sum() / max(num_diffusion_tokens, 1)
            for half in (logits[:, :seq_len], logits[:, seq_len : 2 * seq_len])
        )
        alpha = (noisy / clean.clamp_min(1e-6)).detach() if self.auto_balance else self.clean_loss_weight
        return DLLMLossOutput(noisy + alpha * clean, noisy.detach().clone())


class DFlashDecayLoss(nn.Module):
    def __init__(self, loss_gamma=7.0, use_fused_linear_ce=False, chunk_size=1024, normalize="tokens"):
        super().__init__()
        self.loss_gamma, self.normalize = loss_gamma, normalize

    def _decay_weights(self, T, block_size, device, dtype):
        at = torch.arange(T, device=device, dtype=dtype)
        return torch.exp(-(at if block_size is None else at % (block_size - 1)) / self.loss_gamma)

    @staticmethod
    def _draft_acc_per_pos(correct, block_mask, block_size):
        if block_size is None:
            return None, None
        hits, mask = ((x * block_mask).unflatten(1, (-1, block_size - 1)) for x in (correct, torch.ones_like(correct)))
        return hits.sum((0, 1)), mask.sum((0, 1))

    def forward_fused(
        self, hidden, lm_head_weight, target_ids, block_mask, num_tokens=None, block_size=None, lm_head_bias=None
    ):
        logits = F.linear(hidden, lm_head_weight, lm_head_bias)
        weight = block_mask * self._decay_weights(hidden.shape[1], block_size, hidden.device, logits.dtype)
        loss = (_nll(logits, target_ids) * weight).sum()
        if self.normalize == "mean":
            loss = loss / (weight.sum() + 1e-6)
        elif num_tokens is not None:
            loss = loss / max(num_tokens, 1)
        accuracies = self._draft_acc_per_pos(logits.argmax(-1) == target_ids, block_mask, block_size)
        return DLLMLossOutput(loss, loss.detach().clone(), *accuracies)


class DLLMStrategy:
    def forward_backward(
        self,
        recipe,
        idx,
        batch,
        *,
        loss_buffer,
        num_diffusion_tokens,
        num_ar_tokens=None,
        num_batches,
        is_train=True,
    ):
        recipe._forward_backward_step(
            idx,
            batch,
            loss_buffer=loss_buffer,
            num_diffusion_tokens=num_diffusion_tokens,
            num_ar_tokens=num_ar_tokens,
            num_batches=num_batches,
            is_train=is_train,
        )


class MDLMStrategy(DLLMStrategy):
    def create_loss_fn(self, dllm_cfg):
        return MDLMCrossEntropyLoss()

    def prepare_batch(self, batch, noisy_input_ids, noise_mask, clean_input_ids):
        return dict(input_ids=noisy_input_ids)


class HybridStrategy(DLLMStrategy):
    def create_loss_fn(self, dllm_cfg):
        return HybridDiffusionLLMLoss(alpha=dllm_cfg.get("ar_loss_alpha", 1.0))

    def prepare_batch(self, batch, noisy_input_ids, noise_mask, clean_input_ids):
        return dict(input_ids=clean_input_ids, masked_indices=noise_mask, labels=clean_input_ids, skip_loss=True)


class IDLMStrategy(DLLMStrategy):
    def create_loss_fn(self, dllm_cfg):
        return IDLMLoss(dllm_cfg.get("clean_loss_weight", 0.2), dllm_cfg.get("auto_balance_clean_loss", False))

    def forward_backward(
        self,
        recipe,
        idx,
        batch,
        *,
        loss_buffer,
        num_diffusion_tokens,
        num_ar_tokens=None,
        num_batches,
        is_train=True,
    ):
        clean, valid = batch["_clean_input_ids"], batch.get("attention_mask", torch.ones_like(batch["_noise_mask"]))
        out = recipe.model_parts[0](input_ids=torch.cat([batch["_noisy_input_ids"], clean], 1), use_cache=False)
        result = recipe.dllm_loss_fn(
            out.logits,
            clean,
            batch["_noise_mask"],
            valid,
            seq_len=clean.shape[1],
            num_diffusion_tokens=num_diffusion_tokens,
        )
        recipe._done(result, loss_buffer, is_train)


class DiffusionLMSFTRecipe:
    def _forward_backward_step(
        self, idx, batch, *, loss_buffer, num_diffusion_tokens, num_ar_tokens=None, num_batches, is_train=True
    ):
        noisy, mask, p_mask, clean = (
            batch.pop(f"_{x}") for x in ("noisy_input_ids", "noise_mask", "p_mask", "clean_input_ids")
        )
        loss_mask = batch.pop("loss_mask")
        out = self.model_parts[0](**self.dllm_strategy.prepare_batch(batch, noisy, mask, clean))
        causal_logits = getattr(out, "causal_logits", None)
        result = self.dllm_loss_fn(
            logits=out.logits,
            target_ids=clean,
            noise_mask=mask,
            p_mask=p_mask,
            loss_mask=loss_mask,
            loss_mask_ar=None if causal_logits is None else loss_mask,
            num_diffusion_tokens=num_diffusion_tokens,
            num_ar_tokens=None if causal_logits is None else num_ar_tokens,
            causal_logits=causal_logits,
            noisy_input_ids=noisy,
        )
        self._done(result, loss_buffer, is_train)

    def _done(self, result, loss_buffer, is_train):
        loss_buffer.append(result.total_loss.detach().clone())
        self._dllm_loss_buffer.append(result.dllm_loss.detach().clone())
        if is_train:
            (result.total_loss * self._get_dp_group_size(include_cp=True)).backward()


NAMES = (nemo.LOSSES, nemo.STRATEGIES, "nemo_automodel.recipes.dllm.train_ft")
PUBLISHED = published("nemo", *NAMES)
LOSSES, STRATEGIES, RECIPES = (PUBLISHED[name] for name in NAMES)


class TwoHalves(nn.Module):
    """Nemotron-Labs-Diffusion around a network: labels make it read [xt, x0], with causal_logits of the second half."""

    def __init__(self, network: nn.Module, paradigm: str = "sbd_block_diff") -> None:
        super().__init__()
        self.network, self.config = network, SimpleNamespace(dlm_paradigm=paradigm)

    def forward(self, input_ids: Tensor, masked_indices: Any = None, labels: Any = None, skip_loss: Any = None) -> Any:
        if labels is None or self.config.dlm_paradigm == "bidirectional":
            return self.network(input_ids)
        logits, length = self.network(torch.cat([input_ids, input_ids], 1)).logits, input_ids.shape[1]
        causal_logits = logits[:, length:] if self.config.dlm_paradigm == "sbd_block_diff" else None
        return SimpleNamespace(logits=logits[:, :length], causal_logits=causal_logits)

    def get_output_embeddings(self) -> nn.Module:
        return self.network.get_output_embeddings()


class Kept:
    """What the recipe multiplies a loss by before backward: it keeps the loss, and there is no backward."""

    def __rmul__(self, loss: Tensor) -> "Kept":
        self.loss = loss
        return self

    def backward(self) -> None:
        pass


def recipe_of(model: nn.Module, strategy: str, dp_group_size: Any = 1, **dllm_cfg: Any) -> Any:
    """A recipe that is set up for one microbatch."""
    recipe = object.__new__(RECIPES.DiffusionLMSFTRecipe)
    made = getattr(STRATEGIES, strategy)()
    vars(recipe).update(
        model_parts=[model],
        dllm_strategy=made,
        dllm_loss_fn=made.create_loss_fn(dllm_cfg),
        dist_env=SimpleNamespace(device=next(model.parameters()).device),
        distributed_config=SimpleNamespace(),
        device_mesh=None,
        te_fp8=None,
        _dllm_loss_buffer=[],
        _get_dp_group_size=lambda include_cp: dp_group_size,
    )
    return recipe


def batch_of(p: Problem) -> dict[str, Tensor]:
    """A batch to which a strategy has added its noise."""
    supervised = (torch.arange(p.x0.shape[1]) > 1).long().expand(p.x0.shape)
    noise = dict(noisy_input_ids=p.xt, noise_mask=p.xt == p.mask_index, clean_input_ids=p.x0)
    noise["p_mask"] = p.t[:, None].expand(p.x0.shape)
    return dict({f"_{name}": value for name, value in noise.items()}, input_ids=p.x0.clone(), loss_mask=supervised)


def step(forward_backward: Callable[..., None], recipe: Any, batch: dict[str, Any], **options: Any) -> Tensor:
    """One microbatch; the loss of the log."""
    losses: list[Tensor] = []
    tokens = dict(num_diffusion_tokens=99, num_ar_tokens=88) | options  # of all ranks
    forward_backward(recipe.dllm_strategy, recipe, 0, dict(batch), loss_buffer=losses, num_batches=1, **tokens)
    return losses[0]


def cases(p: Problem) -> dict[str, tuple[Callable[[Network], Tensor], Callable[[Network], Tensor]]]:
    def pair(strategy: str, model_of: Callable[[Network], nn.Module] = lambda network: network, **dllm_cfg: float):
        def loss(forward_backward: Callable[..., None], network: Network) -> Tensor:
            recipe = recipe_of(model_of(network), strategy, kept := Kept(), **dllm_cfg)
            step(forward_backward, recipe, batch_of(p))
            return kept.loss

        theirs = getattr(STRATEGIES, strategy).forward_backward
        ours = nemo.SEAMS[strategy](theirs)
        return lambda network: loss(theirs, network), lambda network: loss(ours, network)

    return {
        "MDLM": pair("MDLMStrategy"),
        "Hybrid": pair("HybridStrategy", TwoHalves, ar_loss_alpha=0.7),
        "IDLM": pair("IDLMStrategy"),
        "IDLM, balanced": pair("IDLMStrategy", auto_balance_clean_loss=True),
    }
