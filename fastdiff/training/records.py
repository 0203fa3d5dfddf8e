"""What a run tells: metrics.jsonl, progress, and trackers."""

import dataclasses
import fcntl
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastdiff.files import import_safetensors, naming
from fastdiff.progress import progress
from fastdiff.training.config import TrainConfig

Record = dict[str, float]
Tell = Callable[[Record], None]


@contextmanager
def open_metrics(folder: Path | None) -> Iterator[io.FileIO | None]:
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


def drop_after(step: int, metrics: io.FileIO | None) -> None:
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


def append(record: Record, metrics: io.FileIO | None) -> None:
    if metrics is None:
        return
    rest = json.dumps(record).encode() + b"\n"
    with naming(Path(metrics.name)):
        while rest:
            rest = rest[metrics.write(rest) :]


@contextmanager
def telling(
    config: TrainConfig, metrics: io.FileIO | None, step: int, callback: Tell | None, first: bool
) -> Iterator[Tell]:
    """What gives each record of a run that goes on from a step to file, progress, tracker and callback; on the first
    rank."""
    if not first:
        yield lambda record: None
        return
    drop_after(step, metrics)
    folder = None if metrics is None else Path(metrics.name).parent
    seen: Record = {"step": step}
    with progress(config.steps, "steps", done=step) as advance, tracker(config, folder, step) as track:

        def tell(record: Record) -> None:
            append(record, metrics)
            advance(int(record["step"] - seen["step"]), _line(seen | record))
            seen.update(record)
            track(record)
            if callback is not None:
                callback(record)

        yield tell


@contextmanager
def tracker(config: TrainConfig, folder: Path | None, step: int) -> Iterator[Tell]:
    """Gives what config.track names the records after a step; TensorBoard no longer shows what was there of these."""
    if config.track == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        logs = None if folder is None else str(folder / "tensorboard")
        with SummaryWriter(logs, purge_step=step + 1) as writer:

            def write(record: Record) -> None:
                for name in record.keys() - {"step"}:
                    writer.add_scalar(name, record[name], int(record["step"]))

            yield write
    elif config.track == "wandb":
        import wandb

        with wandb.init(config=dataclasses.asdict(config), dir=folder) as run:
            yield lambda record: run.log(record, step=int(record["step"]))
    else:
        yield lambda record: None


def _line(seen: Record) -> str:
    text = f"loss {seen['loss']:.3f}  {seen['tokens_per_second']:,.0f} tokens/s  {seen['memory'] / 2**30:.1f} GiB"
    if "mfu" in seen:
        text += f"  {seen['mfu']:.0%} of peak"
    if "bits_per_token" in seen:
        error = seen["bits_per_token_stderr"]
        text += f"  held out {seen['bits_per_token']:.2f} bits per token (standard error {error:.2f})"
    return text
