"""Train HyenaDNA, genomic language models of long implicit convolutions, with DeepSpeed, FSDP2 and megatron-core.

The public names are those of `hyena_dist.api`; each is imported when it is first asked for.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    from hyena_dist.api import public
    return public(name)


def __dir__() -> list[str]:
    from hyena_dist.api import MODULES
    return [*globals(), *MODULES, "__version__"]
