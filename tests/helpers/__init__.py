"""Models, runs and comparisons that several test files share."""
