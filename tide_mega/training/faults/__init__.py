"""What goes wrong in training, and what the run then does: skip, roll back, name, stop, or end to be restarted."""
