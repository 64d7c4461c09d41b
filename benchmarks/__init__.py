"""What is claimed about speed and memory, measured. Each module writes `benchmarks/results/<name>.json`."""
