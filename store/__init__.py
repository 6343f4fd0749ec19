"""Bytes and records at rest: blobs, tensors, models, parties."""
