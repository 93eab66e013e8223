"""Jobs: a front door's whole work, its stages put in order. Only the command line is above."""
