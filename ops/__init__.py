"""Hot paths, each in PyTorch with its Triton kernel below it."""
