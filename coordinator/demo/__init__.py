"""The demonstration: a whole federation on one machine, from nothing to a trained model, and nothing left running."""
