"""What the tests of tokenizing share: texts, and what comes of them."""

import json
import random
from pathlib import Path

import numpy as np

from fastdiff.data.shards import TokenFolder

WORDS = ["sea", "ship", "ümlaut", "north", "wind", "\N{SNOWMAN}", "harbour"]
TEXTS = [" ".join(random.Random(k).choices(WORDS, k=5 + k % 40)) + f" {k}" for k in range(300)]
EOS = "<|endoftext|>"


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"id": k, "text": text}) + "\n" for k, text in enumerate(texts)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def written(folder: Path) -> tuple[list[bytes], list[bytes]]:
    """Documents of bytes: to train on, and held out."""
    tokens = TokenFolder(folder)
    both = (tokens.train, tokens.held_out)
    return tuple([s.document(k).astype(np.uint8).tobytes() for k in range(s.num_documents)] for s in both)
