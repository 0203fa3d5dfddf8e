"""The weights of a model on any number of ranks, as one folder of safetensors."""

import dataclasses
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from fastdiff.files import import_safetensors, write_atomically
from fastdiff.processes import agree, is_distributed


def export(
    model: nn.Module, folder: str | os.PathLike, *, file_size: int = 2_000_000_000, **sections: Mapping[str, Any]
) -> None:
    """Write a model as config.json and model.safetensors. Every rank calls it, and the first one writes.

    A model above `file_size` bytes gets several files and model.safetensors.index.json, as in transformers. A reader
    finds the old weights or the new ones. Rank 0 needs memory for two files, the others for a whole tensor.

    Args:
        model: plain or sharded, the module inside of a wrapper; its `config` is a dataclass.
        folder: made if missing.
        file_size: the most bytes of tensors in a file that holds more than one.
        sections: further named parts of config.json, beside "model".

    Raises:
        OSError: names the file; raised on every rank.
    """
    safetensors, folder = import_safetensors(), Path(folder)
    group = dist.group.WORLD if is_distributed() else None
    writes = group is None or dist.get_rank() == 0
    state: dict[str, Any] = get_model_state_dict(model)
    parts = _split({name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}, file_size)
    files, index = ["model.safetensors"], "model.safetensors.index.json"
    if len(parts) > 1:  # names of no export before, whose files stay until the index is there
        tag = os.urandom(4).hex()
        files = [f"model-{tag}-{number:05}-of-{len(parts):05}.safetensors" for number in range(1, len(parts) + 1)]

    def put(file: str, content: bytes) -> None:
        if writes:
            write_atomically(folder / file, content)

    def put_weights(file: str, names: list[str]) -> None:
        wholes = {}
        for name in names:
            whole = state[name].full_tensor() if isinstance(state[name], DTensor) else state[name]  # by all ranks
            if writes:
                wholes[name] = whole.detach().to("cpu", copy=True).contiguous()
        put(file, safetensors.save(wholes, {"format": "pt"}))

    def finish() -> None:
        if len(parts) > 1:
            places = {name: file for file, names in zip(files, parts, strict=True) for name in names}
            put(index, json.dumps({"metadata": {}, "weight_map": places}, indent=2).encode() + b"\n")
            files.append(index)
        for file in folder.glob("model*.safetensors*") if writes else ():
            if file.name not in files:
                file.unlink()

    agree(group, lambda: write_config(model, folder, **sections) if writes else None)
    for file, names in zip(files, parts, strict=True):
        agree(group, partial(put_weights, file, names))
    agree(group, finish)


def write_config(model: nn.Module, folder: Path, **sections: Mapping[str, Any]) -> None:
    """The config.json of `export`, on one rank."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model": dataclasses.asdict(model.config), **sections}  # type: ignore[call-overload]
    write_atomically(folder / "config.json", json.dumps(config, indent=2).encode() + b"\n")


def _split(sizes: dict[str, int], most: int) -> list[list[str]]:
    """Names in their order, cut where the sizes would add up to more than `most`."""
    parts: list[list[str]] = [[]]
    room = most
    for name, size in sizes.items():
        if size > room and parts[-1]:
            parts.append([])
            room = most
        parts[-1].append(name)
        room -= size
    return parts
