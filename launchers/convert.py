"""Convert a HyenaDNA model: a run, a checkpoint, published weights, Hugging Face's, or safetensors, to any of them."""

import sys

from hyena_dist.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
