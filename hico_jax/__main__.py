"""`python -m hico_jax` is `hico`."""

import sys

from hico_jax.cli import main

sys.exit(main())
