#!/bin/bash
#SBATCH --job-name=qgrid-0123456789ab-001-builds
#SBATCH --array=0-2
#SBATCH --output=logs/001-builds-%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --time=60
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --gres=gpu:l4:1
qgrid_tasks="$PWD/"001-builds.json
if [ -d /home/u ]; then cd -- /home/u; fi
exec /opt/python -m qgrid.slurm.task "$qgrid_tasks" "$SLURM_ARRAY_TASK_ID"
