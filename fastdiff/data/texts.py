"""Texts as tokens, and their pieces: what is scored, given what."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastdiff.checks import check_choice
from fastdiff.data.sources import NUM_BYTES, decode, encode

CUTS = ("windows", "documents", "sliding")


class Tokenizer(Protocol):
    """Of transformers, or `Bytes`."""

    eos_token_id: int | None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str: ...


class Bytes:
    """The tokenizer of models on bytes."""

    eos_token_id = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return encode(text).tolist()

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return decode(torch.tensor([token for token in tokens if token < NUM_BYTES], device="cpu"))


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """A tokenizer: "bytes", a tokenizer.json of `tokenizers`, or a folder or name as transformers takes it.

    Raises:
        ImportError: transformers is not installed.
        ValueError: there is no such tokenizer.
    """
    if name == "bytes":
        return Bytes()
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError:
        raise ImportError("tokenizers need transformers: pip install transformers") from None
    try:
        if name.endswith(".json"):
            return PreTrainedTokenizerFast(tokenizer_file=name)
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # that of tokenizers is one itself
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"tokenizer: found none in {name} ({first}); name a folder that has one") from None


def saved_hash(folder: Path) -> str:
    """A hash of a tokenizer's files, as it has written them."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        digest.update(repr((file.relative_to(folder).as_posix(), file.read_bytes())).encode())
    return digest.hexdigest()


class Tokens(NamedTuple):
    """A document: ids [N] int64, and how many bytes and words (between spaces) begin before each of them, [N + 1]."""

    ids: Tensor
    bytes: Tensor
    words: Tensor


class Piece(NamedTuple):
    """Tokens that are scored (target) given others (context), int64 each, with the target's bytes and words."""

    text: str
    context: Tensor
    target: Tensor
    bytes: int
    words: int


def split_pair(tokenizer: Tokenizer, context: str, whole: str) -> tuple[list[int], list[int]]:
    """The tokens of a whole text: those that its beginning, the context, has when it is alone, and the rest.

    A token with characters of both is of the rest.
    """
    tokens, alone = (tokenizer.encode(text, add_special_tokens=False) for text in (whole, context))
    start = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(tokens, alone, strict=False)))
    return tokens[:start], tokens[start:]


def chat_text(tokenizer: Any, messages: Any, add_generation_prompt: bool = True) -> str:
    """Messages as the tokenizer's chat template writes them, with the head of the assistant's turn behind them.

    Args:
        messages: dicts with role and content; or a text, the user's only message.
        add_generation_prompt: False goes on in the last message instead of beginning a turn.

    Raises:
        ValueError: no chat template, or one that refuses the messages.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("chat: expected a tokenizer with a chat template, got one without")
    from jinja2 import TemplateError

    messages = [dict(role="user", content=messages)] if isinstance(messages, str) else messages
    turn = dict(add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **turn)
    except TemplateError as error:
        raise ValueError(f"chat: the tokenizer's template refuses these messages: {error}") from None


def tokens_of(tokenizer: Any, document: bytes) -> Tokens:
    """The tokens of a UTF-8 document, and an end of text behind them if the tokenizer has one."""
    word_starts = torch.tensor([match.start() for match in re.finditer(rb"\S+", document)], dtype=torch.int64)
    if isinstance(tokenizer, Bytes):
        ids = torch.frombuffer(bytearray(document), dtype=torch.uint8).long() if document else word_starts
        starts = torch.arange(len(document) + 1)
    else:
        text = document.decode()
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
        sizes = torch.tensor([len(character.encode()) for character in text], dtype=torch.int64)
        byte_of = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])  # of each character, and the end
        starts = byte_of[torch.tensor([*(start for start, _ in encoded["offset_mapping"]), len(text)])]
    words = torch.searchsorted(word_starts, starts)
    if (end := tokenizer.eos_token_id) is not None:
        ids = torch.cat([ids, ids.new_tensor([end])])
        starts, words = (torch.cat([count, count[-1:]]) for count in (starts, words))
    return Tokens(ids, starts, words)


def pieces(
    name: str,
    documents: Sequence[Tokens],
    length: int,
    *,
    cut: str = "windows",
    context: int = 0,
    most: int | None = None,
) -> Iterator[Piece]:
    """What is scored of a text, by how the field cuts texts.

    Args:
        documents: of the text.
        length: the longest sequence that the model takes.
        cut: "windows", the documents one after the other in disjoint windows of that length, evenly spread, a rest left
            out; "documents", each on its own, a longer one in windows; "sliding", windows one after the other, each
            beginning in the one before it.
        context: of "sliding", the tokens of a window that are given and not scored.
        most: pieces at most; None means all.

    Raises:
        ValueError: a text shorter than a window; an unknown cut; a context as long as a window.
    """
    check_choice("cut", cut, CUTS)
    if not 0 <= context < length or (context and cut != "sliding"):
        raise ValueError(f"context: expected 0, or with cut 'sliding' less than a window's {length}, got {context}")
    if cut == "documents":
        found = (piece for one in documents for piece in _one_by_one(name, one, length, 0))
        yield from _spread(list(found), most)
        return
    whole = _joined(documents)
    if len(whole.ids) < length:
        raise ValueError(
            f"data: expected at least the {length} tokens of a window, got {len(whole.ids)} of {name}; take a smaller "
            "length, or cut documents"
        )
    if cut == "sliding":
        yield from _spread(list(_one_by_one(name, whole, length, context)), most)
        return
    available = len(whole.ids) // length
    n = available if most is None else min(most, available)
    for start in (torch.arange(n) * available // n * length).tolist():
        yield _piece(name, whole, start, start, start + length)


def _one_by_one(name: str, tokens: Tokens, length: int, context: int) -> Iterator[Piece]:
    end = 0
    while end < len(tokens.ids):
        given = min(context, end)
        start, end = end, min(end + length - given, len(tokens.ids))
        yield _piece(name, tokens, start - given, start, end)


def _spread(found: list[Piece], most: int | None) -> Iterable[Piece]:
    n = len(found)
    return found if most is None or most >= n else [found[i * n // most] for i in range(most)]


def _piece(name: str, tokens: Tokens, given: int, start: int, end: int) -> Piece:
    counts = [int(count[end] - count[start]) for count in (tokens.bytes, tokens.words)]
    return Piece(name, tokens.ids[given:start], tokens.ids[start:end], *counts)


def _joined(documents: Sequence[Tokens]) -> Tokens:
    def chained(counts: list[Tensor]) -> Tensor:
        begin, all_of = 0, [torch.zeros(1, dtype=torch.int64)]
        for count in counts:
            all_of.append(count[1:] + begin)
            begin += int(count[-1])
        return torch.cat(all_of)

    ids = torch.cat([torch.zeros(0, dtype=torch.int64), *(one.ids for one in documents)])
    return Tokens(ids, chained([one.bytes for one in documents]), chained([one.words for one in documents]))
