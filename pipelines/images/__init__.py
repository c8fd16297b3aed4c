"""Programs that go into an image, or run, alone: they import nothing of ours."""
