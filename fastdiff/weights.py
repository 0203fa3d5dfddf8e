"""Tensors of published checkpoints: safetensors, or pickles of which nothing but tensors is made."""

import collections
import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastdiff.files import import_safetensors

# Where codebases leave their weights, in a folder.
NAMES = ("model.safetensors", "pytorch_model.bin", "checkpoints-meta/checkpoint.pth", "checkpoints/last.ckpt")


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a model by their names, the averaged ones (EMA) where a checkpoint has both.

    They lie in the file until they are looked at, wherever its format allows that.

    Args:
        path: a file (.safetensors, or anything that torch.save wrote), or a folder with one.

    Raises:
        FileNotFoundError: there is no such file, or none in the folder.
        ValueError: it is damaged, or holds no tensors by name.
    """
    path = Path(path)
    if path.is_dir():
        path = _file_of(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        if path.suffix == ".json":
            parts = sorted(set(json.loads(path.read_text())["weight_map"].values()))
            return {k: v for part in parts for k, v in _tensors(path.with_name(part)).items()}
        return _tensors(path)
    except OSError:
        raise
    except Exception as error:  # each reader has its own types
        raise ValueError(f"{path}: not weights, damaged or cut short: {error}") from error


def _file_of(folder: Path) -> Path:
    there = [folder / name for name in NAMES] + [*folder.glob("*.index.json")]
    there += [f for ending in ("safetensors", "pth", "pt", "ckpt") for f in sorted(folder.glob(f"*.{ending}"))]
    found = [file for file in there if file.is_file()]
    if not found:
        raise FileNotFoundError(f"{folder}: expected weights, *.safetensors or one of {', '.join(NAMES[1:])}")
    return found[0]


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        import_safetensors()
        from safetensors.torch import load_file

        return load_file(path)
    inert = SimpleNamespace(Unpickler=_Inert, load=_load, __name__="inert")
    mapped = zipfile.is_zipfile(path)  # read when it is looked at; what torch.save wrote before 1.6 is not
    saved = torch.load(path, map_location="cpu", weights_only=False, pickle_module=inert, mmap=mapped)
    state = saved
    for name in ("state_dict", "model"):
        state = state[name] if isinstance(state, dict) and isinstance(state.get(name), dict) else state
    weights = {k: v.detach() for k, v in dict(state).items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not weights:
        raise ValueError("no tensors by name")
    ema = saved.get("ema") if isinstance(saved, dict) else None
    return {**weights, **dict(_averaged(weights, ema))} if isinstance(ema, dict) else weights


def _averaged(weights: dict[str, Tensor], ema: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The averages, which are kept in the order of the parameters, without names and without buffers."""
    names = [name for name in weights if not name.endswith("inv_freq")]
    for name, average in zip(names, ema["shadow_params"], strict=False):
        if average.shape != weights[name].shape:
            raise ValueError(
                f"the average of {name} has shape {tuple(average.shape)}, not {tuple(weights[name].shape)}"
            )
        yield name, average.detach()


class _Nothing:
    """What stands for an object that is no tensor: it takes any state, and does nothing with it."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __call__(self, *_: Any, **__: Any) -> "_Nothing":
        return self

    def __setstate__(self, _: Any) -> None: ...

    def __setitem__(self, *_: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    extend = append


class _Inert(pickle.Unpickler):
    """Finds what makes tensors, and nothing else, so that no code of a file runs."""

    makes = {  # noqa: RUF012
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
        ("collections", "OrderedDict"): collections.OrderedDict,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return self.makes.get((module, name), _Nothing)


def _load(file: Any, **options: Any) -> Any:
    return _Inert(file, **options).load()
