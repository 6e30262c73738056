#!/usr/bin/env bash
# StableAvatar 1.3B on 512x512 clips, 8 machines with 8 GPUs each.
#   bash scripts/train_1B_square_64.sh [key=value ...]
exec bash "$(dirname "$0")/train.sh" wan_1.3b_square ddp_8x8 "$@"
