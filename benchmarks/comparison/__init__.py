"""Comparison of optimizers on tasks that meta-training never sees, with the learning rates of all others tuned.

python -m benchmarks.comparison [--quick] [--suite NAME] [--optimizer MODULE:FUNCTION] [--output DIR]
"""
