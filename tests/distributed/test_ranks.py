"""Losses and tokens over several processes of torchrun and gloo: those of one, and errors without hanging."""

from pathlib import Path

import pytest
import torchrun

pytestmark = pytest.mark.slow

# By number of ranks. Starting processes takes longest, so the functions of one number share them, one after another.
# The last one raises in the middle of a forward.
CASES = {
    2: [
        "options_of_the_last_layer",
        "statistics",
        "log_probabilities",
        "numbers_of_any_size",
        "wrong_calls_raise_on_every_rank",
        "what_one_rank_refuses_raises_on_every_rank",
        "double_backward_is_an_error",
        "data_parallel",
        "vocabulary_parallel",
        "likelihoods_with_gradients",
        "tokens_of_one_rank",
        "what_differs_or_does_not_fit_raises_on_every_rank",
        "fsdp_with_a_last_layer_of_its_own",
    ],
    3: [
        "dtensors",
        "sharded_logits",
        "tokens_of_one_rank",
        "tokens_of_hidden_states",
        "what_is_exchanged",
        "top_p_of_flat_rows",
        "soft_embeddings",
        "what_differs_or_does_not_fit_raises_on_every_rank",
        "what_one_rank_refuses_raises_on_every_rank",
    ],
    4: ["vocabulary_parallel", "statistics", "log_probabilities"],
}


@pytest.mark.parametrize("ranks", CASES)
def test_ranks(ranks):
    torchrun.launch(Path(__file__).with_name("ranks.py"), ranks, *CASES[ranks])
