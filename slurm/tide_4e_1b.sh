#!/bin/bash
# TIDE-4E-1B. Overrides follow the script: sbatch slurm/tide_4e_1b.sh optim.lr=2e-4
#SBATCH --job-name=tide_4e_1b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
#SBATCH --output=%x-%j.log
EXPERIMENT=tide_4e_1b
body="${TIDE_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/body.sh"
[[ -r "$body" ]] || { echo "No $body: call sbatch in the checkout's folder or set TIDE_HOME." >&2 && exit 2; }
# shellcheck source-path=SCRIPTDIR source=body.sh
. "$body"
