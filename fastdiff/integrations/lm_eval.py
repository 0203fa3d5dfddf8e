"""lm-evaluation-harness: masked diffusion models under the name "fastdiff", with the errors of their likelihoods.

    python -m fastdiff.integrations.lm_eval run --model fastdiff --model_args pretrained=FOLDER --tasks TASK

or, from Python, `simple_evaluate(model=FastdiffLM(model, tokenizer, mask_index=M), tasks=[...])`.
"""

import math
import os
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm

from fastdiff.data import NUM_BYTES, decode, encode
from fastdiff.estimators import conditional_nll
from fastdiff.estimators.scoring import Model
from fastdiff.model import DiffusionTransformer, read_config
from fastdiff.sampling import sample
from fastdiff.training import time_free

_TOGETHER = 64  # requests of equal lengths
_WINDOWS = 2**20  # more than a text has


class Bytes:
    """The tokenizer of models on bytes."""

    eos_token_id = None

    def encode(self, text: str) -> list[int]:
        return encode(text).tolist()

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return decode(torch.tensor([token for token in tokens if token < NUM_BYTES], device="cpu"))


class _Scored(NamedTuple):
    nll: float
    stderr: float
    num_tokens: int
    num_forwards: int
    is_greedy: bool


@register_model("fastdiff")
class FastdiffLM(LM):
    """A masked diffusion model in lm-evaluation-harness.

    Log-likelihoods are those of `conditional_nll`, of a target given its context, where a context may be empty. Their
    standard errors go with the results as config.likelihoods, one row a request (and as `likelihoods` here). Masks are
    named by the document: its answers share them, which leaves less noise in which is likelier, and neither the order
    nor the batches of requests change a number.

    Args:
        pretrained: a model as `time_free_nll` takes it; or a folder, of `fastdiff train` or of a model of transformers
            whose output has logits (it may run code of its own, as LLaDA's and Dream's do).
        tokenizer: with encode(text) and decode(tokens, skip_special_tokens=True); None means that of the folder.
        mask_index: the mask's id; None means what the folder says.
        max_length: longest sequence of the model; None means what its config says. Contexts lose tokens at their start.
        exclude_mask: leave the mask out of the softmax; None means yes for a folder of `fastdiff train` and no
            otherwise (LLaDA, Dream).
        seed: names all draws.
        is_check_greedy: find out whether a target is what is generated greedily, a pass for each of its tokens.
        steps, block_length, max_gen_toks: of generation by confidence, see `sample`; steps None reveals one at a time.
        batch_size: sequences in a network pass; None or "auto" means what `time_free_nll` finds.
        device: where tokens go, and the model of a folder; None means a GPU, and the CPU is taken where there is none.
        likelihood: further options of `time_free_nll`: num_samples, proposal, tolerance, max_samples.

    Raises:
        ValueError: what None means cannot be found; a target or a text to generate longer than the model takes.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike | Model,
        tokenizer: Any = None,
        *,
        mask_index: int | None = None,
        max_length: int | None = None,
        exclude_mask: bool | None = None,
        seed: int = 0,
        is_check_greedy: bool = True,
        steps: int | None = None,
        block_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str | None = None,
        device: str | None = None,
        **likelihood: Any,
    ) -> None:
        super().__init__()
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):  # the harness's default
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        if isinstance(pretrained, str | os.PathLike):
            self.model, known = _load(Path(pretrained), self._device)
        else:
            self.model, known = pretrained, _of_config(getattr(pretrained, "config", None))
        given = dict(tokenizer=tokenizer, max_length=max_length, mask_index=mask_index, exclude_mask=exclude_mask)
        given = {name: known.get(name) if value is None else value for name, value in given.items()}
        for name, value in given.items():
            if value is None:
                raise ValueError(f"{name}: expected one, for the model comes with none")
        self.tokenizer, self.max_length = given.pop("tokenizer"), int(given.pop("max_length"))
        self.shared: dict[str, Any] = given  # mask_index and exclude_mask
        self.seed, self.is_check_greedy = seed, is_check_greedy
        self.plan, self.max_gen_toks = dict(steps=steps, block_length=block_length), max_gen_toks
        self.batch_size = None if batch_size is None or batch_size == "auto" else int(batch_size)
        self.likelihood, self.likelihoods = likelihood, list[dict[str, Any]]()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(target | context) in nats, whether the target is what greedy generation gives) of each request."""
        pairs = [self._encode_pair(*request.args) for request in requests]
        names = [_name(k, request) for k, request in enumerate(requests)]
        scored = self._score(pairs, names, disable_tqdm, self.is_check_greedy)
        self._keep(requests, scored)
        return [(-one.nll, one.is_greedy) for one in scored]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p(text) in nats of each request; a long text in windows, of which the last has a context."""
        texts = [self._windows(self.tokenizer.encode(*request.args)) for request in requests]
        names = [_name(k, requests[k]) * _WINDOWS + j for k, windows in enumerate(texts) for j in range(len(windows))]
        parts = iter(self._score([window for windows in texts for window in windows], names, disable_tqdm, False))
        scored = []
        for windows in texts:
            nll, stderr, num_tokens, num_forwards, _ = zip(*(next(parts) for _ in windows), strict=True)
            scored.append(_Scored(sum(nll), math.hypot(*stderr), sum(num_tokens), sum(num_forwards), False))
        self._keep(requests, scored)
        return [-one.nll for one in scored]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first of its stop strings or the end of text."""
        texts = []
        for k, request in enumerate(tqdm(requests, "Generating", disable=disable_tqdm)):
            context, options = request.args
            options = normalize_gen_kwargs(options, self.max_gen_toks)
            length = options["max_gen_toks"]
            if length >= self.max_length:
                raise ValueError(f"max_gen_toks: expected less than max_length = {self.max_length}, got {length}")
            prompt = self._tensor(self.tokenizer.encode(context)[-(self.max_length - length) :])
            law = {name: options[name] for name in ("top_k", "top_p") if name in options}
            law |= (
                dict(temperature=options.get("temperature", 0.0)) | self.shared | self.plan | dict(seed=self.seed + k)
            )  # a request that is repeated gets another text
            drawn = sample(self.model, prompt=prompt, length=len(prompt) + length, sampler="confidence", **law)
            tokens = drawn[0, len(prompt) :].tolist()
            if (end := getattr(self.tokenizer, "eos_token_id", None)) in tokens:
                tokens = tokens[: tokens.index(end)]
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            for stop in filter(None, options["until"]):
                text = text.split(stop)[0]
            texts.append(text)
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into config of its results."""
        return dict(likelihoods=self.likelihoods, seed=self.seed, **self.shared, **self.likelihood)

    def _score(
        self, pairs: list[tuple[list[int], list[int]]], names: list[int], quiet: bool, check_greedy: bool
    ) -> list[_Scored]:
        """Targets given their contexts, those of equal lengths together."""

        def lengths(k: int) -> tuple[int, int]:
            return len(pairs[k][0]), len(pairs[k][1])

        scored: dict[int, _Scored] = {}
        with tqdm(total=len(pairs), desc="Likelihoods", disable=quiet) as bar:
            for _, group in groupby(sorted(range(len(pairs)), key=lengths), lengths):
                for rows in torch.tensor(list(group), device="cpu").split(_TOGETHER):
                    which = rows.tolist()
                    context, target = (self._tensor([pairs[k][side] for k in which]) for side in (0, 1))
                    options: dict[str, Any] = dict(sample_ids=self._tensor([names[k] for k in which]), seed=self.seed)
                    options |= self.shared | self.likelihood | dict(batch_size=self.batch_size)
                    e = conditional_nll(self.model, context, target, **options)
                    greedy = self._is_greedy(context, target) if check_greedy else [False] * len(which)
                    columns = [c.tolist() for c in (e.nll, e.stderr, e.num_tokens, e.num_forwards)]
                    scored |= zip(which, map(_Scored, *columns, greedy), strict=True)
                    bar.update(len(which))
        return [scored[k] for k in range(len(pairs))]

    def _is_greedy(self, context: Tensor, target: Tensor) -> list[bool]:
        """Whether each target [B, R] is what follows its context when the surest token is revealed at each step."""
        size, length = self.batch_size or 1, context.shape[1] + target.shape[1]
        options: dict[str, Any] = dict(length=length, sampler="confidence", temperature=0, **self.shared)
        drawn = [sample(self.model, num_samples=len(c), prompt=c, **options) for c in context.split(size)]
        return (torch.cat(drawn)[:, context.shape[1] :] == target).all(1).tolist()

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both; spaces at the end of the context go to the continuation, as everywhere in the harness."""
        whole = self.tokenizer.encode(context + continuation)
        start = len(self.tokenizer.encode(context.rstrip()))
        if not 0 < len(whole) - start <= self.max_length:
            raise ValueError(
                f"continuation: expected 1 to max_length = {self.max_length} tokens, got {len(whole) - start}"
            )
        return whole[max(0, len(whole) - self.max_length) : start], whole[start:]

    def _windows(self, tokens: list[int]) -> list[tuple[list[int], list[int]]]:
        """Contexts and targets: windows of max_length, the last filled up with what comes before it."""
        size = self.max_length
        stops = [min(start + size, len(tokens)) for start in range(0, len(tokens), size)]
        return [(tokens[max(0, stop - size) : k * size], tokens[k * size : stop]) for k, stop in enumerate(stops)]

    def _keep(self, requests: list[Instance], scored: list[_Scored]) -> None:
        for request, one in zip(requests, scored, strict=True):
            where = dict(task=request.task_name, doc_id=request.doc_id, idx=request.idx)
            self.likelihoods.append(where | one._asdict())

    def _tensor(self, numbers: list) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)


def _load(folder: Path, device: torch.device) -> tuple[Model, dict[str, Any]]:
    """The model of a folder, and what is known of it."""
    if folder.is_dir() and "model" in read_config(folder):
        thin = DiffusionTransformer.from_pretrained(folder).to(device)
        if thin.config.num_states != NUM_BYTES + 1:
            raise ValueError(f"pretrained: expected a model of bytes and a mask, got {thin.config}")
        known = dict(tokenizer=Bytes(), mask_index=NUM_BYTES, exclude_mask=True)
        return time_free(thin, NUM_BYTES), _of_config(thin.config) | known
    from transformers import AutoModel, AutoTokenizer

    import fastdiff.integrations.transformers  # noqa: F401  # names FastdiffForMaskedLM

    options: dict[str, Any] = dict(trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, torch_dtype="auto", **options).to(device)
    return model, _of_config(model.config) | dict(tokenizer=AutoTokenizer.from_pretrained(folder, **options))


def _of_config(config: Any) -> dict[str, Any]:
    lengths = (getattr(config, name, None) for name in ("max_length", "max_sequence_length", "max_position_embeddings"))
    longest = next((length for length in lengths if length is not None), None)
    return dict(mask_index=getattr(config, "mask_token_id", None), max_length=longest, exclude_mask=False)


def _name(k: int, request: Instance) -> int:
    return k if request.doc_id is None else request.doc_id


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
