#!/usr/bin/env bash
# StableAvatar 14B on 720p clips, 8 machines with 8 GPUs each: those of a machine share each sample, DeepSpeed ZeRO-2 shares out the rest.
#   bash scripts/train_14B_720p.sh [key=value ...]
exec bash "$(dirname "$0")/train.sh" wan_14b_720p zero2_8x8 "$@"
