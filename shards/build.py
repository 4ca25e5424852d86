"""Write genomes as WebDataset shards of 2-bit segments, with an index for training."""

import sys

from hyena_dist.cli.build import main

if __name__ == "__main__":
    sys.exit(main())
