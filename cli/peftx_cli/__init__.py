"""The command line of peftx. Heavy imports stand inside the commands, so that `--help` and `list` stay instant."""
