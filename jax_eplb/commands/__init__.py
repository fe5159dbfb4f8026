"""What each command of the command line does; `cli` parses, these work and print."""
