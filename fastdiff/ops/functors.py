"""What the operators ask of a row loss beside its kernels: a declaration each, by the name that kernels know it by.

A loss declares itself where its public function is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor


@dataclass(frozen=True)
class Functor:
    """A row loss.

    Args:
        formula: the losses in float64, without weights, of `Rows` whose `mask` is what is scored; tokens that are not
            hold numbers that no formula minds.
        masked: x_t is x0 or the mask, and masks are scored; else x_t is any id, and all tokens are scored.
        apart: which id kernels treat apart beside x0: "mask", if it is excluded, or "xt".
        logits: what the row is taken for, if not itself, in the formula and for statistics.
        of_scores: rows are log scores, which can be scaled by sigma.
        clean: sigma may be 0: everywhere or, of scores, where x_t = x0.
        extra: what `extra` is called in public; None if there is none.
        extra_range: of tokens, where `extra` is out of its range, and what that is, if values are checked.
        over_ranks: how rows cut over ranks come together: a "sum" of parts, a "softmax", or not at all.
        from_sums: three numbers in the place of a row suffice: the log-sum-exp of the others, x0's, and the mask's.
    """

    formula: Callable[[Any], Tensor]
    masked: bool = True
    apart: Literal["mask", "xt"] = "mask"
    logits: Callable[[Any], Tensor] | None = None
    of_scores: bool = False
    clean: bool = False
    extra: str | None = None
    extra_range: Callable[[Any], tuple[Tensor, str]] | None = None
    over_ranks: Literal["sum", "softmax"] | None = None
    from_sums: bool = False


FUNCTORS: dict[str, Functor] = {}
