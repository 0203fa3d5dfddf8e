"""TRL: DPO, KTO, GRPO and RLOO of a masked diffusion model: log-probabilities of masked answers, without logits.

undo = apply_to_trl(mask_index=126336)  # and then the trainer
"""

import dataclasses
import functools
import importlib
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.checks import check_integer, check_values
from fastdiff.integrations.loss_head import LossHead
from fastdiff.integrations.patching import patch
from fastdiff.integrations.transformers import logits_are_shifted

_TRAINERS = ("dpo", "grpo", "kto", "rloo")
_MULTIPLIER = 6364136223846793005  # of a multiplicative hash
Estimate = Callable[..., Any]


def apply_to_trl(
    mask_index: int,
    *,
    estimate: Estimate | None = None,
    shift: bool | None = None,
    exclude_mask: bool = False,
) -> Callable[[], None]:
    """Replaces `add_fused_lm_head`, which trainers call when they are made, and returns what puts TRL's own back.

    A trainer asks its model for log p of each token of the answers. It then gets

    - by default, that of one pass in which all answers are masked: biased, for each token is scored alone;
    - with an estimate, what each token adds to the estimated log-likelihood of its answer, so that a sum over tokens,
      as in DPO, is that estimate. As many logits are made at once as the estimator's batch_size says.

    An estimate's draws are named by its seed and the tokens of a sequence: policy, reference and old policy meet the
    same masks, and so does another epoch. Entropies, with gradient, and mean_token_accuracy are those of masked answers
    in either case, for which an estimate needs one pass more. The mean logits that TRL logs are NaN.

    Args:
        mask_index: the mask's id.
        estimate: one of fastdiff's that gives token_nll, and options: `partial(time_free_nll, num_samples=8)`.
        shift: the logits at i predict token i + 1; None means yes for Dream, by the model's config.
        exclude_mask: leave the mask out of the softmax.

    Raises:
        ImportError, RuntimeError: as `patch`.
        ValueError, TypeError: mask_index is no id.
    """
    output = importlib.import_module("trl.trainer.utils").FusedCausalLMOutput
    made = masked_lm_head(output, mask_index, estimate=estimate, shift=shift, exclude_mask=exclude_mask)
    modules: dict[str, tuple[Any, ...]] = {f"trl.trainer.{name}_trainer": () for name in _TRAINERS}
    return patch("TRL", modules | {"trl.trainer.utils": (made,)})


def masked_lm_head(
    output: Callable[..., Any],
    mask_index: int,
    *,
    estimate: Estimate | None = None,
    shift: bool | None = None,
    exclude_mask: bool = False,
) -> Callable[..., None]:
    """An `add_fused_lm_head`; arguments are those of `apply_to_trl`, and what its models' outputs are made by."""
    check_integer("mask_index", mask_index, 0)

    def add_fused_lm_head(
        model: Any,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> None:
        """For TRL's: `model(..., labels=labels, fused_lm_head=True)` then scores the tokens whose labels are not -100.

        The last layer's sums are float32 as it is, so that cast_lm_head_to_fp32 changes nothing here.

        Raises:
            ValueError: log_sum_sq_probs is asked for.
        """
        if "log_sum_sq_probs" in outputs:
            raise ValueError("use_weighting: expected False, for log_sum_sq_probs is not made")
        original = model.forward
        shifted = logits_are_shifted(model.config) if shift is None else shift
        head = LossHead(model, logits=lambda tokens: original(input_ids=tokens).logits)
        scorer = _Scorer(original, head, temperature, outputs, mask_index, shifted, exclude_mask, estimate)

        @functools.wraps(type(model).forward)  # generate looks at its arguments
        def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            return output(**scorer(*args, **kwargs)) if fused_lm_head else original(*args, **kwargs)

        model.forward = types.MethodType(forward, model)

    return add_fused_lm_head


@dataclasses.dataclass(frozen=True)
class _Scorer:
    """Of the answers in a batch, by a model's forward."""

    forward: Callable[..., Any]
    head: LossHead
    temperature: float
    outputs: tuple[str, ...]
    mask_index: int
    shift: bool
    exclude_mask: bool
    estimate: Estimate | None

    def __call__(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        output_router_logits: bool = False,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """What TRL's output holds, of the tokens from the second on, [B, L - 1] each.

        Raises:
            ValueError: a preference's answer of no tokens, (on the CPU) a token that the model makes impossible, router
                logits are asked for, or as the estimate.
            ValueError, TypeError, RuntimeError: as `LossHead`.
        """
        if output_router_logits:
            raise ValueError("router_aux_loss_coef: expected 0, for no loss of a router is made")
        mask, seen = labels != -100, torch.ones_like(labels) if attention_mask is None else attention_mask
        mask[:, 0] = False
        if "mean_logits" in self.outputs:  # of preferences; a truncated answer of GRPO may have no token that counts
            check_values("labels", mask, ~mask.any(1, keepdim=True), "an answer of at least one token")
        found: dict[str, Tensor] = {}
        estimate = None if self.estimate is None or not mask.any() else self.estimate
        if estimate is None or "entropy" in self.outputs:
            found = self._all_masked(input_ids, mask, dict(inputs, attention_mask=attention_mask))
        if estimate is not None:
            found["log_probs"] = self._estimated(estimate, input_ids, mask, seen)
        logps = found["log_probs"]
        check_values("log-probabilities", logps, logps.isinf(), "finite numbers, for ratios are made of them")
        if "mean_logits" in self.outputs:
            found["mean_logits"] = torch.full_like(logps, torch.nan)
        return {name: of_tokens[:, 1:] for name, of_tokens in dict(found, label_mask=mask).items()}

    def _all_masked(self, x0: Tensor, mask: Tensor, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Log-probabilities and what else is asked for, [B, L] each, where all answers are masked."""

        def at_logits(tokens: Tensor) -> Tensor:
            return F.pad(tokens[:, 1:], (0, 1)) if self.shift else tokens

        inputs["input_ids"] = x0.masked_fill(mask, self.mask_index)
        options = dict(mask=at_logits(mask), mask_index=self.mask_index, exclude_mask=self.exclude_mask)
        if "is_top1" in self.outputs:  # an entropy beside it is for the log
            with self.head.dce_loss(at_logits(x0), return_stats=True, **options) as loss_of:
                loss, stats = loss_of(self.forward(**inputs).logits)
            found = dict(log_probs=-loss, entropy=stats.entropy, is_top1=stats.correct)
        else:
            options |= dict(temperature=self.temperature, return_entropy=True)
            with self.head.token_logps(at_logits(x0), **options) as logps_of:
                found = dict(zip(("log_probs", "entropy"), logps_of(self.forward(**inputs).logits), strict=True))
        return {name: F.pad(number[:, :-1], (1, 0)) for name, number in found.items()} if self.shift else found

    def _estimated(self, estimate: Estimate, tokens: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
        """What each token adds to the estimated log-likelihood of its answer, [B, L] float32, 0 elsewhere."""
        rows = mask.any(1).nonzero()
        at = (seen[rows[:, 0]] == 0).long().argsort(dim=1, stable=True)  # padding last: the estimator leaves it out
        x0, target, inside = tokens[rows, at], mask[rows, at], seen[rows, at]
        powers = torch.full_like(x0[0], _MULTIPLIER).cumprod(0)
        names = (((x0 + 1) * inside * powers).sum(1) >> 32) & 0xFFFFFFFF
        options = dict(mask_index=self.mask_index, exclude_mask=self.exclude_mask, target=target, sample_ids=names)
        options |= dict(lengths=inside.sum(1), differentiable=torch.is_grad_enabled())
        token_nll = estimate(self._logits, x0, **options).token_nll
        return torch.zeros_like(tokens, dtype=torch.float32).index_put((rows, at), -token_nll.float())

    def _logits(self, xt: Tensor) -> Tensor:
        logits = self.forward(input_ids=xt).logits
        logits = logits if self.temperature == 1 else logits / self.temperature
        return torch.cat([logits[:, :1], logits[:, :-1]], 1) if self.shift else logits
