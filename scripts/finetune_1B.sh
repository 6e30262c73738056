#!/usr/bin/env bash
# Fine-tunes all of a StableAvatar 1.3B file's attention and adapter, one machine.
#   bash scripts/finetune_1B.sh [key=value ...]
exec bash "$(dirname "$0")/train.sh" finetune_1.3b ddp "$@"
