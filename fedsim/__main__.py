"""Makes `python -m fedsim` the command `fedsim`."""

import sys

from fedsim.cli.main import main

sys.exit(main())
