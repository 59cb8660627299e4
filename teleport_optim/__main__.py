"""``python -m teleport_optim`` is the ``teleport-optim`` command."""

import sys

from teleport_optim.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
