"""Benchmarks of the engine against what people use, interleaved in one run, as ratios of medians."""
