#!/usr/bin/env bash
# Makes the small model of examples/puppet from nothing, on 2 CPU cores: world, VAE, speech encoder, latents, transformer, folder, figures.
# Started again it goes on where it was. With the word quick everything is small: a test of the recipe in minutes, not a model to use.
#   bash scripts/train_puppet.sh [quick] [HOME]       HOME: where all of it is kept (runs/puppet, runs/puppet_quick); the model is HOME/model
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev

world="clips=1500" vae="" speech="" main="" finish="" check="cases=50" long="data.frames=81 data.runs=1" few=200
if command -v c++ >/dev/null; then main="compile=true"; fi  # a quarter faster
home=runs/puppet
if [ "${1:-}" = quick ]; then
    shift
    home=runs/puppet_quick  # its own: neither goes on from what the other left
    world="clips=24 frames=45" vae="steps=60" speech="steps=30 pool=60" check="cases=1 frames=25"
    main="max_steps=20 checkpoint.every=20 optimizer.warmup=5" finish="max_steps=4 checkpoint.every=4" long="data.frames=45 data.runs=1" few=4
fi
home=${1:-$home}
# Small programs run side by side with a core each; VAE and transformer train on both.
python() { OMP_NUM_THREADS=1 .venv/bin/python "$@"; }
both() { OMP_NUM_THREADS=1 .venv/bin/python -m torch.distributed.run --nproc_per_node 2 --master_port "${MASTER_PORT:-29511}" "$@"; }
lists=$(printf "$home/world/video_%s_path.txt," square vec rec)
data="data.lists=${lists%,} model=$home/parts"
last() { ls -d "$1"/checkpoints/step_*/transformer | tail -n 1; }

python scripts/puppet.py world output=$home/world $world
OMP_NUM_THREADS=1 .venv/bin/python scripts/puppet.py speech output=$home/speech $speech &
trap "kill $! 2>/dev/null || true" EXIT  # it would outlive an interruption or a failure of the VAE
.venv/bin/python scripts/puppet.py vae lists=${lists%,} output=$home/vae $vae
wait $!
trap - EXIT
python scripts/puppet.py assemble vae=$home/vae speech=$home/speech output=$home/parts
both scripts/cache_latents.py configs/train/puppet.yaml $data data.cache=$home/cache
.venv/bin/python train.py configs/train/puppet.yaml $data data.cache=$home/cache output=$home/train resume=latest $main
# The windows of a long video have 21 latent frames: a short finish at that length, on some of the clips of each shape.
for shape in square vec rec; do head -n $few $home/world/video_${shape}_path.txt >$home/world/finish_${shape}_path.txt; done
finish_lists=$(printf "$home/world/finish_%s_path.txt," square vec rec)
data="data.lists=${finish_lists%,} model=$home/parts data.cache=$home/cache_long $long"
both scripts/cache_latents.py configs/train/puppet.yaml $data
.venv/bin/python train.py configs/train/puppet.yaml $data scratch= transformer="$(last $home/train)" output=$home/finish \
    resume=latest max_steps=300 batch=4 optimizer.lr=3e-4 optimizer.warmup=20 $finish
python scripts/puppet.py assemble vae=$home/vae speech=$home/speech transformer="$(last $home/finish)" output=$home/model
python scripts/puppet.py evaluate model=$home/model output=$home/evaluation.json $check
