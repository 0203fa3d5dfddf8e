"""English to train on and to be surprised by, and its 27 letters: the space and a to z, as text8 has them."""

import re
import subprocess
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

from fastdiff.data import Text
from fastdiff.files import write_atomically

ALPHABET = " abcdefghijklmnopqrstuvwxyz"
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGITS = {str(digit): name for digit, name in enumerate(NAMES)}
CHUNK = 8192  # letters; whole chunks are held out
_IDS = torch.zeros(256, dtype=torch.int64)
_IDS[list(ALPHABET.encode())] = torch.arange(len(ALPHABET))


def letters(text: str) -> str:
    """Lower case, digits by their names, and a space for anything else."""
    text = re.sub(r"\d", lambda digit: f" {DIGITS.get(digit.group(), '')} ", text.lower())
    return re.sub(r"[^a-z]+", " ", text).strip()


class Letters:
    """The tokenizer of 27 letters, as `fastdiff.data.texts.Tokenizer`."""

    eos_token_id = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return _IDS[list(letters(text).encode())].tolist()

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return "".join((ALPHABET + "_")[token] for token in tokens)  # the mask is _


class LetterText:
    """Windows of letters, as `fastdiff.data.TokenSource`; a twentieth of the chunks is held out."""

    num_tokens = len(ALPHABET)

    def __init__(self, text: str, length: int) -> None:
        text = letters(text)
        chunks = [text[i : i + CHUNK].encode() for i in range(0, len(text), CHUNK)]
        self._bytes = Text(chunks, length)
        self.fingerprint = self._bytes.fingerprint

    def __len__(self) -> int:
        return len(self._bytes.train_bytes)

    def sequences(self, start: int, stop: int) -> Tensor:
        return _IDS[self._bytes.sequences(start, stop)]

    def validation(self, n: int) -> Tensor:
        return _IDS[self._bytes.validation(n)]


def windows(text: str, tokenizer, length: int, n: int) -> Tensor:
    """At most n disjoint windows, evenly spread over a text: int64 [<= n, length]."""
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
    pieces = ids[: len(ids) // length * length].view(-1, length)
    n = min(n, len(pieces))
    return pieces[torch.arange(n) * len(pieces) // n]


def english(path: Path | None, kept: Path) -> str:
    """The text of a file, or the Bible's."""
    return path.read_text(errors="replace") if path else king_james(kept)


def other_english() -> str:
    """What Python's own help says of its language."""
    return "\n".join(topics[name] for name in sorted(topics))


def king_james(kept: Path) -> str:
    """The Bible of 1611, 4.3 MB, from two Debian packages that are unpacked and not installed; once, into `kept`."""
    path = kept / "king_james.txt"
    if not path.exists():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            try:
                subprocess.run(
                    ["apt-get", "download", "-q", "bible-kjv", "bible-kjv-text"],
                    cwd=folder,
                    check=True,
                    capture_output=True,
                )
                for package in folder.glob("*.deb"):
                    subprocess.run(["dpkg-deb", "-x", package, folder], check=True, capture_output=True)
                program = [folder / "usr/bin/bible", "-p", folder / "usr/lib", "-f", "gen1:1-rev22:21"]
                verses = subprocess.run(program, check=True, capture_output=True, text=True).stdout
            except (OSError, subprocess.CalledProcessError) as error:
                raise SystemExit(
                    "text: the King James Bible comes as Debian's packages bible-kjv and bible-kjv-text, which could "
                    f"not be had here ({error}); run apt-get update, or name a text with --text"
                ) from None
        found = "\n".join(line.partition(" ")[2] for line in verses.splitlines())  # behind "Ge1:1"
        kept.mkdir(parents=True, exist_ok=True)
        write_atomically(path, found.encode())
    return path.read_text()
