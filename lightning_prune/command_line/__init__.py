"""Command line: what a checkpoint holds, how two differ, compressed files and reports, from a shell."""
