"""The repository: format, keys, packs, index, snapshots, leases, prune and check."""
