"""Clean blocks that a block model has been through already: the next block then costs a pass of its own length."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from fastdiff.checks import check_integer, check_tokens
from fastdiff.noise.blocks import block_causal

if TYPE_CHECKING:
    from fastdiff.model import DiffusionTransformer


class Cache(Protocol):
    """What `sample(cache=)` asks of a cache of b sequences.

    block_length: of the model. tokens: int64 [b, n], what it holds, whole blocks. With an attribute lm_head, an
    nn.Linear or its weight, it gives hidden states, else logits; one max_length tells how many tokens it can take.
    """

    block_length: int
    tokens: Tensor

    def append(self, tokens: Tensor) -> None:
        """Takes up clean blocks [b, m], m a multiple of block_length, that come next."""

    def __call__(self, xt: Tensor, rows: Tensor) -> Any:
        """Logits [r, m, V], or hidden states [r, m, D], of xt [r, m], the next block of the sequences `rows` [r]."""


class BlockCache:
    """Keys and values of a `DiffusionTransformer`, see `DiffusionTransformer.cache`. It has no gradient.

    Attributes:
        tokens: [b, n] int64, what it holds.
        block_length: of the model.
        lm_head: the last layer, for the hidden states that it gives.
        max_length: tokens that the model takes, or None.
    """

    def __init__(
        self,
        model: "DiffusionTransformer",
        batch_size: int,
        block_length: int,
        mask_index: int | None = None,
        total_noise: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if model.sigma_map is not None and (mask_index is None or total_noise is None):
            raise ValueError("mask_index, total_noise: a model that sees the noise level needs both, got None")

        def noise(xt: Tensor) -> Tensor:
            return total_noise(xt.eq(mask_index).double().mean(1)).float()  # type: ignore[misc, arg-type]

        self.block_length = check_integer("block_length", block_length, 1)
        batch_size, device = check_integer("batch_size", batch_size, 1), model.lm_head.weight.device
        self.tokens = torch.empty(batch_size, 0, dtype=torch.int64, device=device)
        self.max_length = model.config.max_length
        self._model, self._noise = model, None if model.sigma_map is None else noise
        self._states: list[Tensor | None] = [None] * len(model.blocks)  # [2, b, heads, room for tokens, D / heads]

    @property
    def lm_head(self) -> nn.Linear:
        return self._model.lm_head

    def append(self, tokens: Tensor) -> None:
        """Runs clean blocks that come next, int64 [b, m], through the network, and keeps their keys and values.

        Raises:
            TypeError, ValueError: another number of sequences, m that is no multiple of block_length, more than the
                model takes, or ids that it does not have.
        """
        self._check("tokens", tokens, (len(self.tokens),))
        if tokens.shape[1] % self.block_length:
            raise ValueError(f"tokens: expected whole blocks of {self.block_length} tokens, got {tokens.shape[1]}")
        held = self.tokens.shape[1]
        sees = block_causal(held + tokens.shape[1], self.block_length, tokens.device)[held:]
        self._run(tokens, None, sees, torch.zeros(len(tokens), device=tokens.device) if self._noise else None)
        self.tokens = torch.cat([self.tokens, tokens.long()], 1)

    def __call__(self, xt: Tensor, rows: Tensor | None = None) -> Tensor:
        """Hidden states [r, m, dim] of the block that comes next, xt int64 [r, m], m at most block_length.

        Args:
            rows: [r] int64, the sequences that xt are of; None means all.

        Raises:
            TypeError, ValueError: as `append`; also for a longer xt.
        """
        if rows is not None:
            check_tokens("rows", rows, None, self.tokens.device)
        self._check("xt", xt, (len(self.tokens),) if rows is None else rows.shape)
        if xt.shape[1] > self.block_length:
            raise ValueError(f"xt: expected at most a block of {self.block_length} tokens, got {xt.shape[1]}")
        everyone = rows is None or torch.equal(rows, torch.arange(len(self.tokens), device=rows.device))
        sigma = self._noise(xt) if self._noise else None
        return self._run(xt, None if everyone else rows, None, sigma)

    @torch.no_grad()
    def _run(self, xt: Tensor, rows: Tensor | None, sees: Tensor | None, sigma: Tensor | None) -> Tensor:
        held = self.tokens.shape[1]
        positions = torch.arange(held, held + xt.shape[1], device=xt.device)

        def after(layer: int) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
            def of_all(k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
                new = torch.stack((k, v))
                if rows is not None:
                    return torch.cat([self._room(layer, new, held)[:, rows, :, :held], new], 3).unbind()
                states = self._room(layer, new, held + xt.shape[1])[..., : held + xt.shape[1], :]
                states[..., held:, :] = new  # kept if `tokens` grow, else written over
                return states.unbind()

            return of_all

        past = [after(layer) for layer in range(len(self._states))]
        return self._model.body(xt, sigma, sees, positions, past=past)

    def _room(self, layer: int, new: Tensor, length: int) -> Tensor:
        """A layer's keys and values, with room for so many tokens; at least doubled where it grows."""
        states = self._states[layer]
        room = 0 if states is None else states.shape[3]
        if states is None or room < length:
            larger = new.new_empty(2, len(self.tokens), new.shape[2], max(length, 2 * room), new.shape[4])
            if states is not None:
                larger[..., :room, :] = states
            self._states[layer] = states = larger
        return states

    def _check(self, name: str, tokens: Tensor, batch: tuple[int, ...]) -> None:
        check_tokens(name, tokens, None, self.tokens.device)
        most, held = self.max_length, self.tokens.shape[1]
        if tokens.dim() != 2 or tokens.shape[:1] != batch or tokens.shape[1] < 1:
            raise ValueError(f"{name}: expected shape [{batch[0]}, m] with m >= 1, got {tuple(tokens.shape)}")
        if most is not None and held + tokens.shape[1] > most:
            raise ValueError(
                f"{name}: expected at most {most - held} tokens after the {held} held, got {tokens.shape[1]}"
            )
