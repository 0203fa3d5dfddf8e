"""d1 and DiffuCoder: the per-token log-probabilities of their GRPO, and what of a trainer these need."""

import random
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.integrations import d1
from standins import Case, Problem, functions


def set_seed(seed: int | None) -> None:
    if seed is not None:
        torch.manual_seed(seed)


class DiffuGRPOTrainer:
    def forward_process(self, batch, prompt_index, mask_id, seed=None):
        """Answers are masked, prompts with probability p_mask_prompt."""
        set_seed(seed)
        p_mask = torch.where(prompt_index, self.args.p_mask_prompt, 1.0).expand(batch.shape)
        drawn = torch.rand(batch.shape, device=batch.device) < self.args.p_mask_prompt
        return torch.where(drawn | ~prompt_index, mask_id, batch), p_mask

    def get_logits(self, model, batch, prompt_index, cfg_scale, mask_id):
        if cfg_scale == 0:
            return model(batch).logits
        cond, un = model(torch.cat([batch, batch.masked_fill(prompt_index, mask_id)])).logits.chunk(2)
        return un + (cfg_scale + 1) * (cond - un)

    def _get_per_token_logps(self, model, input_ids, logits_to_keep, mask_seeds):
        """The rows of answers are copied, scored, and come back as float32."""
        count, batch, length = input_ids.shape
        prompt = torch.arange(length) < length - logits_to_keep
        xt = [self.forward_process(input_ids[i], prompt, self.args.mask_id, mask_seeds[i])[0] for i in range(count)]
        logits = self.get_logits(model, torch.cat(xt), prompt, self.args.cfg_scale, self.args.mask_id)
        rows = logits[:, -logits_to_keep:].reshape(-1, logits.shape[-1])
        nll = F.cross_entropy(rows, input_ids[..., -logits_to_keep:].reshape(-1), reduction="none")
        return -nll.view(count, batch, logits_to_keep)


class CoupledGRPOTrainer:
    """DiffuCoder's, under the name of d1's."""

    def forward_process(self, batch, prompt_index, mask_id, seed=None, accumulate=False):
        """All of the answer masked, a part, and the rest; and what to multiply each with."""
        random.seed(seed)
        set_seed(seed)
        share = random.uniform(0.2, 0.8)
        parts = self.args.gradient_accumulation_steps if accumulate else 1
        drawn = torch.rand(len(batch) // parts, batch.shape[1]).repeat(parts, 1)
        some, others = ~prompt_index & (drawn < share), ~prompt_index & (drawn > share)
        noisy = [torch.where(mask, mask_id, batch) for mask in (~prompt_index, some, others)]
        return noisy, [1, 1 / share, 1 / (1 - share)], some

    def _get_per_token_logps(self, model, input_ids, logits_to_keep, mask_seeds):
        """A log-softmax of all three, of which two numbers a token are taken; the logits at i predict token i + 1."""
        count, _, length = input_ids.shape
        prompt, found = torch.arange(length) < length - logits_to_keep, []
        drawn = [
            self.forward_process(x0, prompt, self.processing_class.mask_token_id, seed, count > 1)
            for x0, seed in zip(input_ids, mask_seeds, strict=True)
        ]
        logits = model(torch.cat([xt for noisy, *_ in drawn for xt in noisy])).logits[:, :-1][:, -logits_to_keep:]
        for x0, logps, (_, weights, some) in zip(input_ids, logits.log_softmax(-1).chunk(count), drawn, strict=True):
            targets = x0[:, -logits_to_keep:].repeat(3, 1)
            first, second, third = logps.gather(-1, targets[..., None])[..., 0].chunk(3)
            masked = torch.where(some[:, -logits_to_keep:], second * weights[1], third * weights[2])
            found.append((first + masked) / 2)
        return torch.stack(found, 1)


PUBLISHED = {"diffu_grpo_trainer": SimpleNamespace(DiffuGRPOTrainer=DiffuGRPOTrainer)}
PUBLISHED["open_r1.coupled_grpo"] = SimpleNamespace(DiffuGRPOTrainer=CoupledGRPOTrainer)
REAL = functions(  # those of the checkouts give float32 only
    "d1/diffu-grpo/diffu_grpo_trainer.py",
    *("forward_process", "get_logits", "_get_per_token_logps"),
    **dict(torch=torch, F=F, set_seed=set_seed),
)
REAL_COUPLED = functions(
    "diffucoder/src/open_r1/coupled_grpo.py",
    *("forward_process", "get_logits", "_get_per_token_logps", "selective_log_softmax"),
    **dict(torch=torch, F=F, random=random, set_seed=lambda seed: (random.seed(seed), set_seed(seed))),
)


def trainer(
    kind: type, mask_index: int, p_mask_prompt: float = 0.15, cfg_scale: float = 0.0, accumulation: int = 1
) -> Any:
    """A trainer with what log-probabilities need."""
    made = kind.__new__(kind)
    made.args = SimpleNamespace(mask_id=mask_index, p_mask_prompt=p_mask_prompt, cfg_scale=cfg_scale)
    made.args.gradient_accumulation_steps = accumulation
    made.processing_class = SimpleNamespace(mask_token_id=mask_index)
    return made


def cases(p: Problem) -> dict[str, Case]:
    answer = p.x0.shape[1] // 2
    weight = torch.randn(1, len(p.x0), answer, dtype=torch.float64)

    def loss(function: Any, network: Any) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            arguments = network, p.x0.unsqueeze(0), answer, [1]
            return (function(trainer(DiffuGRPOTrainer, p.mask_index), *arguments) * weight).sum()

    both = DiffuGRPOTrainer._get_per_token_logps, d1.DiffuGRPOTrainer._get_per_token_logps
    return {"diffu-GRPO": tuple(partial(loss, function) for function in both)}
