#!/usr/bin/env bash
# StableAvatar 1.3B on 512x512 clips, one machine.
#   bash scripts/train_1B_square.sh [key=value ...]
exec bash "$(dirname "$0")/train.sh" wan_1.3b_square ddp "$@"
