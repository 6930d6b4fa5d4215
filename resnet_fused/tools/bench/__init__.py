"""``resnet-fused bench``: a network, fused, against its peers in turns; README.md maps the files."""
