"""What fits, how long it takes and how a run is best laid out over GPUs; nothing is trained."""

import sys

from hyena_dist.runtime.signals import die_of_interrupts

if __name__ == "__main__":
    die_of_interrupts()  # before the other imports, which take seconds
    from hyena_dist.cli.plan import main

    sys.exit(main())
