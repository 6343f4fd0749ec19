"""Examples: what a data scientist writes, whole and runnable."""
