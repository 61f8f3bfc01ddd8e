"""`python -m gemma2` is the `gemma2` command."""

import sys

from gemma2_command import main

sys.exit(main())
