"""A process among others: the SLURM job that it belongs to, and the folder that it alone may write in."""
