"""Texts and tokens: in memory, on disk, from files; what training and evaluation read."""

from fastdiff.data.permutation import permute
from fastdiff.data.shards import Shards, TokenFolder
from fastdiff.data.sources import NUM_BYTES, Table, Text, TokenSource, decode, encode, load_documents
from fastdiff.data.tokenizing import tokenize

__all__ = [
    "NUM_BYTES",
    "Shards",
    "Table",
    "Text",
    "TokenFolder",
    "TokenSource",
    "decode",
    "encode",
    "load_documents",
    "permute",
    "tokenize",
]
