"""Trained models opened for inspection: run folders, stored rows, and the model itself."""
