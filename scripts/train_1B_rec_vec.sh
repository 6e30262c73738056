#!/usr/bin/env bash
# StableAvatar 1.3B on 832x480 and 480x832 clips, one machine.
#   bash scripts/train_1B_rec_vec.sh [key=value ...]
exec bash "$(dirname "$0")/train.sh" wan_1.3b_rec_vec ddp "$@"
