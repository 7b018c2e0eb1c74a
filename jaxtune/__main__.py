"""`python -m jaxtune`, the same as the command `jaxtune`."""

import sys

from jaxtune.cli.main import main

sys.exit(main())
