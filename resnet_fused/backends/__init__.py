"""Backends: each answers whether and how it runs a block, and runs it; `dispatch` chooses."""
