"""Offline preparation of datasets: text files in; shards, index, counts and deciles out."""
