"""What the benchmarks in tools/ share: fair timing, byte counts, predictions, tables and figures."""
