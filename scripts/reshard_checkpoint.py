"""Rewrite a checkpoint for another number of ranks and slots: `jax-eplb reshard`.

python scripts/reshard_checkpoint.py CKPT OUT --ep-size 36 --num-slots 288 --load-balancer FILE.yaml
"""

import sys

from jax_eplb.cli import main

if __name__ == "__main__":
    sys.exit(main(["reshard", *sys.argv[1:]]))
