"""What the benchmarks share: rival layers, timing, memory."""
