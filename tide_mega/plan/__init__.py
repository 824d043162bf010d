"""Plans a run before it is paid for: dry runs of its ranks, and what memory, traffic and time follow from them."""
