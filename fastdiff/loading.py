"""Models by their names on the command line: runs, published checkpoints, models of transformers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checks import check_tensor
from fastdiff.data import NUM_BYTES
from fastdiff.estimators import NLLEstimate, conditional_nll, dse_nll
from fastdiff.evaluating import Model
from fastdiff.graphs import Absorbing, Graph, Uniform
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.published import KINDS, Published, load_published
from fastdiff.schedules import Schedule
from fastdiff.texts import Bytes
from fastdiff.training import SCHEDULE, time_free


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with all that its likelihoods and samples need.

    Attributes:
        conditionals: p(x0 | xt) as estimators take them, of the absorbing graph; None of the uniform one.
        score: (xt, sigma) -> [B, L, V], as `dse_nll` takes it with that parametrization; None if there is none.
        graph, schedule, parametrization: of the score; the graph of both.
        exclude_mask: leave the mask out of the softmax of conditionals.
        tokenizer: `texts.Tokenizer`.
        length: the longest sequence that it takes.
        front: tokens in front of every sequence, which are not scored.
        device: where tokens go.
    """

    conditionals: Model | None
    score: Callable[[Tensor, Tensor], Tensor] | None
    graph: Graph
    schedule: Schedule
    parametrization: str
    exclude_mask: bool
    tokenizer: Any
    length: int
    front: list[int]
    device: torch.device

    def estimate(self, context: Tensor, target: Tensor, sample_ids: Tensor, **options: Any) -> NLLEstimate:
        """-log p(target [B, T] | context [B, C]) in nats; of the uniform graph the bound that its integral gives.

        Raises:
            ValueError: a context, of the uniform graph.
        """
        context, target, sample_ids = (tokens.to(self.device) for tokens in (context, target, sample_ids))
        if self.conditionals is None and self.score is not None:
            if context.numel():
                raise ValueError(
                    f"context: expected none, for a model of the uniform graph, got {context.shape[1]} tokens"
                )
            names: dict[str, Any] = dict(schedule=self.schedule, parametrization=self.parametrization)
            return dse_nll(self.score, target, graph=self.graph, sample_ids=sample_ids, **names, **options)
        front = torch.tensor(self.front, dtype=torch.int64, device=self.device).expand(len(target), -1)
        context, mask_index = torch.cat([front, context], 1), self.graph.mask_index
        names = dict(mask_index=mask_index, exclude_mask=self.exclude_mask, sample_ids=sample_ids)
        return conditional_nll(self.conditionals, context, target, **names, **options)  # type: ignore[arg-type]


def load(
    name: str,
    device: torch.device,
    *,
    tokenizer: str | None = None,
    mask_index: int | None = None,
    length: int | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """The model that a name stands for.

    Args:
        name: the folder of a run; or "KIND:PATH" for a published checkpoint, KIND "sedd", "radd", "mdlm", "duo" or
            "bd3lm"; or "hf:PATH" for a masked model of transformers whose output has logits.
        tokenizer: folder or name of one of transformers, where the model's folder has none.
        mask_index, length: where the model does not say; a length below the model's shortens its windows.
        trust_remote_code: run the code that comes with a model of transformers.

    Raises:
        FileNotFoundError, ImportError: something is missing.
        ValueError: a folder of something else; what is to be said is not; a tokenizer with more ids than the model.
    """
    kind, _, path = name.partition(":")
    if kind == "hf":
        found = _of_transformers(path, device, tokenizer, mask_index, trust_remote_code)
    elif kind in KINDS and path:
        found = _of_published(load_published(kind, path, mask_index=mask_index), path, device, tokenizer)
    else:
        found = _of_run(name, device)
    if length is not None and not 1 <= length <= found.length:
        raise ValueError(f"length: expected 1 to {found.length} tokens, got {length}")
    return found if length is None else dataclasses.replace(found, length=length)


def _of_run(folder: str, device: torch.device) -> Loaded:
    model = DiffusionTransformer.from_pretrained(folder).eval().to(device)
    n, timed, length = model.config.num_states, model.config.cond_dim > 0, model.config.max_length
    if n not in (NUM_BYTES, NUM_BYTES + 1) or length is None:
        raise ValueError(f"{folder}: expected a model of bytes with a longest sequence, got {n} states, {length}")
    graph: Graph = Uniform(n) if n == NUM_BYTES else Absorbing(n)
    conditionals = None if graph.mask_index is None else time_free(model, graph.mask_index)
    score = model if timed else None
    return Loaded(conditionals, score, graph, SCHEDULE, "scale_by_sigma", True, Bytes(), length, [], device)


def _of_published(published: Published, path: str, device: torch.device, tokenizer: str | None) -> Loaded:
    published.network.to(device)
    length, graph = published.length, published.graph
    if length is None:
        raise ValueError(f"{path}: expected the model's length in a config.json beside it")
    tokens = _tokenizer(tokenizer or path, graph.num_states, False)
    conditionals = None if graph.mask_index is None else published.conditionals()
    score, noise = published.score if published.timed else None, (published.schedule, published.parametrization)
    return Loaded(conditionals, score, graph, *noise, True, tokens, length, [], device)


def _of_transformers(
    path: str, device: torch.device, tokenizer: str | None, mask_index: int | None, trust_remote_code: bool
) -> Loaded:
    from transformers import AutoModel, AutoModelForMaskedLM

    from fastdiff.integrations.transformers import agreed_mask_index

    options: dict[str, Any] = dict(dtype="auto", trust_remote_code=trust_remote_code)
    try:
        model = AutoModelForMaskedLM.from_pretrained(path, **options)
    except ValueError:  # LLaDA's and Dream's, whose AutoModel gives logits
        model = AutoModel.from_pretrained(path, **options)
    model, num_states = model.eval().to(device), model.config.vocab_size
    known, tokens = of_config(model.config), _tokenizer(tokenizer or path, num_states, trust_remote_code)
    if mask_index is None:
        mask_index = agreed_mask_index(known["mask_index"], tokens.mask_token_id)
    if mask_index is None:
        raise ValueError(f"mask_index: expected an id, for neither model nor tokenizer of {path} has a mask")
    front = front_of(tokens, None)
    if known["shift"] and not front:
        if tokens.bos_token_id is None:
            raise ValueError(f"{path}: expected a tokenizer with a BOS, for shifted logits predict no first token")
        front = [tokens.bos_token_id]
    if known["max_length"] is None:
        raise ValueError(f"{path}: expected the longest sequence that the model takes in its config, found none")
    conditionals, graph = shifted(model) if known["shift"] else model, Absorbing(num_states, mask_index)
    rest = (tokens, known["max_length"] - len(front), front, device)
    return Loaded(conditionals, None, graph, SCHEDULE, "logits", known["exclude_mask"], *rest)


def _tokenizer(path: str, num_states: int, trust_remote_code: bool) -> Any:
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except ImportError:
        raise ImportError("tokenizers need transformers: pip install transformers") from None
    except (OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"tokenizer: found none in {path} ({first}); name a folder that has one") from None
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
