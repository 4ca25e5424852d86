"""Perplexity of a trained run on held-out bases, on a GPU if there is one, beside Markov chains fitted on the same
training bases."""

import sys

from hyena_dist.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
