"""The verbs of the command line, a file each: `add` declares the arguments, `run` does the work."""
