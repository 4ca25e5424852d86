"""Scaling laws from runs that are finished, and how the learning rate moves with the width."""

import sys

from hyena_dist.runtime.signals import die_of_interrupts

if __name__ == "__main__":
    die_of_interrupts()  # before the other imports, which take seconds
    from hyena_dist.cli.scaling import main

    sys.exit(main())
