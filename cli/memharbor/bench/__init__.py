"""Measure two ways of the same work side by side in one run: ratios, on a noisy machine, and never a verdict by a time."""
