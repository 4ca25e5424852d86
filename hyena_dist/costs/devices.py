"""GPUs and the links between them: what a plan takes for true where nothing was measured.

Every number is ESTIMATED. Memory is what torch reports as `total_memory`; bandwidths and peaks are the makers', of
dense products, without sparsity.
"""

from dataclasses import dataclass

from hyena_dist.config.errors import ConfigError

MEASURED, ESTIMATED = "MEASURED", "ESTIMATED"
CPU = "cpu"
"""The name of this machine where it has no GPU."""
GIB, TERA, GIGA = 2**30, 1e12, 1e9

COPY_SHARE, PRODUCT_SHARE, ATTENTION_SHARE, LINK_SHARE = 0.9, 0.8, 0.37, 0.8
"""Of the maker's number, what a large copy, a large product in half precision, causal attention in both passes, and a
large message reach. The first three were measured on an H100 (3.0 of 3.35 TB/s, 798 of 989 TFLOPS; of attention what
grows with the square of the length between 65,536 and 131,072 tokens); no link was measured."""

CONTEXT_BYTES = 0.6 * GIGA
"""A CUDA context with the modules of torch, and a library or two's own buffers."""
NCCL_BYTES = 0.3 * GIGA
"""NCCL's buffers of one group of ranks."""
FRAGMENTS = 0.05
"""Of the tensors, what the allocator's gaps take: on an H100 1 to 3 % where memory was nearly full."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, and how it is usually connected."""

    name: str
    memory: float
    """Bytes."""
    bandwidth: float
    """Of its memory, bytes per second."""
    bf16: float
    """Operations per second of dense matrix products in half precision, accumulated in float32."""
    fp32: float
    """The same in float32, without TF32."""
    node_link: float
    """Bytes per second that a GPU sends to the others of its node."""
    between_link: float
    """Bytes per second that a GPU sends to another node."""


# NVIDIA's data sheets: A100 (2021), H100 (2023), H200 (2024), HGX B200 (2025), L40S (2023), L4 (2023), RTX 3090's and
# 4090's architecture white papers (2020, 2022). NVLink 3, 4 and 5: 600, 900 and 1800 GB/s in both directions together.
# Cards without NVLink: PCIe 4.0 x16, 32 GB/s each way at most. Between nodes: an adapter of 200 Gb/s a GPU (A100), 400
# Gb/s (H100, H200, B200), or one of 100 Gb/s for four GPUs (the others).
GPUS = {gpu.name: gpu for gpu in (
    Gpu("a100-40", 39.4 * GIB, 1.555 * TERA, 312 * TERA, 19.5 * TERA, 300 * GIGA, 25 * GIGA),
    Gpu("a100-80", 79.2 * GIB, 2.039 * TERA, 312 * TERA, 19.5 * TERA, 300 * GIGA, 25 * GIGA),
    Gpu("h100", 79.1 * GIB, 3.35 * TERA, 989.5 * TERA, 67 * TERA, 450 * GIGA, 50 * GIGA),
    Gpu("h200", 139.8 * GIB, 4.8 * TERA, 989.5 * TERA, 67 * TERA, 450 * GIGA, 50 * GIGA),
    Gpu("b200", 178.3 * GIB, 7.7 * TERA, 2250 * TERA, 75 * TERA, 900 * GIGA, 50 * GIGA),
    Gpu("l40s", 44.4 * GIB, 0.864 * TERA, 362 * TERA, 91.6 * TERA, 32 * GIGA, 3 * GIGA),
    Gpu("l4", 22.0 * GIB, 0.3 * TERA, 121 * TERA, 30.3 * TERA, 32 * GIGA, 3 * GIGA),
    Gpu("rtx3090", 23.6 * GIB, 0.936 * TERA, 71 * TERA, 35.6 * TERA, 32 * GIGA, 3 * GIGA),
    Gpu("rtx4090", 23.5 * GIB, 1.008 * TERA, 165.2 * TERA, 82.6 * TERA, 32 * GIGA, 3 * GIGA),
)}


def find_gpu(name: str) -> Gpu:
    """Of the table.

    Raises:
        ConfigError: it is not in it.
    """
    found = GPUS.get(name.lower().replace("_", "-"))
    if found is None:
        raise ConfigError(f"--gpu {name}: is not in the table: use one of {', '.join(GPUS)}, of which take the one "
                          "with the memory of yours")
    return found
