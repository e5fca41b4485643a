"""The profiler: measures what the other facts are computed from. The only part of `profiles` that imports torch."""
