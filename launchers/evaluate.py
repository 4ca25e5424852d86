"""Perplexity of a trained run on held-out bases, on a GPU if there is one, beside Markov chains fitted on the same
training bases."""

import sys

from hyena_dist.runtime.signals import die_of_interrupts

if __name__ == "__main__":
    die_of_interrupts()  # before the other imports, which take seconds
    from hyena_dist.cli.evaluate import main

    sys.exit(main())
