"""``python -m teleport_optim.meta_training`` is ``teleport-optim meta-train``, in a form that torchrun can start."""

import os
import sys

from teleport_optim.cli.meta_train import main

if __name__ == "__main__":
    exit_code = main()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Threads of torch.distributed have been seen to abort a process, now and then, while the interpreter shuts down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
