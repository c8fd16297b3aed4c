"""Plumbing without nets: storage, manifests, checkpoints, tracking, registry, distributed set-up."""
