"""`python -m tether` is `tether`."""

import sys

try:
    from tether.cli import main

    main()
except KeyboardInterrupt:  # while the command line itself was being imported
    sys.exit(130)
