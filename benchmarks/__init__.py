"""Benchmarks: every number that the project claims comes from a command here."""
