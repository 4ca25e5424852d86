"""Draw windows of whole genomes, by seed, as a table that says which species each is of."""

import sys

from hyena_dist.runtime.signals import die_of_interrupts

if __name__ == "__main__":
    die_of_interrupts()  # before the other imports, which take seconds
    from hyena_dist.cli.species import main

    sys.exit(main())
