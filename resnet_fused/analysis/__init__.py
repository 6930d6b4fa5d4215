"""Diagnostics of residual networks: one file a subject, each with its results as values, a table and a figure.

`gradients`, `jacobian`, `kinks`, `degree`, `receptive_field`, `geometry`; they measure on `blocks` and `chains`.
On the command line: ``resnet-fused analyze SUBJECT``.
"""
