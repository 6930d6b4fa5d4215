"""What runs on the GPU: the phases of a block and the kernel that walks them."""
