#!/usr/bin/env bash
# LoRA of StableAvatar 1.3B on 832x480 and 480x832 clips, 8 machines with 8 GPUs each.
#   bash scripts/train_1B_rec_vec_lora_64.sh [key=value ...]
exec bash "$(dirname "$0")/train.sh" wan_1.3b_rec_vec_lora ddp_8x8 "$@"
