"""The names of the solvers, which the command line reads without PyTorch."""

from __future__ import annotations

from typing import Literal

#: The solvers that remove the noise; see `purify_fast.methods.diffusion.process`.
Solver = Literal["ddpm", "ddim", "vp_sde", "ode", "one_shot"]
