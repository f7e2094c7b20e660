"""Benchmarks: medians of interleaved runs after a warm-up, the yardstick in the same process, ratios beside times."""

from infopt.bench.generation import NEW, generate, yardstick

__all__ = ["NEW", "generate", "yardstick"]
