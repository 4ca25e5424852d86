"""Long convolutions of other makers' libraries, which need not be installed, as backends of the operator (`ops.mix`):
what stands around the convolution is torch's (`ops.chunked`). No library is ever taken unless it is asked for.

cudnn: `cudnn.ops.fft_causal_conv1d` of nvidia-cudnn-frontend with cuDNN 9.26 or newer. It wants input and filter of one
dtype, and the filter is never lowered: half-precision activations are convolved in float32. It pads both to the next
power of two.

flashfftconv: FlashFFTConv (Fu et al. 2023), in half precision, of powers of two.
"""

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hyena_dist.ops.chunked import Chunked
from hyena_dist.ops.long_conv import Convolution, Spectra
from hyena_dist.ops.mix import Asked
from hyena_dist.ops.segments import Segments

Convolve = Callable[[Tensor, Tensor], Tensor]
"""u [B, c, L], h [c, L] -> h (*) u, with gradients by autograd."""

PACKAGES = {"cudnn": ("cudnn", "nvidia-cudnn-frontend"), "flashfftconv": ("flashfftconv", "flashfftconv")}
"""Of each backend its module and what is to be installed."""

LEAST_CUDNN = 92600
MOST_CUDNN_TOKENS = {torch.float32: 2**24, torch.float64: 2**23}
FLASH_SIZES = [2**power for power in range(8, 23)]
"""Sizes of transforms that FlashFFTConv has kernels for; a causal convolution needs twice its length."""


def installed(name: str) -> bool:
    """Whether a library can be imported, as far as can be said without importing it."""
    return importlib.util.find_spec(PACKAGES[name][0]) is not None


def refusal(name: str, asked: Asked) -> str | None:
    """Why a library cannot convolve this; None: it can."""
    if asked.device.type != "cuda":
        return f"{name} runs on CUDA, not on {asked.device.type}"
    if asked.segmented:
        return f"{name} does not know segments"
    return _cudnn_refusal(asked) if name == "cudnn" else _flash_refusal(asked)


def _cudnn_refusal(asked: Asked) -> str | None:
    try:
        cudnn: Any = importlib.import_module("cudnn")
    except (ImportError, OSError) as error:  # its shared libraries may be missing, or of another CUDA
        return f"the module cudnn cannot be imported: {' '.join(str(error).split())}"
    version = cudnn.backend_version()
    if version < LEAST_CUDNN or not hasattr(cudnn, "fft_causal_conv1d_forward"):
        return (f"its FFT convolution needs cuDNN {LEAST_CUDNN} and a front end built for that, and this is cuDNN "
                f"{version}: torch pins nvidia-cudnn, which has to be replaced by a newer one")
    most = MOST_CUDNN_TOKENS[torch.float64 if asked.dtype == torch.float64 else torch.float32]
    return None if asked.length <= most else f"cudnn takes at most {most:,} tokens, got {asked.length:,}"


def _flash_refusal(asked: Asked) -> str | None:
    if asked.dtype not in (torch.bfloat16, torch.float16):
        return "flashfftconv has kernels for half precision only"
    if 2 * asked.length not in FLASH_SIZES:
        return (f"flashfftconv has kernels for powers of two from {FLASH_SIZES[0] // 2} to {FLASH_SIZES[-1] // 2:,} "
                f"only, got {asked.length:,}")
    return None


def convolve_by(name: str, length: int, dtype: torch.dtype, device: torch.device) -> Convolve:
    """A library's convolution of rows of `length` tokens, of activations that have gone through `dtype`; the result is
    of the dtype of u."""
    if name == "cudnn":
        # From the module that defines it: the package's own attribute is that module, once something has imported it.
        convolve = importlib.import_module("cudnn.ops.fft_causal_conv1d").fft_causal_conv1d
        return lambda u, h: convolve(u.to(h.dtype), h).to(u.dtype)
    flash = _flash(2 * length, dtype, device)
    return lambda u, h: flash(u.to(dtype).contiguous(), h).to(u.dtype)


@lru_cache(maxsize=4)
def _flash(size: int, dtype: torch.dtype, device: torch.device) -> Any:
    return importlib.import_module("flashfftconv").FlashFFTConv(size, dtype=dtype).to(device)


class Library(Chunked):
    """The backend of one of PACKAGES.

    Args:
        dtype: of the activations.
    """

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        super().__init__()
        self._name, self._dtype = name, dtype

    def refusal(self, asked: Asked) -> str | None:
        return refusal(self._name, asked)

    def convolution(self, length: int, _segments: Segments | None, _dtype: torch.dtype,
                    device: torch.device) -> Convolution:
        return _ByAutograd(convolve_by(self._name, length, self._dtype, device), length)


class _ByAutograd:
    """`long_conv.Convolution` of a function whose gradients are autograd's. Its spectra are the leaves u and h, and the
    result with its graph."""

    def __init__(self, convolve: Convolve, length: int) -> None:
        self._convolve, self.lags = convolve, length

    def convolve(self, u: Tensor, h: Tensor) -> Tensor:
        return self._convolve(u, h[:, : self.lags])

    def spectra(self, u: Tensor, h: Tensor) -> Spectra:
        leaves = u.detach().requires_grad_(), h[:, : self.lags].detach().requires_grad_()
        with torch.enable_grad():
            y = self._convolve(*leaves)
        return [leaves, (y, y)]

    def product(self, spectra: Spectra) -> Tensor:
        return spectra[1][0].detach()

    def correlate(self, g: Tensor, spectra: Spectra, dh: Tensor) -> Tensor:
        du, found = torch.autograd.grad(spectra[1][0], spectra[0], g)
        dh.copy_(found)
        return du
