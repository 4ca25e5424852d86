"""A training step of a Transformer over ours of the same size, one sequence in bf16, by length."""

from benchmarks.gpu.measure import Size, cost, forget_peak, kernels
from benchmarks.gpu.task import Task

MILLION = 1 << 20
LENGTHS = (16384, 65536, 131072, 262144)
TINY = (128, 256, 512)
LEAST_SECONDS = 8.0


def run(task: Task) -> None:
    layers, width = (1, 16) if task.tiny else (8, 256)
    times: dict[str, dict[int, float]] = {"H": {}, "A": {}}
    for length in TINY if task.tiny else LENGTHS:
        if task.left() < LEAST_SECONDS:
            task.note(f"{length:,} tokens: no time left")
            break
        for pattern, of in times.items():
            size = Size(layers, width, length, pattern=pattern)
            found, step = cost(size, rounds=3, at_most=3.0)
            of[length] = found.seconds
            if pattern == "A" and len(of) == 1:
                names = [name for name, *_ in kernels(step).by_name]
                flash = [name for name in names if "flash" in name.lower()]
                task.note(f"attention by {flash[0][:80] if flash else 'no kernel called flash'}", ok=bool(flash))
            del step
            forget_peak()
        theirs, ours = times["A"][length], times["H"][length]
        task.note(f"{length:,} tokens: Transformer {theirs * 1e3:,.1f} ms, ours {ours * 1e3:,.1f} ms, ratio "
                  f"{theirs / ours:.2f}", length=length, transformer=theirs, ours=ours)
    if len(times["A"]) >= 3 and not task.tiny:
        task.attempt("fit", lambda: _to_a_million(task, times))


def _to_a_million(task: Task, times: dict[str, dict[int, float]]) -> None:
    """The Transformer's time is b L + c L^2: fitted through the measured lengths, and set beside ours measured."""
    import numpy as np
    lengths = np.array(list(times["A"]), dtype=float)
    # By least squares of the relative error: else the longest length decides alone.
    seconds = np.array(list(times["A"].values()))
    terms = np.stack([lengths, lengths**2], axis=1)
    coefficients, *_ = np.linalg.lstsq(terms / seconds[:, None], np.ones_like(seconds), rcond=None)
    worst = float(np.abs(terms @ coefficients / seconds - 1).max())
    whole = float(coefficients @ [MILLION, MILLION**2])
    found, _ = cost(Size(8, 256, MILLION), rounds=3, at_most=5.0)
    task.note(f"{MILLION:,} tokens: Transformer {whole:,.1f} s by the fit (off by {worst:.0%} at most where measured), "
              f"ours {found.seconds:.2f} s, ratio {whole / found.seconds:.1f}", fitted=whole, off=worst,
              ours=found.seconds, coefficients=coefficients.tolist())
