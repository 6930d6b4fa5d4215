"""The nn.Module side: which modules are blocks, what their children say, and the classes that run them fused."""
