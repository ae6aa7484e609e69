"""The models that the benchmarks run: built here with random weights, or exported."""
