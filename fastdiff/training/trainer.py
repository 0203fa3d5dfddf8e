"""A step of training, an evaluation, and the state that a checkpoint holds."""

import dataclasses
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastdiff.data.sources import TokenSource
from fastdiff.estimators import block_nll, time_free_nll
from fastdiff.model import DiffusionTransformer
from fastdiff.noise.blocks import num_blocks
from fastdiff.noise.times import ImportanceTimes
from fastdiff.training.checkpoints import Checkpoints
from fastdiff.training.config import DTYPES, SCHEDULE, TrainConfig
from fastdiff.training.objectives import diffusion_loss, noise
from fastdiff.training.ranks import Ranks, check_topology, over_ranks, synchronising, whole
from fastdiff.training.readings import Reading
from fastdiff.training.records import Record
from fastdiff.training.speed import Moment


class Trainer:
    """A model over ranks, its average, the optimiser and the step.

    Every method is called on every rank.
    """

    def __init__(self, config: TrainConfig, model: DiffusionTransformer, source: TokenSource, ranks: Ranks) -> None:
        self.config, self.source, self.ranks = config, source, ranks
        self.step = 0
        self.law: ImportanceTimes | None = None
        if config.times == "importance":
            self.law = ImportanceTimes(eps=0 if config.loss == "dce-k" else 1e-3)
        self.device = model.lm_head.weight.device
        self.model = model.train()
        self.called, self.averaged = over_ranks(model, config, ranks)
        self.held_out = torch.empty(0, 0, dtype=torch.int64, device=self.device)
        if config.eval_every:
            self.held_out = source.validation(config.eval_sequences).to(self.device)
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        decay = config.weight_decay
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=decay, fused=True)

    @cached_property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def batch(self, step: int) -> Tensor:
        """This rank's rows of a step, [n, L]."""
        n = self.config.batch_size // self.ranks.size
        start = step * self.config.batch_size + self.ranks.rank * n
        times = 1 + int(self.config.complementary)  # that each sequence is there
        x0 = self.source.sequences(start // times, -(-(start + n) // times))
        x0 = x0.repeat_interleave(times, 0)[start % times :][:n]
        return x0.pin_memory() if self.device.type == "cuda" else x0

    def advance(self, x0: Tensor, signals: list[int]) -> Reading:
        """One optimiser step on what `batch` gave; a rank that has noted a signal by its end wants to stop.

        Nothing waits for the device, but where times are drawn by importance and their law changes.
        """
        loss = self._backward(x0.to(self.device, non_blocking=True))
        norm = self._clip()
        values = torch.stack([loss, norm, torch.full_like(loss, bool(signals))])
        lr = self._update()
        self.step += 1
        values = self.ranks.mean(values).to("cpu", non_blocking=True)
        return Reading(self.step, lr, x0.shape[1], values, Moment(self.device))

    def _backward(self, x0: Tensor) -> Tensor:
        c = self.config
        loss = torch.zeros((), dtype=torch.float32, device=self.device)
        parts = x0.chunk(c.accumulation)
        first = self.ranks.rank * len(x0)
        met: list[tuple[Tensor, Tensor]] = []
        for part in parts:
            with synchronising(self.called, last=part is parts[-1]), self._autocast():
                names: dict[str, Any] = {"seed": c.seed, "step": self.step, "first": first, "batch_size": c.batch_size}
                names |= {"law": self.law, "complementary": c.complementary, "block_length": c.block_length}
                batch = noise(part, c.loss, self.model.config.num_states, **names)
                if batch.times is None:
                    value = diffusion_loss(self.called, batch, c.loss, reduction="mean", num_items=x0.numel())
                else:
                    losses = diffusion_loss(self.called, batch, c.loss)
                    met.append((batch.times, losses.detach().view(len(batch.times), -1)))
                    value = losses.sum() / x0.numel()
                value.backward()
            loss += value.detach()
            first += len(part)
        if self.law is not None:
            times, losses = map(torch.cat, zip(*met, strict=True))
            self.law.update(times, losses, self.ranks.group)
        return loss

    @torch.no_grad()
    def _clip(self) -> Tensor:
        """The norm of the gradient of all ranks, which is then no more than grad_clip."""
        parameters = list(self.model.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        torch.nn.utils.clip_grads_with_norm_(parameters, self.config.grad_clip, norm)
        return norm

    @torch.no_grad()
    def _update(self) -> float:
        lr = self.config.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        get_ema_multi_avg_fn(decay)(_own(self.averaged), _own(self.model), None)
        return lr

    @torch.no_grad()
    def evaluate(self) -> Record:
        """Held-out bits per token of the averaged weights, a likelihood of blocks where they are trained; for
        "dse-uniform" and "gidd" the loss in nats per token.

        The standard error is that over sequences: masking noise, and how far they stand for their text.
        """
        n = len(self.held_out)
        each = -(-n // self.ranks.size)  # sequences of a rank: all as many, for sharded models run on all ranks at once
        start = self.ranks.rank * each
        first = min(start, n - each)
        values = torch.zeros(n, dtype=torch.float64, device=self.device)
        with whole(self.averaged), self._autocast():
            values[first : first + each] = self._losses(self.held_out[first : first + each], first)
        values[:start] = 0  # another rank has these
        values = self.ranks.mean(values * self.ranks.size)
        name = "validation_loss" if self.config.moves_tokens else "bits_per_token"
        stderr = values.std() / math.sqrt(n)
        return {"step": self.step, name: values.mean().item(), f"{name}_stderr": stderr.item()}

    def _losses(self, x0: Tensor, first: int) -> Tensor:
        """Of held-out sequences, [n]; they are those from `first` on."""
        c, num_states = self.config, self.model.config.num_states
        if c.moves_tokens:
            rows: dict[str, Any] = {"seed": c.seed, "first": first, "batch_size": len(self.held_out)}
            batches = (noise(x0, c.loss, num_states, step=k, **rows) for k in range(c.eval_samples))
            losses = [diffusion_loss(self.averaged, batch, c.loss) for batch in batches]
            return torch.stack(losses).double().mean((0, 2))
        options: dict[str, Any] = {"num_samples": c.eval_samples, "seed": c.seed}
        options["sample_ids"] = torch.arange(first, first + len(x0), device=x0.device)
        options["mask_index"] = mask_index = num_states - 1
        if c.block_length:
            blocks = self.averaged.block_conditionals(c.block_length, mask_index, SCHEDULE.total_noise)
            return block_nll(blocks, x0, block_length=c.block_length, **options).bits_per_token
        model = self.averaged.conditionals(mask_index, SCHEDULE.total_noise)
        return time_free_nll(model, x0, **options).bits_per_token

    def save(self, checkpoints: Checkpoints) -> None:
        """Write a checkpoint, which holds all that the numbers of a resumed run come of."""
        checkpoints.save(self.step, self._state(), {"settings": self._settings, "source": self.fingerprint})

    def load(self, checkpoints: Checkpoints, step: int, folder: Path) -> None:
        """Take up a checkpoint, if it was made under the same settings and is not beyond the last step."""
        extra = checkpoints.extra(step)
        then, now = dataclasses.asdict(TrainConfig()) | extra["settings"], self._settings
        for name in sorted(now.keys() - self.config.may_change):
            if then.get(name) != now[name]:
                raise ValueError(f"{name}: the run in {folder} has {then.get(name)!r}, got {now[name]!r}")
        if extra["source"] != self.fingerprint:
            raise ValueError(f"{folder}: this run was trained on other data, or on another split of it")
        if step > self.config.steps:
            raise ValueError(f"steps: the run in {folder} has done {step}, got {self.config.steps}")
        state = self._state()
        checkpoints.load(step, state)
        set_model_state_dict(self.model, state["model"])
        set_model_state_dict(self.averaged, state["averaged"])
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        if self.law is not None:
            self.law.load_state_dict(state["times"])
        self.step = step

    def _state(self) -> dict[str, dict]:
        return {
            "model": get_model_state_dict(self.model),
            "averaged": get_model_state_dict(self.averaged),
            "optimizer": get_optimizer_state_dict(self.model, self.optimizer),
            "times": {} if self.law is None else self.law.state_dict(),
        }

    @property
    def _settings(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.config), **dataclasses.asdict(self.model.config)}

    def _autocast(self) -> torch.autocast:
        cast = self.config.dtype != "float32" and not isinstance(self.model, FSDPModule)  # which casts by itself
        return torch.autocast(self.device.type, DTYPES[self.config.dtype], enabled=cast)


def check_fit(config: TrainConfig, model: DiffusionTransformer, source: TokenSource, ranks: Ranks) -> None:
    """Raises a ValueError where settings, model, data and ranks do not go together."""
    check_topology(config, ranks)
    num_states = source.num_tokens + (config.loss != "dse-uniform")
    if model.config.num_states != num_states:
        raise ValueError(f"model: expected num_states = {num_states}, got {model.config.num_states}")
    if bool(model.config.cond_dim) != config.sees_noise:
        what = "> 0" if config.sees_noise else "= 0"
        raise ValueError(f"model: expected cond_dim {what} for loss {config.loss!r}, got {model.config.cond_dim}")
    if config.block_length:
        num_blocks(source.sequences(0, 1).shape[1], config.block_length)
    n = len(source.validation(config.eval_sequences)) if config.eval_every else 2
    if n < 2:
        raise ValueError(f"eval_every: expected 2 held-out sequences or more to evaluate on, got {n}; 0 does without")


def _own(model: torch.nn.Module) -> list[Tensor]:
    """The parameters, or this rank's part of each."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
