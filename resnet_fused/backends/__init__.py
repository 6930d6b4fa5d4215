"""Backends: each one says whether and how it can run a block, and runs it; `dispatch` chooses."""
