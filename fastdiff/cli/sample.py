"""`fastdiff sample`."""

import itertools
import json
import re
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastdiff.cli.models import load_named, no_room
from fastdiff.cli.options import Dtype, MaskIndex, Named, Place, Shift, TokenizerOf, Trust, check_file, check_seed
from fastdiff.data.texts import Tokenizer, chat_text
from fastdiff.files import write_atomically
from fastdiff.generation.sampling import sample as draw_samples
from fastdiff.generation.unmasking import SAMPLERS, TIMED
from fastdiff.noise.mixture import Mixture

_FRAMES = 8  # lines in which a text comes about
_BETWEEN = "----------"  # a line of it stands between two texts


def sample(
    model: Named,
    prompt: Annotated[str, typer.Option(help="text to go on from")] = "",
    chat: Annotated[bool, typer.Option("--chat", help="the prompt is a message; draw what the assistant says")] = False,
    infill: Annotated[str | None, typer.Option(help="text with {n} where n tokens are to be filled in")] = None,
    length: Annotated[
        int | None, typer.Option(help="tokens (bytes of a run), with the prompt", show_default="all the model takes")
    ] = None,
    sampler: Annotated[str, typer.Option(help=", ".join(SAMPLERS))] = "tweedie",
    steps: Annotated[int | None, typer.Option(help="steps", show_default="as many as tokens to draw")] = None,
    block_length: Annotated[int | None, typer.Option(help="for the last four samplers; else one block")] = None,
    guidance: Annotated[float, typer.Option(help="classifier-free; 0 is none")] = 0.0,
    temperature: Annotated[float, typer.Option(help="below 1: more likely tokens; 0: the likeliest")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="draw from so many likeliest tokens")] = None,
    top_p: Annotated[float | None, typer.Option(help="draw from the likeliest tokens of so much probability")] = None,
    num_samples: Annotated[int, typer.Option(help="texts to draw")] = 1,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help=f'file for the texts: .jsonl for a {{"text": ...}} a line, else {_BETWEEN} between two'),
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="also how each text came about")] = False,
    tokenizer: TokenizerOf = None,
    mask_index: MaskIndex = None,
    dtype: Dtype = None,
    shift: Shift = None,
    trust_remote_code: Trust = False,
    device: Place = None,
) -> None:
    """Draw texts: whole ones, after a prompt, or where an infill leaves room.

    A run trained in blocks fills them from left to right, each by the sampler.
    """
    check_seed(seed)
    check_file("out", out)
    options: dict[str, Any] = dict(tokenizer=tokenizer, mask_index=mask_index, length=length, shift=shift)
    loaded = load_named(model, device, dtype, trust_remote_code=trust_remote_code, **options)
    if chat:
        loaded, prompt = loaded.in_chats(), chat_text(loaded.tokenizer, prompt)
    graph, most = loaded.graph, length or loaded.length
    given = loaded.front + loaded.tokenizer.encode(prompt, add_special_tokens=False)
    if prompt:
        _check_number("prompt", len(given) - len(loaded.front), most)
    # scores of the absorbing graph hold its conditionals, for the samplers that ask for these
    by_score = loaded.conditionals is None or (loaded.score is not None and sampler in TIMED)
    network: Any = loaded.score if by_score else loaded.conditionals
    cache = None if loaded.block_length is None else loaded.cache(num_samples)
    begun = given if infill is None else loaded.front + _blanks(infill, loaded.tokenizer, most)
    tokens = torch.tensor(begun, dtype=torch.int64, device=loaded.device)
    with no_room(loaded.device, loaded.num_bytes, "fewer --num-samples"):
        drawn = draw_samples(
            network,
            num_samples=num_samples,
            length=None if infill is not None else len(loaded.front) + most,
            steps=steps,
            graph=graph,
            schedule=loaded.schedule if isinstance(graph, Mixture) else None,
            parametrization=loaded.parametrization if by_score else "logits",
            sampler=sampler,
            prompt=tokens if prompt or infill is None else None,
            infill=None if infill is None else tokens,
            block_length=block_length,
            cache=cache,
            guidance=guidance,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            return_trajectory=True,
        )
    texts = [loaded.tokenizer.decode(tokens.tolist(), skip_special_tokens=True) for tokens in drawn.tokens]
    if out is not None:
        write_atomically(out, _written(texts, out.suffix).encode())
    for number, (text, trajectory) in enumerate(zip(texts, drawn.trajectory.unbind(1), strict=True)):
        if show:
            for step in torch.linspace(0, len(trajectory) - 1, min(_FRAMES, len(trajectory))).round().int().tolist():
                typer.echo(f"{step:4}  {_dotted(trajectory[step].tolist(), graph.mask_index, loaded.tokenizer)}")
        if out is None:
            typer.echo(f"{_BETWEEN}\n{text}" if number else text)


def _written(texts: list[str], suffix: str) -> str:
    if suffix == ".jsonl":
        return "".join(json.dumps({"text": text}) + "\n" for text in texts)
    return f"\n{_BETWEEN}\n".join(texts) + "\n"


def _blanks(text: str, tokenizer: Tokenizer, most: int) -> list[int]:
    """The tokens of a text, and -1 for each of the n tokens that a "{n}" in it stands for; `most` of both."""
    parts = re.split(r"\{(\d+)\}", text)  # texts and numbers by turns
    tokens = [tokenizer.encode(part, add_special_tokens=False) for part in parts[::2]]
    counts = [int(count) for count in parts[1::2]]
    _check_number("infill", sum(counts) + sum(map(len, tokens)), most)
    whole = [*tokens[0]]
    for count, behind in zip(counts, tokens[1:], strict=True):
        whole += [-1] * count + behind
    return whole


def _check_number(option: str, n: int, most: int) -> None:
    if not 1 <= n <= most:
        raise ValueError(f"{option}: expected 1 to {most} tokens, got {n}")


def _dotted(tokens: list[int], mask_index: int | None, tokenizer: Tokenizer) -> str:
    """Tokens on one line, a dot for each mask."""
    runs = itertools.groupby(tokens, key=lambda token: token == mask_index)
    text = "".join("·" * len(list(run)) if masked else tokenizer.decode(list(run)) for masked, run in runs)
    return "".join(c if c.isprintable() else "↵" if c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
