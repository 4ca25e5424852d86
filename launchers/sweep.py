"""Many runs as one: plan, run, watch and report a sweep over any keys of the configuration, and branch its runs."""

import sys

from hyena_dist.runtime.signals import die_of_interrupts

if __name__ == "__main__":
    die_of_interrupts()  # before the other imports, which take seconds
    from hyena_dist.cli.sweep import main

    sys.exit(main())
