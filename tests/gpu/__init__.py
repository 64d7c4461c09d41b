"""What needs an NVIDIA GPU with virtual memory management: `make test-gpu`."""
