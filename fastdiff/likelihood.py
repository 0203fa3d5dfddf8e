"""Likelihoods of a text, some pieces at a time: what is done is kept, and ranks share the pieces.

The same numbers come out on any number of ranks, after any number of kills.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastdiff.data.texts import Piece
from fastdiff.estimators import NLLEstimate
from fastdiff.loading import Loaded
from fastdiff.processes import join
from fastdiff.progress import progress

TOGETHER = 8  # pieces of equal lengths in one estimate: what is kept, and what goes to a rank
_COLUMNS = ("nll", "stderr", "num_tokens", "num_forwards", "degrees_of_freedom", "bias")


@contextmanager
def ranks() -> Iterator[tuple[int, int]]:
    """This process's rank among those that torchrun has started, if it has, and its rank on its machine."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield 0, 0
        return
    own = not dist.is_initialized()
    if own:
        join("gloo")
    try:
        yield dist.get_rank(), int(os.environ["LOCAL_RANK"])
    finally:
        if own:
            dist.destroy_process_group()


def likelihoods(
    model: Loaded, pieces: list[Piece], settings: dict[str, Any], kept: Path | None, **options: Any
) -> NLLEstimate:
    """The estimate of each piece of a text, in their order, on every rank.

    Args:
        settings: what the numbers depend on, beside the pieces and options; JSON.
        kept: a file for what is done (each rank adds its rank to the name), or None. `forget` removes them.
        options: likelihood, and those of its estimator, as `Loaded.estimate` takes them.

    Raises:
        ValueError, TypeError: as the estimator.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    name = _name(pieces, settings | options)
    done = dict(_kept(kept, name))
    if ranks > 1:
        dist.barrier()  # before anyone adds to what all have read
    parts = [part for part in _parts(pieces) if not done.keys() >= set(part)]
    own = parts[rank::ranks]
    with progress(len(own), "pieces of text") as advance:
        for part in own:
            context, target = (torch.stack([getattr(pieces[k], side) for k in part]) for side in ("context", "target"))
            estimate = model.estimate(context, target, torch.tensor(part), **options)
            rows = dict(zip(part, _rows(estimate), strict=True))
            done |= rows
            if kept is not None:
                _keep(kept.with_name(f"{kept.name}.{rank}"), name, rows)
            advance(1)
    if ranks > 1:
        every: list[Any] = [None] * ranks
        dist.all_gather_object(every, done)
        done = {k: row for rows in every for k, row in rows.items()}
    columns = torch.tensor([done[k] for k in range(len(pieces))], dtype=torch.float64).unbind(1)
    nll, stderr, num_tokens, num_forwards, *rest = columns
    return NLLEstimate(nll, stderr, num_tokens.long(), num_forwards.long(), *rest)


def forget(kept: Path) -> None:
    """Removes what `likelihoods` kept."""
    for file in _files(kept):
        file.unlink()


def row(estimate: NLLEstimate, pieces: list[Piece], *, drawn: bool) -> dict[str, Any]:
    """Numbers of one text for JSON: nats, and bits and perplexities by byte, token and word; if masks were drawn, with
    95% intervals."""
    pooled = estimate.pooled()
    nll = torch.cat([pooled.nll, *(pooled.interval() if drawn else ())])
    sizes = dict(byte=sum(p.bytes for p in pieces), token=pooled.num_tokens.item(), word=sum(p.words for p in pieces))
    each = torch.tensor([piece.bytes for piece in pieces])
    bits = estimate.nll / each / math.log(2)
    found: dict[str, Any] = dict(pieces=len(pieces), bytes=sizes["byte"], tokens=sizes["token"], words=sizes["word"])
    found["network_passes"] = pooled.num_forwards.item()
    numbers = dict(nll=nll)
    for unit, size in sizes.items():
        if unit != "word":
            numbers[f"bits_per_{unit}"] = nll / size / math.log(2)
        if unit != "byte":
            numbers[f"perplexity_per_{unit}"] = torch.exp(nll / size)
    for name, values in numbers.items():
        found[name], *interval = values.tolist()
        if drawn:
            found[f"{name}_interval"] = interval
    found["bits_per_byte_sd_between_pieces"] = bits.std().item() if len(pieces) > 1 and (each > 0).all() else None
    return found


def _parts(pieces: list[Piece]) -> Iterator[list[int]]:
    """Numbers of pieces of equal lengths, a few at a time, whatever is done already."""

    def lengths(k: int) -> tuple[int, int]:
        return len(pieces[k].context), len(pieces[k].target)

    for _, alike in groupby(sorted(range(len(pieces)), key=lengths), lengths):
        numbers = list(alike)
        yield from (numbers[i : i + TOGETHER] for i in range(0, len(numbers), TOGETHER))


def _rows(estimate: NLLEstimate) -> list[list[float]]:
    return torch.stack([getattr(estimate, name).double() for name in _COLUMNS], 1).tolist()


def _name(pieces: list[Piece], settings: dict[str, Any]) -> str:
    """A hash of all that the numbers depend on."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for piece in pieces:
        digest.update(repr((piece.text, len(piece.context))).encode())
        digest.update(torch.cat([piece.context, piece.target]).numpy().tobytes())
    return digest.hexdigest()


def _files(kept: Path) -> list[Path]:
    return sorted(file for file in kept.parent.glob(f"{kept.name}.*") if file.suffix[1:].isdecimal())


def _kept(kept: Path | None, name: str) -> Iterator[tuple[int, list[float]]]:
    for file in [] if kept is None else _files(kept):
        for line in file.read_text().splitlines():
            try:
                of, rows = json.loads(line)
            except ValueError:  # a kill cut the last one short
                continue
            if of == name:
                yield from ((int(k), row) for k, row in rows.items())


def _keep(file: Path, name: str, rows: dict[int, list[float]]) -> None:
    with file.open("a") as end:
        end.write("\n" + json.dumps([name, rows]))  # behind a line that may have been cut short
        end.flush()
        os.fsync(end.fileno())
