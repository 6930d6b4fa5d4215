"""Without a GPU: launches compiled for a chip that is not there, and what each phase should cost."""
