#!/usr/bin/env bash
# Sets up and makes a talking video of an example portrait with the small puppet model that comes along; nothing is downloaded.
#   bash scripts/demo.sh [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh

example=examples/ada
exec .venv/bin/python inference.py configs/inference/puppet.yaml \
    reference=$example/reference.png audio=$example/audio.wav prompt="$(cat $example/prompt.txt)" output=outputs/demo.mp4 "$@"
