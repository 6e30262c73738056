#!/usr/bin/env bash
# Trains a configuration, on all GPUs of this machine or as one of several machines (start it on each of them).
#   bash scripts/train.sh CONFIG STRATEGY [key=value ...]      CONFIG: a name in configs/train   STRATEGY: a name in accelerate_config
# From the environment, with the usual names: CUDA_VISIBLE_DEVICES or GPUS (per machine), NUM_MACHINES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
if [ $# -lt 2 ]; then echo "error: say which CONFIG and STRATEGY, such as: bash scripts/train.sh wan_1.3b_square ddp" >&2; exit 2; fi
config=$root/configs/train/$1.yaml strategy=$2
shift 2
bash "$root/scripts/setup.sh"

if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then visible=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | wc -l)
else visible=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l); fi
gpus=${GPUS:-$visible}
case $strategy in *_8x8) machines=${NUM_MACHINES:-8} ;; *) machines=${NUM_MACHINES:-1} ;; esac
cd "$root"
if [ "$gpus" -eq 0 ]; then echo "No GPU is visible: training on the CPU, in one process"; exec .venv/bin/python train.py "$config" "$@"; fi
if [ "$machines" -gt 1 ] && [ -z "${MASTER_ADDR:-}" ]; then echo "error: give MASTER_ADDR, the address of the first machine, and NODE_RANK" >&2; exit 2; fi

# What announces the end of a job's time goes on to all processes, and they get the time that a checkpoint takes (torch gives 30 s).
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
exec .venv/bin/accelerate launch --config_file "accelerate_config/$strategy.yaml" --num_machines "$machines" \
    --num_processes $((machines * gpus)) --machine_rank "${NODE_RANK:-${SLURM_NODEID:-0}}" \
    --main_process_ip "${MASTER_ADDR:-127.0.0.1}" --main_process_port "${MASTER_PORT:-29500}" train.py "$config" "$@"
