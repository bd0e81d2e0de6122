#!/bin/bash
# One torchrun per node. Submit from the repository's root, with the config and any overrides:
#   sbatch --nodes 4 configs/cluster/slurm.sh configs/chatflow-70b.yaml train.steps=20000
# Before the time limit, when the job is preempted, and after `scancel --signal TERM --batch JOB`, the ranks finish their
# step and save; the job is then queued again and goes on from there. How: docs/clusters.md

#SBATCH --job-name=megaflow
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@900
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=megaflow-%j.log

set -u
config=${1:?"usage: sbatch configs/cluster/slurm.sh CONFIG [section.key=value ...]"}
shift

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 10000))

export OMP_NUM_THREADS=1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # else no rank comes back after a restart
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=800   # seconds that torchrun leaves its ranks for the last step and the save
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

stopped=
stop() {
    stopped=yes
    kill -TERM "$ranks" # srun hands it to every torchrun, which hands it to its ranks
}
trap stop TERM

srun --kill-on-bad-exit=1 .venv/bin/torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${SLURM_GPUS_ON_NODE:-8}" --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-backend c10d --rdzv-endpoint "$first:$port" \
    megaflow/pretrain.py --config "$config" "$@" &
ranks=$!

wait "$ranks"
code=$?
while kill -0 "$ranks" 2>/dev/null; do # a signal ended the wait, not the ranks
    wait "$ranks"
    code=$?
done

state=$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)
if [ -n "$stopped" ] && [ "$state" = RUNNING ]; then # not after a plain scancel
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
