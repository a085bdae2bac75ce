"""iree-compile in a child process: flags from a point, artifacts or failures out. May not import other stages."""
