"""Machinery of a recording: tensors without data, a copy of the model, and what its code reaches, kept as it was."""
