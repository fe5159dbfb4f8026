"""`python -m jax_eplb` is `jax-eplb`."""

import sys

from jax_eplb.cli import main

sys.exit(main())
