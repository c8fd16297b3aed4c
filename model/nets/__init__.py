"""Tensors to tensors; knows no data."""
