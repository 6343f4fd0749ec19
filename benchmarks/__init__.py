"""Measure speed and memory, each beside the floor that is measured in the same run."""
