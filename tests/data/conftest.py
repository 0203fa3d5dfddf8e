"""Texts to tokenize and a tokenizer."""

import pytest
from tokenized import EOS, TEXTS, write_jsonl


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """A tokenizer.json, byte-level BPE as GPT-2's, trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.enable_truncation(7)  # which a tokenizer.json may hold, and which must not count
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with the texts as JSONL."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    return tmp_path
