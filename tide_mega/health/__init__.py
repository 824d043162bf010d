"""Health check of every node before a run: `python -m tide_mega.health`, with the overrides of the training."""
