"""Re-read shards and compare every byte with the index, and with the FASTA files if they are given."""

import sys

from hyena_dist.cli.verify import main

if __name__ == "__main__":
    sys.exit(main())
