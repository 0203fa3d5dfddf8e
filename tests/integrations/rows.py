"""How many rows of logits a step makes at once."""

from torch.profiler import ProfilerActivity, profile


def largest_rows(step, num_states):
    """What a step returns, and what is largest of all that it makes, in rows of so many float64 numbers."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as made:
        result = step()
    return result, max(event.self_cpu_memory_usage for event in made.events()) / (8 * num_states)
