"""dllm: `compute_loss` of its trainers, and what of a trainer that needs."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.integrations import dllm
from standins import Network, Problem, published
from standins.dream import cart_weight as cart_weight  # which DreamTrainer has


class LinearAlphaScheduler:
    """alpha = 1 - t; the weight is -alpha' / (1 - alpha + 1e-6)."""

    def __call__(self, t: Tensor) -> Tensor:
        return 1 - t.float()

    def weight(self, t: Tensor) -> Tensor:
        return 1 / (1 - self(t) + 1e-6)


class MDLMTrainer:
    def _preprocess_inputs(self, inputs):
        """Where logits are shifted, a BOS that is never masked comes first, unless something like it does."""
        if not self.right_shift_logits or (inputs["labels"][:, 0] == -100).all():
            return inputs
        for name, value in dict(input_ids=self.processing_class.bos_token_id, labels=-100, attention_mask=1).items():
            if name in inputs:
                inputs[name] = F.pad(inputs[name], (1, 0), value=value)
        return inputs

    def _postprocess_outputs(self, outputs):
        if self.right_shift_logits:
            outputs.logits = torch.cat([outputs.logits[:, :1], outputs.logits[:, :-1]], dim=1)
        return outputs

    def _compute_loss_weights(self, t, inputs, *args, **kwargs):
        if self.loss_weight_type == "uniform":
            return torch.ones_like(inputs["input_ids"])
        return self.scheduler.weight(t)[:, None].expand(inputs["input_ids"].shape)

    def _forward(self, model, xt, inputs):
        return model(input_ids=xt, attention_mask=inputs.get("attention_mask"))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Logits are made, and thrown away where only the loss is asked for."""
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        return (loss, None, None) if prediction_loss_only else (loss, outputs.logits, inputs["labels"])

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        """Every row is scored, then weighted; those of tokens that are not masked weigh 0."""
        inputs = self._preprocess_inputs(inputs)
        x0, maskable = inputs["input_ids"], inputs["labels"] != -100
        (batch, length), device = x0.shape, x0.device
        t = self.time_epsilon + (1 - self.time_epsilon) * torch.rand(batch, device=device)
        p_mask = (1 - self.scheduler(t))[:, None].expand(batch, length)
        masked = (torch.rand((batch, length), device=device) < p_mask) & maskable
        xt = torch.where(masked, self.processing_class.mask_token_id, x0)
        outputs = self._postprocess_outputs(self._forward(model, xt, inputs))
        logits = outputs.logits[:, :length]
        weights = self._compute_loss_weights(t=t, inputs=inputs, masked_mask=masked)
        nll = F.cross_entropy(logits.transpose(1, 2), x0, reduction="none")
        nll = nll * weights * masked.to(nll.dtype)
        split = "train" if model.training else "eval"
        self.meter.update(split=split, value=nll.detach(), weight=maskable.to(logits.dtype).detach())
        counts = maskable.sum(-1, keepdim=True)
        if self.loss_norm_type == "token":
            nll = nll / counts.sum().clamp_min(1)
        elif self.loss_norm_type == "sequence":
            nll = nll / (counts.clamp_min(1) * batch)
        else:
            nll = nll / batch
        return (nll.sum(), outputs) if return_outputs else nll.sum()


class BD3LMTrainer(MDLMTrainer):
    def _forward(self, model, xt, inputs):
        """Noised tokens, then clean ones; who sees whom is a [2 L, 2 L] mask."""
        (batch, length), size = xt.shape, self.block_size
        half, at = torch.arange(2) * torch.ones(length, 1), torch.arange(length)
        clean, block = half.T.flatten().bool(), (at // size).repeat(2)
        row, column = block[:, None], block[None, :]
        same = (row == column) & (clean[:, None] == clean[None, :])
        before = (row > column) & clean[None, :] & ~clean[:, None]
        causal = (row >= column) & clean[None, :] & clean[:, None]
        return model(
            input_ids=torch.cat([xt, inputs["input_ids"]], dim=1),
            attention_mask=(same | before | causal).expand(1, 1, 2 * length, 2 * length),
            position_ids=at.repeat(2).expand(batch, 2 * length),
        )

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return super().compute_loss(model, inputs, return_outputs, **kwargs)


PUBLISHED = published(
    "dllm", "dllm.core.trainers", "dllm.core.schedulers", "dllm.pipelines.dream.trainer", "dllm.pipelines.a2d"
)
MDLMTrainer, BD3LMTrainer = PUBLISHED["dllm.core.trainers"].MDLMTrainer, PUBLISHED["dllm.core.trainers"].BD3LMTrainer
LinearAlphaScheduler = PUBLISHED["dllm.core.schedulers"].LinearAlphaScheduler


class Meter:
    """Sums of values and of weights."""

    def __init__(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64)

    def update(self, split: str, value: Tensor, weight: Tensor) -> None:
        self.split = split
        self.sums += torch.stack([(value * weight).sum(), weight.sum()]).double()


def trainer(kind: type, mask_index: int, attention: str = "sdpa", **options: Any) -> Any:
    """A trainer with what the loss needs, and no Trainer behind it. attention: the model's kind."""
    made = kind.__new__(kind)
    tokenizer = SimpleNamespace(padding_side="right", mask_token_id=mask_index, bos_token_id=0)
    vars(made).update(processing_class=tokenizer, meter=Meter(), scheduler=LinearAlphaScheduler(), time_epsilon=1e-3)
    config = SimpleNamespace(_attn_implementation=attention)
    vars(made).update(accelerator=SimpleNamespace(unwrap_model=lambda _: SimpleNamespace(config=config)), block_size=4)
    vars(made).update(loss_weight_type="scheduler", loss_norm_type="token", right_shift_logits=False)
    vars(made).update(options)
    return made


def cases(p: Problem) -> dict[str, tuple[Callable[[Network], Tensor], Callable[[Network], Tensor]]]:
    labels = p.x0.clone()
    labels[:, 0], labels[0, -2:] = -100, -100

    def pair(kind: type, compute_loss: Callable[..., Any], **options: Any):
        def loss(function: Callable[..., Any], network: Network) -> Tensor:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return function(trainer(kind, p.mask_index, **options), network, dict(input_ids=p.x0, labels=labels))

        return lambda network: loss(kind.compute_loss, network), lambda network: loss(compute_loss, network)

    mdlm, bd3lm = (MDLMTrainer, dllm.MDLMTrainer.compute_loss), (BD3LMTrainer, dllm.BD3LMTrainer.compute_loss)
    return {
        "MDLM": pair(*mdlm),
        "MDLM, per sequence": pair(*mdlm, loss_norm_type="sequence"),
        "MDLM, shifted": pair(*mdlm, loss_norm_type="batch", right_shift_logits=True),
        "BD3LM": pair(*bd3lm),
    }
