"""Sizes that the plan and the run share. No torch."""

FIRST_BYTES = 1 << 20
"""Limit of the first bucket: a small one is full early, so that the wire has work soon after backward begins."""
