"""Training libraries: what the average of the iterates needs to be evaluated and saved there."""
