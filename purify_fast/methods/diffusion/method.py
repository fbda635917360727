"""The description of purification by diffusion, and the options of a purifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..trainings import Method

#: The solvers that remove the noise; see `purify_fast.methods.diffusion.process`.
Solver = Literal["ddpm", "ddim", "vp_sde", "ode", "one_shot"]


@dataclass(frozen=True)
class ProcessOptions:
    """The options of a diffusion purifier's process.

    Args:
        t_star: For a diffusion purifier: time t* up to which noise is added, as a share of the diffusion process.
            Several numbers mean several rounds of purification. Default: the saved time, or 0.1.
        denoising_steps: For a diffusion purifier: number of steps of the solver from t* back to 0, or a number for each
            round. Default: the saved number, or all steps of the training's process.
        solver: For a diffusion purifier: solver that removes the noise. Default: the saved solver, or ddpm.
    """

    t_star: tuple[float, ...] = ()
    denoising_steps: tuple[int, ...] = ()
    solver: Solver | None = None

    def changes(self) -> dict[str, Any]:
        """The fields of the process that --t-star, --denoising-steps and --solver set."""
        times, steps = (option[0] if len(option) == 1 else option for option in (self.t_star, self.denoising_steps))
        process = {"t_star": times, "steps": steps, "solver": self.solver}
        process = {name: value for name, value in process.items() if value not in ((), None)}
        return {"process": process} if process else {}


METHOD = Method(
    defence="DiffusionPurifier",
    parts={"Denoiser": "denoiser.module."},
    loading=ProcessOptions,
    recipes=True,
    trained_by="examples/your_diffusion_loop.py --train OUT trains a denoiser, "
    "and `purify-fast evaluate OUT --classifier FOLDER` puts it in front of a classifier",
)
