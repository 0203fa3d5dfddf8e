"""Codebases with fastdiff in the place of their own code, as their users have them."""

import sys

import pytest

from fastdiff.integrations import loss_head


@pytest.fixture
def applied(monkeypatch):
    """Applies a seam to a stand-in, or to the codebase it stands for, until the test ends."""
    undone = []

    def apply(standin, apply_to):
        for name, module in standin.PUBLISHED.items():
            monkeypatch.setitem(sys.modules, name, module)
        undone.append(apply_to())
        return undone[-1]

    yield apply
    for undo in undone:
        undo()


@pytest.fixture
def small_parts(monkeypatch):
    """Logits of loss_heads.py's networks are made for a few positions at a time."""
    from loss_heads import V

    monkeypatch.setitem(loss_head.TILE_BYTES, "cpu", 7 * V * 8)
