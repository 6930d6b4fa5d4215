"""The fused operators as PyTorch sees them: schemas, fakes, autograd, checks, and the formulas in plain PyTorch."""
