"""What is in a directory of shards: its audit, how much of each contig is in which split, and some of its bases."""

import sys

from hyena_dist.cli.show import main

if __name__ == "__main__":
    sys.exit(main())
