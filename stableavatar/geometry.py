"""The one home of the numbers that tie pixel frames, latents, tokens and audio samples together.

Wan2.1's VAE keeps the first pixel frame alone and folds every four after it, so T pixel frames are
(T - 1) // 4 + 1 latent frames; space is divided by 8, and the transformer patches 2 x 2 latents into a token.
"""

TEMPORAL_STRIDE = 4
SPATIAL_STRIDE = 8
PATCH = 2
SIZE_MULTIPLE = SPATIAL_STRIDE * PATCH
WINDOW_FRAMES = 81
FPS = 25
SAMPLE_RATE = 16_000
MIN_SAMPLES = 400
"""Receptive field of wav2vec2's convolutions: anything shorter gives no feature token."""
IMAGE_TOKENS = 257
IMAGE_SIZE = 224
TEXT_LENGTH = 512
LATENT_CHANNELS = 16
MASK_CHANNELS = TEMPORAL_STRIDE
AUDIO_WIDENING = 4
"""Feature tokens added to both sides of a latent frame's audio slice."""


def latents_to_frames(latents: int) -> int:
    """Pixel frames that `latents` latent frames decode to."""
    return TEMPORAL_STRIDE * (latents - 1) + 1


def frames_to_latents(frames: int) -> int:
    """Latent frames that hold `frames` pixel frames; the last one may be only partly used."""
    return (max(frames, 1) - 2 + TEMPORAL_STRIDE) // TEMPORAL_STRIDE + 1


def samples_to_frames(samples: int, fps: float = FPS) -> int:
    """Whole video frames that `samples` of 16 kHz audio last, at least one."""
    return max(1, int(samples * fps / SAMPLE_RATE))


def latent_start_frame(latent: int) -> int:
    """First pixel frame of a window that starts at latent frame `latent` (a window's first latent is one frame)."""
    return TEMPORAL_STRIDE * latent


def frame_samples(frames: int, fps: float = FPS) -> int:
    """Audio samples that last as long as `frames` video frames, rounded down."""
    return int(frames * SAMPLE_RATE / fps)


def round_size(size: int) -> int:
    """The multiple of 16 nearest to `size` (ties upwards), at least 16."""
    return max(SIZE_MULTIPLE, (size + SIZE_MULTIPLE // 2) // SIZE_MULTIPLE * SIZE_MULTIPLE)


def frame_tokens(width: int, height: int) -> int:
    """Tokens of a latent frame of a video of some size in pixels, rounded as `round_size` does."""
    return round_size(width) // SIZE_MULTIPLE * (round_size(height) // SIZE_MULTIPLE)


def audio_slices(tokens: int, frames: int) -> list[tuple[int, int]]:
    """Inclusive ranges of audio feature tokens, one per latent frame, before widening (may leave the audio).

    Args:
        tokens: feature tokens of the window.
        frames: pixel frames of the window; (frames - 1) // 4 + 1 ranges come back, all of the same width.
    """
    per_frame = tokens / frames
    half = int(per_frame * TEMPORAL_STRIDE / 2)

    def centre(latent: int) -> int:
        start, end = per_frame * latents_to_frames(latent), per_frame * latents_to_frames(latent + 1)
        return int((start + end) / 2) - 1

    first_end = centre(1) - half
    later = [(centre(i) - half, centre(i) + half) for i in range(1, frames_to_latents(frames))]
    return [(first_end - 2 * half, first_end), *later]
