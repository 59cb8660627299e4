"""Command line: one file for each sub-command."""
