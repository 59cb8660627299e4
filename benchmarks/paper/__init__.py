"""The two-dimensional experiments of arXiv 2504.15399, with every test run counted and every teleport applied."""
