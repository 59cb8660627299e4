"""The testing kit, whose public names are in :mod:`teleport_optim.testing`."""
