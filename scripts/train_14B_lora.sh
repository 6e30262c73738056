#!/usr/bin/env bash
# LoRA of StableAvatar 14B on clips of all three shapes, DeepSpeed ZeRO-2, 8 machines with 8 GPUs each.
#   bash scripts/train_14B_lora.sh [key=value ...]
exec bash "$(dirname "$0")/train.sh" wan_14b_lora zero2_8x8 "$@"
