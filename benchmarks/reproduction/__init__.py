"""The experiments of `benchmarks/reproduce.py`: what is run, on what, how it is trained, measured and reported."""
