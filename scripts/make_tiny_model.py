"""Writes a complete pipeline folder with tiny random models: every component, nothing downloaded, a few MB.

It talks nonsense, but it runs the whole program: the tests and the benchmarks use it.

    python scripts/make_tiny_model.py FOLDER
"""

import argparse
from pathlib import Path

import torch
from transformers import (
    ByT5Tokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    UMT5Config,
    UMT5EncoderModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from stableavatar.geometry import IMAGE_SIZE, SAMPLE_RATE
from stableavatar.models.dit import AvatarTransformer
from stableavatar.pipeline import StableAvatarPipeline
from stableavatar.vae import WanVAE

TEXT_DIM, IMAGE_DIM, AUDIO_DIM = 32, 32, 32


def tiny_transformer(**changes: object) -> AvatarTransformer:
    """Four heads of 16, two blocks; every matrix random, the audio branches too, so that the voice has an effect."""
    settings = {
        "dim": 64, "num_heads": 4, "num_layers": 2, "ffn_dim": 128, "freq_dim": 32,
        "text_dim": TEXT_DIM, "image_dim": IMAGE_DIM, "audio_dim": AUDIO_DIM,
    }  # fmt: skip
    model = AvatarTransformer(**settings | changes)
    for block in model.blocks:
        for linear in (block.cross_attn.k_audio, block.cross_attn.v_audio):
            torch.nn.init.normal_(linear.weight, std=0.2)
    return model


def tiny_speech_encoder() -> Wav2Vec2Model:
    """wav2vec2 with the strides of the real one: 50 tokens a second of 16 kHz sound."""
    config = Wav2Vec2Config(
        hidden_size=AUDIO_DIM,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        vocab_size=32,
    )
    return Wav2Vec2Model(config)


def tiny_pipeline(seed: int = 0) -> StableAvatarPipeline:
    """All components, random from `seed`."""
    torch.manual_seed(seed)
    text = UMT5Config(vocab_size=384, d_model=TEXT_DIM, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    image = CLIPVisionConfig(
        hidden_size=IMAGE_DIM, intermediate_size=64, projection_dim=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=IMAGE_SIZE, patch_size=14,
    )  # fmt: skip
    return StableAvatarPipeline(
        transformer=tiny_transformer().eval(),
        vae=WanVAE(base_dim=8).eval(),
        text_encoder=UMT5EncoderModel(text).eval(),
        tokenizer=ByT5Tokenizer(),
        image_encoder=CLIPVisionModelWithProjection(image).eval(),
        audio_encoder=tiny_speech_encoder().eval(),
        audio_processor=Wav2Vec2FeatureExtractor(sampling_rate=SAMPLE_RATE, do_normalize=True),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    arguments = parser.parse_args()
    tiny_pipeline(arguments.seed).to(getattr(torch, arguments.dtype)).save_pretrained(arguments.folder)
    print(f"wrote {arguments.folder}")


if __name__ == "__main__":
    main()
