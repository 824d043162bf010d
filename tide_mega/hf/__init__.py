"""The code that exported folders contain: copied verbatim, so it imports nothing else from the package."""
