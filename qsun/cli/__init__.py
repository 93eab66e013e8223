"""The command line: one file per command, none imported before it is called."""
