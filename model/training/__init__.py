"""What a job runs: python -m model.training.NAME SPEC."""
