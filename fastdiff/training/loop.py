"""The run: steps, evaluations and checkpoints, until it is done or told to stop."""

import dataclasses
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff.data.sources import TokenSource
from fastdiff.files import read_config
from fastdiff.model import DiffusionTransformer
from fastdiff.processes import agree
from fastdiff.training.checkpoints import Checkpoints
from fastdiff.training.config import TrainConfig
from fastdiff.training.exporting import export, write_config
from fastdiff.training.ranks import blocks_as, joined
from fastdiff.training.readings import Readings
from fastdiff.training.records import Record, Tell, open_metrics, telling
from fastdiff.training.trainer import Trainer, check_fit

_JOB = "TORCHELASTIC_RUN_ID"  # of torchrun, in its environment
_AHEAD = 2  # batches made before they are asked for


class Stopped(KeyboardInterrupt):
    """A signal, whose number is the argument, has stopped a run that is now saved."""


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
    """Train a model in place, on the device it is on, with all ranks that torchrun has started.

    Every rank calls it alike, with a model on its own device and the same folder; the first one's weights count. Loss
    and weights are the same on any number of ranks and however they share the model, up to rounding. A progress bar
    shows on a terminal. Ctrl-C, SIGTERM and SIGUSR1 on any rank finish the steps at hand, save and raise `Stopped`, a
    KeyboardInterrupt, on all.

    Args:
        config: how to train.
        model: its num_states is the source's num_tokens, and one more for the mask (the last id) unless the
            loss is "dse-uniform"; it sees the noise level (cond_dim) exactly for the "dse" losses and
            "gidd". Where ranks share it, it stays shared.
        source: the tokens.
        out: the run folder; None keeps nothing.
        resume: go on from the checkpoint in `out`, to the same numbers as an unbroken run. So does what torchrun has
            started again, if there is a checkpoint.
        callback: called on the first rank with each record of metrics.jsonl, after each step (on a GPU some steps
            later) and each evaluation.
        sections: further named parts for config.json, beside "model", "training" and the source's fingerprint.

    Returns:
        The model with the averaged weights, shared as the one passed in, which holds the raw ones.

    Raises (on every rank):
        FileExistsError: `out` holds a run and resume is False.
        FileNotFoundError: nothing to resume.
        BlockingIOError: another run is writing to `out`.
        ValueError: a model that does not fit, ranks that cannot share a batch or model, a damaged file, a run resumed
            with other settings or data, or for fewer steps than it has done.
        FloatingPointError: the loss or its gradient is not finite any more.
    """
    folder = None if out is None else Path(out)
    with joined(model.lm_head.weight.device) as ranks, ExitStack() as stack:
        keep = {"keep": config.keep, "keep_every": config.keep_every}
        checkpoints = None if folder is None else Checkpoints(folder / "checkpoints", **keep)
        latest = None if checkpoints is None else checkpoints.latest()
        resume = resume or (latest is not None and any(agree(ranks.group, partial(_restarted, folder))))
        if resume and latest is None:
            raise FileNotFoundError(f"out: expected a run folder to resume, but there is no checkpoint in {folder}")
        with ranks.together():
            check_fit(config, model, source, ranks)
            metrics = stack.enter_context(open_metrics(folder if ranks.first else None))
        if checkpoints is not None:
            stack.callback(checkpoints.wait)
        if latest is not None and not resume:
            raise FileExistsError(f"out: {folder} holds a run already; resume it or choose another folder")
        trainer = Trainer(config, model, source, ranks)
        if folder is not None and checkpoints is not None and latest is not None:
            trainer.load(checkpoints, latest, folder)
        about: dict[str, Any] = {}
        if folder is not None:
            about = {"training": dataclasses.asdict(config), "source": {"fingerprint": trainer.fingerprint}}
            about |= {"job": {"id": os.environ.get(_JOB)}, **(sections or {})}
        with ranks.together():
            tell = stack.enter_context(telling(config, metrics, trainer.step, callback, ranks.first))
            if folder is not None and ranks.first:  # what a run that is killed before its end is resumed with
                write_config(model, folder, **about)

        def save() -> None:
            if checkpoints is not None and trainer.step != latest:
                trainer.save(checkpoints)

        with blocks_as(config, model), _signals() as noted:
            _run(trainer, Readings(config, model, ranks, tell), noted, tell, save)
            if folder is not None:
                export(trainer.averaged, folder, **about)
        if number := max(agree(ranks.group, lambda: noted[0] if noted else 0)):
            raise Stopped(number)
    return trainer.averaged


def _restarted(folder: Path | None) -> bool:
    """Whether torchrun has started the ranks of this node again, for the run that they had begun."""
    if folder is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return False
    return read_config(folder).get("job") == {"id": os.environ.get(_JOB)}


def _run(trainer: Trainer, readings: Readings, noted: list[int], tell: Tell, save: Callable[[], None]) -> None:
    """The steps that are left, or until a rank has noted a signal."""
    config = trainer.config
    with _ahead(trainer.batch, range(trainer.step, config.steps)) as batches:
        for x0 in batches:
            readings.add(trainer.advance(x0, noted))
            evaluates = config.eval_every and trainer.step % config.eval_every == 0
            saves = trainer.step % config.save_every == 0 and trainer.step < config.steps
            if evaluates or saves:
                readings.settle()
            if evaluates:
                tell(trainer.evaluate())
            if readings.stop:
                break
            if saves:
                save()
            if evaluates or saves:
                readings.start()
    readings.settle()
    save()


@contextmanager
def _ahead(make: Callable[[int], Tensor], steps: range) -> Iterator[Iterator[Tensor]]:
    """make(step) for each step, some of them made in a thread before they are asked for."""
    made: deque[Future[Tensor]] = deque()

    def batches(thread: ThreadPoolExecutor) -> Iterator[Tensor]:
        for step in steps:
            while len(made) < min(_AHEAD, steps.stop - step):
                made.append(thread.submit(make, step + len(made)))
            yield made.popleft().result()

    with ThreadPoolExecutor(1) as thread:
        try:
            yield batches(thread)
        finally:
            for batch in made:
                batch.cancel()


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM and SIGUSR1 are only noted in the list."""
    noted: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():  # no other is interrupted
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            handlers[number] = signal.signal(number, lambda number, frame: noted.append(number))
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
