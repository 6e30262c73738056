#!/usr/bin/env bash
# Fine-tunes a StableAvatar 1.3B file with a LoRA, one machine.
#   bash scripts/finetune_1B_lora.sh [key=value ...]
exec bash "$(dirname "$0")/train.sh" finetune_1.3b_lora ddp "$@"
