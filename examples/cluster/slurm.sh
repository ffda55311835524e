#!/bin/bash
# A fine-tuning run under SLURM: `sbatch slurm.sh run.yaml`. Ray starts on every node of the job; llmforge runs on the first.
#
# Change: nodes, GPUs, time, and how the environment with `pip install 'llmforge[ray]'` is entered.
# run.yaml: num_devices is nodes × GPUs; output_dir and cache_dir are on a file system that all nodes see.
#SBATCH --job-name=llmforge
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue

set -euo pipefail
config=${1:?usage: sbatch slurm.sh run.yaml}
port=6379

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname --ip-address | awk '{print $1}')
export RAY_ADDRESS="$head:$port"

srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" \
    ray start --head --node-ip-address="$head" --port="$port" --num-gpus="$SLURM_GPUS_ON_NODE" --block &
if ((${#nodes[@]} > 1)); then
    others=$(IFS=,; echo "${nodes[*]:1}")
    srun --nodes=$((${#nodes[@]} - 1)) --ntasks-per-node=1 --nodelist="$others" \
        ray start --address="$RAY_ADDRESS" --num-gpus="$SLURM_GPUS_ON_NODE" --block &
fi

# SLURM sends TERM to this shell five minutes before the end (--signal): llmforge writes a checkpoint and stops; the job
# comes back (--requeue) and goes on from it.
run_dir=$(python - "$config" <<'PY'
import sys
from pathlib import Path

from llmforge.config import load_config
from llmforge.jobs.run_directory import RunDirectory

config = load_config(Path(sys.argv[1])).config
if config.custom_model_tag is None:
    sys.exit("set custom_model_tag, so that a requeued job finds its run")
print(RunDirectory.at(Path(config.output_dir), config.custom_model_tag).path)
PY
)
if [[ -f "$run_dir/resolved_config.yaml" ]]; then
    llmforge finetune --resume "$run_dir" &
else
    llmforge anyscale finetune "$config" --wait &
fi
driver=$!
trap 'kill -TERM "$driver"; wait "$driver" || true; scontrol requeue "$SLURM_JOB_ID"' TERM
wait "$driver"
