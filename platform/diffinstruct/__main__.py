"""`python -m diffinstruct ...`: the same face as the `diffinstruct` command."""

import sys

from diffinstruct.cli.main import main

sys.exit(main())
