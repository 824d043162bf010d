"""A run: its folder, environment, code, length, console output and orderly stop."""
