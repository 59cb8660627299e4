"""How optimizers are compared: tasks that meta-training never sees, rivals with their rates tuned, and what is reported."""
