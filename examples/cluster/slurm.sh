#!/usr/bin/env bash
# Trains on several machines of a Slurm cluster: one task a machine, torchrun starts a process a GPU.
#   sbatch --nodes 4 --gpus-per-node 8 examples/cluster/slurm.sh unimed-7b-release --name full train.accumulate=1
# All machines see one folder. Queued again, the job goes on from its last checkpoint. Read by bash in a test; not run on a cluster.
#SBATCH --job-name=unimed
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=slurm-%j.log
set -euo pipefail

[[ $# -gt 0 ]] || { echo "usage: sbatch slurm.sh RECIPE --name NAME [KEY=VALUE...]" >&2; exit 2; }
[[ " $* " =~ \ --name\ +([A-Za-z0-9._-]+)\  ]] || { echo "slurm.sh: give the run a name with --name NAME" >&2; exit 2; }
run="runs/${BASH_REMATCH[1]}"

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
resume=()
[[ -f "$run/recipe.yaml" ]] && resume=(--resume)

export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / SLURM_GPUS_ON_NODE))
srun torchrun \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:29500" \
  -m unimed train "$@" "${resume[@]}"
