#!/usr/bin/env bash
# StableAvatar 14B on 720p clips, DeepSpeed ZeRO-3, 8 machines with 8 GPUs each.
#   bash scripts/train_14B_720p.sh [key=value ...]
exec bash "$(dirname "$0")/train.sh" wan_14b_720p zero3_8x8 "$@"
