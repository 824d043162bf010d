"""The distributed part of the memory: which rows a step needs, how they travel, who owns them."""
