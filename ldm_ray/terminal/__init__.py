"""What a command says and hears: its flags, progress, signals and exit code."""
