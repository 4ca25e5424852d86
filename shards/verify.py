"""Re-read shards and compare every byte with the index, and with the FASTA files if they are given."""

import sys

from hyena_dist.runtime.signals import die_of_interrupts

if __name__ == "__main__":
    die_of_interrupts()  # before the other imports, which take seconds
    from hyena_dist.cli.verify import main

    sys.exit(main())
