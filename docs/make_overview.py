"""Draws docs/overview.png from the program's own window plan and fusion weights.

    python docs/make_overview.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import soundfile
from matplotlib.axes import Axes
from PIL import Image

from stableavatar.geometry import FPS, frames_to_latents, samples_to_frames
from stableavatar.sampling.windows import WindowPlan

ROOT = Path(__file__).resolve().parents[1]
CASE = ROOT / "examples" / "ada"
INK, ACCENT, SOFT = "#1f2937", "#2563eb", "#93c5fd"
WINDOW, OVERLAP, STEPS = 9, 3, 4


def draw_voice(axis: Axes, sound, rate: int) -> None:
    """The waveform over seconds."""
    axis.fill_between([i / rate for i in range(len(sound))][::40], sound[::40], -sound[::40], color=ACCENT, linewidth=0)
    axis.set_title("a voice of any length", fontsize=11, color=INK)
    axis.set_xlabel("seconds", fontsize=9)
    axis.set_yticks([])


def draw_windows(axis: Axes, plan: WindowPlan) -> None:
    """Windows over latent frames, as opaque as their weight in the fusion."""
    for index, window in enumerate(plan.windows):
        ramp = plan.fusion(index).tolist()
        following = plan.fusion(index + 1).tolist() if index + 1 < len(plan) else []
        for frame in range(*window):
            weight = ramp[frame - window.start] if frame - window.start < len(ramp) else 1.0
            left = frame - (window.stop - len(following))
            weight *= 1 - following[left] if following and left >= 0 else 1.0
            axis.barh(-index, 1, left=frame, height=0.75, color=ACCENT, alpha=0.12 + 0.88 * weight, linewidth=0)
    axis.set_title("windows share frames; velocities are fused with log weights", fontsize=11, color=INK)
    axis.set_xlabel("latent frames", fontsize=9)
    axis.set_ylabel("window", fontsize=9)
    axis.set_yticks([])


def draw_wavefront(axis: Axes, plan: WindowPlan) -> None:
    """In which order (window, step) pairs run."""
    order = plan.order(STEPS, "wavefront")
    for position, (window, step) in enumerate(order):
        axis.barh(-step, 0.92, left=window, height=0.86, color=SOFT if step < STEPS - 1 else ACCENT)
        axis.text(window + 0.46, -step, position + 1, ha="center", va="center", fontsize=7, color="white" if step == STEPS - 1 else INK)
    axis.set_title("wavefront: finished windows (dark) stream out early", fontsize=11, color=INK)
    axis.set_xlabel("window", fontsize=9)
    axis.set_ylabel("step", fontsize=9)
    axis.set_yticks([])


def main() -> None:
    sound, rate = soundfile.read(CASE / "audio.wav")
    plan = WindowPlan.sliding(frames_to_latents(samples_to_frames(len(sound))), WINDOW, OVERLAP)
    figure, axes = plt.subplot_mosaic("abb;acc;add", figsize=(11, 5.6), dpi=110, width_ratios=[1, 0.9, 0.9])
    axes["a"].imshow(Image.open(CASE / "reference.png"))
    axes["a"].set_title("a portrait", fontsize=11, color=INK)
    axes["a"].axis("off")
    draw_voice(axes["b"], sound, rate)
    draw_windows(axes["c"], plan)
    draw_wavefront(axes["d"], plan)
    for name in "bcd":
        axes[name].spines[["top", "right", "left"]].set_visible(False)
        axes[name].tick_params(labelsize=8, length=2)
    figure.suptitle(f"StableAvatar: one portrait and one voice become {FPS} frames a second, without end", fontsize=13, color=INK)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "overview.png")


if __name__ == "__main__":
    main()
