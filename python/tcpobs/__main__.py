"""python -m tcpobs."""

import sys

from tcpobs.cli import main

sys.exit(main())
