"""What the masked estimators share: checked inputs, and losses of masked sequences, a batch at a time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_bool, check_tensor, check_tokens, check_values
from fastdiff.estimators.replay import replayed
from fastdiff.evaluating import BlockModel, Model, evaluating, model_parts
from fastdiff.losses.linear_losses import linear_dce_loss
from fastdiff.losses.row_losses import dce_loss
from fastdiff.noise.noising import Masked, mask_exactly

_LOGITS_PER_BATCH = 2**26  # 256 MB in float32
_LEAST_VOCABULARY = 1024  # what a network holds for a token, logits aside, counts as this many


class Scorer:
    """-log c(x0_i | xt) at the masked tokens of B sequences x0, c the conditionals of a model.

    Attributes:
        x0: [B, L] int64.
        lengths: [B] int64, tokens of each sequence; the model never sees what comes after them.
        target: [B, L] bool, the positions that may be masked.
        num_tokens: [B] int64, how many those are.
    """

    def __init__(
        self,
        model: Model | BlockModel,
        x0: Tensor,
        mask_index: int,
        *,
        target: Tensor | None = None,
        lengths: Tensor | None = None,
        exclude_mask: bool = True,
        batch_size: int | None = None,
        differentiable: bool = False,
        backend: str | None = None,
    ) -> None:
        inside = _check_x0(x0, lengths)
        if mask_index < 0:
            raise ValueError(f"mask_index: expected an id >= 0 (xt is made before V is known), got {mask_index}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if target is None:
            target = inside
        check_bool("target", target, x0.shape, x0.device)
        if not target.any(1).all():
            empty = int((~target.any(1)).nonzero()[0])
            raise ValueError(f"target: expected at least one position in a sequence, got none in x0[{empty}]")
        if (target & ~inside).any():
            raise ValueError("target: expected positions inside the lengths, got one after them")
        if (target & (x0 == mask_index)).any():
            raise ValueError(f"x0: expected no mask (mask_index={mask_index}) at the target positions, got one")
        self.body, self.lm_head, self.bias = model_parts(model)
        self.x0, self.target, self.mask_index = x0, target, mask_index
        self.exclude_mask, self.batch_size, self.backend = exclude_mask, batch_size, backend
        self.differentiable = differentiable
        self.lengths, self.num_tokens = inside.sum(1), target.sum(1)
        # what the model must give a logit of; the mask only to leave it out
        self._largest_id = max([mask_index if exclude_mask else 0, *x0.where(target, 0).amax(1).tolist()])
        self._advance: Callable[[int], None] = lambda num_rows: None

    def groups(self, *columns: Tensor) -> list[Tensor]:
        """Sequences [k] that agree in length, number of target tokens and the given columns [B]."""
        return equal_rows(torch.stack([self.lengths, self.num_tokens, *columns], 1))

    def targets(self, which: Tensor) -> Tensor:
        """The target tokens [K, L] of a group, of its own length L."""
        return self.target[which, : int(self.lengths[which[0]])]

    def batches(self, num_rows: int) -> Iterator[Tensor]:
        """Rows 0..num_rows-1 in runs of batch_size; where that is None, a first run of one row sets it."""
        start = 0
        while start < num_rows:
            stop = min(num_rows, start + (self.batch_size or 1))
            yield torch.arange(start, stop, device=self.x0.device)
            self._advance(stop - start)
            start = stop

    def __call__(self, which: Tensor, masked: Masked) -> Tensor:
        """Losses [b, L], float64, of the sequences `which` [b] masked as given; 0 where nothing is masked."""
        return self.in_one_pass(lambda: self.losses(self.output(masked.xt), which, masked.mask))

    def in_one_pass(self, losses: Callable[[], Tensor]) -> Tensor:
        """What `losses` gives; if differentiable, what backward needs of it is made anew there, not kept."""
        return replayed(losses) if self.differentiable and torch.is_grad_enabled() else losses()

    def output(self, xt: Tensor, *given: Tensor) -> Tensor:
        """Logits [b, L, V] of xt [b, L], or hidden states [b, L, D] where the last layer is apart."""
        output = self.body(xt, *given)
        if self.lm_head is None:
            output = getattr(output, "logits", output)
            self._check("logits", output, xt.shape, "V")
            self._set_sizes(output.shape[2], output.shape[2])
        else:
            output = getattr(output, "last_hidden_state", output)
            self._check("hidden states", output, xt.shape, "D")
            self._set_sizes(len(self.lm_head), output.shape[2])
        return output

    def losses(self, output: Tensor, which: Tensor, mask: Tensor) -> Tensor:
        """Losses [b, L], float64, where mask [b, L] is true, and 0 elsewhere, from what `output` gave."""
        x0 = self.x0[which, : mask.shape[1]].where(mask, 0)
        options: dict[str, Any] = dict(mask_index=self.mask_index, exclude_mask=self.exclude_mask)
        options |= dict(mask=mask, backend=self.backend)
        if self.lm_head is None:
            return dce_loss(output, x0, **options).double()
        return linear_dce_loss(output, self.lm_head, x0, bias=self.bias, **options).double()

    def run(self, which: Tensor, mask: Tensor) -> Tensor:
        """Losses [K, passes, L] of a group of K sequences, a pass for each of the masks [K, passes, L]."""
        passes, x0 = mask.shape[1], self.x0[which, : mask.shape[2]]
        losses = []
        for rows in self.batches(len(which) * passes):
            k, p = rows // passes, rows % passes
            masked = mask[k, p]
            losses.append(self(which[k], Masked(x0[k].masked_fill(masked, self.mask_index), masked)))
        return torch.cat(losses).view(mask.shape)

    def draw(
        self, which: Tensor, counts: Tensor, steps: Tensor, seed: Tensor, sample_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Losses and masks [K, passes, L] of a group of K sequences, see `draw_masks`."""
        mask = draw_masks(self.targets(which), counts, steps, seed, sample_ids, self.backend)
        return self.run(which, mask), mask

    @contextmanager
    def evaluating(self, num_rows: int) -> Iterator[None]:
        """Around `num_rows` passes, see `fastdiff.evaluating`."""
        with evaluating(self.body, num_rows, differentiable=self.differentiable) as self._advance:
            yield

    def _check(self, what: str, output: Any, shape: torch.Size, width: str) -> None:
        check_tensor(f"model's {what}", output)
        if output.dim() != 3 or output.shape[:2] != shape:
            raise ValueError(f"model's {what}: expected shape [{shape[0]}, {shape[1]}, {width}], got {[*output.shape]}")

    def _set_sizes(self, num_states: int, width: int) -> None:
        """What the first output tells: whether all ids exist, and how many sequences fit a batch."""
        if self._largest_id >= num_states:
            no_mask = self.exclude_mask and self.mask_index >= num_states
            hint = "; a model without a logit of the mask needs exclude_mask=False" if no_mask else ""
            raise ValueError(f"x0, mask_index: expected ids in [0, V={num_states}), got {self._largest_id}{hint}")
        if self.batch_size is None:
            width = max(width, _LEAST_VOCABULARY)
            self.batch_size = max(1, _LOGITS_PER_BATCH // (self.x0.shape[1] * width))


def draw_masks(
    target: Tensor, counts: Tensor, steps: Tensor, seed: Tensor, sample_ids: Tensor, backend: str | None
) -> Tensor:
    """Masks [K, passes, L] of K sequences, pass p with counts[:, p] of the target tokens [K, L].

    The draws are named by (seed, sample_ids[k], steps[p]): at one step a smaller count masks a subset of a larger.
    """
    passes = counts.shape[1]
    row = torch.arange(counts.numel(), device=target.device)
    k, p = row // passes, row % passes
    masked = mask_exactly(
        target[k].long(),
        counts.flatten(),
        mask_index=0,
        maskable=target[k],
        seed=seed,
        step=steps[p],
        sample_ids=sample_ids[k],
        backend=backend,
    )
    return masked.mask.view(*counts.shape, -1)


def equal_rows(keys: Tensor) -> list[Tensor]:
    """Indices of the rows of keys [B, C] that are equal, one tensor for each value, rising in each."""
    _, group = keys.unique(dim=0, return_inverse=True)
    order = group.argsort(stable=True)
    return list(order.split(group.bincount().tolist())) if len(keys) else []


def _check_x0(x0: Tensor, lengths: Tensor | None) -> Tensor:
    """Which positions [B, L] are inside the lengths."""
    check_tensor("x0", x0)
    if x0.dtype != torch.int64:
        raise TypeError(f"x0: expected int64 token ids, got {x0.dtype}")
    if x0.dim() != 2 or x0.shape[1] == 0:
        raise ValueError(f"x0: expected shape [B, L] with L >= 1, got {tuple(x0.shape)}")
    if lengths is None:
        inside = torch.ones_like(x0, dtype=torch.bool)
    else:
        check_tokens("lengths", lengths, x0.shape[:1], x0.device)
        check_values("lengths", lengths, (lengths < 1) | (lengths > x0.shape[1]), f"lengths in [1, {x0.shape[1]}]")
        inside = torch.arange(x0.shape[1], device=x0.device) < lengths.unsqueeze(1)
    if ((x0 < 0) & inside).any():
        raise ValueError(f"x0: expected ids >= 0, got {int(x0[inside].min())}")
    return inside
