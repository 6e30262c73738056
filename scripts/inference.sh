#!/usr/bin/env bash
# For those who know the released repository: its flags as variables, this program's command beneath. Further key=value words may follow.
# Relative paths are those of the folder it is called from; $root is the repository.
#   bash scripts/inference.sh [key=value ...]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
bash "$root/scripts/setup.sh"

pretrained_model_name_or_path="$root"/checkpoints/Wan2.1-Fun-V1.1-1.3B-InP
transformer_path="$root"/checkpoints/StableAvatar-1.3B/transformer3d-square.pt
pretrained_wav2vec_path="$root"/checkpoints/wav2vec2-base-960h
validation_reference_path="$root"/examples/ada/reference.png
validation_driven_audio_path="$root"/examples/ada/audio.wav
validation_prompts=$(cat "$root/examples/ada/prompt.txt")
output_dir=outputs
width=512
height=512
seed=42
sample_steps=50
overlap_window_length=5
clip_sample_n_frames=81
sample_text_guide_scale=3.0
sample_audio_guide_scale=5.0
GPU_memory_mode=model_full_load

case $GPU_memory_mode in
    model_full_load) memory="memory.mode=full" ;;
    model_cpu_offload) memory="memory.mode=model_offload" ;;
    model_cpu_offload_and_qfloat8) memory="memory.mode=model_offload memory.fp8=true" ;;
    sequential_cpu_offload) memory="memory.mode=sequential_offload" ;;
    *) echo "error: unknown GPU_memory_mode $GPU_memory_mode" >&2; exit 2 ;;
esac

exec "$root/.venv/bin/python" "$root/inference.py" "$root/configs/inference/wan_1.3b_square.yaml" checkpoints=. \
    base="$pretrained_model_name_or_path" transformer="$transformer_path" wav2vec="$pretrained_wav2vec_path" \
    reference="$validation_reference_path" audio="$validation_driven_audio_path" prompt="$validation_prompts" \
    output="$output_dir/video.mp4" width="$width" height="$height" seed="$seed" steps="$sample_steps" \
    windows.overlap="$overlap_window_length" windows.frames="$clip_sample_n_frames" \
    guidance.text_scale="$sample_text_guide_scale" guidance.audio_scale="$sample_audio_guide_scale" $memory "$@"
