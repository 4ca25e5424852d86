"""Fine-tune a model on every task of a published suite of benchmarks, and write one table beside published numbers."""

import sys

from hyena_dist.runtime.signals import die_of_interrupts

if __name__ == "__main__":
    die_of_interrupts()  # before the other imports, which take seconds
    from hyena_dist.cli.suite import main

    sys.exit(main())
