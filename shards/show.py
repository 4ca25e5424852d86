"""What is in a directory of shards: its audit, how much of each contig is in which split, and some of its bases."""

import sys

from hyena_dist.runtime.signals import die_of_interrupts

if __name__ == "__main__":
    die_of_interrupts()  # before the other imports, which take seconds
    from hyena_dist.cli.show import main

    sys.exit(main())
