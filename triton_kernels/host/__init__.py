"""From a block to launches: which phases, their tiles, and how they are launched."""
