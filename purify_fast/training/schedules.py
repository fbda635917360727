"""Learning rates as functions of progress through the run."""

import math


def one_cycle(progress: float, peak: float, warm: float = 0.2, floor: float = 1e-3) -> float:
    """Cosine up from ``peak / 25`` over the first ``warm`` of the run, cosine down to ``floor * peak``; Smith 2018."""
    if progress < warm:
        low, position = peak / 25, 1 - progress / warm
    else:
        low, position = floor * peak, (progress - warm) / (1 - warm)
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * position))
