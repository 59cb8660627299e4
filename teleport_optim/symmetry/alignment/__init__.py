"""The alignment of networks, whose public names are in :mod:`teleport_optim.alignment`."""
