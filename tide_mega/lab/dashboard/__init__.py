"""What a run logged, shown: the W&B workspace as code, and the same panels drawn from files."""
