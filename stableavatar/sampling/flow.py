"""Rectified flow, x_t = (1 - t) x_0 + t noise, velocity = noise - x_0 (equations 12 and 13): schedules, solvers, training pairs."""

import copy
import math

import numpy as np
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

SOLVERS = ("euler", "unipc", "dpm")
TRAIN_TIMESTEPS = 1000
"""The timestep that the network is told is this times sigma; the library's `num_train_timesteps`."""


def make_scheduler(solver: str, steps: int, shift: float) -> SchedulerMixin:
    """A library scheduler over the shifted flow schedule, ready for `steps` steps."""
    common = {"num_train_timesteps": TRAIN_TIMESTEPS}
    multistep = common | {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    if solver == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, **common)
    elif solver == "unipc":
        scheduler = UniPCMultistepScheduler(**multistep)
    elif solver == "dpm":
        scheduler = DPMSolverMultistepScheduler(**multistep)
    else:
        raise ValueError(f"solver '{solver}' is unknown; expected one of {', '.join(SOLVERS)}")
    scheduler.set_timesteps(steps)
    return scheduler


class Solver:
    """Steps one stretch of frames from noise to data; multistep solvers keep their history here, one per stretch.

    All solvers act on each latent element alone, so a stretch gives the same numbers as the whole video would.
    """

    def __init__(self, scheduler: SchedulerMixin) -> None:
        self._scheduler = copy.deepcopy(scheduler)
        self._scheduler.set_begin_index(0)

    def step(self, latents: Tensor, velocity: Tensor, step: int) -> Tensor:
        """Latents of step `step` + 1, in float32."""
        timestep = self._scheduler.timesteps[step]
        return self._scheduler.step(velocity, timestep, latents, return_dict=False)[0]

    def state(self) -> dict:
        """What changes from step to step, as tensors, numbers and lists of them."""
        return {k: v for k, v in vars(self._scheduler).items() if isinstance(v, (int, float, list, Tensor, type(None)))}

    def restore(self, state: dict) -> None:
        """Takes over a state that `state` gave."""
        vars(self._scheduler).update(copy.deepcopy(state))


def frame_noise(shape: tuple[int, int, int], seed: int, frame: int, scale: float = 1.0) -> Tensor:
    """Normal noise [C, 1, h, w] of one latent frame: the same whatever the order or the process that asks for it.

    Args:
        scale: standard deviation. The model was trained from 1; from less it makes what is nearer to the mean of what it could make.
    """
    channels, height, width = shape
    mixed = np.random.SeedSequence([seed, frame]).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(mixed))
    return scale * torch.randn((channels, 1, height, width), generator=generator)


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Noise levels in 0..1 moved towards 1 by a shift above 1: what the samplers do to their schedule."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """Quantiles in 0..1 of the distribution whose logit is normal (Esser et al. 2024, equation 19), for u in 0..1."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def mode(u: Tensor, scale: float) -> Tensor:
    """Noise levels that favour the middle for a positive scale (Esser et al. 2024, equation 20), for u in 0..1; falls from 1 to 0."""
    return 1 - u - scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Noisy latents [B, C, F, h, w] at the noise levels sigma [B] (equation 12)."""
    sigma = sigma.view(-1, *(1,) * (latents.ndim - 1))
    return (1 - sigma) * latents + sigma * noise


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """What the network learns to predict (equation 13)."""
    return noise - latents
