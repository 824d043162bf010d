"""A process and its surroundings: the SLURM job that it belongs to, and locks on folders it has to itself."""
