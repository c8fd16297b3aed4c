"""The services of a machine that has none: S3 and MLflow on loopback."""
