"""From text to batches: tokenised shards, frequency deciles and the loader."""
