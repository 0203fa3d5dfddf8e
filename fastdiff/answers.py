"""Prompts and their answers: lines of JSON, what is scored of them, and which answer is the likeliest.

Every answer has masks of its own, so that their errors are independent.
"""

import json
import math
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastdiff.data.texts import Piece, chat_text, split_pair
from fastdiff.estimators import NLLEstimate
from fastdiff.likelihood import row
from fastdiff.loading import Loaded

RANKINGS = ("by_nll", "by_nll_per_byte")
_DRAWS = 10_000
_Z = 1.96  # a normal's 95%


class Question(NamedTuple):
    """A line of a file: its number, answers, their tokens given the prompt's, and which is right: a single one, or None
    where it does not say."""

    line: int
    answers: list[str]
    pieces: list[Piece]
    right: int | None


def read_questions(file: Path, model: Loaded, *, chat: bool = False) -> list[Question]:
    """The questions of a file.

    Args:
        file: a JSON object a line, {"prompt": text, "answers": [text, ...]} or {"prompt": text, "answer": text}; also
            "right", the index of the right answer. Lines without a character are skipped.
        model: its tokenizer, mask and length.
        chat: prompts are what a user says, or lists of messages {"role": ..., "content": ...}, and are written by the
            tokenizer's chat template; answers are what the assistant says.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no line, or one of something else; no tokens, or more than the model takes.
    """
    found = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                if line.strip():
                    found.append(_question(number, line, model, chat))
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from None
    if not found:
        raise ValueError(f"data: expected a line of JSON for each prompt, found none in {file}")
    return found


def records(questions: list[Question], estimate: NLLEstimate) -> list[dict[str, Any]]:
    """Numbers of each question for JSON: of its answers, and if there are several, which is the likeliest.

    Args:
        estimate: of all answers, one question's after another's.
    """
    low, high = estimate.interval()
    columns = torch.stack([estimate.nll, low, high, estimate.stderr, estimate.degrees_of_freedom], 1).numpy()
    passes, found, end = estimate.num_forwards.tolist(), [], 0
    for question in questions:
        start, end = end, end + len(question.pieces)
        rows, sizes = columns[start:end], np.array([piece.bytes for piece in question.pieces])
        answers = zip(question.answers, question.pieces, rows.tolist(), passes[start:end], strict=True)
        record: dict[str, Any] = dict(line=question.line, right=question.right, answers=[_numbers(*a) for a in answers])
        if len(rows) > 1:
            nll, _, _, stderr, freedom = rows.T
            for name, by in zip(RANKINGS, (1, sizes), strict=True):
                record[name] = ranking(nll / by, stderr / by, freedom)
        found.append(record)
    return found


def summary(questions: list[Question], estimate: NLLEstimate, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Numbers of all questions for JSON.

    Returns:
        right: of the right answers, as one text (`likelihood.row`); if any are known.
        accuracy: by each of `RANKINGS`; if they are known among several.
    """
    starts = accumulate((len(question.pieces) for question in questions), initial=0)
    right = {
        start + q.right: q.pieces[q.right] for q, start in zip(questions, starts, strict=False) if q.right is not None
    }
    found: dict[str, Any] = {}
    if right:
        columns = {name: column[[*right]] for name, column in vars(estimate).items() if column is not None}
        found["right"] = row(NLLEstimate(**columns), [*right.values()], drawn=True)
    if any(record["right"] is not None and RANKINGS[0] in record for record in records):
        found["accuracy"] = {by: accuracy(records, by) for by in RANKINGS}
    return found


def ranking(nll: np.ndarray, stderr: np.ndarray, degrees_of_freedom: np.ndarray) -> dict[str, Any]:
    """The order of K answers, and how far the errors of their estimates leave it open.

    Returns:
        order: indices, the likeliest first.
        probabilities: that each is truly the likeliest, where the truth is the estimate and its error, Student's t, and
            nothing was known before. They add up to 1; answers that tie share. From draws: good to 0.01.
        error: the probability that the first is not.
    """
    t = np.random.default_rng(0).standard_t(degrees_of_freedom.clip(max=1e6), (_DRAWS, len(nll)))
    truth = nll + np.nan_to_num(stderr) * t  # an infinite estimate has no error
    least = truth == truth.min(1, keepdims=True)
    order, probabilities = nll.argsort(kind="stable").tolist(), (least / least.sum(1, keepdims=True)).mean(0)
    return dict(order=order, probabilities=probabilities.tolist(), error=1 - probabilities[order[0]])


def accuracy(records: list[dict[str, Any]], by: str) -> dict[str, Any]:
    """How often the likeliest of several answers, by one of `RANKINGS`, is the right one.

    Returns:
        accuracy: a share of the records that say which is right, and their number `questions`.
        questions_interval: 95%, of what these stand for (Wilson's).
        masking_interval: 95%, of the accuracy of these with likelihoods that have no error.
    """
    asked = [record for record in records if record["right"] is not None and by in record]
    n = len(asked)
    share = sum(record[by]["order"][0] == record["right"] for record in asked) / n
    centre, half = share + _Z**2 / (2 * n), _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))
    p = np.array([record[by]["probabilities"][record["right"]] for record in asked])
    without, error = p.mean(), _Z * math.sqrt((p * (1 - p)).sum()) / n
    return dict(
        accuracy=share,
        questions=n,
        questions_interval=[(centre + sign * half) / (1 + _Z**2 / n) for sign in (-1, 1)],
        masking_interval=[max(without - error, 0.0), min(without + error, 1.0)],
    )


def _question(number: int, line: bytes, model: Loaded, chat: bool) -> Question:
    try:
        said = json.loads(line)
    except ValueError:
        raise ValueError(f"expected JSON, got {line[:40]!r}") from None
    if not isinstance(said, dict) or "prompt" not in said or ("answers" in said) == ("answer" in said):
        raise ValueError(f'expected {{"prompt": ..., "answers": [...]}} or one "answer", got {line[:40]!r}')
    answers = said.get("answers", [said.get("answer")])
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"answers: expected texts, at least one, got {answers!r}")
    if twice := [answer for k, answer in enumerate(answers) if answer in answers[:k]]:
        raise ValueError(f"answers: expected different ones, got {twice[0]!r} twice")
    right = said.get("right", 0 if len(answers) == 1 else None)
    if right is not None and (type(right) is not int or not 0 <= right < len(answers)):
        raise ValueError(f"right: expected an index, 0 to {len(answers) - 1}, got {right!r}")
    prompt = _prompt(said["prompt"], model, chat)
    return Question(number, answers, [_piece(number, prompt, answer, model, chat) for answer in answers], right)


def _prompt(prompt: Any, model: Loaded, chat: bool) -> str:
    messages = isinstance(prompt, list) and all(
        isinstance(message, dict) and all(isinstance(message.get(part), str) for part in ("role", "content"))
        for message in prompt
    )
    if not isinstance(prompt, str) and not (messages and prompt):
        raise ValueError(f"prompt: expected a text, or messages with role and content, got {prompt!r}")
    if messages and not chat:
        raise ValueError("prompt: expected a text, got messages, which the chat template is for: add --chat")
    return chat_text(model.tokenizer, prompt) if chat else prompt


def _piece(number: int, prompt: str, answer: str, model: Loaded, chat: bool) -> Piece:
    """Spaces at the end of a prompt that is a text are scored with the answer, as lm-evaluation-harness does."""
    context, target = split_pair(model.tokenizer, prompt if chat else prompt.rstrip(), prompt + answer)
    if not answer or not target:
        raise ValueError(f"answers: expected at least a token in each, got {answer!r}")
    if len(context) + len(target) > model.length:
        raise ValueError(
            f"answers: expected at most {model.length} tokens with the prompt, got {len(context)} of the prompt and "
            f"{len(target)} of {answer[:40]!r}"
        )
    if model.graph.mask_index in context + target:
        raise ValueError("expected no mask among the tokens of prompt and answers")
    size = len((answer.lstrip() or answer).encode())
    return Piece(
        f"line {number}", torch.tensor(context, dtype=torch.int64), torch.tensor(target), size, len(answer.split())
    )


def _numbers(answer: str, piece: Piece, numbers: list[float], network_passes: int) -> dict[str, Any]:
    nll, low, high, stderr, _ = numbers
    found = dict(answer=answer, nll=nll, nll_interval=[low, high], stderr=stderr, network_passes=network_passes)
    for unit, size in (("token", len(piece.target)), ("byte", piece.bytes)):
        found |= {
            f"{unit}s": size,
            f"nll_per_{unit}": nll / size,
            f"nll_per_{unit}_interval": [low / size, high / size],
        }
    return found
