"""Suites of benchmarks by name, each in a file of its own: what it consists of, and how its files are read."""

from hyena_dist.tasks.suites import dnalongbench, genomic_benchmarks, gue, long_range, nucleotide_transformer
from hyena_dist.tasks.suites.description import Suite

SUITES: dict[str, Suite] = {suite.name: suite for suite in (
    genomic_benchmarks.CADUCEUS, genomic_benchmarks.HYENADNA, nucleotide_transformer.CADUCEUS, gue.GUE, long_range.LRB,
    dnalongbench.DNALONGBENCH)}
