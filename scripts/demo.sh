#!/usr/bin/env bash
# Sets up and makes a talking video of an example portrait with the tiny model, without downloading any weights.
# The tiny model's weights are random: the video shows that everything runs, not how good it looks.
#   bash scripts/demo.sh [key=value ...]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh

example=examples/ada
if [ ! -e examples/puppet/model_index.json ]; then .venv/bin/python scripts/make_tiny_model.py examples/puppet; fi
exec .venv/bin/python inference.py configs/inference/puppet.yaml \
    reference=$example/reference.png audio=$example/audio.wav prompt="$(cat $example/prompt.txt)" output=outputs/demo.mp4 "$@"
