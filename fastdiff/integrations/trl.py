"""TRL: DPO, KTO, GRPO and RLOO of a masked diffusion model, whose log-probabilities are of masked answers, without logits.

undo = apply_to_trl(mask_index=126336)  # and then the trainer
"""

import functools
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


def apply_to_trl(
    mask_index: int,
    *,
    estimate: Callable[..., Any] | None = None,
    shift: bool | None = None,
    exclude_mask: bool = False,
    seed: int = 0,
) -> Callable[[], None]:
    """Replaces `add_fused_lm_head`, which trainers call when they are made, and returns what puts TRL's own back.

    A trainer asks a model for log p of each token of the answers. It then gets

    - by default, that of one pass where all answers are masked, as d1's: biased, for each token is scored alone;
    - with an estimate, what each token adds to the estimated log-likelihood of its answer, so that sums over tokens,
      as in DPO, are unbiased. Logits are made for it, as many at once as the estimator's batch_size says.

    Draws are named by seed and the tokens of a sequence: policy, reference and old policy meet the same masks, and
    another epoch does, too. Entropies, with gradient, and mean_token_accuracy are of the masked answers in either case,
    which with an estimate is one pass more; the mean logits that TRL logs are NaN.

    Args:
        mask_index: the mask's id.
        estimate: one of fastdiff's that fills token_nll, with its options: `partial(time_free_nll, num_samples=8)`.
        shift: the logits at i predict token i + 1; None means yes for Dream, by the model's config.
        exclude_mask: leave the mask out of the softmax.
        seed: of an estimate's masks.

    Raises:
        ImportError, RuntimeError: as `patch`.
        ValueError, TypeError: mask_index is no id.
    """
    check_integer("mask_index", mask_index, 0)
    options = dict(mask_index=mask_index, exclude_mask=exclude_mask)

    def add_fused_lm_head(
        model: Any,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> None:
        """For TRL's: `model(..., labels=labels, fused_lm_head=True)` gives what is asked of the labels. Sums are of
        float32 whether or not the last layer is cast.

        Raises:
            ValueError: log_sum_sq_probs is asked for.
        """
        if "log_sum_sq_probs" in outputs:
            raise ValueError("use_weighting: expected False, for log_sum_sq_probs is not made")
        original = model.forward
        shifted = logits_are_shifted(model.config) if shift is None else shift
        answers = functools.partial(_Answers, original, LossHead(model, logits=_logits(original)), options, shifted)

        @functools.wraps(type(model).forward)  # generate looks at its arguments
        def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            if not fused_lm_head:
                return original(*args, **kwargs)
            return _scored(answers(temperature, **kwargs), outputs, estimate, seed)

        model.forward = types.MethodType(forward, model)

    modules: dict[str, tuple[Any, ...]] = {f"trl.trainer.{name}_trainer": () for name in _TRAINERS}
    return patch("TRL", modules | {"trl.trainer.utils": (add_fused_lm_head,)})


def _logits(forward: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    return lambda tokens: forward(input_ids=tokens).logits


def _scored(answers: "_Answers", outputs: tuple[str, ...], estimate: Callable[..., Any] | None, seed: int) -> Any:
    """TRL's output, of the tokens from the second on.

    Raises:
        ValueError: a preference's answer of no tokens, a token that the model makes impossible, or as the estimate.
        ValueError, TypeError, RuntimeError: as `LossHead`.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    if "mean_logits" in outputs:  # of preferences; a truncated answer of GRPO may have no token that counts
        check_values("labels", answers.mask, ~answers.mask.any(1, keepdim=True), "an answer of at least one token")
    found: dict[str, Tensor] = {}
    if estimate is None or "entropy" in outputs:
        found = answers.all_masked(outputs)
    if estimate is not None:
        found["log_probs"] = answers.estimated(estimate, seed)
    check_values("log-probabilities", found["log_probs"], found["log_probs"].isinf(), "finite numbers")
    if "mean_logits" in outputs:
        found["mean_logits"] = torch.full_like(found["log_probs"], torch.nan)
    found = {name: of_tokens[:, 1:] for name, of_tokens in found.items()}
    return FusedCausalLMOutput(**found, label_mask=answers.mask[:, 1:])


class _Answers:
    """A batch whose answers are scored. Attributes: mask [B, L] bool, the tokens of answers."""

    def __init__(
        self,
        forward: Callable[..., Any],
        head: LossHead,
        options: dict[str, Any],
        shift: bool,
        temperature: float,
        *,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        output_router_logits: bool = False,
        **inputs: Any,
    ) -> None:
        if output_router_logits:
            raise ValueError("router_aux_loss_coef: expected 0, for no loss of a router is made")
        self.forward, self.head, self.options, self.shift, self.temperature = forward, head, options, shift, temperature
        self.x0, self.inputs = input_ids, inputs
        self.seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self.mask = labels != -100
        self.mask[:, 0] = False  # TRL has no place for it

    def all_masked(self, outputs: tuple[str, ...]) -> dict[str, Tensor]:
        """Log-probabilities where all answers are masked, and what else is asked for: [B, L] each."""
        x0, mask = (self._at_logits(tokens) for tokens in (self.x0, self.mask))
        options, xt = self.options | dict(mask=mask), self.x0.masked_fill(self.mask, self.options["mask_index"])
        inputs = dict(self.inputs, input_ids=xt, attention_mask=self.seen)
        if "is_top1" in outputs:  # the entropy is then to be logged
            with self.head.dce_loss(x0, return_stats=True, **options) as loss_of:
                loss, stats = loss_of(self.forward(**inputs).logits)
            found = dict(log_probs=-loss, entropy=stats.entropy, is_top1=stats.correct)
        else:
            options |= dict(temperature=self.temperature, return_entropy=True)
            with self.head.token_logps(x0, **options) as logps_of:
                found = dict(zip(("log_probs", "entropy"), logps_of(self.forward(**inputs).logits), strict=True))
        return {name: F.pad(number[:, :-1], (1, 0)) if self.shift else number for name, number in found.items()}

    def estimated(self, estimate: Callable[..., Any], seed: int) -> Tensor:
        """What each token adds to the estimated log-likelihood of its answer: [B, L] float32, 0 elsewhere.

        Padding goes to the right, where the estimator leaves it out.
        """
        which = self.mask.any(1)
        order = (self.seen[which] == 0).long().argsort(1, stable=True)
        x0, target, seen = (t[which].gather(1, order) for t in (self.x0, self.mask, self.seen))
        powers = torch.full_like(x0[0], _MULTIPLIER).cumprod(0)
        names = (((x0 + 1) * seen * powers).sum(1) >> 32) & 0xFFFFFFFF
        options = dict(target=target, lengths=seen.sum(1), seed=seed, sample_ids=names, **self.options)
        found = estimate(self._logits, x0, differentiable=torch.is_grad_enabled(), **options).token_nll
        return self.mask.new_zeros(self.mask.shape, dtype=torch.float32).index_put(
            (which.nonzero(), order), -found.float()
        )

    def _logits(self, xt: Tensor) -> Tensor:
        logits = self.forward(input_ids=xt).logits
        logits = logits if self.temperature == 1 else logits / self.temperature
        return torch.cat([logits[:, :1], logits[:, :-1]], 1) if self.shift else logits

    def _at_logits(self, tokens: Tensor) -> Tensor:
        return F.pad(tokens[:, 1:], (0, 1)) if self.shift else tokens
