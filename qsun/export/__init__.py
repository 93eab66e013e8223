"""Export: the files of a bundle that start it and say what it is."""
