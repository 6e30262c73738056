#!/usr/bin/env bash
# Makes the small model of examples/puppet from nothing, on 2 CPU cores: world, VAE, speech encoder, latents, transformer, folder, figures.
# Started again it goes on where it was. With the word quick everything is small: a test of the recipe in minutes, not a model to use.
#   bash scripts/train_puppet.sh [quick] [HOME]       HOME: where all of it is kept (runs/puppet, runs/puppet_quick); the model is HOME/model
#   SPEECH=examples/puppet VAE=examples/puppet bash scripts/train_puppet.sh      takes these parts from a folder instead of training them
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev

world="clips=2500" mouths="steps=1300" vae="steps=6000" speech="" check="cases=50"
begin="max_steps=6000" finish="max_steps=3500" long="max_steps=700" frames=""
# In bfloat16 plain products train faster than the fused kernel (1.5 times), and compiled blocks faster still (a quarter); in float32 neither does.
fast=""
if .venv/bin/python -c 'import sys, torch; from stableavatar.machine import fast_precision as f; sys.exit(f(torch.device("cpu")) != torch.bfloat16)'; then
    fast="attention=_native_math"
    if command -v c++ >/dev/null; then fast="$fast compile=true"; fi
fi
home=runs/puppet
if [ "${1:-}" = quick ]; then
    shift
    home=runs/puppet_quick  # its own: neither goes on from what the other left
    fast=${fast% compile=true}  # which takes longer than these few steps
    world="clips=24 frames=45" mouths="steps=30" vae="steps=30" speech="steps=30 pool=60" check="cases=1 frames=25"
    frames="data.frames=45" begin="max_steps=20 checkpoint.every=20 optimizer.warmup=5"
    finish="max_steps=4 checkpoint.every=4" long=$finish
fi
home=${1:-$home}
# Small programs run side by side with a core each. The VAE trains on both, the transformer in two processes: 1.5 times as fast as two threads.
python() { OMP_NUM_THREADS=1 .venv/bin/python "$@"; }
both() { OMP_NUM_THREADS=1 .venv/bin/python -m torch.distributed.run --nproc_per_node 2 --master_port "${MASTER_PORT:-29511}" "$@"; }
lists=$(printf "$home/world/video_%s_path.txt," square vec rec)
last() { ls -d "$1"/checkpoints/step_*/transformer | tail -n 1; }
# train NAME "SETTINGS OF THE DATA" [SETTINGS ...]: the latents of that data, then a run on them; both in HOME.
train() {
    local name=$1 data="data.lists=${lists%,} data.cache=$home/cache_$1 model=$home/parts $2"
    shift 2
    both scripts/cache_latents.py configs/train/puppet.yaml $data
    both train.py configs/train/puppet.yaml $data output=$home/$name resume=latest $fast "$@"
}

python scripts/puppet.py world output=$home/world $world
listening=${SPEECH:-$home/speech} seeing=${VAE:-$home/vae} learner=
if [ -z "${SPEECH:-}" ]; then
    OMP_NUM_THREADS=1 .venv/bin/python scripts/puppet.py speech output=$home/speech $speech &
    learner=$!
    trap "kill $learner 2>/dev/null || true" EXIT  # it would outlive an interruption or a failure of the VAE
fi
# Large tensors stay with the process instead of going back to the system after every use: up to twice as fast (glibc). Not for the
# speech encoder: batches of many lengths would leave holes.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=68719476736
if [ -z "${VAE:-}" ]; then
    # First small crops around mouths, which are what is hard; then larger ones, so that the edges of a crop matter less.
    .venv/bin/python scripts/puppet.py vae lists=${lists%,} output=$home/vae_mouths crop=32 batch=16 lip_crops=0.9 $mouths
    .venv/bin/python scripts/puppet.py vae lists=${lists%,} output=$home/vae start=$home/vae_mouths $vae
fi
if [ -n "$learner" ]; then wait $learner; fi
trap - EXIT
python scripts/puppet.py assemble vae=$seeing speech=$listening output=$home/parts
# First small pictures, where a step costs little more than half: what is heard and what is copied is learned there as well.
train begin "data.sizes=96x96 data.runs=2 $frames" optimizer.schedule=constant $begin
# Then all shapes at their size, and at last as in use, with whole windows, while the learning rate falls to zero.
train finish "$frames" scratch= transformer="$(last $home/begin)" optimizer.schedule=constant $finish
train long "${frames:-data.frames=81}" scratch= transformer="$(last $home/finish)" optimizer.lr=6e-4 $long
python scripts/puppet.py assemble vae=$seeing speech=$listening transformer="$(last $home/long)" output=$home/model
python scripts/puppet.py evaluate model=$home/model output=$home/evaluation.json $check
