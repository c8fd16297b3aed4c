"""Pictures and captions into batches; knows no nets."""
