"""Convert a HyenaDNA model: a run, a checkpoint, published weights, Hugging Face's, or safetensors, to any of them."""

import sys

from hyena_dist.runtime.signals import die_of_interrupts

if __name__ == "__main__":
    die_of_interrupts()  # before the other imports, which take seconds
    from hyena_dist.cli.convert import main

    sys.exit(main())
