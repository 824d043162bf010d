"""The distributed part of the memory: which rows a step needs, how they travel, and who owns them."""
