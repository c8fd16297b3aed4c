"""The DAG, and the command line that runs it."""
