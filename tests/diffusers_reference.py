"""The pictures diffusers makes, for comparison with ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import numpy.typing as npt
import torch

Pixels = npt.NDArray[np.uint8]

# What each of our sampler names stands for: scheduler class and what the name fixes.
SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++sde_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
}
_SDE = {"algorithm_type": "sde-dpmsolver++"}
MORE_SCHEDULERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "dpm++2m_sde": ("DPMSolverMultistepScheduler", _SDE),
    "dpm++3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpm++3m_sde": ("DPMSolverMultistepScheduler", {**_SDE, "solver_order": 3}),
    "dpm++2s": ("DPMSolverSinglestepScheduler", {"solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 2}),
    "deis": ("DEISMultistepScheduler", {"solver_order": 2}),
    "deis3": ("DEISMultistepScheduler", {"solver_order": 3}),
    "heun": ("HeunDiscreteScheduler", {"clip_sample": False}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
}


class DrivenFlowHeun(diffusers.FlowMatchHeunDiscreteScheduler):  # type: ignore[misc]
    """The scheduler with the arguments that the FLUX.1 pipelines pass: it has its own levels.

    The pipelines count 2 n - 1 steps then; 0.75 of 4 steps skips one in their counting and in ours.
    """

    def set_timesteps(
        self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = 0.0
    ) -> None:
        """Set as many levels as ``sigmas`` has."""
        super().set_timesteps(num_inference_steps or len(sigmas), device)


class DrivenFlowDpm(diffusers.DPMSolverMultistepScheduler):  # type: ignore[misc]
    """The same; the text-to-image pipeline drives its base class as well, the others do not."""

    def set_timesteps(
        self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None, mu: Any = 0.0
    ) -> None:
        """Set as many levels as ``sigmas`` has."""
        dynamic = {"mu": mu} if self.config.use_dynamic_shifting else {}
        super().set_timesteps(num_inference_steps or len(sigmas), device, **dynamic)

    def scale_noise(self, sample: Any, timestep: Any, noise: Any) -> Any:
        """What flow-matching schedulers call `add_noise`."""
        return self.add_noise(sample, noise, timestep)


_FLOW_DPM = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOW_SCHEDULERS: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "euler": (diffusers.FlowMatchEulerDiscreteScheduler, {}),
    "euler_karras": (diffusers.FlowMatchEulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "euler_exponential": (
        diffusers.FlowMatchEulerDiscreteScheduler, {"use_exponential_sigmas": True},
    ),
    "euler_beta": (diffusers.FlowMatchEulerDiscreteScheduler, {"use_beta_sigmas": True}),
    "heun": (DrivenFlowHeun, {}),
    "dpm++2m": (DrivenFlowDpm, _FLOW_DPM),
}  # fmt: skip
# Class of the folder's pipeline -> the class of each mode.
PIPELINES: Mapping[str, Mapping[str, str]] = {
    f"{family}Pipeline": {
        "text-to-image": f"{family}Pipeline",
        "image-to-image": f"{family}Img2ImgPipeline",
        "inpainting": f"{family}InpaintPipeline",
    }
    for family in ("StableDiffusion", "StableDiffusionXL", "Flux")
}


class DiffusersReference:
    """The pipelines of all three modes over one set of float32 weights.

    Args:
        folder: a pipeline in diffusers layout.

    Attributes:
        source: the scheduler's configuration as the folder has it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        base = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        self._family = type(base).__name__
        self._components = base.components
        # Not base.scheduler: the pipelines' constructors rewrite steps_offset and clip_sample.
        source = type(base.scheduler).from_pretrained(folder, subfolder="scheduler")
        self.source: Mapping[str, Any] = source.config
        self._pipelines: dict[str, Any] = {}

    def pipeline(self, mode: str) -> Any:
        """Return the pipeline of a mode, made at its first use."""
        if mode not in self._pipelines:
            plain = self._family == "StableDiffusionPipeline"
            made = getattr(diffusers, PIPELINES[self._family][mode])(
                **self._components, **({"requires_safety_checker": False} if plain else {})
            )
            made.set_progress_bar_config(disable=True)
            self._pipelines[mode] = made
        return self._pipelines[mode]

    def paint(self, mode: str, scheduler: str, *, seed: int, **arguments: Any) -> Pixels:
        """Return one picture (H, W, 3).

        Args:
            mode: ``text-to-image``, ``image-to-image`` or ``inpainting``.
            scheduler: a key of `SCHEDULERS` or `MORE_SCHEDULERS`, for FLUX.1 of `FLOW_SCHEDULERS`.
            seed: of the CPU generator.
            arguments: of the pipeline's call.
        """
        pipeline = self.pipeline(mode)
        if self._family == "FluxPipeline":
            kind, overrides = FLOW_SCHEDULERS[scheduler]
        else:
            name, overrides = {**SCHEDULERS, **MORE_SCHEDULERS}[scheduler]
            kind = getattr(diffusers, name)
        pipeline.scheduler = kind.from_config(self.source, **overrides)
        pictures = pipeline(
            generator=torch.Generator("cpu").manual_seed(seed), output_type="np", **arguments
        ).images
        pixels: Pixels = np.rint(pictures[0] * 255).astype(np.uint8)
        return pixels


def psnr_db(ours: Pixels, theirs: Pixels) -> float:
    """Peak signal-to-noise ratio of two uint8 pictures, dB; 120 for equal ones."""
    error = float(((ours.astype(np.float64) - theirs.astype(np.float64)) ** 2).mean())
    return min(120.0, 10 * float(np.log10(255**2 / max(error, 1e-12))))
