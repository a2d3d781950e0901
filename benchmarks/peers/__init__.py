"""leveret beside its peers: the same work, each in its best documented setting. `python -m benchmarks.peers --help`."""
