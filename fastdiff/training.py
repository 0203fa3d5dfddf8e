"""Training of a `DiffusionTransformer`: losses, averaged weights, held-out likelihood, exact resumption.

A run folder holds config.json and model.safetensors (the averaged weights, for `from_pretrained`), trainer.pt
(all that a resumed run needs) and metrics.jsonl (a record a line; locked while the run goes on).
"""

import copy
import dataclasses
import fcntl
import io
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.checks import check_choice, check_integer
from fastdiff.data import TokenSource
from fastdiff.estimators import time_free_nll
from fastdiff.estimators.scoring import Model
from fastdiff.graphs import Absorbing, Uniform
from fastdiff.linear_losses import linear_dce_loss, linear_dse_loss
from fastdiff.losses import dce_loss, dse_loss
from fastdiff.model import DiffusionTransformer, import_safetensors, naming, write_atomically
from fastdiff.noising import (
    corrupt,
    harmonic_mask,
    mask_exactly,
    mask_tokens,
    sample_mask_counts,
    sample_times,
)
from fastdiff.schedules import LogLinear

LOSSES = ("dce-t", "dce-lambda", "dce-k", "dce-harmonic", "dse-absorb", "dse-uniform")
SCHEDULE = LogLinear()
LARGE_VOCABULARY = 4096  # from where on the last layer is multiplied for the scored tokens only

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_LEAST = {"steps": 1, "batch_size": 1, "accumulation": 1, "warmup": 0, "save_every": 1, "seed": 0}
_LEAST |= {"eval_every": 0, "eval_sequences": 2, "eval_samples": 3}
_MAY_CHANGE = {"steps", "save_every", "eval_every", "eval_sequences", "eval_samples"}  # when a run resumes

Record = dict[str, float]


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, whose number is the argument, has stopped a run that is now saved."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        loss: what is minimised, in nats per token; each bounds the negative log-likelihood.
            "dce-t": cross-entropy of the masked tokens at time t of the log-linear schedule, weight
            dsigma / expm1(sigma). "dce-lambda": with a share lambda masked, weight 1 / lambda.
            "dce-k": with exactly m masked, m stratified over 1..L, weight L / m.
            "dce-harmonic": with m of probability 1 / (m H_L), weight H_L.
            "dse-absorb", "dse-uniform": score entropy of a sigma-conditioned model, log-linear schedule.
        steps: optimiser steps.
        batch_size: sequences in a step.
        accumulation: parts that a batch is cut into to fit memory.
        lr: learning rate of AdamW, reached in proportion over the first `warmup` steps.
        weight_decay: AdamW's, on matrices.
        grad_clip: largest norm of the gradient.
        ema: decay of the averaged weights; (1 + step) / (10 + step) where that is less.
        dtype: "float32", or "bfloat16" by autocast.
        eval_every, eval_sequences, eval_samples: steps between evaluations (0: none), held-out sequences in
            one, and network passes for each of them.
        save_every: steps between checkpoints; the last step always saves.
        seed: the randomness of the noise.

    Raises:
        ValueError, TypeError: a value out of range or of another type, named.
    """

    loss: str = "dce-k"
    steps: int = 1000
    batch_size: int = 64
    accumulation: int = 1
    lr: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema: float = 0.9999
    dtype: str = "float32"
    eval_every: int = 500
    eval_sequences: int = 64
    eval_samples: int = 32
    save_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("loss", self.loss, LOSSES)
        check_choice("dtype", self.dtype, tuple(_DTYPES))
        for name, least in _LEAST.items():
            value = check_integer(name, getattr(self, name), least)
            if value >= 2**63:
                raise ValueError(f"{name}: expected a number below 2^63, got {value}")
            object.__setattr__(self, name, value)
        whole = self.batch_size % self.accumulation == 0
        expected = {
            "lr": ("a number > 0", 0 < self.lr < math.inf),
            "weight_decay": ("a number >= 0", 0 <= self.weight_decay < math.inf),
            "grad_clip": ("a number > 0", self.grad_clip > 0),
            "ema": ("a decay in [0, 1)", 0 <= self.ema < 1),
            "batch_size": (f"a multiple of accumulation = {self.accumulation}", whole),
        }
        for name, (what, holds) in expected.items():
            if not holds:
                raise ValueError(f"{name}: expected {what}, got {getattr(self, name)}")


def train(
    config: TrainConfig,
    model: DiffusionTransformer,
    source: TokenSource,
    *,
    out: str | os.PathLike | None = None,
    resume: bool = False,
    callback: Callable[[Record], None] | None = None,
    sections: Mapping[str, dict] | None = None,
) -> DiffusionTransformer:
    """Train a model in place, on the device it is on.

    A progress bar shows on a terminal. Ctrl-C and SIGTERM finish the step at hand, save and raise `Stopped`, a
    KeyboardInterrupt.

    Args:
        config: how to train.
        model: its num_states is the source's num_tokens, and one more for the mask (the last id) unless the
            loss is "dse-uniform"; it is conditioned on sigma exactly for the "dse" losses.
        source: the tokens.
        out: the run folder; None keeps nothing.
        resume: go on from the checkpoint in `out`, to the same numbers as an unbroken run.
        callback: called with each record of metrics.jsonl, after each step and each evaluation.
        sections: further named parts for config.json, beside "model", "training" and the source's fingerprint.

    Returns:
        The model with the averaged weights. The one passed in holds the raw ones.

    Raises:
        FileExistsError: `out` holds a run and resume is False.
        FileNotFoundError: nothing to resume.
        BlockingIOError: another run is writing to `out`.
        ValueError: a model that does not fit, a damaged file, a run resumed with other settings or data, or for fewer
            steps than it has done.
        FloatingPointError: the loss or its gradient is not finite any more.
    """
    trainer = _Trainer(config, model, source, sections or {})
    folder = None if out is None else Path(out)
    if resume and (folder is None or not (folder / "trainer.pt").is_file()):
        raise FileNotFoundError(
            f"out: expected a run folder to resume, but there is no {Path(out or '.') / 'trainer.pt'}"
        )
    with _metrics(folder) as metrics:
        if folder is not None and resume:
            trainer.load(folder)
        elif folder is not None and (folder / "trainer.pt").exists():
            raise FileExistsError(f"out: {folder} holds a run already; resume it or choose another folder")
        _drop_after(trainer.step, metrics)
        with _progress(config, trainer.step) as show, _noting_signals() as noted:
            while trainer.step < config.steps and not noted:
                records = trainer.advance()
                _append(records, metrics)
                for record in records:
                    show(record)
                    if callback is not None:
                        callback(record)
                if trainer.step % config.save_every == 0 and trainer.step < config.steps:
                    trainer.save(folder)
            trainer.save(folder)
    return trainer.averaged


class Noised(NamedTuple):
    """A batch as its loss sees it: tokens [B, L], and the noise and weight of each sequence, [B]."""

    x0: Tensor
    xt: Tensor
    sigma: Tensor
    weight: Tensor


def noise(x0: Tensor, loss: str, num_states: int, *, seed: int, step: int) -> Noised:
    """Noise tokens [B, L] as `loss`, one of `LOSSES`, wants it; a mask is the last of num_states.

    The draws are named by seed, step and place in the batch. The weight is that of a sequence's summed loss;
    for the score entropies it is dsigma.
    """
    n, length = x0.shape
    mask_index = num_states - 1
    names: dict[str, Any] = {"seed": seed, "step": step}
    nothing = torch.zeros(n, dtype=torch.float32, device=x0.device)
    if loss == "dce-k":
        counts, weight = (drawn.to(x0.device) for drawn in sample_mask_counts(n, length, **names))
        xt = mask_exactly(x0, counts, mask_index=mask_index, **names).xt
        return Noised(x0, xt, nothing, weight)
    if loss == "dce-harmonic":
        drawn = harmonic_mask(x0, mask_index=mask_index, **names)
        return Noised(x0, drawn.xt, nothing, drawn.weight)
    t = sample_times(n, **names).to(x0.device)
    if loss == "dce-lambda":
        return Noised(x0, mask_tokens(x0, t, mask_index=mask_index, **names).xt, nothing, 1 / t)
    sigma, dsigma = SCHEDULE(t)
    graph = Uniform(num_states) if loss == "dse-uniform" else Absorbing(num_states)
    weight = dsigma / torch.expm1(sigma) if loss == "dce-t" else dsigma
    return Noised(x0, corrupt(x0, sigma, graph, **names), sigma, weight)


def diffusion_loss(model: DiffusionTransformer, batch: Noised, loss: str, **reduction: Any) -> Tensor:
    """The weighted loss of a noised batch in nats; `reduction` and `num_items` as in `dce_loss`.

    With a large vocabulary the logits are never whole in memory.
    """
    x0, xt, sigma, weight = batch
    noise = (sigma,) if loss.startswith("dse") else ()
    rows, dce, dse = _rows_and_losses(model, xt, *noise)
    if not noise:
        return dce(*rows, x0, xt=xt, weight=weight, **reduction)
    reduction |= {"graph": loss.removeprefix("dse-"), "parametrization": "scale_by_sigma"}
    return dse(*rows, sigma, xt, x0, dsigma=weight, **reduction)


def _rows_and_losses(model: DiffusionTransformer, *inputs: Tensor) -> tuple[Any, Callable, Callable]:
    """What the losses take in front of the tokens, and the two losses."""
    if model.config.num_states < LARGE_VOCABULARY:
        return (model(*inputs),), dce_loss, dse_loss
    dce, dse = (partial(loss, bias=model.lm_head.bias) for loss in (linear_dce_loss, linear_dse_loss))
    return (model.body(*inputs), model.lm_head.weight), dce, dse


def time_free(model: DiffusionTransformer, mask_index: int) -> Model:
    """The conditionals' (body, lm_head) for the estimators: xt [B, L] -> hidden states, and the last layer.

    A model conditioned on sigma is asked at the noise that m masks in L tokens suggest: that of time m / L.
    """
    if not model.config.cond_dim:
        return model.body, model.lm_head
    return lambda xt: model.body(xt, SCHEDULE.total_noise((xt == mask_index).float().mean(1))), model.lm_head


class _Trainer:
    """Weights, their average, the optimiser and the step: the state that a checkpoint holds."""

    def __init__(
        self, config: TrainConfig, model: DiffusionTransformer, source: TokenSource, sections: Mapping[str, dict]
    ) -> None:
        num_states = source.num_tokens + (config.loss != "dse-uniform")
        if model.config.num_states != num_states:
            raise ValueError(f"model: expected num_states = {num_states}, got {model.config.num_states}")
        conditioned = config.loss.startswith("dse")
        if bool(model.config.cond_dim) != conditioned:
            what = "> 0" if conditioned else "= 0"
            raise ValueError(f"model: expected cond_dim {what} for loss {config.loss!r}, got {model.config.cond_dim}")
        self.config, self.model, self.source, self.sections = config, model.train(), source, sections
        self.step = 0
        self.device = model.lm_head.weight.device
        self.averaged = copy.deepcopy(model).eval().requires_grad_(False)
        self.held_out = torch.empty(0, 0, dtype=torch.int64, device=self.device)
        if config.eval_every:
            self.held_out = source.validation(config.eval_sequences).to(self.device)
            if len(self.held_out) < 2:
                n = len(self.held_out)
                raise ValueError(
                    f"eval_every: expected 2 held-out sequences or more to evaluate on, got {n}; 0 does without"
                )
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        decay = config.weight_decay
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=decay, fused=True)

    def advance(self) -> list[Record]:
        """One optimiser step, and an evaluation where one is due: their records."""
        start = time.perf_counter()
        first, size = self.step * self.config.batch_size, self.config.batch_size
        x0 = self.source.sequences(first, first + size).to(self.device)
        loss = self._backward(x0)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip).item()
        if not math.isfinite(loss + norm):
            raise FloatingPointError(f"step {self.step + 1}: loss {loss}, gradient norm {norm}; try a lower lr")
        self._update()
        self.step += 1
        rate = x0.numel() / (time.perf_counter() - start)
        record = {"step": self.step, "loss": loss, "grad_norm": norm, "tokens_per_second": rate}
        due = self.config.eval_every and self.step % self.config.eval_every == 0
        return [record, self._evaluate()] if due else [record]

    def _backward(self, x0: Tensor) -> float:
        c = self.config
        batch = noise(x0, c.loss, self.model.config.num_states, seed=c.seed, step=self.step)
        size, total = c.batch_size // c.accumulation, 0.0
        for start in range(0, c.batch_size, size):
            part = Noised(*(tensor[start : start + size] for tensor in batch))
            with self._autocast():
                loss = diffusion_loss(self.model, part, c.loss, reduction="mean", num_items=x0.numel())
            loss.backward()
            total += loss.item()
        return total

    def _update(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * min(1, (self.step + 1) / max(1, self.config.warmup))
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for average, raw in zip(self.averaged.parameters(), self.model.parameters(), strict=True):
                average.lerp_(raw, 1 - decay)

    @torch.no_grad()
    def _evaluate(self) -> Record:
        """Held-out bits per token of the averaged weights; for "dse-uniform" the loss in nats per token.

        The standard error is that over sequences: masking noise, and how far they stand for their text.
        """
        c, x0, mask_index = self.config, self.held_out, self.model.config.num_states - 1
        with self._autocast():
            if c.loss == "dse-uniform":
                name = "validation_loss"
                batches = (noise(x0, c.loss, mask_index + 1, seed=c.seed, step=k) for k in range(c.eval_samples))
                losses = [diffusion_loss(self.averaged, batch, c.loss) for batch in batches]
                values = torch.stack(losses).double().mean((0, 2))
            else:
                name, model = "bits_per_token", time_free(self.averaged, mask_index)
                estimate = time_free_nll(model, x0, mask_index=mask_index, num_samples=c.eval_samples, seed=c.seed)
                values = estimate.bits_per_token
        stderr = values.std() / math.sqrt(len(values))
        return {"step": self.step, name: values.mean().item(), f"{name}_stderr": stderr.item()}

    def save(self, folder: Path | None) -> None:
        """Write a checkpoint. A resumed run reads trainer.pt alone, so no crash can leave it half of two."""
        if folder is None:
            return
        own = {"training": dataclasses.asdict(self.config), "source": {"fingerprint": self._fingerprint}}
        self.averaged.save_pretrained(folder, **(own | dict(self.sections)))
        parts = {name: getattr(self, name).state_dict() for name in ("model", "averaged", "optimizer")}
        buffer = io.BytesIO()
        settings = self._settings()
        torch.save({"step": self.step, "settings": settings, "source": self._fingerprint, **parts}, buffer)
        write_atomically(folder / "trainer.pt", buffer.getvalue())

    def load(self, folder: Path) -> None:
        """Take up a checkpoint, if it is whole, was made under the same settings and is not beyond the last step."""
        path = folder / "trainer.pt"
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            then, now, step, source = state["settings"], self._settings(), state["step"], state["source"]
        except Exception as error:  # whatever the unpickler makes of it
            raise ValueError(f"{path}: damaged or cut short") from error
        for name in sorted(now.keys() - _MAY_CHANGE):
            if then.get(name) != now[name]:
                raise ValueError(f"{name}: the run in {folder} has {then.get(name)!r}, got {now[name]!r}")
        if source != self._fingerprint:
            raise ValueError(f"{path}: this run was trained on other data, or on another split of it")
        if step > self.config.steps:
            raise ValueError(f"steps: the run in {folder} has done {step}, got {self.config.steps}")
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = step

    @cached_property
    def _fingerprint(self) -> str:
        return self.source.fingerprint

    def _settings(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.config), **dataclasses.asdict(self.model.config)}

    def _autocast(self) -> torch.autocast:
        dtype = self.config.dtype
        return torch.autocast(self.device.type, _DTYPES[dtype], enabled=dtype != "float32")


@contextmanager
def _metrics(folder: Path | None) -> Iterator[io.FileIO | None]:
    """metrics.jsonl, locked while it is open: no two runs write to one folder, and a crash leaves no lock."""
    if folder is None:
        yield None
        return
    import_safetensors()  # no run finds out at its first checkpoint
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "ab+", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"out: another run is writing to {folder}") from None
        except OSError:
            pass  # a file system without locks
        yield file


def _drop_after(step: int, metrics: io.FileIO | None) -> None:
    """Drops the records after a step, and one cut short."""
    if metrics is None:
        return
    metrics.seek(0)
    kept = 0
    for number, line in enumerate(metrics.read().splitlines(keepends=True), 1):
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{metrics.name!s}: line {number} is not a record") from None
        kept += len(line)
    metrics.truncate(kept)


def _append(records: list[Record], metrics: io.FileIO | None) -> None:
    if metrics is None:
        return
    rest = b"".join(json.dumps(record).encode() + b"\n" for record in records)
    with naming(Path(metrics.name)):
        while rest:
            rest = rest[metrics.write(rest) :]


@contextmanager
def _noting_signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are only noted in the list, until the block has ended and raises Stopped."""
    noted: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # no other is interrupted
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.signal(number, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if noted:
        raise Stopped(noted[0])


@contextmanager
def _progress(config: TrainConfig, step: int) -> Iterator[Callable[[Record], None]]:
    """Shows records on a progress bar; shows nothing unless stderr is a terminal and rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda record: None
        return
    console = Console(stderr=True)
    columns = (BarColumn(16), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task, seen = bar.add_task("", total=config.steps, completed=step), Record()

        def show(record: Record) -> None:
            seen.update(record)
            text = f"loss {seen['loss']:.3f}  {seen['tokens_per_second']:,.0f} tokens/s"
            if "bits_per_token" in seen:
                text += f"  held out {seen['bits_per_token']:.2f} bits"
            bar.update(task, completed=seen["step"], description=text)

        yield show
