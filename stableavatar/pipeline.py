"""StableAvatarPipeline: encode once, plan windows, denoise, decode in a stream."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection, PreTrainedTokenizerBase, UMT5EncoderModel, Wav2Vec2FeatureExtractor, Wav2Vec2Model

from stableavatar import __version__, geometry
from stableavatar.config import RELEASED_TRANSFORMER, InferenceConfig, flatten, validate
from stableavatar.encoders import encode_audio, encode_image, encode_text
from stableavatar.folders import library_errors, load_folder, load_model
from stableavatar.media import AudioTrack, fit_image, read_image, to_pixels
from stableavatar.models.dit import AvatarTransformer
from stableavatar.models.kernels import check_backend
from stableavatar.models.lora import merge_files
from stableavatar.models.lora_files import parse_loras
from stableavatar.models.weights import BASE_CONFIG_FILE, load_released, load_transformer, read_base_config
from stableavatar.parallel.apply import apply_parallel
from stableavatar.parallel.guidance import share_passes
from stableavatar.parallel.launch import leads, together
from stableavatar.parallel.mesh import Mesh
from stableavatar.parallel.resume import SharedRunStore
from stableavatar.parallel.windows import share_windows
from stableavatar.puppet.vae import VideoVAE
from stableavatar.sampling.conditioning import Conditioning, reference_channels
from stableavatar.sampling.denoise import GuidedVelocity, SlidingWindows, denoise_motion_frames, denoise_windows
from stableavatar.sampling.flow import frame_noise, make_scheduler
from stableavatar.sampling.guidance import Guidance, Text
from stableavatar.sampling.offload import resolve_device, resolve_dtype
from stableavatar.sampling.resume import NO_RUN_STORE, NoRunStore, RunStore
from stableavatar.sampling.step_cache import StepCache
from stableavatar.sampling.windows import Window, WindowPlan

logger = logging.getLogger(__name__)

# Settings and sections that say where results go, how often they are saved, in which order and by how many processes they are
# made, not what they are.
UNRELATED_TO_RESULT = {"output", "frames_dir", "cases", "work_dir", "save_every", "reference", "audio", "windows.order", "parallel"}


def _check_widths(
    transformer: AvatarTransformer, vae: VideoVAE, text: UMT5EncoderModel, image: nn.Module, audio: Wav2Vec2Model
) -> None:
    """Raises ValueError if an encoder's output is not as wide as the transformer expects."""
    pairs = {
        "text encoder": (text, "d_model", "text_dim"),
        "image encoder": (image, "hidden_size", "image_dim"),
        "speech encoder": (audio, "hidden_size", "audio_dim"),
        "VAE": (vae, "z_dim", "out_channels"),
    }
    for name, (encoder, theirs, ours) in pairs.items():
        if transformer is None or encoder is None:  # Training loads the parts that it needs.
            continue
        got, expected = getattr(encoder.config, theirs), transformer.config[ours]
        if got != expected:
            raise ValueError(f"the {name} gives {got} channels, the transformer expects {expected}: they are of different models")


def transformer_path(config: InferenceConfig) -> Path:
    """File or folder of the transformer's weights."""
    if config.model:
        return Path(config.transformer or Path(config.model) / "transformer")
    return Path(config.checkpoints) / (config.transformer or RELEASED_TRANSFORMER)


def transformer_config(config: InferenceConfig) -> dict[str, Any]:
    """The transformer's settings as its config.json has them, without loading weights.

    Raises:
        ValueError: there is none.
    """
    if not config.model:
        return read_base_config(Path(config.checkpoints) / config.base / BASE_CONFIG_FILE)
    path = transformer_path(config)
    folder = path if path.is_dir() else Path(config.model) / "transformer"
    with library_errors(f"the model in {folder}"):
        return AvatarTransformer.load_config(folder, local_files_only=True)


def _weight_files(config: InferenceConfig) -> list[str]:
    """Size and time of the transformer's and LoRA files: a run does not go on with other weights under the same name."""
    path = transformer_path(config)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    files += [file for file, _ in parse_loras(config.lora)]
    return [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files if file.is_file()]


class StableAvatarPipeline(DiffusionPipeline):
    """A portrait and a voice become a talking video.

    Args:
        transformer: the diffusion transformer; vae: a streaming VAE, Wan's or the puppet world's.
        text_encoder, tokenizer: UMT5; image_encoder: CLIP ViT-H/14; audio_encoder, audio_processor: wav2vec2.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->audio_encoder->transformer->vae"
    parallel: Mesh | None = None
    """The processes that make a video together; each of them has its own pipeline and calls the same methods."""
    runs_on: torch.device | None = None
    """Where models run, if their weights do not tell: those that are dealt out may lie on the host."""

    def __init__(
        self,
        transformer: AvatarTransformer,
        vae: VideoVAE,
        text_encoder: UMT5EncoderModel,
        tokenizer: PreTrainedTokenizerBase,
        image_encoder: CLIPVisionModelWithProjection,
        audio_encoder: Wav2Vec2Model,
        audio_processor: Wav2Vec2FeatureExtractor,
    ) -> None:
        super().__init__()
        _check_widths(transformer, vae, text_encoder, image_encoder, audio_encoder)
        self.register_modules(
            transformer=transformer,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            image_encoder=image_encoder,
            audio_encoder=audio_encoder,
            audio_processor=audio_processor,
        )

    @classmethod
    def from_released(
        cls,
        checkpoints: str | Path,
        transformer: str = RELEASED_TRANSFORMER,
        base: str = InferenceConfig.base,
        wav2vec: str = InferenceConfig.wav2vec,
        dtype: torch.dtype = torch.bfloat16,
    ) -> "StableAvatarPipeline":
        """From the released files as they are laid out on disk.

        Args:
            checkpoints: the folder; the other paths are inside it (or absolute).
            transformer: a StableAvatar `.pt`, or the base model's own file, whose audio branches then start fresh.
            base: folder with the Wan VAE, UMT5, CLIP and the transformer's config.json.
            dtype: of transformer, text and image encoder; the VAE and wav2vec2 stay in float32.
        """
        return cls(**load_released(Path(checkpoints), transformer, base, wav2vec, dtype))

    @classmethod
    def from_config(cls, config: InferenceConfig, mesh: Mesh | None = None) -> "StableAvatarPipeline":
        """Loaded, placed and tuned as the settings say, as one of the processes of `mesh`."""
        device = resolve_device(config.device)
        dtype = resolve_dtype(config.dtype, device)
        check_backend(config.attention, device, dtype)
        if config.model:
            pipe = cls._from_folder(config, dtype)
        else:
            pipe = cls.from_released(config.checkpoints, config.transformer or RELEASED_TRANSFORMER, config.base, config.wav2vec, dtype)
        if loras := parse_loras(config.lora):
            merge_files(pipe.transformer, loras)
        apply_parallel(pipe, config, device, mesh)
        return pipe

    @property
    def _execution_device(self) -> torch.device:
        return self.runs_on or super()._execution_device

    @classmethod
    def _from_folder(cls, config: InferenceConfig, dtype: torch.dtype) -> "StableAvatarPipeline":
        """From a pipeline folder, with the transformer that the settings name in place of its own."""
        folder, dtypes = Path(config.model), {"default": dtype, "vae": torch.float32, "audio_encoder": torch.float32}
        if not config.transformer:
            return load_folder(cls, folder, dtypes)
        path = transformer_path(config)
        if path.is_dir():
            transformer = load_model(AvatarTransformer, path, dtype)
        else:  # the folder's own settings tell what a released file does not: heads, adapter, ...
            own = AvatarTransformer.load_config(folder / "transformer", local_files_only=True)
            transformer = load_transformer(path, dtype, config={key: value for key, value in own.items() if not key.startswith("_")})
        others = load_folder(cls, folder, dtypes, without=("transformer",))
        return cls(**others.components | {"transformer": transformer})

    def __call__(
        self, reference: Image.Image | str, audio: AudioTrack | str, prompt: str = "", config: InferenceConfig | None = None
    ) -> Tensor:
        """All frames [T, H, W, 3] uint8 of a video; for long ones `stream` needs less memory."""
        return torch.cat(list(self.stream(reference, audio, prompt, config)))

    def stream(
        self, reference: Image.Image | str, audio: AudioTrack | str, prompt: str = "", config: InferenceConfig | None = None
    ) -> Iterator[Tensor]:
        """Frames as they are ready, from the first to the last.

        Args:
            reference: portrait, an image or the path of one.
            audio: voice, a track or the path of an audio or video file.
            prompt: description of the first frame, of the behaviour, of the background.
            config: size, sampling, guidance, windows and resuming. What concerns files and loading (reference, audio, prompt, output,
                model, device, memory, ...) is not read here.

        Returns:
            parts [n, H, W, 3] uint8; encoding is done, the rest happens as they are asked for. Of several processes the first one gets them
            and all ask, to take part in the denoising.

        Raises:
            ValueError: settings, inputs or a work_dir that cannot be used.
        """
        config = config or InferenceConfig()
        validate(config)
        with ExitStack() as stack:

            def prepare() -> tuple[AudioTrack, Tensor, int, Conditioning]:
                track = audio if isinstance(audio, AudioTrack) else stack.enter_context(AudioTrack(audio))
                image = reference.convert("RGB") if isinstance(reference, Image.Image) else read_image(reference)
                pixels, frames = fit_image(image, *self.frame_size(config), config.fit), self.frame_count(track, config)
                return track, pixels, frames, self.encode(pixels, track, prompt, frames, config)

            track, pixels, frames, conditioning = together(self.parallel, prepare)
            store = together(self.parallel, partial(self._run_store, pixels, track, prompt, config))
            latents = self.denoise(conditioning, frames, config, store)
            return self._frames(latents, frames, stack.pop_all())

    def _frames(self, latents: Iterator[Tensor], frames: int, inputs: ExitStack) -> Iterator[Tensor]:
        """The frames that latents decode to, on the first process; the others denoise with it and decode nothing."""
        with inputs:
            if not leads(self.parallel):
                for _ in latents:
                    pass
                return
            bar = inputs.enter_context(self.progress_bar(total=frames))
            bar.set_description("decode")
            yield from self._decode(latents, frames, bar.update)

    def frame_count(self, audio: AudioTrack, config: InferenceConfig) -> int:
        """Video frames that last as long as the audio."""
        return geometry.samples_to_frames(audio.samples, config.fps)

    def frame_size(self, config: InferenceConfig) -> tuple[int, int]:
        """Width and height, rounded to what the VAE and the patches divide."""
        size = geometry.round_size(config.width), geometry.round_size(config.height)
        if size != (config.width, config.height):
            logger.warning("size %dx%d was rounded to %dx%d, multiples of 16", config.width, config.height, *size)
        return size

    @torch.no_grad()
    def encode(self, pixels: Tensor, audio: AudioTrack, prompt: str, frames: int, config: InferenceConfig) -> Conditioning:
        """Text, image and reference once; audio window by window when it is needed.

        Args:
            pixels: reference image [3, H, W] in [-1, 1].
            frames: pixel frames of the video.
        """
        device, dtype = self._execution_device, self.transformer.dtype
        prompts = {Text.POSITIVE: prompt, Text.NEGATIVE: config.negative_prompt}
        if config.guidance.name != "cfg":
            del prompts[Text.NEGATIVE]
        with self.progress_bar(total=3) as bar:
            bar.set_description("encode")
            length = self.transformer.config.text_length
            embeds = encode_text(self.text_encoder, self.tokenizer, list(prompts.values()), length, device)
            text = {name: embed[None].to(device, dtype) for name, embed in zip(prompts, embeds, strict=True)}
            bar.update()
            image = encode_image(self.image_encoder, pixels[None], device).to(device, dtype)
            bar.update()
            reference = self._encode_reference(pixels[:, None], geometry.frames_to_latents(min(frames, config.windows.frames)))
            bar.update()
        return Conditioning(text, image, reference_channels(reference, known=1), partial(self._encode_window, audio, config.fps))

    def _encode_reference(self, frames: Tensor, latents: int) -> Tensor:
        """Frames [3, n, H, W], followed by zeros, as `latents` normalised latent frames [16, F, h, w]."""
        return self.vae.encode_reference(frames.to(self._execution_device), latents)

    def _encode_window(self, audio: AudioTrack, fps: float, window: Window) -> Tensor:
        """wav2vec features [1, Ta, A] of exactly a window's pixel frames."""
        first = geometry.latent_start_frame(window.start)
        stop = first + geometry.latents_to_frames(window.stop - window.start)
        start = geometry.frame_samples(first, fps)
        waveform = audio.read(start, max(geometry.frame_samples(stop, fps), start + geometry.MIN_SAMPLES))
        features = encode_audio(self.audio_encoder, self.audio_processor, waveform, self._execution_device)
        return features.to(self._execution_device, self.transformer.dtype)

    def denoise(
        self, conditioning: Conditioning, frames: int, config: InferenceConfig, store: NoRunStore = NO_RUN_STORE
    ) -> Iterator[Tensor]:
        """Finished latents [16, n, h, w] from the first to the last, float32 on the host.

        Where several processes share the windows, only the first of them gets the latents; the others must run through this, too.

        Args:
            frames: pixel frames of the video.
        """
        length, total = geometry.frames_to_latents(config.windows.frames), geometry.frames_to_latents(frames)
        plan = WindowPlan.sliding(total, length, config.windows.overlap, config.windows.tail, config.windows.weights)
        with self.progress_bar(total=len(plan) * config.steps) as bar:
            bar.set_description("denoise")
            if config.windows.strategy == "motion_frame":
                assert self.parallel is None or self.parallel.size("windows") == 1, "a clip waits for the one before"
                start = partial(self._start, config)
                yield from denoise_motion_frames(plan, start, conditioning, self._continue_reference, store, bar.update)
            else:
                windows, velocity = self._start(config, conditioning, plan)
                yield from denoise_windows(windows, velocity, store, bar.update)

    def _start(self, config: InferenceConfig, conditioning: Conditioning, plan: WindowPlan) -> tuple[SlidingWindows, GuidedVelocity]:
        """Fresh noise, solvers and guidance for a plan."""
        scheduler = make_scheduler(config.solver, config.steps, config.shift)
        guidance = asdict(config.guidance)
        batched = guidance.pop("batched")
        cache, shares = StepCache(config.step_cache, config.steps), share_passes(self.parallel)
        velocity = GuidedVelocity(self.transformer, conditioning, Guidance(**guidance), scheduler.timesteps, cache, batched, shares)
        shape = (geometry.LATENT_CHANNELS, *conditioning.reference.shape[-2:])
        crew = share_windows(self.parallel, plan, config.windows.order, shape)
        noise = partial(frame_noise, shape, config.seed, scale=config.noise_scale)
        return SlidingWindows(crew, scheduler, noise, velocity), velocity

    def _continue_reference(self, clip: Tensor, overlap: int) -> Tensor:
        """Reference channels of a clip that goes on from the last `overlap` latent frames of `clip` [16, F, h, w]."""
        frames = torch.cat(list(self.vae.decode_stream([clip.to(self._execution_device)])), dim=1)
        tail = frames[:, -geometry.latents_to_frames(overlap) :]
        return reference_channels(self._encode_reference(tail, clip.shape[1]), known=overlap)

    def _decode(self, latents: Iterator[Tensor], frames: int, on_progress: Callable[[int], object]) -> Iterator[Tensor]:
        """Pixels of a stream of latents, cut after `frames`."""
        left = frames
        for chunk in self.vae.decode_stream(self._finite(part).to(self._execution_device) for part in latents):
            chunk = to_pixels(chunk[:, :left]).permute(1, 2, 3, 0).cpu()
            left -= len(chunk)
            if len(chunk):
                yield chunk
            on_progress(len(chunk))

    def _finite(self, latents: Tensor) -> Tensor:
        """The latents, unless the network produced numbers that are none."""
        if not torch.isfinite(latents).all():
            advice = "try dtype=bfloat16 or float32" if self.transformer.dtype == torch.float16 else "is the checkpoint whole?"
            raise ValueError(f"the transformer produced NaN or infinite latents in {self.transformer.dtype}; {advice}")
        return latents

    def _run_store(self, pixels: Tensor, audio: AudioTrack, prompt: str, config: InferenceConfig) -> NoRunStore:
        """The store of a resumable run, if one is wanted."""
        if not config.work_dir:
            return NO_RUN_STORE
        sound = hashlib.sha256()
        for start in range(0, audio.samples, geometry.SAMPLE_RATE):
            sound.update(audio.read(start, start + geometry.SAMPLE_RATE).tobytes())
        related = (item for item in flatten(asdict(config)) if not {item[0], item[0].partition(".")[0]} & UNRELATED_TO_RESULT)
        inputs = {"reference": hashlib.sha256(pixels.numpy().tobytes()).hexdigest(), "audio": sound.hexdigest()}
        versions = {"version": __version__, "torch": torch.__version__, "weights": _weight_files(config)}
        identity = dict(related) | inputs | versions | {"prompt": prompt}
        store = RunStore(Path(config.work_dir), identity, config.save_every) if leads(self.parallel) else NO_RUN_STORE
        return store if self.parallel is None else SharedRunStore(store, self.parallel)
