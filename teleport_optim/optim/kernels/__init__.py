"""The momentum step, in torch and in C."""
