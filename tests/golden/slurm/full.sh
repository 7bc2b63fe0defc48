#!/bin/bash
#SBATCH --job-name=qgrid-0123456789ab-004-cells
#SBATCH --array=0-999%20
#SBATCH --output=logs/004-cells-%a.log
#SBATCH --open-mode=append
#SBATCH --no-requeue
#SBATCH --signal=B:USR1@300
#SBATCH --time=2880
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=128G
#SBATCH --gres=gpu:h100:4
#SBATCH --constraint=(nvlink|sxm)&rack1
#SBATCH --account=proj-1
#SBATCH --partition=gpu,spare
#SBATCH --qos=high
#SBATCH --dependency=afterany:17:18
#SBATCH --exclusive
#SBATCH --reservation=night
#SBATCH --exclude=n[1-3]
#SBATCH --contiguous
#SBATCH --nice=5
qgrid_tasks="$PWD/"004-cells.json
if [ -d /home/u ]; then cd -- /home/u; fi
set -e
module load cuda/13.0
source "$HOME/env.sh"  # the user's own
set +e
exec /opt/python -m qgrid.slurm.task "$qgrid_tasks" "$SLURM_ARRAY_TASK_ID"
