#!/usr/bin/env bash
# StableAvatar 14B on clips of all three shapes, DeepSpeed ZeRO-2, 8 machines with 8 GPUs each.
#   bash scripts/train_14B.sh [key=value ...]
exec bash "$(dirname "$0")/train.sh" wan_14b zero2_8x8 "$@"
