"""Write genomes as WebDataset shards of 2-bit segments, with an index for training."""

import sys

from hyena_dist.runtime.signals import die_of_interrupts

if __name__ == "__main__":
    die_of_interrupts()  # before the other imports, which take seconds
    from hyena_dist.cli.build import main

    sys.exit(main())
