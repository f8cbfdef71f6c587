#!/usr/bin/env bash
# Two nodes of eight GPUs. A run that its time limit stops is queued again, and continues.
#   sbatch docs/examples/slurm.sh RECIPE OUTPUT_DIR    from a directory that all nodes share, with .venv in it
#SBATCH --job-name=lorakit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
recipe=$1 output_dir=$2
source .venv/bin/activate
started="$(mktemp)"

# torchrun gets the signal, passes it on to its processes and waits this long for their checkpoint.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=110
first_node="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
code=0
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
  --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first_node:29500" \
  -m lorakit train "$recipe" --output-dir "$output_dir" --resume auto || code=$?

# torchrun's code is 1 whatever the reason; the run's own record, if this job wrote it, tells it.
if [[ "$output_dir/run.json" -nt "$started" ]] && grep -q '"exit_reason": "interrupted"' "$output_dir/run.json"; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
