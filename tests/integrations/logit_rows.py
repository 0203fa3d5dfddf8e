"""How much of the logits a training step makes."""

import torch


def largest_rows(step, num_states, dtype=torch.float64):
    """What is largest of all that a step makes, in rows of so many logits."""
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    return max(event.self_cpu_memory_usage for event in profile.events()) / (num_states * dtype.itemsize)
