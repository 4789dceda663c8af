"""The command line: one file a command; reply on stdout, everything else on stderr."""
