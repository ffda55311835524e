#!/bin/bash
# A fine-tuning run under SLURM: `sbatch slurm.sh run.yaml /shared/runs/my-run`. Ray starts on every node of the job,
# llmforge on the first.
#
# Change: nodes, GPUs, CPUs, time, and how the environment with `pip install 'llmforge[ray]'` is entered.
# run.yaml: num_devices is nodes × GPUs; cache_dir and the run's directory are on a file system that all nodes see.
#SBATCH --job-name=llmforge
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
config=${1:?usage: sbatch slurm.sh run.yaml /shared/runs/my-run}
run_dir=${2:?usage: sbatch slurm.sh run.yaml /shared/runs/my-run}

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=6379
head=$(python -c 'import ray; print(ray.util.get_node_ip_address())')
export RAY_ADDRESS="$head:$port"
# The cluster runs what it is sent only for this job's own processes.
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun does not take it from the job by itself
ray_start=(ray start --block --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}")

srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" "${ray_start[@]}" \
    --head --node-ip-address="$head" --port="$port" &
timeout 120 bash -c "until (exec 3<>/dev/tcp/$head/$port) 2>/dev/null; do sleep 1; done"
if ((${#nodes[@]} > 1)); then
    others=$(IFS=,; echo "${nodes[*]:1}")
    srun --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --nodelist="$others" \
        "${ray_start[@]}" --address="$RAY_ADDRESS" &
fi

# --wait: the other nodes are still joining.
if [[ -f "$run_dir/resolved_config.yaml" ]]; then
    llmforge anyscale finetune --resume "$run_dir" --wait &
else
    llmforge anyscale finetune "$config" --wait \
        --set "output_dir=$(dirname "$run_dir")" --set "custom_model_tag=$(basename "$run_dir")" &
fi
driver=$!

# Five minutes before the end (--signal) llmforge is told to stop: it writes a checkpoint and ends with 130. The job then
# comes back and goes on from it, as it does when a node failed (--requeue).
stop() {
    local code=0
    kill -TERM "$driver"
    wait "$driver" || code=$?
    ((code > 128)) && scontrol requeue "$SLURM_JOB_ID"
    exit "$code"
}
trap stop TERM
wait "$driver"
