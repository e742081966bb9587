"""The parts of `benchmarks/on_gpu.py`: what is measured, on which networks, how, and the tables that come of it."""
