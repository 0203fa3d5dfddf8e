"""What steps have found, read some steps later, so that the device never waits for the host."""

import math
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fastdiff.model import DiffusionTransformer
from fastdiff.training.config import TrainConfig
from fastdiff.training.ranks import Ranks
from fastdiff.training.records import Record
from fastdiff.training.speed import Moment, memory, operations_per_token, peak

LATE = {"cpu": 0, "cuda": 4}  # steps that a device is given before the first of them is waited for


class Reading(NamedTuple):
    """What a step of sequences of a length has found: loss, norm of the gradient, and whether to stop, [3], means over
    ranks, which are on their way to the host until the step is done."""

    step: int
    lr: float
    length: int
    values: Tensor
    done: Moment


class Readings:
    """Those that are still on their way, in their order."""

    def __init__(
        self, config: TrainConfig, model: DiffusionTransformer, ranks: Ranks, tell: Callable[[Record], None]
    ) -> None:
        self.stop = False  # a rank wants to
        self._config, self._model, self._tell = config, model, tell
        self._device = model.lm_head.weight.device
        rate = peak(self._device, config.dtype)
        self._peak = None if rate is None else rate * ranks.size
        self._pending: deque[Reading] = deque()
        self.start()

    def start(self) -> None:
        """The next step begins now, and not where the last one ended."""
        self._last = Moment(self._device)

    def add(self, reading: Reading) -> None:
        self._pending.append(reading)
        self.settle(LATE[self._device.type])

    def settle(self, most: int = 0) -> None:
        """Wait for all but the last few, and tell them.

        Raises:
            FloatingPointError: one is not finite.
        """
        while len(self._pending) > most:
            reading = self._pending.popleft()
            reading.done.wait()
            loss, norm, stop = reading.values.tolist()
            if not math.isfinite(loss + norm):
                raise FloatingPointError(f"step {reading.step}: loss {loss}, gradient norm {norm}; try a lower lr")
            self.stop = self.stop or stop > 0
            self._tell(self._record(reading, loss, norm))
            self._last = reading.done

    def _record(self, reading: Reading, loss: float, norm: float) -> Record:
        rate = self._config.batch_size * reading.length / reading.done.since(self._last)
        record = {"step": reading.step, "loss": loss, "grad_norm": norm, "lr": reading.lr, "tokens_per_second": rate}
        if self._peak is not None:
            operations = operations_per_token(self._model, reading.length, self._config.streams)
            record["mfu"] = rate * operations / self._peak
        return record | {"memory": memory(self._device)}
