"""Models by their names on the command line: runs, published checkpoints, models of transformers."""

import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checks import check_choice, check_tensor
from fastdiff.data.sources import NUM_BYTES
from fastdiff.data.texts import Bytes, load_tokenizer, saved_hash
from fastdiff.estimators import NLLEstimate, block_nll, conditional_nll, dse_nll, ordered_nll, time_integral_nll
from fastdiff.estimators.orders import ORDERS
from fastdiff.evaluating import BlockModel, Model
from fastdiff.files import read_config
from fastdiff.generation.block_cache import BlockCache
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.noise.graphs import Absorbing, Graph, Uniform
from fastdiff.noise.mixture import Mixture
from fastdiff.placing import placed, spread
from fastdiff.published import KINDS, Published, load_published
from fastdiff.schedules import LogLinear, Schedule
from fastdiff.training import MIXED, SCHEDULE, SCORES

_OF_ANY_GRAPH = ("time-free", "integral")
LIKELIHOODS = (*_OF_ANY_GRAPH, *ORDERS)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with all that its likelihoods and samples need.

    Attributes:
        network: what holds the weights.
        conditionals: p(x0 | xt) as estimators take them, of the absorbing graph, or with a block_length as `block_nll`
            takes them; None of the uniform graph and of mixtures.
        score: (xt, sigma) -> [B, L, V], as `dse_nll` takes it with that parametrization; None if there is none.
        graph, schedule, parametrization: of the score; the graph of both.
        exclude_mask: leave the mask out of the softmax of conditionals.
        tokenizer: `texts.Tokenizer`.
        length: tokens of a window: those that it takes, or that were asked for.
        front: tokens in front of every sequence, which are not scored.
        device: where tokens go.
        eps: least time t of the mean that the model's codebase prints; None where that mean is over all t in (0, 1).
        block_length: of a block model, which fills blocks from left to right; None of others.
    """

    network: nn.Module
    conditionals: Model | BlockModel | None
    score: Callable[[Tensor, Tensor], Tensor] | None
    graph: Graph | Mixture
    schedule: Schedule
    parametrization: str
    exclude_mask: bool
    tokenizer: Any
    length: int
    front: list[int]
    device: torch.device
    eps: float | None = None
    block_length: int | None = None

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return next(self.network.parameters()).dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights, wherever they lie."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self.network.parameters())

    def in_chats(self) -> "Loaded":
        """The same without a front, for texts of a chat template, which has all that stands there."""
        return dataclasses.replace(self, front=[], length=self.length + len(self.front))

    def cache(self, num_samples: int) -> BlockCache:
        """An empty one of a block model, for `sample`."""
        blocks = num_samples, self.block_length, self.graph.mask_index, self.schedule.total_noise
        return self.network.cache(*blocks)  # type: ignore[operator]

    def estimate(
        self, context: Tensor, target: Tensor, sample_ids: Tensor, *, likelihood: str = "time-free", **options: Any
    ) -> NLLEstimate:
        """-log p(target [B, T] | context [B, C]) in nats.

        Args:
            likelihood: "time-free", of `conditional_nll`, or of `block_nll` for a block model; the uniform graph, which
                has none, and mixtures give their "bound", the whole integral of `dse_nll`. "integral", what the model's
                own codebase prints: a mean over times, of `dse_nll` for scores and of `time_integral_nll` for
                conditionals. Or an order of `ordered_nll`.
            options: of that estimator.

        Raises:
            ValueError: an unknown likelihood, or one that the model does not have; a context, for an integral over
                scores.
        """
        kind = self.name_of(likelihood)
        context, target, sample_ids = (tokens.to(self.device) for tokens in (context, target, sample_ids))
        published = likelihood == "integral"
        if self.score is not None and (published or self.conditionals is None):
            if context.numel():
                raise ValueError(f"context: expected none, for an integral over scores, got {context.shape[1]} tokens")
            names: dict[str, Any] = dict(schedule=self.schedule, parametrization=self.parametrization)
            names |= dict(eps=self.eps if published else None, sample_ids=sample_ids)
            return dse_nll(self.score, target, graph=self.graph, **names, **options)
        front = torch.tensor(self.front, dtype=torch.int64, device=self.device).expand(len(target), -1)
        context, mask_index = torch.cat([front, context], 1), self.graph.mask_index
        names = dict(mask_index=mask_index, exclude_mask=self.exclude_mask)
        if kind == "time-free":
            names |= dict(sample_ids=sample_ids)
            return conditional_nll(self.conditionals, context, target, **names, **options)  # type: ignore[arg-type]
        x0 = torch.cat([context, target], 1)
        names |= dict(target=torch.cat([context < 0, target >= 0], 1))
        if kind == "block":
            names |= dict(block_length=self.block_length, sample_ids=sample_ids)
            return block_nll(self.conditionals, x0, **names, **options)  # type: ignore[arg-type]
        if likelihood in ORDERS:
            return ordered_nll(self.conditionals, x0, order=likelihood, **names, **options)  # type: ignore[arg-type]
        names |= dict(sample_ids=sample_ids)
        names |= dict(eps=0.0) if self.eps is None else dict(eps=self.eps, schedule=self.schedule)
        return time_integral_nll(self.conditionals, x0, **names, **options)  # type: ignore[arg-type]

    def name_of(self, likelihood: str) -> str:
        """What `estimate` gives for a likelihood: "bound" where a time-free one is asked of uniform noise, "block"
        where it is of a block model.

        Raises:
            ValueError: an unknown likelihood, or one that the uniform graph or a block model does not have.
        """
        if self.block_length is not None:
            if likelihood != "time-free":
                raise ValueError(f"likelihood: expected 'time-free', the only one of a block model, got {likelihood!r}")
            return "block"
        check_choice("likelihood", likelihood, LIKELIHOODS if self.conditionals is not None else _OF_ANY_GRAPH)
        return "bound" if likelihood == "time-free" and self.conditionals is None else likelihood


def load(
    name: str,
    device: torch.device | None,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: str | None = None,
    mask_index: int | None = None,
    length: int | None = None,
    shift: bool | None = None,
    exclude_mask: bool | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """The model that a name stands for.

    Args:
        name: the folder of a run; or "KIND:PATH" for a published checkpoint, KIND "sedd", "radd", "mdlm", "duo" or
            "bd3lm"; or "hf:PATH" for a masked model of transformers whose output has logits.
        device: where it goes; None spreads a model of transformers over all that this rank has (`placing`), and puts
            others on the first of its GPUs.
        dtype: of the weights; None means what a checkpoint of transformers says, and float32 for others.
        tokenizer: folder or name of one of transformers, where the model's folder has none.
        mask_index: where the model does not say.
        length: tokens of a window; None means as many as the model says it takes. More than these are for models
            without learned positions alone, and come with a warning.
        shift: the logits at i predict token i + 1, of a model of transformers; None means yes for Dream, by its config.
        exclude_mask: leave the mask out of the softmax of conditionals; None means no for models of transformers.
        trust_remote_code: run the code that comes with a model of transformers.

    Raises:
        FileNotFoundError, ImportError: something is missing.
        ValueError: a folder of something else; what is to be said is not; a tokenizer with more ids than the model.
    """
    kind, _, path = name.partition(":")
    if kind == "hf":
        found = _of_transformers(path, device, dtype, tokenizer, mask_index, length, shift, trust_remote_code)
    elif shift is not None:
        raise ValueError(f"shift: expected none for {name}, for it is no model of transformers (hf:)")
    elif kind in KINDS and path:
        found = _of_published(load_published(kind, path, mask_index=mask_index), path, device, dtype, tokenizer, length)
    else:
        found = _of_run(name, device, dtype, length, trust_remote_code)
    return found if exclude_mask is None else dataclasses.replace(found, exclude_mask=exclude_mask)


def _of_run(
    folder: str, device: torch.device | None, dtype: torch.dtype | None, length: int | None, trust_remote_code: bool
) -> Loaded:
    if (Path(folder) / "checkpoints").is_dir() and not any(Path(folder).glob("model*.safetensors*")):
        raise FileNotFoundError(
            f"{folder}: no weights yet, which a run writes when it ends or stops; go on with it, or with --steps of "
            "its newest checkpoint end it"
        )
    model = DiffusionTransformer.from_pretrained(folder).eval()
    n, timed, longest = model.config.num_states, model.config.cond_dim > 0, model.config.max_length
    tokens, num_tokens = _tokenizer_of_run(Path(folder), trust_remote_code)
    if n not in (num_tokens, num_tokens + 1) or longest is None:
        raise ValueError(
            f"{folder}: expected a model of {num_tokens} tokens with a longest sequence, got {n} states, {longest}"
        )
    length, device = _window(folder, length, longest, False), placed(model, device, dtype)
    graph: Graph = Uniform(n) if n == num_tokens else Absorbing(n)
    conditionals: Model | BlockModel | None = None
    settings = read_config(folder).get("training", {})
    block_length = settings.get("block_length") or None
    if settings.get("loss") == "gidd":
        return Loaded(model, None, model, Mixture(n), MIXED, "logits", True, tokens, length, [], device)
    if graph.mask_index is not None:
        masks = graph.mask_index, SCHEDULE.total_noise
        conditionals = model.block_conditionals(block_length, *masks) if block_length else model.conditionals(*masks)
    score = model if timed and not block_length else None
    noise = SCHEDULE, SCORES[graph.name]
    return Loaded(model, conditionals, score, graph, *noise, True, tokens, length, [], device, None, block_length)


def _tokenizer_of_run(folder: Path, trust_remote_code: bool) -> tuple[Any, int]:
    """The tokenizer of what a run was trained on, and how many tokens that has."""
    told = read_config(folder).get("tokenizer")
    if told is None or told["name"] == "bytes":
        return Bytes(), NUM_BYTES
    own = folder / "tokenizer"
    if saved_hash(own) != told["fingerprint"]:
        raise ValueError(f"{own}: not the tokenizer that this run was trained with")
    return load_tokenizer(str(own), trust_remote_code), told["num_tokens"]


def _of_published(
    published: Published,
    path: str,
    device: torch.device | None,
    dtype: torch.dtype | None,
    tokenizer: str | None,
    length: int | None,
) -> Loaded:
    length, graph = _window(path, length, published.length, False), published.graph
    tokens = _tokenizer(tokenizer or path, graph.num_states, False)
    device = placed(published.network, device, dtype)
    conditionals = None if graph.mask_index is None else published.conditionals()
    score = published.score if published.timed else None
    schedule = LogLinear(0) if published.kind == "bd3lm" else published.schedule
    eps = None if published.kind == "radd" else 1e-3
    noise = schedule, published.parametrization
    return Loaded(published.network, conditionals, score, graph, *noise, True, tokens, length, [], device, eps)


def _of_transformers(
    path: str,
    device: torch.device | None,
    dtype: torch.dtype | None,
    tokenizer: str | None,
    mask_index: int | None,
    length: int | None,
    shift: bool | None,
    trust_remote_code: bool,
) -> Loaded:
    from fastdiff.integrations.transformers import agreed_mask_index

    model = _from_pretrained(path, device, dtype=dtype or "auto", trust_remote_code=trust_remote_code)
    num_states = model.config.vocab_size
    known, tokens = of_config(model.config), _tokenizer(tokenizer or path, num_states, trust_remote_code)
    if mask_index is None:
        mask_index = agreed_mask_index(known["mask_index"], tokens.mask_token_id)
    if mask_index is None:
        raise ValueError(f"mask_index: expected an id, for neither model nor tokenizer of {path} has a mask")
    shift, front = known["shift"] if shift is None else shift, front_of(tokens, None)
    if shift and not front:
        if tokens.bos_token_id is None:
            raise ValueError(f"{path}: expected a tokenizer with a BOS, for shifted logits predict no first token")
        front = [tokens.bos_token_id]
    longest = known["max_length"] and known["max_length"] - len(front)
    length = _window(path, length, longest, any("rope" in name for name in vars(model.config)))
    conditionals, graph = shifted(model) if shift else model, Absorbing(num_states, mask_index)
    if device is None:  # what is offloaded is on none
        there = (parameter.device for parameter in model.parameters() if parameter.device.type != "meta")
        device = next(there, torch.device("cpu"))
    rest = (known["exclude_mask"], tokens, length, front, device)
    return Loaded(model, conditionals, None, graph, SCHEDULE, "logits", *rest)


def _from_pretrained(path: str, device: torch.device | None, **options: Any) -> Any:
    """A model of transformers that gives logits, in evaluation mode, with all of its weights."""
    from transformers import AutoModel, AutoModelForMaskedLM

    options["output_loading_info"] = True
    if device is not None and device.type != "cpu":
        options["device_map"] = {"": device}
    of = spread if device is None else lambda load, path, **options: load(path, **options)
    try:
        model, report = of(AutoModelForMaskedLM.from_pretrained, path, **options)
    except ValueError:  # LLaDA's and Dream's, whose AutoModel gives logits
        model, report = of(AutoModel.from_pretrained, path, **options)
    if model.get_output_embeddings() is None:
        raise ValueError(f"{path}: expected a masked model whose output has logits, got a {type(model).__name__}")
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{path}: {len(missing)} tensors of the model are not in its files; {missing[0]} is missing")
    return model.eval()


def _window(path: str, asked: int | None, said: int | None, endless: bool) -> int:
    """Tokens of a window: as many as are asked for, or as a model says it takes; endless ones may be asked for more."""
    if asked is None:
        if said is None:
            raise ValueError(f"length: expected one, for {path} does not say how many tokens it takes")
        return said
    if asked < 1 or (said is not None and asked > said and not endless):
        raise ValueError(f"length: expected {f'1 to {said} tokens' if said else 'at least 1'}, got {asked}")
    if said is not None and asked > said:
        warnings.warn(f"length: {path} was made for {said} tokens, got {asked}", stacklevel=2)
    return asked


def _tokenizer(path: str, num_states: int, trust_remote_code: bool) -> Any:
    tokenizer = load_tokenizer(path, trust_remote_code)
    if len(tokenizer) > num_states:
        raise ValueError(f"tokenizer: expected at most the model's {num_states} ids, got {len(tokenizer)}")
    return tokenizer


class _Shifted(nn.Module):
    """What a body gives at i - 1, at i: logits ("logits") or hidden states ("last_hidden_state")."""

    def __init__(self, body: Any, what: str) -> None:
        super().__init__()
        self.body, self.what = body, what

    def forward(self, xt: Tensor) -> Tensor:
        output = self.body(xt)
        output = getattr(output, self.what, output)
        check_tensor(f"model's {self.what}", output)
        return torch.cat([output[:, :1], output[:, :-1]], 1)  # the first is there for the shape: nothing predicts it


def shifted(model: Model) -> Model:
    """A model whose outputs at i predict token i + 1, with them at i + 1."""
    if isinstance(model, tuple):
        return _Shifted(model[0], "last_hidden_state"), model[1]
    return _Shifted(model, "logits")


def of_config(config: Any) -> dict[str, Any]:
    """What a model's config says; max_length of one of transformers is a default of generation."""
    from fastdiff.integrations.transformers import logits_are_shifted

    ours = isinstance(config, ModelConfig)
    names = ("max_length",) if ours else ("max_position_embeddings", "max_sequence_length")
    longest = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    mask_index, shift = getattr(config, "mask_token_id", None), logits_are_shifted(config)
    return dict(mask_index=mask_index, max_length=longest, exclude_mask=ours, shift=shift)


def front_of(tokenizer: Any, add_bos_token: bool | None) -> list[int]:
    """What is put in front of every text: a tokenizer's BOS or not, or None for what it does by itself."""
    if add_bos_token is not None:
        bos: Any = getattr(tokenizer, "bos_token_id", None)
        if add_bos_token and bos is None:
            raise ValueError("add_bos_token: expected a tokenizer that has a BOS")
        return [bos] if add_bos_token else []
    text, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text and (text or not whole):
            return whole[:start]
    raise ValueError(f"tokenizer: expected the tokens {text} of a text among those with special ones, got {whole}")
