"""Backends: each answers whether it runs a block, and runs it. Chosen in `resnet_fused.dispatch`."""
