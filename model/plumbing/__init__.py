"""Plumbing without nets: storage, assets, jobs, checkpoints, tracking, registry, distributed set-up."""
