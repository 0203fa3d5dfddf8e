"""Published checkpoints of SEDD, RADD, MDLM, Duo and BD3-LM: the network, and what its outputs mean."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_choice
from fastdiff.evaluating import Model
from fastdiff.model import DiffusionTransformer, ModelConfig, check_alike, inverse_frequencies
from fastdiff.noise.graphs import Absorbing, Graph, Uniform
from fastdiff.schedules import Geometric, LogLinear, Schedule
from fastdiff.weights import read_weights

KINDS = ("sedd", "radd", "mdlm", "duo", "bd3lm")
MASKS = {50258: 50257, 30522: 103}  # of GPT-2's tokens and a mask, of BERT's


@dataclasses.dataclass(frozen=True)
class Published:
    """A network and its conventions.

    parametrization is of `dse_loss`, for the network as a function of (xt, sigma). A network that is not timed sees
    noise level 0, or none, whatever the noise is.
    """

    kind: str
    network: DiffusionTransformer
    graph: Graph
    schedule: Schedule
    parametrization: str
    timed: bool
    length: int | None

    def conditionals(self) -> Model:
        """For the estimators: (body, last layer) of p(x0 | xt), as `DiffusionTransformer.conditionals` gives them.

        Raises:
            ValueError: the graph is uniform.
        """
        mask_index = self.graph.mask_index
        if mask_index is None:
            raise ValueError(f"{self.kind}: expected the absorbing graph, for p(x0 | xt) of the uniform one has a time")

        return self.network.conditionals(mask_index, lambda share: self._seen(self.schedule.total_noise(share)))

    def score(self, xt: Tensor, sigma: Tensor) -> Tensor:
        """What the network gives for xt [B, L] at sigma [B], for `dse_nll` with this parametrization: [B, L, V]."""
        return self.network(xt, None if self.network.sigma_map is None else self._seen(sigma))

    def _seen(self, sigma: Tensor) -> Tensor:
        return sigma if self.timed else torch.zeros_like(sigma)


def load_published(kind: str, path: str | os.PathLike, *, mask_index: int | None = None) -> Published:
    """A checkpoint in float32 on the CPU, its averaged weights where it has them.

    Args:
        kind: "sedd", "radd", "mdlm", "duo" or "bd3lm".
        path: a folder (of a hub, or of a training run) or a file of weights, as `read_weights` takes it.
        mask_index: of a vocabulary that is neither GPT-2's nor BERT's.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: another architecture, a missing, surplus or misshapen tensor, a mask that is not known.
    """
    check_choice("kind", kind, KINDS)
    said = _said(Path(path))
    weights = _own(read_weights(path), path)
    config = _config(weights, said, path)
    if (kind == "radd") == bool(config.cond_dim):
        seen = "sees the noise level" if config.cond_dim else "does not see the noise level"
        raise ValueError(f"{path}: expected weights of {kind}, but this network {seen}")
    with torch.device("meta"):
        network = DiffusionTransformer(config)
    check_alike(network, weights, path)
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    uniform = kind == "duo" or said.get("graph", {}).get("type") == "uniform"
    graph: Graph = Uniform(config.num_states)
    if not uniform:
        mask_index = MASKS.get(config.num_states) if mask_index is None else mask_index
        if mask_index is None and kind in ("sedd", "radd"):
            mask_index = config.num_states - 1
        if mask_index is None:
            raise ValueError(f"mask_index: expected an id, for none is known of {config.num_states} ids")
        graph = Absorbing(config.num_states, mask_index)
    noise = said.get("noise", {})
    schedule: Schedule = LogLinear()
    if noise.get("type") == "geometric":
        schedule = Geometric(noise["sigma_min"], noise["sigma_max"])
    scaled = said.get("scale_by_sigma", not uniform)
    parametrization = "logits" if kind != "sedd" else "scale_by_sigma" if scaled else "log_score"
    timed = said.get("time_conditioning", kind in ("sedd", "duo"))
    return Published(kind, network.eval(), graph, schedule, parametrization, timed, said.get("length"))


def _said(path: Path) -> dict[str, Any]:
    """What a config.json beside the weights says, its section on the model among the rest."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    said = json.loads(file.read_text()) if file.is_file() else {}
    said |= said.get("model", {})
    names = dict(model_length="length", hidden_dim="hidden_size")
    return {names.get(name, name): value for name, value in said.items()}


def _own(weights: dict[str, Tensor], path: str | os.PathLike) -> dict[str, Tensor]:
    """The network's weights, without what wrappers put before their names, and without what is no network's."""
    last = "vocab_embed.embedding"
    prefix = next((name.removesuffix(last) for name in weights if name.endswith(last)), None)
    if prefix is None:
        raise ValueError(f"{path}: expected a tensor {last}, got {', '.join(list(weights)[:4])}, ...")
    beside = ("noise.", "sampling_eps_", "block_diff_mask", "mask")
    own = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    own["vocab_embed.weight"] = own.pop(last)
    return {name: tensor for name, tensor in own.items() if not name.startswith(beside)}


def _config(weights: dict[str, Tensor], said: dict[str, Any], path: str | os.PathLike) -> ModelConfig:
    """The shape that weights have; takes the frequencies of their rotary positions, which must be ours, from them."""
    num_states, dim = weights["vocab_embed.weight"].shape
    heads, inv_freq = said.get("n_heads"), weights.pop("rotary_emb.inv_freq", None)
    if inv_freq is not None:
        heads = dim // (2 * len(inv_freq))
        if not torch.allclose(inv_freq.float(), inverse_frequencies(dim // heads), rtol=1e-5):
            raise ValueError(f"{path}: expected rotary positions of base 10000, got other ones in rotary_emb.inv_freq")
    if not heads:
        raise ValueError(f"{path}: expected n_heads in a config.json, or rotary_emb.inv_freq among the weights")
    depth = 1 + max((int(name.split(".")[1]) for name in weights if name.startswith("blocks.")), default=-1)
    sigma_map = weights.get("sigma_map.mlp.2.weight")
    cond_dim = 0 if sigma_map is None else len(sigma_map)
    norm_bias = "blocks.0.norm1.bias" in weights
    return ModelConfig(num_states, said.get("length"), dim, depth, heads, cond_dim, norm_bias, learned_positions=False)
