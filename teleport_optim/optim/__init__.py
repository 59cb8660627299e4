"""The optimizer: the update rule, its kernels, and the class around them."""
