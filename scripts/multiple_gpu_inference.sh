#!/usr/bin/env bash
# One video, or a list of them, on all GPUs of this machine or as one of several machines (start it on each of them).
#   bash scripts/multiple_gpu_inference.sh CONFIG [key=value ...]      CONFIG: a name in configs/inference
# Without a parallel.* word the GPUs of a machine share the tokens (parallel.ulysses) and machines the windows (parallel.windows).
# From the environment, with the usual names: CUDA_VISIBLE_DEVICES or GPUS (per machine; without GPUs, processes on the CPU), NUM_MACHINES,
# NODE_RANK, MASTER_ADDR, MASTER_PORT; Slurm's SLURM_NNODES and SLURM_NODEID are understood. Relative paths are those of the folder it is
# called from; several machines need the inputs and the run's folders on a shared disk.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
if [ $# -lt 1 ]; then echo "error: say which CONFIG, such as: bash scripts/multiple_gpu_inference.sh wan_14b reference=face.png ..." >&2; exit 2; fi
config=$root/configs/inference/$1.yaml
shift
bash "$root/scripts/setup.sh"

if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then visible=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l)
else visible=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l); fi
gpus=${GPUS:-$visible} machines=${NUM_MACHINES:-${SLURM_NNODES:-1}}
if [ "$gpus" -eq 0 ]; then echo "error: no GPU is visible; for processes on the CPU say how many: GPUS=2" >&2; exit 2; fi
if [ "$machines" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then echo "error: give MASTER_ADDR, the address of the first machine, and NODE_RANK" >&2; exit 2; fi

mesh="parallel.ulysses=$gpus parallel.windows=$machines"
for word in "$@"; do case $word in parallel.windows=*|parallel.guidance=*|parallel.ring=*|parallel.ulysses=*) mesh= ;; esac; done
if [ "$machines" -eq 1 ]; then meeting=--standalone # at a free port
else meeting="--nnodes=$machines --node_rank=${NODE_RANK:-${SLURM_NODEID:-0}} --master_addr=$MASTER_ADDR --master_port=${MASTER_PORT:-29500}"; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$root/.venv/bin/python" "$root/scripts/launch.py" $meeting --nproc_per_node="$gpus" "$root/inference.py" "$config" $mesh "$@"
