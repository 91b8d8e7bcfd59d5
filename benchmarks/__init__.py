"""Speed and memory, measured side by side in one run and printed as ratios: ``make bench``.

Machines are noisy, so nothing here asserts a time; a table is printed, which docs/speed.md includes.
"""
