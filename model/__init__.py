"""The science of latent-gpt and its plumbing. Knows nothing of components or pipelines."""
