"""lm-evaluation-harness: masked diffusion models under the name "fastdiff", with the errors of their likelihoods.

    python -m fastdiff.integrations.lm_eval run --model fastdiff --model_args pretrained=FOLDER --tasks TASK

or, from Python, `simple_evaluate(model=FastdiffLM(model, tokenizer, mask_index=M), tasks=[...])`.
"""

import math
import os
from collections import Counter
from collections.abc import Callable
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import handle_arg_string
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer

from fastdiff.checks import check_choice
from fastdiff.data.sources import NUM_BYTES
from fastdiff.data.texts import Bytes, chat_text, split_pair
from fastdiff.estimators import conditional_nll
from fastdiff.estimators.scoring import Model
from fastdiff.estimators.time_free import PROPOSALS
from fastdiff.files import read_config
from fastdiff.generation.sampling import sample
from fastdiff.integrations.transformers import agreed_mask_index  # and names FastdiffForMaskedLM
from fastdiff.loading import front_of, of_config, shifted
from fastdiff.model import DiffusionTransformer
from fastdiff.training import SCHEDULE

_TOGETHER = 64  # requests of equal lengths
_PARTS = 2**20  # more than a document has windows or repeats


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

    What the tokenizer puts in front of a text (BOS, [CLS]) is in front of every context and never scored; what it
    appends is left out. Scored are all tokens with a part of the continuation in them.

    Args:
        pretrained: a model as `time_free_nll` takes it; or a folder, of `fastdiff train` or of a model of transformers
            whose output has logits (LLaDA's and Dream's need trust_remote_code).
        tokenizer: as of transformers, with encode(text, add_special_tokens=) and decode(tokens, skip_special_tokens=);
            or the folder of one; None means that of the model's folder.
        mask_index: the mask's id; None means what the folder, the model's config or the tokenizer says.
        max_length: longest sequence of the model; None means what its config says. Contexts lose tokens at their start.
        exclude_mask: leave the mask out of the softmax; None means yes for a model of `fastdiff train` and no
            otherwise (LLaDA, Dream).
        shift: the logits at i predict token i + 1; None means yes for Dream, by its config, and no otherwise.
        add_bos_token: put the tokenizer's BOS in front of a text, or nothing; None means what the tokenizer does.
        num_samples, proposal, tolerance, max_samples: as in `time_free_nll`.
        seed: names all draws.
        is_check_greedy: find out whether a target is what is generated greedily, a pass for each of its tokens.
        steps, block_length, max_gen_toks: of generation by confidence, see `sample`; steps None reveals one at a time.
        batch_size: sequences in a network pass; None or "auto" means what `time_free_nll` finds.
        trust_remote_code: run the code that comes with a folder, of its model and of its tokenizer.
        device: where tokens go, and the model of a folder; None means where the model is, or for a folder a GPU, and
            the CPU is taken where there is none.

    Raises:
        ValueError: what None means cannot be found, or config and tokenizer disagree; an option is of no use, be it
            a number or, as from --model_args, a string; a target or a text to generate longer than the model takes;
            shifted logits and no token in front of a target; a folder that several processes load.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike | Model,
        tokenizer: Any = None,
        *,
        mask_index: int | None = None,
        max_length: int | None = None,
        exclude_mask: bool | None = None,
        shift: bool | None = None,
        add_bos_token: bool | None = None,
        num_samples: int = 64,
        proposal: str = "stratified",
        tolerance: float | None = None,
        max_samples: int = 4096,
        seed: int = 0,
        is_check_greedy: bool = True,
        steps: int | None = None,
        block_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str | None = None,
        trust_remote_code: bool = False,
        device: str | None = None,
    ) -> None:
        super().__init__()
        check_choice("proposal", proposal, PROPOSALS)
        self.likelihood = dict(proposal=proposal) | _parsed(float | None, 0, tolerance=tolerance)
        self.likelihood |= _parsed(int, 1, num_samples=num_samples, max_samples=max_samples)
        self.plan = _parsed(int | None, 1, steps=steps, block_length=block_length)
        own = _parsed(int, 1, max_gen_toks=max_gen_toks) | _parsed(int, 0, seed=seed)
        own |= _parsed(bool, 0, is_check_greedy=is_check_greedy, trust_remote_code=trust_remote_code)
        self.max_gen_toks, self.seed, self.is_check_greedy, trust_remote_code = own.values()
        batch_size = None if str(batch_size).startswith("auto") else batch_size
        self.batch_size = _parsed(int | None, 1, batch_size=batch_size)["batch_size"]
        add_bos_token = _parsed(bool | None, 0, add_bos_token=add_bos_token)["add_bos_token"]
        given = _parsed(int | None, 1, max_length=max_length) | _parsed(int | None, 0, mask_index=mask_index)
        given |= _parsed(bool | None, 0, exclude_mask=exclude_mask, shift=shift)

        self._device = _place(pretrained, device)
        if isinstance(pretrained, str | os.PathLike):
            model, known = _load(Path(pretrained), self._device, trust_remote_code)
        else:
            model, known = pretrained, of_config(getattr(pretrained, "config", None))
        self.tokenizer = known.pop("tokenizer", None) if tokenizer is None else tokenizer
        if isinstance(self.tokenizer, str | os.PathLike):
            self.tokenizer = AutoTokenizer.from_pretrained(self.tokenizer, trust_remote_code=trust_remote_code)
        if given["mask_index"] is None:
            known["mask_index"] = agreed_mask_index(known["mask_index"], getattr(self.tokenizer, "mask_token_id", None))
        given = {name: known[name] if value is None else value for name, value in given.items()}
        for name, value in (("tokenizer", self.tokenizer), *given.items()):
            if value is None:
                raise ValueError(f"{name}: expected one, for the model comes with none")
        self.front = front_of(self.tokenizer, add_bos_token)
        self.max_length, self.shift = given.pop("max_length"), given.pop("shift")
        self.shared: dict[str, Any] = given  # mask_index and exclude_mask
        self.model = shifted(model) if self.shift else model
        self.likelihoods: list[dict[str, Any]] = []

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(target | context) in nats, whether the target is what greedy generation gives) of each request."""

        def cache(k: int, one: _Scored) -> None:
            self.cache_hook.add_partial("loglikelihood", requests[k].args, (-one.nll, one.is_greedy))

        pairs = [self._encode_pair(*request.args) for request in requests]
        names = [_name(k, request) for k, request in enumerate(requests)]
        scored = self._score(pairs, names, disable_tqdm, self.is_check_greedy, cache)
        self._keep(requests, scored)
        return [(-one.nll, one.is_greedy) for one in scored]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p(text) in nats of each request; a long text in windows, of which the last has a context."""
        texts = [self._windows(self._encode(*request.args)) for request in requests]
        names = [_name(k, requests[k]) * _PARTS + j for k, windows in enumerate(texts) for j in range(len(windows))]
        parts = iter(self._score([window for windows in texts for window in windows], names, disable_tqdm, False))
        scored = [_sum(list(islice(parts, len(windows)))) for windows in texts]
        self._keep(requests, scored)
        return [-one.nll for one in scored]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first of its stop strings or the end of text."""
        texts, repeats = [], Counter[tuple[str | None, int]]()
        for k, request in enumerate(tqdm(requests, "Generating", disable=disable_tqdm)):
            context, options = request.args
            options = normalize_gen_kwargs(options, self.max_gen_toks)
            length, most = options["max_gen_toks"], self.max_length - len(self.front)
            if length >= most:
                raise ValueError(f"max_gen_toks: expected less than max_length = {most}, got {length}")
            prompt = self._tensor(self._behind_front(self._encode(context), length))
            name = (request.task_name, _name(k, request))
            seed = self.seed + name[1] * _PARTS + repeats[name]  # a request that is repeated gets another text
            repeats[name] += 1
            law = {name: options[name] for name in ("top_k", "top_p") if name in options}
            law |= dict(temperature=options.get("temperature", 0.0), seed=seed) | self.shared | self.plan
            drawn = sample(self.model, prompt=prompt, length=len(prompt) + length, sampler="confidence", **law)
            tokens = drawn[0, len(prompt) :].tolist()
            if (end := getattr(self.tokenizer, "eos_token_id", None)) in tokens:
                tokens = tokens[: tokens.index(end)]
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            for stop in filter(None, options["until"]):
                text = text.split(stop)[0]
            self.cache_hook.add_partial("generate_until", request.args, text)
            texts.append(text)
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of messages, by the tokenizer's template."""
        return chat_text(self.tokenizer, chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """What the harness names its cache of requests by."""
        return self.tokenizer.name_or_path.replace("/", "__")

    chat_template = TemplateLM.chat_template  # that of the tokenizer, for the harness's records

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into config of its results."""
        return dict(likelihoods=self.likelihoods, seed=self.seed, shift=self.shift, **self.shared, **self.likelihood)

    def _score(
        self,
        pairs: list[tuple[list[int], list[int]]],
        names: list[int],
        quiet: bool,
        check_greedy: bool,
        done: Callable[[int, _Scored], None] = lambda k, one: None,
    ) -> list[_Scored]:
        """Targets given their contexts, those of equal lengths together; `done` is told of each as it comes."""

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
                    for k, one in zip(which, map(_Scored, *columns, greedy), strict=True):
                        scored[k] = one
                        done(k, one)
                    bar.update(len(which))
        return [scored[k] for k in range(len(pairs))]

    def _is_greedy(self, context: Tensor, target: Tensor) -> list[bool]:
        """Whether each target [B, R] is what follows its context when the surest token is revealed at each step."""
        size, length = self.batch_size or 1, context.shape[1] + target.shape[1]
        options: dict[str, Any] = dict(length=length, sampler="confidence", temperature=0, **self.shared)
        drawn = [sample(self.model, num_samples=len(c), prompt=c, **options) for c in context.split(size)]
        return (torch.cat(drawn)[:, context.shape[1] :] == target).all(1).tolist()

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of both; spaces at the end of the context go to the continuation, as everywhere in the harness."""
        given, target = split_pair(self.tokenizer, context.rstrip(), context + continuation)
        most = self.max_length - len(self.front)
        if not 0 < len(target) <= most:
            raise ValueError(f"continuation: expected 1 to max_length = {most} tokens, got {len(target)}")
        return self._behind_front(given, len(target)), target

    def _windows(self, tokens: list[int]) -> list[tuple[list[int], list[int]]]:
        """Contexts and targets: windows of what the model takes, the last filled up with what comes before it."""
        size = self.max_length - len(self.front)
        targets = [tokens[start : start + size] for start in range(0, len(tokens), size)]
        return [(self._behind_front(tokens[: k * size], len(target)), target) for k, target in enumerate(targets)]

    def _behind_front(self, context: list[int], length: int) -> list[int]:
        """What is in front of every text, and as much of the end of a context as leaves room for length tokens.

        A context that begins with the front itself, as a chat template may write it, does not have it twice.
        """
        if context[: len(self.front)] == self.front:
            context = context[len(self.front) :]
        room = self.max_length - len(self.front) - length
        context = self.front + context[max(0, len(context) - room) :]
        if self.shift and not context:
            raise ValueError("context: expected a token, for shifted logits predict no first one; see add_bos_token")
        return context

    def _keep(self, requests: list[Instance], scored: list[_Scored]) -> None:
        for request, one in zip(requests, scored, strict=True):
            where = dict(task=request.task_name, doc_id=request.doc_id, idx=request.idx)
            self.likelihoods.append(where | one._asdict())

    def _tensor(self, numbers: list) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)


def _sum(parts: list[_Scored]) -> _Scored:
    nll, stderr = sum((part.nll for part in parts), 0.0), math.hypot(*(part.stderr for part in parts))
    return _Scored(nll, stderr, sum(p.num_tokens for p in parts), sum(p.num_forwards for p in parts), False)


def _parsed(kind: Any, least: int, **options: Any) -> dict[str, Any]:
    """Options of a type, or of it and None; strings mean what they mean in --model_args."""
    kinds = get_args(kind) or (kind,)
    parsed = {}
    for name, value in options.items():
        number = handle_arg_string(value) if isinstance(value, str) else value
        if int in kinds and isinstance(number, float) and number.is_integer():  # 1e3
            number = int(number)
        if float in kinds and type(number) is int:
            number = float(number)
        if type(number) not in kinds or not (number is None or number >= least):
            what = "True or False" if bool in kinds else f"{kinds[0].__name__} >= {least}"
            raise ValueError(f"{name}: expected {what}, got {value!r}")
        parsed[name] = number
    return parsed


def _place(pretrained: Any, device: str | None) -> torch.device:
    parameters = pretrained.parameters() if isinstance(pretrained, nn.Module) else ()
    own = next((p.device for p in parameters if not p.is_meta), None)  # an offloaded one is nowhere
    if device is None and own is not None:
        return own
    if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):  # the harness's default
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _load(folder: Path, device: torch.device, trust_remote_code: bool) -> tuple[Model, dict[str, Any]]:
    """The model of a folder, and what is known of it."""
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(f"WORLD_SIZE: expected 1, for one process evaluates, got {processes}")
    if folder.is_dir() and "model" in read_config(folder):
        thin = DiffusionTransformer.from_pretrained(folder).to(device)
        if thin.config.num_states != NUM_BYTES + 1:
            raise ValueError(f"pretrained: expected a model of bytes and a mask, got {thin.config}")
        training = read_config(folder).get("training", {})
        if training.get("block_length"):
            raise ValueError(f"pretrained: expected a model of whole sequences, got one of blocks, {folder}")
        if training.get("loss") == "gidd":
            raise ValueError(f"pretrained: expected a model of masks, got one of masks and uniform noise, {folder}")
        return thin.conditionals(NUM_BYTES, SCHEDULE.total_noise), of_config(thin.config) | dict(
            tokenizer=Bytes(), mask_index=NUM_BYTES
        )
    model = AutoModel.from_pretrained(folder, dtype="auto", trust_remote_code=trust_remote_code).to(device)
    return model, of_config(model.config) | dict(tokenizer=folder)


def _name(k: int, request: Instance) -> int:
    return k if request.doc_id is None else request.doc_id


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
