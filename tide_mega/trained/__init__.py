"""Trained models, opened to be looked at: run folders, stored rows, the model itself."""
