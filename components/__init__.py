"""Thin pipeline steps over `model`, and the job launcher."""
