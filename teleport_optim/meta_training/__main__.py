"""``python -m teleport_optim.meta_training`` is ``teleport-optim meta-train``, in a form that torchrun can start."""

import sys

from teleport_optim.meta_training.command import main

if __name__ == "__main__":
    sys.exit(main())
