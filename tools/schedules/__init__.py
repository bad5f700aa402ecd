"""Draws, simulates and checks pipeline schedules (``python -m tools.schedules``), with the plugin's own code."""
