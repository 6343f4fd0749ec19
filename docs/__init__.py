"""The documentation, and what makes the reference pages out of the code."""
