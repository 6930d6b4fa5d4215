"""What people run beside training: the command line, explain, verify, benchmarks, tables and pictures."""
